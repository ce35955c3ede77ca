//! Why the store did not do what it was asked.

use std::{io, path::PathBuf};

use shoal_proto::{BlobId, ObjectId};

use crate::index::IndexError;

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process owns the data directory.
    #[error("data directory {path} is in use by {holder}")]
    Locked {
        /// The data directory.
        path: PathBuf,
        /// What the owner wrote about itself: pid and program.
        holder: String,
    },
    /// The disk or the store is full, and nothing may go. What was to be kept is not; go on without keeping.
    #[error("no space left for {what}")]
    Full {
        /// What was to be written.
        what: String,
    },
    /// The disk failed.
    #[error("{what}")]
    Io {
        /// What was being done, and to which file.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The index failed.
    #[error(transparent)]
    Index(IndexError),
    /// The image behind this handle does not name the piece, so nobody can have verified it for this image.
    #[error("piece {piece} of blob {blob} is not named by the image")]
    UnknownPiece {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
    },
    /// Not as many bytes as the piece has.
    #[error("piece {piece} of blob {blob} has {expected} encoded bytes, got {found}")]
    WrongLength {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
        /// Bytes that the image states.
        expected: u64,
        /// Bytes that were given.
        found: u64,
    },
    /// Images disagree about a blob in more ways than are kept, and every variant is open.
    #[error("blob {blob} is described in {limit} other ways by images in use")]
    TooManyVariants {
        /// The blob.
        blob: BlobId,
        /// Variants kept per blob.
        limit: u32,
    },
    /// Bytes that are not the object they were given as.
    #[error("object {id} does not have these bytes: their sha256 is {found}")]
    WrongObject {
        /// Identity that was claimed.
        id: ObjectId,
        /// Identity of the bytes.
        found: ObjectId,
    },
    /// A record that cannot be written as JSON.
    #[error("the record of {what}")]
    Record {
        /// Of which mount or pin.
        what: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        let what = what.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { what },
            _ => Self::Io { what, source },
        }
    }
}

impl From<IndexError> for StoreError {
    fn from(error: IndexError) -> Self {
        match error.is_full() {
            true => Self::Full { what: "the index".into() },
            false => Self::Index(error),
        }
    }
}
