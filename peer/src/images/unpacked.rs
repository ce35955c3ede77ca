//! A bootstrap layer, unpacked, and from it the pieces of each blob.
//!
//! Everything here is a stranger's: the bootstrap is verified when it is parsed, chunk tables are compared with it, and how
//! much they may take in memory is bounded before they are fetched or decoded.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use shoal_proto::{BlobId, ObjectId};
use shoal_rafs::{
    Blob, Bootstrap, ChunkTable, ChunkTableError, PieceTable,
    oci::{BlobPlace, LayerLimits, read_bootstrap_layer},
};

use super::ImageError;
use crate::fetch::MAX_OBJECT;

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
    pub(super) bootstrap: Bootstrap,
    /// Copies of chunk tables. Layers of older converters have none.
    copies: BTreeMap<BlobId, Bytes>,
    /// Where it says that its blobs are, if not in the registry.
    pub(super) backend: Option<BlobPlace>,
}

impl Unpacked {
    /// Unpacks a bootstrap layer, which is not encrypted any more. Blocks.
    pub(crate) fn read(bytes: &[u8], layer: ObjectId) -> Result<Self, ImageError> {
        let unpacked = read_bootstrap_layer(bytes, &LayerLimits::default())
            .map_err(|e| ImageError::Layer { layer, source: Arc::new(e) })?;
        let bootstrap =
            Bootstrap::parse(unpacked.bootstrap).map_err(|e| ImageError::Bootstrap { layer, source: Arc::new(e) })?;
        let gzip_layers = bootstrap.blobs().iter().filter(|blob| blob.is_gzip_layer());
        // Each was bounded when the bootstrap was read, by its chunks and 1 GiB, and there are at most 254.
        let (bytes, limit) = (gzip_layers.map(|blob| blob.chunk_table.decoded_size).sum(), MAX_INDEX);
        if bytes > limit {
            return Err(ImageError::IndexTooLarge { layer, bytes, limit });
        }
        let (diff_id, copies, backend) = (unpacked.diff_id, unpacked.chunk_tables, unpacked.backend);
        Ok(Self { layer, diff_id, bootstrap, copies, backend })
    }

    /// The meta blobs without which the pieces of gzip layers are not known, with the most bytes that each may have.
    pub(crate) fn metas(&self) -> impl Iterator<Item = (ObjectId, u64)> + '_ {
        let lacking = self.bootstrap.blobs().iter().filter(|blob| blob.is_gzip_layer() && self.copy(blob).is_none());
        let meta =
            |blob: &Blob| blob.meta.map(|meta| (ObjectId::new(*meta.id.as_bytes()), meta.size.min(MAX_OBJECT)));
        lacking.filter_map(meta)
    }

    /// The pieces of each blob, in the order of the bootstrap's blob table. Blocks.
    pub(crate) fn tables(&self, metas: &Metas) -> Result<Vec<Arc<PieceTable>>, ImageError> {
        let blobs = (0..).zip(self.bootstrap.blobs());
        blobs.map(|(index, described)| self.pieces(index, described, metas).map(Arc::new)).collect()
    }

    /// The pieces of a blob, by its chunk table where there is one: blobs without batches need none.
    fn pieces(&self, index: u32, described: &Blob, metas: &Metas) -> Result<PieceTable, ImageError> {
        let (layer, blob) = (self.layer, described.id);
        let table = self.chunk_table(described, metas);
        let table = table.map_err(|e| ImageError::ChunkTable { layer, blob, source: Arc::new(e) })?;
        let pieces = self.bootstrap.piece_table(index, table.as_ref());
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
