//! Copy: an image as it is from one registry, layout or archive to another, of any kind and with all its platforms.
//!
//! ```text
//! index ──> manifest ──> config and layers: there already, mounted, or streamed through
//!      children first, then what names them, the tag last
//! ```
//!
//! Manifests and indexes keep their bytes, and so their digests. Nothing is stored on the way, and blobs are verified on
//! it. Layers that only name a place elsewhere are left there. Not copied: what refers to an image without being named by
//! it, such as signatures.

use std::collections::HashSet;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, future::BoxFuture, stream};
use serde::Serialize;
use shoal_proto::ObjectId;

use super::{
    Descriptor, ManifestError, Placed, Platform, Reference, Registry, RegistryError, Source,
    document::{Content, Document, Link},
};

/// Blobs of one manifest that are copied at the same time.
const BLOBS_AT_ONCE: usize = 4;
/// Indexes may name indexes; deeper than this nobody means it.
const MAX_DEPTH: usize = 4;

/// What was copied.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CopyReport {
    /// Where to: with tag and digest.
    pub reference: String,
    /// Digest of the manifest or index under the tag.
    #[serde(serialize_with = "super::push::digest")]
    pub manifest: ObjectId,
    /// What happened to blobs.
    #[serde(flatten)]
    pub blobs: CopiedBlobs,
}

/// Blobs of a copy, in bytes, each blob counted once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct CopiedBlobs {
    /// Streamed from the one place to the other.
    pub sent_bytes: u64,
    /// Taken by the registry from another of its repositories.
    pub mounted_bytes: u64,
    /// There before.
    pub existing_bytes: u64,
}

impl CopiedBlobs {
    pub(super) fn add(&mut self, placed: Placed, size: u64) {
        *match placed {
            Placed::Sent => &mut self.sent_bytes,
            Placed::Mounted => &mut self.mounted_bytes,
            Placed::Existed => &mut self.existing_bytes,
        } += size;
    }
}

/// Copies an image to the tag of `to`; `latest` without one. Of an index, with a platform, it copies that platform's
/// manifest alone. Calls `progress` after each blob.
///
/// # Errors
/// Whatever either place answers. The tag is written last: after an error it is what it was.
pub async fn copy(
    registry: &Registry,
    from: &Reference,
    to: &Reference,
    platform: Option<&Platform>,
    progress: impl Fn(Placed, u64) + Send + Sync,
) -> Result<CopyReport, RegistryError> {
    let tagged = to.tagged()?;
    let (mut id, _) = registry.resolve(from).await?;
    let mut bytes = registry.manifest(from.source(), id).await?;
    let mut document = parse(id, &bytes)?;
    if let (Some(wanted), Content::Index(_)) = (platform, &document.content) {
        id = document.select(wanted).map_err(|source| RegistryError::Manifest { id, source })?.id;
        bytes = registry.manifest(from.source(), id).await?;
        document = parse(id, &bytes)?;
    }
    let mut copier = Copier::new(registry, from.source(), tagged.source(), &progress);
    copier.contents(id, &document, 0).await?;
    let manifest = registry.put_manifest(&tagged, &document.media_type, bytes).await?;
    Ok(CopyReport { reference: tagged.pinned(manifest).to_string(), manifest, blobs: copier.blobs })
}

fn parse(id: ObjectId, bytes: &[u8]) -> Result<Document, RegistryError> {
    Document::parse(bytes).map_err(|source| RegistryError::Manifest { id, source })
}

/// Copies what documents name.
pub(super) struct Copier<'a> {
    registry: &'a Registry,
    from: &'a Source,
    to: &'a Source,
    progress: &'a (dyn Fn(Placed, u64) + Send + Sync),
    seen: HashSet<ObjectId>,
    pub(super) blobs: CopiedBlobs,
}

impl<'a> Copier<'a> {
    pub(super) fn new(
        registry: &'a Registry,
        from: &'a Source,
        to: &'a Source,
        progress: &'a (dyn Fn(Placed, u64) + Send + Sync),
    ) -> Self {
        Self { registry, from, to, progress, seen: HashSet::new(), blobs: CopiedBlobs::default() }
    }

    /// A manifest or index with all that it names, under its digest.
    pub(super) fn document(&mut self, id: ObjectId, depth: usize) -> BoxFuture<'_, Result<(), RegistryError>> {
        Box::pin(async move {
            let bytes: Bytes = self.registry.manifest(self.from, id).await?;
            let document = parse(id, &bytes)?;
            self.contents(id, &document, depth).await?;
            self.registry.put_child(self.to, &document.media_type, bytes).await.map(drop)
        })
    }

    async fn contents(&mut self, id: ObjectId, document: &Document, depth: usize) -> Result<(), RegistryError> {
        match &document.content {
            Content::Image(links) => self.links(links.layers.iter().chain([&links.config])).await,
            Content::Index(_) if depth >= MAX_DEPTH => {
                Err(RegistryError::Manifest { id, source: ManifestError::NestedIndex })
            }
            Content::Index(children) => {
                for child in children {
                    self.document(child.descriptor.id, depth + 1).await?;
                }
                Ok(())
            }
        }
    }

    async fn links(&mut self, links: impl Iterator<Item = &Link>) -> Result<(), RegistryError> {
        let new = links.filter(|link| !link.foreign && self.seen.insert(link.descriptor.id));
        let descriptors: Vec<Descriptor> = new.map(|link| link.descriptor).collect();
        let (registry, from, to, progress) = (self.registry, self.from, self.to, self.progress);
        let copies = stream::iter(descriptors).map(|descriptor| async move {
            let placed = registry.copy_blob(from, to, &descriptor).await?;
            progress(placed, descriptor.size);
            Ok::<_, RegistryError>((placed, descriptor.size))
        });
        let placed: Vec<_> = copies.buffer_unordered(BLOBS_AT_ONCE).try_collect().await?;
        placed.into_iter().for_each(|(placed, size)| self.blobs.add(placed, size));
        Ok(())
    }
}
