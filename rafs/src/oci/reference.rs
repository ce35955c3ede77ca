//! How an image is named, and where its bytes live.
//!
//! The grammar is that of the OCI distribution specification, section "Pulling manifests", with two decisions: a host is
//! always required (`alpine` alone could be anybody's), and hosts are kept in lower case so that lists of registries
//! compare simply. A [`Source`] also arrives from peers, so it is parsed by the same strict rules and bounded; the rules
//! leave no room for user names, paths that climb, queries or fragments, because a URL is made from it.

use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    str::FromStr,
};

use shoal_proto::ObjectId;

/// Longest host with port.
const MAX_REGISTRY: usize = 255;
/// Longest repository name.
const MAX_REPOSITORY: usize = 255;
/// Longest tag, by the specification.
const MAX_TAG: usize = 128;
/// Longest path of a layout folder.
const MAX_DIR: usize = 1024;
/// In front of the path of a layout folder.
const LAYOUT: &str = "oci:";

/// Why a text does not name an image or a source.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// No host in front.
    #[error(
        "{found:?} names no registry: a host is required, as in docker.io/library/alpine:3 or localhost:5000/app:1"
    )]
    NoHost {
        /// The text, cut to a sane length.
        found: String,
    },
    /// A part breaks the grammar.
    #[error("{part} {found:?} {rule}")]
    Grammar {
        /// Which part of the name.
        part: &'static str,
        /// That part, cut to a sane length.
        found: String,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// The operation makes a new image, whose digest is not known before.
    #[error("{reference} has a digest: push to a tag")]
    Pinned {
        /// The reference.
        reference: String,
    },
}

fn grammar(part: &'static str, found: &str, rule: &'static str) -> ReferenceError {
    ReferenceError::Grammar { part, found: cut(found), rule }
}

fn cut(text: &str) -> String {
    text.chars().take(120).collect()
}

/// Where an image's bytes live: a repository in a registry, or a layout folder.
///
/// Text pair `("host[:port]", "repository")`, or `("oci:/absolute/dir", "")`. A layout folder names files of this very
/// machine: who reads for others must look at [`Source::is_layout`] and at its own list of registries first.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Source {
    registry: String,
    repository: String,
}

impl Source {
    /// From the text pair, wherever it comes from.
    pub fn new(registry: &str, repository: &str) -> Result<Self, ReferenceError> {
        if let Some(dir) = registry.strip_prefix(LAYOUT) {
            if !repository.is_empty() {
                return Err(grammar("repository", repository, "must be empty for a layout folder"));
            }
            return Self::layout(Path::new(dir));
        }
        Ok(Self { registry: parse_registry(registry)?, repository: parse_repository(repository)? })
    }

    /// A layout folder. A relative path is taken from the current folder.
    pub fn layout(dir: &Path) -> Result<Self, ReferenceError> {
        let lossy = dir.to_string_lossy();
        let text = dir.to_str().ok_or_else(|| grammar("folder", &lossy, "must be UTF-8"))?;
        if text.is_empty() || text.contains(char::is_control) {
            return Err(grammar("folder", text, "must be a path without control characters"));
        }
        let absolute = std::path::absolute(dir).map_err(|_| grammar("folder", text, "must be a path"))?;
        let absolute: PathBuf = absolute.components().collect();
        if absolute.components().any(|c| c == std::path::Component::ParentDir) {
            return Err(grammar("folder", text, "must not climb with '..'"));
        }
        match absolute.to_str() {
            Some(path) if split_layout_tag(path).1.is_some() => {
                Err(grammar("folder", path, "must not end in what reads as a tag"))
            }
            Some(path) if path.len() <= MAX_DIR => {
                Ok(Self { registry: format!("{LAYOUT}{path}"), repository: String::new() })
            }
            _ => Err(grammar("folder", text, "must be UTF-8 of at most 1024 bytes")),
        }
    }

    /// `host[:port]`, or `oci:/absolute/dir`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository; empty for a layout folder.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The layout folder, if it is one.
    pub fn layout_dir(&self) -> Option<&Path> {
        self.registry.strip_prefix(LAYOUT).map(Path::new)
    }

    /// Whether this names a folder of this machine.
    pub fn is_layout(&self) -> bool {
        self.layout_dir().is_some()
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.registry)?;
        if self.repository.is_empty() { Ok(()) } else { write!(f, "/{}", self.repository) }
    }
}

/// The name of an image: `host[:port]/repository[:tag][@sha256:...]` or `oci:DIR[:tag][@sha256:...]`.
///
/// Without tag and digest it means the tag `latest`, in a layout folder the only image if there is just one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    source: Source,
    tag: Option<String>,
    digest: Option<ObjectId>,
}

impl Reference {
    /// From its parts.
    pub fn new(source: Source, tag: Option<&str>, digest: Option<ObjectId>) -> Result<Self, ReferenceError> {
        let tag = tag.map(parse_tag).transpose()?;
        Ok(Self { source, tag, digest })
    }

    /// Where the image lives.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The tag, if there is one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if there is one. It wins over the tag.
    pub fn digest(&self) -> Option<ObjectId> {
        self.digest
    }

    /// The same name in another place.
    pub(super) fn at(&self, source: &Source) -> Self {
        Self { source: source.clone(), ..self.clone() }
    }

    /// The same image, pinned to the digest that its tag was resolved to.
    pub fn pinned(&self, digest: ObjectId) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// The name that a new image gets: the tag, or `latest`.
    ///
    /// # Errors
    /// A reference with a digest: what the new image has is not known before.
    pub fn tagged(&self) -> Result<Self, ReferenceError> {
        match self.digest {
            Some(_) => Err(ReferenceError::Pinned { reference: self.to_string() }),
            None => Self::new(self.source.clone(), Some(self.tag().unwrap_or("latest")), None),
        }
    }

    /// What to ask a registry for: the digest, the tag or `latest`.
    pub(super) fn object(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => format!("sha256:{digest}"),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if let Some(rest) = text.strip_prefix(LAYOUT) {
            // A path may have an '@' of its own.
            let (rest, digest) = match rest.rfind("@sha256:") {
                Some(at) => (&rest[..at], Some(parse_digest(&rest[at + 1..])?)),
                None => (rest, None),
            };
            let (dir, tag) = split_layout_tag(rest);
            return Self::new(Source::layout(Path::new(dir))?, tag, digest);
        }
        let (rest, digest) = match text.rsplit_once('@') {
            Some((rest, digest)) => (rest, Some(parse_digest(digest)?)),
            None => (text, None),
        };
        let no_host = || ReferenceError::NoHost { found: cut(text) };
        let (host, rest) = rest.split_once('/').ok_or_else(no_host)?;
        if !host.contains(['.', ':']) && !host.eq_ignore_ascii_case("localhost") {
            return Err(no_host());
        }
        let (repository, tag) = match rest.split_once(':') {
            Some((repository, tag)) => (repository, Some(tag)),
            None => (rest, None),
        };
        let source = Source { registry: parse_registry(host)?, repository: parse_repository(repository)? };
        Self::new(source, tag, digest)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.source)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@sha256:{digest}"),
            None => Ok(()),
        }
    }
}

/// `DIR:tag`: what follows the last colon is a tag if it could be one; a folder whose name ends so needs a tag written.
pub(super) fn split_layout_tag(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((dir, tag)) if parse_tag(tag).is_ok() => (dir, Some(tag)),
        _ => (text, None),
    }
}

fn parse_digest(text: &str) -> Result<ObjectId, ReferenceError> {
    let hex = text.strip_prefix("sha256:").ok_or_else(|| grammar("digest", text, "must start with \"sha256:\""))?;
    hex.parse().map_err(|_| grammar("digest", text, "must have 64 lower-case hexadecimal digits"))
}

fn parse_registry(text: &str) -> Result<String, ReferenceError> {
    let broken = |rule| grammar("registry", text, rule);
    if text.is_empty() || text.len() > MAX_REGISTRY {
        return Err(broken("must have 1 to 255 characters"));
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(|| broken("must close the bracket"))?;
            host.parse::<Ipv6Addr>().map_err(|_| broken("must have an IPv6 address in the brackets"))?;
            let port = match port.strip_prefix(':') {
                None if port.is_empty() => None,
                None => return Err(broken("must have nothing but a port after the bracket")),
                port => port,
            };
            (format!("[{}]", host.to_ascii_lowercase()), port)
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host.to_ascii_lowercase(), Some(port)),
            None => (text.to_ascii_lowercase(), None),
        },
    };
    if !host.starts_with('[') && !is_host(&host) {
        return Err(broken("must be a host name or address, with an optional port"));
    }
    let Some(port) = port else { return Ok(host) };
    let digits = port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit());
    match port.parse::<u16>() {
        Ok(port) if port > 0 && digits => Ok(format!("{host}:{port}")),
        _ => Err(broken("must have a port of 1 to 65535")),
    }
}

/// A URL takes a host with a number at the end for an IPv4 address, in any of its old spellings; only the usual one is
/// allowed here, because two spellings of one address would pass a list of registries differently.
fn is_host(host: &str) -> bool {
    let last = host.rsplit('.').next().unwrap_or(host);
    let number = last.bytes().next().is_some_and(|b| b.is_ascii_digit())
        && (last.bytes().all(|b| b.is_ascii_digit()) || last.starts_with("0x"));
    host.split('.').all(is_label) && (!number || host.parse::<Ipv4Addr>().is_ok())
}

fn is_label(label: &str) -> bool {
    let edge = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
    label.len() <= 63
        && edge(label.bytes().next())
        && edge(label.bytes().last())
        && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn parse_repository(text: &str) -> Result<String, ReferenceError> {
    if text.is_empty() || text.len() > MAX_REPOSITORY || !text.split('/').all(is_path_component) {
        let rule =
            "must be lower-case letters, digits and single separators, in parts between slashes, at most 255 in all";
        return Err(grammar("repository", text, rule));
    }
    Ok(text.to_owned())
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(part: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let edges = part.bytes().next().is_some_and(is_word) && part.bytes().last().is_some_and(is_word);
    edges
        && part
            .split(|c: char| c.is_ascii() && is_word(c as u8))
            .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-'))
}

pub(super) fn parse_tag(text: &str) -> Result<String, ReferenceError> {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    let all = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'));
    if first && all && text.len() <= MAX_TAG {
        Ok(text.to_owned())
    } else {
        Err(grammar("tag", text, "must be 1 to 128 letters, digits, '_', '.' or '-', not starting with '.' or '-'"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_round_trip() {
        let digest = "ab".repeat(32);
        for text in [
            "docker.io/library/alpine:3",
            "localhost/app",
            "localhost:5000/team/app_x/a--b.c__d:V1.0-rc_1",
            "[::1]:5000/app:1",
            &format!("registry.example.com/app@sha256:{digest}"),
            &format!("registry.example.com/app:1@sha256:{digest}"),
            "oci:/var/lib/layout:v1",
            "oci:/var/lib/layout",
            &format!("oci:/var/lib/layout@sha256:{digest}"),
        ] {
            let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(reference.to_string(), text);
            let source = reference.source();
            assert_eq!(Source::new(source.registry(), source.repository()).as_ref(), Ok(source));
        }
        let upper: Reference = "LOCALHOST:05000/app".parse().unwrap();
        assert_eq!(upper.source().registry(), "localhost:5000");
        let relative: Reference = "oci:layout:1".parse().unwrap();
        assert!(relative.source().layout_dir().unwrap().is_absolute());
        assert_eq!(relative.tag(), Some("1"));
    }

    #[test]
    fn names_without_a_host_are_refused_by_name() {
        for text in ["alpine", "alpine:3", "library/alpine", "team/app:1", ""] {
            let error = text.parse::<Reference>().unwrap_err();
            assert!(matches!(error, ReferenceError::NoHost { .. }), "{text}: {error}");
            assert!(error.to_string().contains("a host is required"));
        }
    }

    #[test]
    fn broken_parts_are_refused_by_name() {
        let long_repository = format!("h.io/{}", "a".repeat(256));
        let long_tag = format!("h.io/a:{}", "t".repeat(129));
        for (text, part) in [
            ("user@h.io/app:1", "digest"),
            ("h.io/", "repository"),
            ("h.io/App", "repository"),
            ("h.io/a//b", "repository"),
            ("h.io/../b", "repository"),
            ("h.io/a/..", "repository"),
            ("h.io/a..b", "repository"),
            ("h.io/a___b", "repository"),
            ("h.io/a?x=1", "repository"),
            ("h.io/a%2e", "repository"),
            (long_repository.as_str(), "repository"),
            ("h.io/a:", "tag"),
            ("h.io/a:.x", "tag"),
            ("h.io/a:x/y", "tag"),
            (long_tag.as_str(), "tag"),
            ("h.io:0/a", "registry"),
            ("h.io:65536/a", "registry"),
            ("h.io:+80/a", "registry"),
            ("h.io:80:80/a", "registry"),
            ("-h.io/a", "registry"),
            ("h..io/a", "registry"),
            ("127.1:5000/a", "registry"),
            ("0x7f.0x1/a", "registry"),
            ("1.2.3.999/a", "registry"),
            ("[::1/a", "registry"),
            ("[zz]:1/a", "registry"),
            ("user:pass@h.io/app", "digest"),
            ("h.io/a@md5:00", "digest"),
            ("h.io/a@sha256:AA", "digest"),
            ("oci:", "folder"),
            ("oci:/a/../b", "folder"),
            ("oci:/a\n", "folder"),
            ("oci:/a:b:c", "folder"),
            ("oci:/a:b/", "folder"),
        ] {
            match text.parse::<Reference>() {
                Err(ReferenceError::Grammar { part: found, .. }) => assert_eq!(found, part, "{text}"),
                other => panic!("{text}: {other:?}"),
            }
        }
        assert!(Source::new("h.io", "").is_err());
        assert!(Source::new("user@h.io", "a").is_err());
        assert!(Source::new("h.io/x", "a").is_err());
        assert!(Source::new("oci:/a", "b").is_err());
    }

    proptest! {
        #[test]
        fn whatever_parses_round_trips(text in "(oci:|[a-z.:]{1,8}/)?[a-zA-Z0-9._/:@-]{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>(), Ok(reference));
            }
        }

        #[test]
        fn a_source_makes_a_url_that_says_the_same(
            host in r"[a-z0-9.:@/?#\[\]-]{1,12}", repository in r"[a-z0-9./_?#@%-]{1,12}",
        ) {
            if let Ok(source) = Source::new(&host, &repository) && !source.is_layout() {
                let url = url::Url::parse(&format!("https://{}/v2/{}/", source.registry(), source.repository()));
                let url = url.unwrap();
                prop_assert_eq!(url.path(), format!("/v2/{}/", source.repository()));
                prop_assert!(url.username().is_empty() && url.query().is_none() && url.fragment().is_none());
            }
        }
    }
}
