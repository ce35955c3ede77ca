//! A bootstrap layer, unpacked, and from it the pieces of each blob.
//!
//! That is done once. What was in the layer is kept as objects, the bootstrap is read in place, and what it takes to mount the image
//! again does not depend on how many files it has; but it does on its chunks, of which the pieces are in memory.
//!
//! Everything here is a stranger's: the bootstrap is verified when it is parsed, chunk tables are compared with it, and how
//! much they may take in memory is bounded before they are fetched or decoded.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shoal_proto::{BlobId, ObjectId};
use shoal_rafs::{
    Blob, Bootstrap, ChunkTable, ChunkTableError, Metadata, NamedChunks, PieceTable,
    oci::{BlobPlace, LayerLimits, read_bootstrap_layer},
};

use super::ImageError;
use crate::{
    fetch::MAX_OBJECT,
    store::{LayerRecord, Store},
};

/// Most bytes of chunk tables, contexts and windows of an image's gzip layers: they stay in memory while it is loaded. For
/// each 2 MiB of a tar there are 32 KiB, so this is an image of about 16 GiB unpacked.
const MAX_INDEX: u64 = 256 << 20;

/// Meta blobs by digest.
pub(super) type Metas = BTreeMap<ObjectId, Bytes>;

/// A bootstrap layer, unpacked and verified, but for the chunk tables.
pub(crate) struct Unpacked {
    /// Its digest.
    pub(super) layer: ObjectId,
    /// The sha256 of its tar.
    pub(super) diff_id: ObjectId,
    pub(super) metadata: Metadata,
    /// The sha256 of the bootstrap.
    pub(super) bootstrap: ObjectId,
    /// Copies of chunk tables. Layers of older converters have none.
    copies: BTreeMap<BlobId, Bytes>,
    /// Where it says that its blobs are, if not in the registry.
    pub(super) backend: Option<BlobPlace>,
    /// What it was kept as, beside the layer.
    pub(super) kept: Vec<ObjectId>,
}

impl Unpacked {
    /// Unpacks a bootstrap layer, which is not encrypted any more. Blocks.
    pub(crate) fn read(bytes: &[u8], layer: ObjectId) -> Result<Self, ImageError> {
        let unpacked = read_bootstrap_layer(bytes, &LayerLimits::default())
            .map_err(|e| ImageError::Layer { layer, source: Arc::new(e) })?;
        let broken = |e| ImageError::Bootstrap { layer, source: Arc::new(e) };
        let id = ObjectId::new(Sha256::digest(&unpacked.bootstrap).into());
        let metadata = Metadata::from(Bootstrap::parse(unpacked.bootstrap).map_err(broken)?);
        let gzip_layers = metadata.blobs().iter().filter(|blob| blob.is_gzip_layer());
        // Each was bounded when the bootstrap was read, by its chunks and 1 GiB, and there are at most 254.
        let (bytes, limit) = (gzip_layers.map(|blob| blob.chunk_table.decoded_size).sum(), MAX_INDEX);
        if bytes > limit {
            return Err(ImageError::IndexTooLarge { layer, bytes, limit });
        }
        let (diff_id, copies, backend) = (unpacked.diff_id, unpacked.chunk_tables, unpacked.backend);
        Ok(Self { layer, diff_id, metadata, bootstrap: id, copies, backend, kept: Vec::new() })
    }

    /// Keeps what is in it in the store, so that it need not be unpacked and verified again, and reads the bootstrap from there
    /// from now on: it takes no memory then. Nothing is kept of what has keys in it, or cannot be read in place. Blocks.
    pub(super) fn keep(mut self, store: &Store) -> Self {
        if let Err(error) = self.try_keep(store) {
            tracing::debug!(layer = %self.layer, "its bootstrap stays in memory: {}", crate::chain(&*error));
        }
        self
    }

    fn try_keep(&mut self, store: &Store) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Metadata::Whole(bootstrap) = &self.metadata else { return Ok(()) };
        if bootstrap.is_encrypted() || bootstrap.is_tarfs() || bootstrap.blobs().iter().any(Blob::is_v5) {
            return Ok(());
        }
        let bytes = bootstrap.as_bytes();
        store.put_object(self.bootstrap, bytes)?;
        let (mut chunk_tables, mut kept) = (Vec::new(), vec![self.bootstrap]);
        for blob in bootstrap.blobs().iter().filter(|blob| blob.needs_chunk_table()) {
            let Some(copy) = self.copy(blob) else { continue };
            let id = ObjectId::new(Sha256::digest(copy).into());
            store.put_object(id, copy)?;
            chunk_tables.push((blob.id.to_string(), id.to_string()));
            kept.push(id);
        }
        let hash = self.metadata.hash()?;
        let record = LayerRecord {
            diff_id: self.diff_id,
            bootstrap: self.bootstrap,
            bootstrap_hash: hex::encode(hash),
            bootstrap_bytes: bytes.len() as u64,
            chunk_tables,
            backend: self.backend.as_ref().map(ToString::to_string),
        };
        store.put_layer(self.layer, &record)?;
        self.metadata = Metadata::open_known(store.open_object(self.bootstrap)?, hash)?;
        self.kept = kept;
        Ok(())
    }

    /// A layer that was [kept](Self::keep), if all of it is still there. Blocks.
    pub(super) fn kept(store: &Store, layer: ObjectId) -> Option<Self> {
        let found = Self::try_kept(store, layer);
        found.unwrap_or_else(|error| {
            tracing::debug!(%layer, "it is unpacked again: {}", crate::chain(&*error));
            None
        })
    }

    fn try_kept(store: &Store, layer: ObjectId) -> Result<Option<Self>, Box<dyn std::error::Error + Send + Sync>> {
        let Some(record) = store.layer(layer)? else { return Ok(None) };
        // Others may ask for it.
        if !store.has_object(layer) || !store.has_object(record.bootstrap) {
            return Ok(None);
        }
        let mut hash = [0; 32];
        hex::decode_to_slice(&record.bootstrap_hash, &mut hash)?;
        let file = store.open_object(record.bootstrap)?;
        if file.metadata()?.len() != record.bootstrap_bytes {
            return Ok(None);
        }
        let (mut copies, mut kept) = (BTreeMap::new(), vec![record.bootstrap]);
        for (blob, id) in &record.chunk_tables {
            let id = id.parse()?;
            let Some(copy) = store.object(id)? else { return Ok(None) };
            copies.insert(blob.parse()?, copy);
            kept.push(id);
        }
        let metadata = Metadata::open_known(file, hash)?;
        let backend = record.backend.as_deref().map(str::parse).transpose()?;
        let (diff_id, bootstrap) = (record.diff_id, record.bootstrap);
        Ok(Some(Self { layer, diff_id, metadata, bootstrap, copies, backend, kept }))
    }

    /// The meta blobs without which the pieces of gzip layers are not known, with the most bytes that each may have.
    pub(crate) fn metas(&self) -> impl Iterator<Item = (ObjectId, u64)> + '_ {
        let lacking = self.metadata.blobs().iter().filter(|blob| blob.is_gzip_layer() && self.copy(blob).is_none());
        let meta =
            |blob: &Blob| blob.meta.map(|meta| (ObjectId::new(*meta.id.as_bytes()), meta.size.min(MAX_OBJECT)));
        lacking.filter_map(meta)
    }

    /// The pieces of each blob, in the order of the bootstrap's blob table. Blocks.
    pub(crate) fn tables(&self, metas: &Metas) -> Result<Vec<Arc<PieceTable>>, ImageError> {
        let named = self.metadata.named_chunks();
        let named = named.map_err(|e| ImageError::Bootstrap { layer: self.layer, source: Arc::new(e) })?;
        let blobs = (0..).zip(self.metadata.blobs());
        blobs.map(|(index, described)| self.pieces(&named, index, described, metas).map(Arc::new)).collect()
    }

    /// The pieces of a blob, by its chunk table where there is one: blobs without batches need none.
    fn pieces(
        &self,
        named: &NamedChunks,
        index: u32,
        described: &Blob,
        metas: &Metas,
    ) -> Result<PieceTable, ImageError> {
        let (layer, blob) = (self.layer, described.id);
        let table = self.chunk_table(described, metas);
        let table = table.map_err(|e| ImageError::ChunkTable { layer, blob, source: Arc::new(e) })?;
        let pieces = named.piece_table(index, table.as_ref());
        pieces.map_err(|source| ImageError::Pieces { layer, blob, source })
    }

    fn chunk_table(&self, blob: &Blob, metas: &Metas) -> Result<Option<ChunkTable>, ChunkTableError> {
        if let Some(copy) = self.copy(blob) {
            return ChunkTable::parse(copy).map(Some);
        }
        let meta = blob.meta.and_then(|meta| metas.get(&ObjectId::new(*meta.id.as_bytes())));
        meta.map(|meta| ChunkTable::read_meta(meta, blob.chunk_table.decoded_size)).transpose()
    }

    /// The layer's copy of a chunk table. Converters name that of a gzip layer by its meta blob.
    fn copy(&self, blob: &Blob) -> Option<&Bytes> {
        self.copies.get(&blob.id).or_else(|| self.copies.get(&blob.meta?.id))
    }
}
