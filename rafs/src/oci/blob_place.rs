//! Where blobs lie when not in the registry: S3-compatible object storage, any HTTP server with ranges, a folder.
//!
//! ```text
//! s3://BUCKET[/PREFIX][?endpoint=URL][&region=NAME]      http[s]://HOST[:PORT][/PATH]      file:///DIR
//! ```
//!
//! A blob is `<place>/<its sha256 in hexadecimal>`, as nydusd looks for it. A place never holds a credential: those come from
//! files and the environment of whoever reads. In a bootstrap layer a place is the file `image/backend.json`, a
//! stranger's word: it is followed only by who has configured the same place.

use std::{
    fmt,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use serde_json::{Value, json};
use url::Url;

const DEFAULT_REGION: &str = "us-east-1";
/// Longest text of a place.
const MAX_TEXT: usize = 1024;
/// Most entries of a backend file that are looked at.
const MAX_ENTRIES: usize = 16;

/// Where blobs lie.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum BlobPlace {
    /// A bucket of an object storage that speaks the protocol of Amazon's S3.
    S3(Bucket),
    /// A folder of an HTTP server; the path ends with a slash.
    Web(Url),
    /// A local or a mounted folder, absolute.
    Folder(PathBuf),
}

/// Part of an object storage.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Bucket {
    /// Its server, without a path.
    pub endpoint: Url,
    /// Its region, which is part of every signature.
    pub region: String,
    /// Its name.
    pub name: String,
    /// In front of each name, without slashes at its ends; may be empty.
    pub prefix: String,
}

/// Why a text names no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{problem}; a place of blobs is s3://BUCKET[/PREFIX][?endpoint=URL&region=NAME], http[s]://HOST/PATH or file:///DIR"
)]
pub struct BlobPlaceError {
    problem: &'static str,
}

fn wrong(problem: &'static str) -> BlobPlaceError {
    BlobPlaceError { problem }
}

impl FromStr for BlobPlace {
    type Err = BlobPlaceError;

    fn from_str(text: &str) -> Result<Self, BlobPlaceError> {
        if text.len() > MAX_TEXT || text.contains(|c: char| c.is_control() || c.is_whitespace()) {
            return Err(wrong("it is too long or has spaces in it"));
        }
        if let Some(dir) = text.strip_prefix("file://") {
            return folder(Path::new(dir));
        }
        let url = Url::parse(text).map_err(|_| wrong("it is no URL"))?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err(wrong("credentials belong in a file, not in the name of the place"));
        }
        if url.fragment().is_some() {
            return Err(wrong("it has a fragment"));
        }
        match url.scheme() {
            "s3" => Bucket::parse(&url).map(Self::S3),
            "http" | "https" => web(url),
            _ => Err(wrong("it is none of the known kinds")),
        }
    }
}

fn folder(dir: &Path) -> Result<BlobPlace, BlobPlaceError> {
    if !dir.is_absolute() || dir.components().any(|part| part == Component::ParentDir) {
        return Err(wrong("the folder must be an absolute path that does not climb"));
    }
    Ok(BlobPlace::Folder(dir.components().collect()))
}

fn web(mut url: Url) -> Result<BlobPlace, BlobPlaceError> {
    if url.query().is_some() || url.host_str().is_none_or(str::is_empty) {
        return Err(wrong("it has a query or no host"));
    }
    if !url.path().ends_with('/') {
        url.set_path(&format!("{}/", url.path()));
    }
    Ok(BlobPlace::Web(url))
}

impl Bucket {
    fn parse(url: &Url) -> Result<Self, BlobPlaceError> {
        let (mut endpoint, mut region) = (None, DEFAULT_REGION.to_owned());
        for (key, value) in url.query_pairs() {
            match &*key {
                "endpoint" => endpoint = Some(value.into_owned()),
                "region" => region = value.into_owned(),
                _ => return Err(wrong("it has a parameter other than endpoint and region")),
            }
        }
        if url.port().is_some() {
            return Err(wrong("a bucket has no port; that of its server belongs in endpoint"));
        }
        Self::new(endpoint.as_deref(), region, url.host_str().unwrap_or_default(), url.path())
    }

    /// From its parts, wherever they come from.
    fn new(endpoint: Option<&str>, region: String, name: &str, prefix: &str) -> Result<Self, BlobPlaceError> {
        let plain = |text: &str, also: &[u8]| {
            text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || also.contains(&byte))
        };
        if !(3..=63).contains(&name.len()) || !plain(name, b".") || name.contains("..") {
            return Err(wrong("the bucket's name is none"));
        }
        if region.is_empty() || region.len() > 64 || !plain(&region, b"_") {
            return Err(wrong("the region's name is none"));
        }
        let prefix = prefix.trim_matches('/');
        let part = |part: &str| !matches!(part, "" | "." | "..") && plain(part, b"._");
        if !prefix.is_empty() && !prefix.split('/').all(part) {
            return Err(wrong("the prefix may have letters, digits, '.', '_' and '-' between slashes"));
        }
        let endpoint = match endpoint {
            Some(endpoint) => Url::parse(endpoint).map_err(|_| wrong("the endpoint is no URL"))?,
            None => Url::parse(&format!("https://s3.{region}.amazonaws.com"))
                .map_err(|_| wrong("the region's name is none"))?,
        };
        let bare = endpoint.path() == "/" && endpoint.query().is_none() && endpoint.fragment().is_none();
        let nobody = endpoint.username().is_empty() && endpoint.password().is_none();
        if !matches!(endpoint.scheme(), "http" | "https") || !bare || !nobody {
            return Err(wrong("the endpoint must be http[s]://HOST[:PORT] and no more"));
        }
        Ok(Self { endpoint, region, name: name.to_owned(), prefix: prefix.to_owned() })
    }
}

impl fmt::Display for BlobPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3(Bucket { endpoint, region, name, prefix }) => {
                let slash = if prefix.is_empty() { "" } else { "/" };
                let endpoint = endpoint.as_str().trim_end_matches('/');
                write!(f, "s3://{name}{slash}{prefix}?endpoint={endpoint}&region={region}")
            }
            Self::Web(url) => f.write_str(url.as_str()),
            Self::Folder(dir) => write!(f, "file://{}", dir.display()),
        }
    }
}

impl BlobPlace {
    /// The backend file of an image whose blobs lie here, with the keys that nydusd's configuration has.
    pub(super) fn backend_file(&self) -> Vec<u8> {
        let (kind, config) = match self {
            Self::S3(Bucket { endpoint, region, name, prefix }) => {
                let port = endpoint.port().map(|port| format!(":{port}")).unwrap_or_default();
                let host = format!("{}{port}", endpoint.host_str().unwrap_or_default());
                let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
                let config = json!({
                    "scheme": endpoint.scheme(), "endpoint": host, "region": region, "bucket_name": name,
                    "object_prefix": prefix,
                });
                ("s3", config)
            }
            Self::Web(url) => {
                let path = url.path().trim_end_matches('/');
                ("http-proxy", json!({ "addr": url.origin().ascii_serialization(), "path": path }))
            }
            Self::Folder(dir) => ("localfs", json!({ "dir": dir })),
        };
        json!({ "version": "v1", "backends": [{ "type": kind, "config": config }] }).to_string().into_bytes()
    }

    /// The first place in a backend file that is of a known kind; `None` if there is none, or it is no such file. Whatever else
    /// it holds, credentials for instance, is passed over.
    pub(super) fn of_backend_file(bytes: &[u8]) -> Option<Self> {
        let document: Value = serde_json::from_slice(bytes).ok()?;
        let backends = document.get("backends")?.as_array()?;
        backends.iter().take(MAX_ENTRIES).find_map(entry)
    }
}

fn entry(backend: &Value) -> Option<BlobPlace> {
    let config = backend.get("config")?;
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    match backend.get("type")?.as_str()? {
        "s3" => {
            let endpoint = text("endpoint").filter(|endpoint| !endpoint.is_empty());
            let endpoint = endpoint.map(|host| format!("{}://{host}", text("scheme").unwrap_or("https")));
            let region = text("region").unwrap_or(DEFAULT_REGION).to_owned();
            let prefix = text("object_prefix").unwrap_or_default();
            Bucket::new(endpoint.as_deref(), region, text("bucket_name")?, prefix).ok().map(BlobPlace::S3)
        }
        "http-proxy" => {
            let place = format!("{}{}", text("addr")?.trim_end_matches('/'), text("path").unwrap_or_default());
            place.parse().ok().filter(|place| matches!(place, BlobPlace::Web(_)))
        }
        "localfs" => folder(Path::new(text("dir")?)).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn places_are_read_and_written_the_same_way() {
        for (text, shown) in [
            ("s3://bucket", "s3://bucket?endpoint=https://s3.us-east-1.amazonaws.com&region=us-east-1"),
            (
                "s3://my.bucket/a/b/?region=eu-1&endpoint=http://minio:9000/",
                "s3://my.bucket/a/b?endpoint=http://minio:9000&region=eu-1",
            ),
            ("https://host:8443/blobs", "https://host:8443/blobs/"),
            ("http://host", "http://host/"),
            ("file:///srv/blobs/", "file:///srv/blobs"),
        ] {
            let place: BlobPlace = text.parse().unwrap();
            assert_eq!(place.to_string(), shown);
            assert_eq!(shown.parse(), Ok(place.clone()), "{shown}");
            assert_eq!(BlobPlace::of_backend_file(&place.backend_file()), Some(place), "{text}");
        }
    }

    #[test]
    fn what_is_no_place_is_refused_and_secrets_are_not_told() {
        for text in [
            "",
            "bucket",
            "ftp://host/x",
            "s3://",
            "s3://ab",
            "s3://b_cket",
            "s3://bucket/a//b",
            "s3://bucket?key=x",
            "s3://bucket:9000",
            "s3://bucket?endpoint=host:9000",
            "s3://bucket?region=",
            "s3://bucket?endpoint=https://host/path",
            "s3://bucket?endpoint=https://u:p@host",
            "https://user:secret@host/",
            "https://host/?token=secret",
            "http://host/#x",
            "file://relative",
            "file:///a/../b",
            "http://a b/",
        ] {
            let error = text.parse::<BlobPlace>().unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn credentials_in_a_backend_file_are_passed_over() {
        let file = json!({ "version": "v1", "backends": [
            { "type": "oss", "config": {} },
            { "type": "s3", "config": { "bucket_name": "bucket", "access_key_secret": "secret", "endpoint": "h:1" } },
        ]});
        let place = BlobPlace::of_backend_file(file.to_string().as_bytes()).unwrap();
        assert_eq!(place.to_string(), "s3://bucket?endpoint=https://h:1&region=us-east-1");
        for text in ["", "[]", "{}", r#"{"backends":{}}"#, r#"{"backends":[{"type":"s3"}]}"#] {
            assert_eq!(BlobPlace::of_backend_file(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_place_says_what_it_was_read_from(text in "(s3|http|https|file)://[a-z0-9./:?=&@-]{0,40}") {
            if let Ok(place) = text.parse::<BlobPlace>() {
                prop_assert_eq!(place.to_string().parse(), Ok(place.clone()));
                prop_assert_eq!(BlobPlace::of_backend_file(&place.backend_file()), Some(place));
            }
        }

        #[test]
        fn no_backend_file_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = BlobPlace::of_backend_file(&bytes);
        }
    }
}
