//! Nydus images as something to read from: what another image shares chunks with, and what is converted back.

use bytes::Bytes;
use shoal_proto::{BlobId, ObjectId};

use super::{
    BootstrapLayer, ImageManifest, LayerError, LayerLimits, ManifestError, Platform, Registry, RegistryError, Source,
    document::{self, Child, Content, Document},
    read_bootstrap_layer,
};
use crate::{Blob, Bootstrap, BootstrapError, ChunkTableError, blob::chunk_table_file_of, layout::CI_HEADER};

/// Largest bootstrap layer that is read.
pub(super) const MAX_LAYER: u64 = 1 << 30;

/// Why a Nydus image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum NydusSourceError {
    /// A registry, layout or archive failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its bootstrap layer is broken.
    #[error("image sha256:{id}")]
    Layer {
        /// Its manifest.
        id: ObjectId,
        /// What is wrong.
        source: LayerError,
    },
    /// Its bootstrap is broken.
    #[error("the bootstrap of image sha256:{id}")]
    Bootstrap {
        /// Its manifest.
        id: ObjectId,
        /// What is wrong.
        source: BootstrapError,
    },
    /// The chunk table in a blob is broken.
    #[error("the chunk table of blob {blob}")]
    ChunkTable {
        /// The blob.
        blob: BlobId,
        /// What is wrong.
        source: ChunkTableError,
    },
    /// It is sound, and of no use for this.
    #[error("image sha256:{id}: {problem}")]
    Unfit {
        /// Its manifest.
        id: ObjectId,
        /// Why not.
        problem: String,
    },
}

/// A Nydus image without its blobs.
#[derive(Debug)]
pub(super) struct NydusSource {
    /// Its manifest's digest.
    pub(super) id: ObjectId,
    pub(super) manifest: ImageManifest,
    pub(super) layer: BootstrapLayer,
    pub(super) bootstrap: Bootstrap,
}

impl NydusSource {
    /// Reads manifest and bootstrap.
    pub(super) async fn load(registry: &Registry, source: &Source, id: ObjectId) -> Result<Self, NydusSourceError> {
        let bytes = registry.manifest(source, id).await?;
        let manifest = ImageManifest::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
        let layer = registry.blob(source, manifest.bootstrap.id, MAX_LAYER).await?;
        let layer = registry.open_layer(manifest.bootstrap.id, layer, manifest.seal.as_ref());
        let layer = layer
            .map_err(LayerError::from)
            .and_then(|layer| read_bootstrap_layer(&layer[..], &LayerLimits::default()));
        let layer = layer.map_err(|source| NydusSourceError::Layer { id, source })?;
        if let Some(place) = &layer.backend {
            registry.note_backend(source, place);
        }
        let bootstrap = Bootstrap::parse(layer.bootstrap.clone());
        let bootstrap = bootstrap.map_err(|source| NydusSourceError::Bootstrap { id, source })?;
        Ok(Self { id, manifest, layer, bootstrap })
    }

    /// The size of a blob's file: a merged bootstrap need not know what follows the chunk table.
    pub(super) fn size(&self, blob: &Blob) -> u64 {
        let listed = self.manifest.blobs.iter().find(|(id, _)| *id == blob.id);
        listed.map_or(blob.encoded_size, |(_, size)| *size)
    }

    /// The chunk table of a blob: from the bootstrap layer, or, where a converter has put none there, from the blob.
    pub(super) async fn chunk_table(
        &self,
        registry: &Registry,
        source: &Source,
        blob: &Blob,
    ) -> Result<Bytes, NydusSourceError> {
        if let Some(table) = self.layer.chunk_tables.get(&blob.id) {
            return Ok(table.clone());
        }
        let table = stored_chunk_table(registry, source, blob, self.size(blob)).await?;
        table.map_err(|source| NydusSourceError::ChunkTable { blob: blob.id, source })
    }
}

/// Reads the chunk table of a blob of `size` bytes where the blob is.
pub(super) async fn stored_chunk_table(
    registry: &Registry,
    source: &Source,
    blob: &Blob,
    size: u64,
) -> Result<Result<Bytes, ChunkTableError>, RegistryError> {
    let table = blob.chunk_table;
    // A table of no chunks was not compared with the size of the blob when the bootstrap was read.
    let end = table.offset.saturating_add(table.encoded_size).saturating_add(CI_HEADER).min(size);
    let range = table.offset.min(end)..end;
    let len = range.end - range.start;
    let stored = registry.blob_range(source, blob.id, range).await?.collect(len).await?;
    Ok(chunk_table_file_of(&stored, table.offset, blob.cipher.as_ref()).map(Bytes::from))
}

/// The Nydus images behind what a reference was resolved to: of an index those that are marked as Nydus, or all if none is;
/// `platforms` chooses among them.
pub(super) fn nydus_images(
    (id, size): (ObjectId, u64),
    root: &Document,
    platforms: &[Platform],
) -> Result<Vec<Child>, RegistryError> {
    match &root.content {
        Content::Image(_) => Ok(vec![Child::alone(id, size, &root.media_type)]),
        Content::Index(children) => {
            marked(children, platforms).map_err(|source| RegistryError::Manifest { id, source })
        }
    }
}

fn marked(children: &[Child], platforms: &[Platform]) -> Result<Vec<Child>, ManifestError> {
    let marked = children.iter().any(|child| child.is_nydus);
    let images = || children.iter().filter(|child| child.is_image() && (child.is_nydus || !marked));
    let accepts = |wanted: &Platform, child: &Child| child.platform.as_ref().is_some_and(|p| wanted.accepts(p));
    if let Some(missing) = platforms.iter().find(|wanted| !images().any(|child| accepts(wanted, child))) {
        return Err(document::no_platform(missing, children));
    }
    let chosen = images().filter(|child| platforms.is_empty() || platforms.iter().any(|p| accepts(p, child)));
    let chosen: Vec<_> = chosen.cloned().collect();
    if chosen.is_empty() { Err(ManifestError::NoImage) } else { Ok(chosen) }
}
