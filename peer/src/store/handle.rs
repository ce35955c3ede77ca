//! A blob in the hands of those that read and write it.

use std::{fmt, sync::Arc};

use bytes::Bytes;
use shoal_proto::{Bitfield, Fingerprint};
use shoal_rafs::PieceTable;

use super::{StoreError, blobs::Blobs, holdings::Holding, variant::Variant};
use crate::index::BlobKey;

/// A blob of the store as one image describes it. Cheap to clone.
///
/// Other handles of the same variant see the same pieces; those of images that disagree have another variant.
#[derive(Clone)]
pub struct BlobHandle {
    blobs: Arc<Blobs>,
    variant: Arc<Variant>,
    table: Arc<PieceTable>,
}

impl fmt::Debug for BlobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobHandle").field("key", &self.key()).finish_non_exhaustive()
    }
}

impl BlobHandle {
    pub(super) fn new(blobs: Arc<Blobs>, variant: Arc<Variant>, table: Arc<PieceTable>) -> Self {
        Self { blobs, variant, table }
    }

    pub(super) fn variant(&self) -> &Arc<Variant> {
        &self.variant
    }

    /// Which variant this is.
    pub fn key(&self) -> BlobKey {
        self.variant.key()
    }

    /// The image's description of the blob.
    pub fn table(&self) -> &Arc<PieceTable> {
        &self.table
    }

    /// Fingerprint of a piece that this or another image of the variant names. Who asks for a piece with another
    /// fingerprint means something else.
    pub fn fingerprint(&self, piece: u32) -> Option<Fingerprint> {
        self.variant.fingerprint(piece)
    }

    /// Whether a piece may be read and served.
    pub fn is_present(&self, piece: u32) -> bool {
        self.variant.is_present(piece)
    }

    /// The pieces that may be read and served now, also those that only other images of the variant name.
    pub fn present(&self) -> Bitfield {
        self.variant.present()
    }

    /// The pieces that a crash now would leave.
    pub fn durable(&self) -> Bitfield {
        self.variant.durable()
    }

    /// Keeps a piece. The caller has verified it: [`PieceTable::decode`] of *this handle's* table has accepted these
    /// very bytes. Present on return; does not wait for a sync.
    ///
    /// Returns whether this call made it present: not when it already was, or when another thread is writing it now,
    /// or when the disk failed to sync the blob meanwhile. [`StoreError::Full`] when there is no room and nothing that
    /// could go for it: go on without.
    pub fn write(&self, piece: u32, encoded: &[u8]) -> Result<bool, StoreError> {
        self.blobs.write(self, piece, encoded)
    }

    /// The encoded bytes of a piece, or `None` when it is not present, or evicted meanwhile. A piece that the disk has lost
    /// is forgotten and is `None`. A disk may also lie: decode, that is verify, what comes, and [`forget`](Self::forget) it when
    /// that fails.
    pub fn read(&self, piece: u32) -> Result<Option<Bytes>, StoreError> {
        self.blobs.holdings.used(Holding::Blob(self.key()));
        self.inspect(piece)
    }

    /// As [`read`](Self::read), but never waits for the device: `None` also when the bytes are not in the page cache, and for
    /// whatever `read` would report. May be called where blocking is not allowed.
    pub fn read_at_once(&self, piece: u32) -> Option<Bytes> {
        let bytes = self.blobs.read_at_once(&self.variant, piece)?;
        self.blobs.holdings.used(Holding::Blob(self.key()));
        Some(bytes)
    }

    /// As [`read`](Self::read), but does not count as use when it comes to what was used longest ago.
    pub fn inspect(&self, piece: u32) -> Result<Option<Bytes>, StoreError> {
        self.blobs.read(&self.variant, piece)
    }

    /// Keeps the list that this blob's pieces come from, with the blob: it goes when the blob goes. To be called once all of
    /// the blob has been compared with its sha256, for whoever finds the list takes that for done. Durable on return.
    pub fn put_list(&self, list: &[u8]) -> Result<(), StoreError> {
        self.blobs.put_list(self.key(), list)
    }

    /// A piece is damaged on disk: it is not present any more and may be written again. May wait for a running flush.
    pub fn forget(&self, piece: u32) -> Result<(), StoreError> {
        self.blobs.forget(&self.variant, piece)
    }
}
