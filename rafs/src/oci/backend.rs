//! Blobs outside of registries: which images' blobs lie where, and reading and writing them there.
//!
//! Manifests, configs and bootstraps stay in the registry; only data blobs are looked for here. A rule of the
//! configuration names images by registry, or registry and the beginning of the repository, and a place. An image may name
//! its place itself, in its bootstrap layer; that is a stranger's word, so only a place that some rule has is followed. What
//! a place does not have is read from the registry. Nothing is trusted more than what a registry says: digests are compared
//! by whoever compares them for registries.

use std::{
    collections::HashMap,
    fmt,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use reqwest::{Method, Url};
use shoal_proto::ObjectId;

use super::{
    BlobPlace, BlobStream, Descriptor, RegistryError, RegistryOptions, Source, blob_file,
    http::{Body, Http, Request},
};
use s3::S3;

mod credentials;
mod s3;
mod watched;

pub use credentials::CredentialsFileError;

/// Most images whose own word on their place is remembered. Beyond, those of other images are forgotten and learned again.
const MAX_NOTED: usize = 4096;

/// Where the blobs of some images lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackendRule {
    /// The place.
    pub place: BlobPlace,
    /// Which images: `*`, `host[:port]`, or `host[:port]/beginning/of/repository`. None: those that name the place
    /// themselves.
    pub images: Vec<String>,
    /// A file with the keys of an object storage, of the form of `~/.aws/credentials`. Without one they come from the
    /// environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`); without those nothing is signed. An
    /// HTTP server is shown what the auth file has for its host, over https only.
    pub credentials: Option<PathBuf>,
}

impl BackendRule {
    fn applies(&self, source: &Source) -> bool {
        let name = source.to_string();
        let begins =
            |rule: &str| name.strip_prefix(rule).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        self.images.iter().any(|rule| rule == "*" || begins(rule.trim_end_matches('/')))
    }
}

/// All places, and which images use which.
#[derive(Debug, Default)]
pub(super) struct Backends {
    all: Vec<(BackendRule, Backend)>,
    /// What images have said, as positions. Held for a look-up only.
    noted: Mutex<HashMap<Source, usize>>,
}

impl Backends {
    pub(super) fn new(options: &RegistryOptions, http: &Http) -> Result<Self, RegistryError> {
        let open = |rule: &BackendRule| Ok((rule.clone(), Backend::open(rule, options, http)?));
        Ok(Self {
            all: options.backends.iter().map(open).collect::<Result<_, RegistryError>>()?,
            noted: Mutex::default(),
        })
    }

    /// Remembers where an image says that its blobs are. Whether that is one of the places.
    pub(super) fn note(&self, source: &Source, place: &BlobPlace) -> bool {
        let Some(position) = self.all.iter().position(|(rule, _)| rule.place == *place) else { return false };
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        if noted.len() >= MAX_NOTED && !noted.contains_key(source) {
            noted.clear();
        }
        noted.insert(source.clone(), position);
        true
    }

    /// Where to look for the blobs of an image: as a rule says, else as the image does.
    pub(super) fn of(&self, source: &Source) -> Option<&Backend> {
        let ruled = self.all.iter().find(|(rule, _)| rule.applies(source));
        let noted = || self.noted.lock().unwrap_or_else(PoisonError::into_inner).get(source).copied();
        ruled.or_else(|| self.all.get(noted()?)).map(|(_, backend)| backend)
    }

    /// The place itself, if there is a rule for it.
    pub(super) fn at(&self, place: &BlobPlace) -> Option<&Backend> {
        self.all.iter().find(|(rule, _)| rule.place == *place).map(|(_, backend)| backend)
    }
}

/// A place, opened. Opening asks nothing.
pub(super) struct Backend {
    place: BlobPlace,
    kind: Kind,
}

enum Kind {
    S3(S3),
    /// With the name under which the auth file may have credentials.
    Web(Url, Source),
    Folder(PathBuf),
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Backend {
    fn open(rule: &BackendRule, options: &RegistryOptions, http: &Http) -> Result<Self, RegistryError> {
        let kind = match &rule.place {
            BlobPlace::S3(bucket) => Kind::S3(S3::open(bucket, rule.credentials.as_deref(), options, http)?),
            BlobPlace::Web(url) => {
                let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
                let host = format!("{}{port}", url.host_str().unwrap_or_default());
                Kind::Web(url.clone(), Source::new(&host, "blobs")?)
            }
            BlobPlace::Folder(dir) => Kind::Folder(dir.clone()),
        };
        Ok(Self { place: rule.place.clone(), kind })
    }

    /// The size of a blob, or `None` when it is not there.
    pub(super) async fn size(&self, http: &Http, id: ObjectId) -> Result<Option<u64>, RegistryError> {
        match &self.kind {
            Kind::S3(store) => store.size(id).await,
            Kind::Web(base, source) => http.size_of(&web(Method::HEAD, base, source, id)?).await,
            Kind::Folder(dir) => blob_file::size(&dir.join(id.to_string())),
        }
    }

    /// Exactly these bytes of a blob, unverified.
    pub(super) async fn range(
        &self,
        http: &Http,
        id: ObjectId,
        range: Range<u64>,
    ) -> Result<BlobStream, RegistryError> {
        match &self.kind {
            _ if range.is_empty() => Ok(BlobStream::empty(self.place.to_string())),
            Kind::S3(store) => store.range(id, range).await,
            Kind::Web(base, source) => http.range_of(web(Method::GET, base, source, id)?, range).await,
            Kind::Folder(dir) => blob_file::open(&dir.join(id.to_string()), id, Some(range)).await,
        }
    }

    /// Stores a file as a blob unless it is there already, which is what the answer says. It appears whole or not at all;
    /// of an HTTP server, which is asked with PUT, that is for it to see to.
    pub(super) async fn put(&self, http: &Http, blob: &Descriptor, file: &Path) -> Result<bool, RegistryError> {
        if self.size(http, blob.id).await? == Some(blob.size) {
            return Ok(true);
        }
        match &self.kind {
            Kind::S3(store) => store.put(blob, file).await?,
            Kind::Web(base, source) => {
                let body = Body::File { path: file, from: 0, size: blob.size };
                http.send_retrying(&Request { body, ..web(Method::PUT, base, source, blob.id)? }).await?;
            }
            Kind::Folder(dir) => {
                let (dir, id, file) = (dir.clone(), blob.id, file.to_owned());
                let write = move || {
                    let made = std::fs::create_dir_all(&dir);
                    made.map_err(RegistryError::io(format!("cannot make {}", dir.display())))?;
                    blob_file::put(&dir.join(id.to_string()), id, &file)
                };
                super::registry::blocking(write).await?;
            }
        }
        Ok(false)
    }
}

fn web<'a>(method: Method, base: &Url, source: &'a Source, id: ObjectId) -> Result<Request<'a>, RegistryError> {
    let url = base.join(&id.to_string()).map_err(|error| RegistryError::Protocol {
        what: base.to_string(),
        reason: format!("this makes no URL: {error}"),
    })?;
    Ok(Request { method, url, source, push: false, also: None, headers: Default::default(), body: Body::None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_name_images_by_whole_parts_of_their_names() {
        let rule = |images: &[&str]| BackendRule {
            place: "file:///blobs".parse().unwrap(),
            images: images.iter().map(|&image| image.to_owned()).collect(),
            credentials: None,
        };
        let source = Source::new("host:5000", "team/app").unwrap();
        for (images, applies) in [
            (&["*"][..], true),
            (&["host:5000"], true),
            (&["host:5000/team/"], true),
            (&["other", "host:5000/team/app"], true),
            (&["host:5000/te"], false),
            (&["host"], false),
            (&["host:5000/team/app/more"], false),
            (&[], false),
        ] {
            assert_eq!(rule(images).applies(&source), applies, "{images:?}");
        }
    }

    #[test]
    fn an_image_chooses_among_the_places_that_are_known() {
        let rule = BackendRule { place: "file:///blobs".parse().unwrap(), images: Vec::new(), credentials: None };
        let options = RegistryOptions { backends: vec![rule.clone()], ..Default::default() };
        let backends = Backends::new(&options, &Http::new(RegistryOptions::default()).unwrap()).unwrap();
        let source = Source::new("host", "app").unwrap();
        assert!(backends.of(&source).is_none());
        assert!(!backends.note(&source, &"file:///etc".parse().unwrap()));
        assert!(backends.of(&source).is_none() && backends.at(&rule.place).is_some());
        assert!(backends.note(&source, &rule.place));
        assert!(backends.of(&source).is_some());
    }
}
