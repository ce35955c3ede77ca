//! An image that is loaded: its tree, and its blobs as the store and the scheduler have them.

use std::sync::{Arc, OnceLock};

use shoal_proto::{BlobId, Fingerprint, ObjectId};
use shoal_rafs::{Metadata, PieceTable, oci::Source};
use shoal_scheduler::BlobKey;

use super::{ImageError, Unpacked, unpacked::Metas};
use crate::{
    driver::{DriverHandle, Stake},
    native::NativeNames,
    starts::StartRecord,
    store::{self, BlobHandle, Store},
    traffic::PieceOrigins,
};

/// An image, loaded.
#[derive(Debug)]
pub struct Image {
    /// Where it comes from.
    pub source: Source,
    /// The digest of its bootstrap layer: what distinguishes it from all other images.
    pub layer: ObjectId,
    /// The sha256 of that layer's tar.
    pub diff_id: ObjectId,
    /// The meta blobs of its gzip layers that the bootstrap layer has no copy of.
    pub(crate) metas: Vec<ObjectId>,
    /// Its tree.
    pub metadata: Metadata,
    /// The sha256 of its bootstrap.
    pub(crate) bootstrap: ObjectId,
    /// What its bootstrap layer was unpacked to, as far as that is kept.
    pub(crate) unpacked: Vec<ObjectId>,
    /// Its blobs, in the order of the bootstrap's blob table.
    pub blobs: Vec<ImageBlob>,
    /// What is read of it just after it was mounted.
    pub(crate) starts: StartRecord,
    native: OnceLock<NativeNames>,
}

/// One blob of an image.
#[derive(Debug, Clone)]
pub struct ImageBlob {
    /// What the scheduler calls it.
    pub key: BlobKey,
    /// The pieces as this image names them.
    pub table: Arc<PieceTable>,
    /// The pieces that are here.
    pub handle: BlobHandle,
    /// Where they came from.
    pub origins: Arc<PieceOrigins>,
    /// What keeps them known to the scheduler.
    pub(crate) stake: Stake,
}

impl Image {
    /// What the files are called of which the kernel can mount it. Hashes a lot the first time.
    pub(crate) fn native_names(&self) -> &NativeNames {
        self.native.get_or_init(|| NativeNames::of(self))
    }

    /// The same, if somebody has asked before. Costs nothing.
    pub(crate) fn known_native_names(&self) -> Option<&NativeNames> {
        self.native.get()
    }

    /// Whether every piece that it names is here.
    pub fn is_complete(&self) -> bool {
        self.blobs.iter().all(|blob| {
            let present = blob.handle.present();
            present.is_full() || blob.pieces().all(|piece| present.contains(piece))
        })
    }

    /// A piece by the place of its blob in the blob table, if the image names it: its blob, and its number.
    pub(crate) fn piece(&self, blob: u32, piece: u32) -> Option<(&ImageBlob, u32)> {
        let blob = self.blobs.get(blob as usize)?;
        blob.table.piece(piece).map(|_| (blob, piece))
    }

    /// Its blob with this id.
    pub fn blob(&self, id: BlobId) -> Option<&ImageBlob> {
        self.blobs.iter().find(|blob| blob.table.blob() == id)
    }
}

impl ImageBlob {
    /// Whether `piece` is what somebody else means by `fingerprint`.
    pub fn agrees(&self, piece: u32, fingerprint: &Fingerprint) -> bool {
        self.table.piece(piece).is_some_and(|piece| piece.fingerprint() == *fingerprint)
    }

    /// Encoded bytes of `piece`; 0 when the image does not name it.
    pub fn encoded_len(&self, piece: u32) -> usize {
        let range = self.table.piece(piece).map(|piece| piece.encoded()).unwrap_or_default();
        (range.end - range.start) as usize
    }

    /// Chunks in `piece`; 0 when the image does not name it.
    pub fn chunks(&self, piece: u32) -> u64 {
        self.table.piece(piece).map_or(0, |piece| piece.chunks().len() as u64)
    }

    /// The numbers of the pieces that the image names.
    pub fn pieces(&self) -> impl Iterator<Item = u32> + '_ {
        (0..self.table.len()).filter(|&piece| self.table.piece(piece).is_some())
    }
}

/// Opens the blobs of an image in the store. Blocks.
pub(super) fn open(
    store: &Store,
    driver: &DriverHandle,
    unpacked: Unpacked,
    metas: &Metas,
    source: Source,
) -> Result<Image, ImageError> {
    let tables = unpacked.tables(metas)?;
    let Unpacked { layer, diff_id, metadata, bootstrap, kept, .. } = unpacked;
    let blobs = tables.into_iter().map(|table| {
        let handle = store.open_blob(&table).map_err(|e| ImageError::Store(Arc::new(e)))?;
        let key = scheduled(handle.key());
        let origins = Arc::new(PieceOrigins::new(table.len()));
        Ok(ImageBlob { key, table, handle, origins, stake: driver.stake(key) })
    });
    let blobs = blobs.collect::<Result<_, _>>()?;
    let metas = metas.keys().copied().collect();
    let (native, starts) = (OnceLock::new(), StartRecord::default());
    Ok(Image { source, layer, diff_id, metas, metadata, bootstrap, unpacked: kept, blobs, starts, native })
}

/// What the scheduler calls a blob of the store.
pub(crate) fn scheduled(stored: store::BlobKey) -> BlobKey {
    BlobKey { id: *stored.blob.as_bytes(), variant: stored.variant }
}
