//! Manifests that have another one as their subject, found again also in registries that do not list referrers.
//!
//! The distribution specification ("Pushing Manifests with Subject", "Referrers Tag Schema"): a registry that lists
//! referrers says so when it takes the manifest; elsewhere the client keeps the list itself, as an index under a tag made
//! of the subject's digest. Two clients that change one list at the same time may lose an entry: the specification has no
//! remedy either. Layout folders need no list: their index names every manifest.

use bytes::Bytes;
use serde_json::Value;
use shoal_proto::ObjectId;

use super::{
    Reference, Registry, RegistryError, Source,
    document::{self, Content, Document},
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
            return self.put_child(source, document::OCI_MANIFEST, bytes).await.map(drop);
        }
        let untagged = Reference::new(source.clone(), None, None)?;
        let put = self.http.put_manifest(&untagged, document::OCI_MANIFEST, bytes).await?;
        if put.knows_referrers {
            return Ok(());
        }
        let list = Reference::new(source.clone(), Some(&format!("sha256-{subject}")), None)?;
        let mut entries = self.referrers(&list).await?;
        let digest = entry.get("digest");
        if entries.iter().any(|known| known.get("digest") == digest) {
            return Ok(());
        }
        entries.push(entry);
        self.put_manifest(&list, document::OCI_INDEX, document::index(&entries)).await.map(drop)
    }

    /// The entries of a list; none if there is no list yet.
    async fn referrers(&self, list: &Reference) -> Result<Vec<Value>, RegistryError> {
        let (id, _) = match self.resolve(list).await {
            Err(RegistryError::NotFound { .. }) => return Ok(Vec::new()),
            resolved => resolved?,
        };
        let bytes = self.manifest(list.source(), id).await?;
        let document = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
        match document.content {
            Content::Index(children) => Ok(children.into_iter().map(|child| child.raw).collect()),
            Content::Image(_) => Ok(Vec::new()),
        }
    }
}
