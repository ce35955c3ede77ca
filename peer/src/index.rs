//! The index: what the store knows across restarts, in RocksDB.
//!
//! Seven column families; integers are big-endian, so that keys sort by number and a blob's records lie together.
//!
//! ```text
//! meta     "schema"                              -> version u32
//! blobs    blob 32 | variant 4                   -> pieces u32 | last use u64, seconds since 1970
//! pieces   blob 32 | variant 4 | piece 4         -> durable u8 | fingerprint 32 | encoded start u64 | end u64
//! digests  algorithm 1 | digest 32               -> blob 32 | variant 4 | piece 4 | chunk 4 | fingerprint 32
//! mounts   mountpoint, the bytes of its path     -> JSON
//! pins     reference                             -> JSON
//! layers   sha256 of a bootstrap layer, 32       -> JSON
//! ```
//!
//! A *variant* is one reading of a blob: images that describe a blob's pieces alike share one, images that disagree
//! about a piece have their records and bytes apart. A piece record exists as soon as an image has declared the
//! piece; `durable` says that its bytes were synced to the variant's file before the record was written. The
//! fingerprint in a digest record ties it to the piece that it was written for: once the variant is reused for
//! another, it leads nowhere.
//!
//! Changes are committed in atomic batches, in order: after a crash a prefix of them is there, and at least
//! everything up to the last batch that was committed with [`Survives::PowerCut`].
//!
//! An index that is damaged is not repaired: it is put aside and an empty one begun. The store is a cache, and what
//! the lost records vouched for is fetched again. An index of a newer program is refused and left alone.
//!
//! This module knows records, not their meaning: what may be declared or is durable is the [`store`](crate::store)'s.

mod keys;
mod rocks;

use std::{collections::BTreeMap, ops::Range, path::PathBuf};

use shoal_proto::{BlobId, Digest, Fingerprint, ObjectId};

pub use rocks::{RocksIndex, SCHEMA_VERSION};

/// Why the index did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// Written by a later version of this program.
    #[error("the index has schema version {found}, this program knows up to {known}")]
    NewerSchema {
        /// Version in the index.
        found: u32,
        /// The latest that this program can read.
        known: u32,
    },
    /// A record that passed RocksDB's checksums and still is not one of ours.
    #[error("malformed record {key} in {family}")]
    Malformed {
        /// Column family.
        family: &'static str,
        /// Its key, in hexadecimal.
        key: String,
    },
    /// RocksDB failed.
    #[error("{action} the index")]
    Database {
        /// What was being done.
        action: &'static str,
        /// RocksDB's words.
        #[source]
        source: rocksdb::Error,
    },
    /// A damaged index could not be put aside.
    #[error("putting the damaged index {path} aside")]
    Damaged {
        /// Folder of the index.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

impl IndexError {
    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Database { source, .. } => source.as_ref().contains("No space left on device"),
            Self::Damaged { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            Self::NewerSchema { .. } | Self::Malformed { .. } => false,
        }
    }
}

/// Names a variant of a blob: its folder, its file, its records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobKey {
    /// The blob.
    pub blob: BlobId,
    /// Number of the variant, from 0.
    pub variant: u32,
}

/// What is known of a variant as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VariantRecord {
    /// Pieces of the whole blob.
    pub pieces: u32,
    /// When it was last used, in seconds since 1970. Written now and then, so it may have been used since.
    pub last_use: u64,
}

/// A piece as the images that share a variant declare it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceRecord {
    /// What it must be.
    pub fingerprint: Fingerprint,
    /// Where it lies in the stored blob.
    pub encoded: Range<u64>,
    /// Whether its bytes are in the variant's file, synced.
    pub durable: bool,
}

/// Where a chunk with a certain digest lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkPlace {
    /// The variant that has it.
    pub key: BlobKey,
    /// Number of the piece that holds it.
    pub piece: u32,
    /// Index of the chunk in the blob's chunk table.
    pub chunk: u32,
    /// Fingerprint of the piece when this was written.
    pub fingerprint: Fingerprint,
}

/// One change of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Writes the record of a variant.
    Variant(BlobKey, VariantRecord),
    /// Removes a variant with all its pieces.
    DropVariant(BlobKey),
    /// Writes the record of a piece.
    Piece(BlobKey, u32, PieceRecord),
    /// Writes where a chunk is.
    Digest(Digest, ChunkPlace),
    /// Writes the mount at a path.
    Mount(Vec<u8>, Vec<u8>),
    /// Removes the mount at a path.
    DropMount(Vec<u8>),
    /// Writes the pin of a reference.
    Pin(Vec<u8>, Vec<u8>),
    /// Removes the pin of a reference.
    DropPin(Vec<u8>),
    /// Writes what a bootstrap layer unpacks to.
    Layer(ObjectId, Vec<u8>),
}

/// What a commit must survive once it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survives {
    /// The end of this process.
    Kill,
    /// A loss of power too, together with everything committed before.
    PowerCut,
}

/// The records, as the store uses them. RocksDB in the daemon; in tests a double that crashes.
pub trait Records: Send + Sync {
    /// All variants of a blob, by number.
    fn variants(&self, blob: &BlobId) -> Result<BTreeMap<u32, VariantRecord>, IndexError>;

    /// All variants of all blobs, in order.
    fn all(&self) -> Result<Vec<(BlobKey, VariantRecord)>, IndexError>;

    /// All pieces of a variant that were declared, by number.
    fn pieces(&self, key: BlobKey) -> Result<BTreeMap<u32, PieceRecord>, IndexError>;

    /// One piece.
    fn piece(&self, key: BlobKey, piece: u32) -> Result<Option<PieceRecord>, IndexError>;

    /// Where a chunk was last recorded. The place may have changed since: compare the fingerprint.
    fn place(&self, digest: &Digest) -> Result<Option<ChunkPlace>, IndexError>;

    /// Removes the places in variants that are `gone`, going through all there are. Neither atomic nor synced: a place that
    /// leads nowhere is no harm.
    fn forget_places(&self, gone: &dyn Fn(BlobKey) -> bool) -> Result<(), IndexError>;

    /// All mounts: path to record.
    fn mounts(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError>;

    /// All pins: reference to record.
    fn pins(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError>;

    /// What a bootstrap layer unpacks to.
    fn layer(&self, layer: ObjectId) -> Result<Option<Vec<u8>>, IndexError>;

    /// Applies all changes or none, in order.
    fn commit(&self, changes: &[Change], survives: Survives) -> Result<(), IndexError>;
}

#[cfg(test)]
mod tests;
