//! What a request asks for: paths of the distribution API and `Range` headers, parsed. Pure.

use std::ops::Range;

use shoal_proto::ObjectId;
use shoal_rafs::oci::{Reference, Source};

/// What a path leads to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// `/v2/`: is this a registry?
    Base,
    /// `/v2/<repository>/manifests/<tag or digest>`.
    Manifest { repository: String, name: ManifestName },
    /// `/v2/<repository>/blobs/<digest>`.
    Blob { repository: String, id: ObjectId },
}

/// How a manifest is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ManifestName {
    /// By a tag.
    Tag(String),
    /// By its digest.
    Digest(ObjectId),
}

/// Why a path leads nowhere: the code of the distribution specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PathError {
    /// No such route.
    Unknown,
    /// The repository name breaks the grammar.
    Name,
    /// The digest is not a sha256.
    Digest,
    /// The tag breaks the grammar.
    Tag,
}

impl Target {
    /// Parses a path as it came, percent signs and all: no valid name needs one.
    pub(crate) fn parse(path: &str) -> Result<Self, PathError> {
        let rest = match path {
            "/v2" | "/v2/" => return Ok(Self::Base),
            _ => path.strip_prefix("/v2/").ok_or(PathError::Unknown)?,
        };
        let (rest, last) = rest.rsplit_once('/').ok_or(PathError::Unknown)?;
        let (repository, kind) = rest.rsplit_once('/').ok_or(PathError::Unknown)?;
        if !matches!(kind, "manifests" | "blobs") {
            return Err(PathError::Unknown);
        }
        // Any valid host will do: the rules for the repository are the same.
        let source = Source::new("localhost", repository).map_err(|_| PathError::Name)?;
        let repository = repository.to_owned();
        if kind == "blobs" {
            return Ok(Self::Blob { repository, id: parse_digest(last)? });
        }
        if last.contains(':') {
            return Ok(Self::Manifest { repository, name: ManifestName::Digest(parse_digest(last)?) });
        }
        Reference::new(source, Some(last), None).map_err(|_| PathError::Tag)?;
        Ok(Self::Manifest { repository, name: ManifestName::Tag(last.to_owned()) })
    }
}

fn parse_digest(text: &str) -> Result<ObjectId, PathError> {
    text.strip_prefix("sha256:").and_then(|hex| hex.parse().ok()).ok_or(PathError::Digest)
}

/// The bytes to send, after RFC 9110, section 14. `Ok(None)` sends all: no header, or one that may be ignored
/// (another unit, several ranges, broken syntax). `Err` is 416.
pub(crate) fn parse_range(header: Option<&str>, size: u64) -> Result<Option<Range<u64>>, ()> {
    let Some(text) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else { return Ok(None) };
    let Some((first, last)) = text.split_once('-') else { return Ok(None) };
    let number = |text: &str| match text.trim() {
        text if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
            // More digits than fit are more bytes than there are.
            Some(text.parse::<u64>().unwrap_or(u64::MAX))
        }
        _ => None,
    };
    let range = match (first.trim(), number(first), last.trim(), number(last)) {
        ("", _, _, Some(suffix)) => size.saturating_sub(suffix)..size,
        (_, Some(first), "", _) => first..size,
        (_, Some(first), _, Some(last)) if first <= last => first..last.saturating_add(1).min(size),
        _ => return Ok(None),
    };
    if range.is_empty() { Err(()) } else { Ok(Some(range)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_are_parsed_or_refused_with_their_code() {
        let id = ObjectId::new([0xab; 32]);
        assert_eq!(Target::parse("/v2/"), Ok(Target::Base));
        let blob = Target::Blob { repository: "a/b".to_owned(), id };
        assert_eq!(Target::parse(&format!("/v2/a/b/blobs/sha256:{id}")), Ok(blob));
        let manifest = |name| Ok(Target::Manifest { repository: "a/b".to_owned(), name });
        assert_eq!(Target::parse("/v2/a/b/manifests/v1"), manifest(ManifestName::Tag("v1".to_owned())));
        assert_eq!(Target::parse(&format!("/v2/a/b/manifests/sha256:{id}")), manifest(ManifestName::Digest(id)));
        for (path, error) in [
            ("/", PathError::Unknown),
            ("/v1/", PathError::Unknown),
            ("/metrics", PathError::Unknown),
            ("/v2/a/tags/list", PathError::Unknown),
            ("/v2/manifests/v1", PathError::Unknown),
            ("/v2/../manifests/v1", PathError::Name),
            ("/v2/a/../b/manifests/v1", PathError::Name),
            ("/v2/a%2f/manifests/v1", PathError::Name),
            ("/v2/a//manifests/v1", PathError::Name),
            ("/v2/a/manifests/..", PathError::Tag),
            ("/v2/a/manifests/", PathError::Tag),
            ("/v2/a/manifests/md5:00", PathError::Digest),
            ("/v2/a/blobs/../../etc/passwd", PathError::Unknown),
            ("/v2/a/blobs/sha256:..", PathError::Digest),
            ("/v2/a/blobs/v1", PathError::Digest),
        ] {
            assert_eq!(Target::parse(path), Err(error), "{path}");
        }
    }

    #[test]
    fn ranges_follow_the_specification() {
        for (header, wanted) in [
            ("bytes=0-9", Ok(Some(0..10))),
            ("bytes=90-200", Ok(Some(90..100))),
            ("bytes=90-", Ok(Some(90..100))),
            ("bytes=-5", Ok(Some(95..100))),
            ("bytes=-500", Ok(Some(0..100))),
            ("bytes=0-99999999999999999999999", Ok(Some(0..100))),
            ("bytes=100-", Err(())),
            ("bytes=200-300", Err(())),
            ("bytes=-0", Err(())),
            ("bytes=9-0", Ok(None)),
            ("bytes=0-1,5-6", Ok(None)),
            ("bytes=a-b", Ok(None)),
            ("bytes=+1-2", Ok(None)),
            ("chunks=0-1", Ok(None)),
        ] {
            assert_eq!(parse_range(Some(header), 100), wanted, "{header}");
        }
        assert_eq!(parse_range(None, 100), Ok(None));
        assert_eq!(parse_range(Some("bytes=0-"), 0), Err(()));
    }

    proptest! {
        /// Whatever is let through makes the path of a URL that says the same.
        #[test]
        fn any_path_is_refused_or_taken_at_its_word(path in "(/v2/)?[a-z0-9._/%:-]{0,30}(/(blobs|manifests)/[a-z0-9:.-]{0,12})?") {
            match Target::parse(&path) {
                Ok(Target::Manifest { repository, name: ManifestName::Tag(tag) }) => {
                    prop_assert_eq!(format!("/v2/{repository}/manifests/{tag}"), path);
                }
                Ok(Target::Manifest { .. } | Target::Blob { .. }) => prop_assert!(path.contains("sha256:")),
                Ok(Target::Base) => prop_assert!(path.starts_with("/v2")),
                Err(_) => {}
            }
        }

        #[test]
        fn a_range_lies_within_the_blob(header in "bytes=[0-9,-]{0,24}", size in any::<u64>()) {
            if let Ok(Some(range)) = parse_range(Some(&header), size) {
                prop_assert!(range.start < range.end && range.end <= size);
            }
        }
    }
}
