//! Why images cannot be built.

use std::io;
use std::path::{Path, PathBuf};

use shoal_proto::BlobId;

use crate::archive::ArchiveError;
use crate::bootstrap::BootstrapError;
use crate::codec::Compressor;
use crate::source::ChunkError;

/// Why a build ended.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The chunk size is none of the format.
    #[error("chunk size {found:#x} must be a power of two from 0x1000 to 0x1000000")]
    ChunkSize {
        /// What was asked for.
        found: u32,
    },
    /// The batch size is none of the format.
    #[error("batch size {found:#x} must be a power of two from 0x1000 to the chunk size of {chunk_size:#x}")]
    BatchSize {
        /// What was asked for.
        found: u32,
        /// Bytes of a chunk.
        chunk_size: u32,
    },
    /// An encrypted blob that would have its key inside.
    #[error("a bootstrap inside an encrypted blob would have the key in it: encrypt without inline metadata")]
    KeyInBlob,
    /// The chunk table of an encrypted blob cannot hold such chunks.
    #[error("chunks of {found:#x} bytes cannot be encrypted: the chunk size must be at most 0x800000")]
    EncryptedChunkSize {
        /// What was asked for.
        found: u32,
    },
    /// A gzip layer that stays as it is.
    #[error("a layer that stays as it is cannot be encrypted")]
    EncryptedLayer,
    /// There are no random numbers for a key.
    #[error("cannot make a key")]
    RandomKey {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// An earlier image cannot be used.
    #[error("earlier image {position}: {problem}")]
    Dictionary {
        /// Its position, the first is 1.
        position: usize,
        /// Why not.
        problem: String,
    },
    /// The compressor can only be read.
    #[error("blobs cannot be written with compressor {found}")]
    Compressor {
        /// What was asked for.
        found: Compressor,
    },
    /// The compressor has no such level.
    #[error("{compressor} has no compression level {found}: zstd has -7 to 22, the others none")]
    Level {
        /// The compressor.
        compressor: Compressor,
        /// What was asked for.
        found: i32,
    },
    /// A compressor failed.
    #[error("cannot compress a chunk: {message}")]
    Encode {
        /// What it said.
        message: String,
    },
    /// An archive cannot become an image.
    #[error("{}", archive.display())]
    Archive {
        /// The archive.
        archive: PathBuf,
        /// Which entry, and why.
        #[source]
        source: ArchiveError,
    },
    /// A file or directory could not be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not what it was when its directory was read.
    #[error("{} changed while the image was built: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
    /// The source has something that the format cannot hold.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The limit.
        what: String,
    },
    /// The image is larger than the format allows.
    #[error("the image has {found} {what}, at most {limit} fit")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A bootstrap names a chunk that it does not describe.
    #[error("chunk {index} of blob {blob} is in no chunk table")]
    UnknownChunk {
        /// The blob.
        blob: BlobId,
        /// Index of the chunk.
        index: u32,
    },
    /// A chunk of an image could not be read.
    #[error("cannot read the image")]
    Chunk {
        /// Which, and why.
        #[source]
        source: ChunkError,
    },
    /// The bootstrap of an image could not be read.
    #[error("cannot read the image")]
    Image {
        /// What is wrong with it.
        #[source]
        source: BootstrapError,
    },
    /// A worker thread ended early.
    #[error("a worker thread ended before its work was done")]
    Worker,
}

impl BuildError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}
