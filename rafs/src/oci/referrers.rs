//! Manifests that have another one as their subject, found again also in registries that do not list referrers.
//!
//! The distribution specification ("Pushing Manifests with Subject", "Referrers Tag Schema"): a registry that lists
//! referrers says so when it takes the manifest; elsewhere the client keeps the list itself, as an index under a tag made
//! of the subject's digest. Two clients that change one list at the same time may lose an entry: the specification has no
//! remedy either. Layout folders have such a list, too.

use bytes::Bytes;
use serde_json::Value;
use shoal_proto::ObjectId;

use reqwest::Method;

use super::{
    Reference, Registry, RegistryError, Source,
    document::{self, Child, Content, Document},
    http::Http,
    registry::MAX_MANIFEST,
};

impl Registry {
    /// Stores a manifest with a subject under its digest. `entry` is how the list of referrers names it.
    pub(super) async fn put_referring(
        &self,
        source: &Source,
        bytes: Bytes,
        subject: ObjectId,
        entry: Value,
    ) -> Result<(), RegistryError> {
        if source.is_layout() {
            self.put_child(source, document::OCI_MANIFEST, bytes).await?;
        } else {
            let untagged = Reference::new(source.clone(), None, None)?;
            let put = self.http.put_manifest(&untagged, document::OCI_MANIFEST, bytes).await?;
            if put.knows_referrers {
                return Ok(());
            }
        }
        let list = Reference::new(source.clone(), Some(&format!("sha256-{subject}")), None)?;
        let mut entries: Vec<_> = self.referrers(&list).await?.into_iter().map(|child| child.raw).collect();
        let digest = entry.get("digest");
        if entries.iter().any(|known| known.get("digest") == digest) {
            return Ok(());
        }
        entries.push(entry);
        self.put_manifest(&list, document::OCI_INDEX, document::index(&entries)).await.map(drop)
    }

    /// What has the manifest `subject` as its subject, as the registry lists it, or else as clients have: at most what fits
    /// into one answer of 4 MiB.
    pub(super) async fn referrers_of(&self, source: &Source, subject: ObjectId) -> Result<Vec<Child>, RegistryError> {
        let listed = match source.is_layout() {
            true => Err(RegistryError::NotFound { what: format!("referrers of {subject} in {source}") }),
            false => self.http.referrers(source, subject).await,
        };
        match listed {
            Ok(bytes) => children(subject, &bytes),
            // Registries that know nothing of it have several words for that.
            Err(RegistryError::NotFound { .. } | RegistryError::Registry { status: 400..=499, .. }) => {
                self.referrers(&Reference::new(source.clone(), Some(&format!("sha256-{subject}")), None)?).await
            }
            Err(error) => Err(error),
        }
    }

    /// The entries of a list; none if there is no list yet.
    async fn referrers(&self, list: &Reference) -> Result<Vec<Child>, RegistryError> {
        let (id, _) = match self.resolve(list).await {
            Err(RegistryError::NotFound { .. }) => return Ok(Vec::new()),
            resolved => resolved?,
        };
        let bytes = self.manifest(list.source(), id).await?;
        children(id, &bytes)
    }
}

impl Http {
    /// The registry's own list of referrers.
    async fn referrers(&self, source: &Source, subject: ObjectId) -> Result<Bytes, RegistryError> {
        let request = self.request(Method::GET, source, &format!("referrers/sha256:{subject}"))?;
        self.whole(&request, MAX_MANIFEST).await
    }
}

/// What an index names; `id` stands in errors.
fn children(id: ObjectId, bytes: &[u8]) -> Result<Vec<Child>, RegistryError> {
    let document = Document::parse(bytes).map_err(|source| RegistryError::Manifest { id, source })?;
    match document.content {
        Content::Index(children) => Ok(children),
        Content::Image(_) => Ok(Vec::new()),
    }
}
