//! The image: RAFS v6 as it lies on disk, read, built, checked, unpacked and mounted.
//!
//! An image is a *bootstrap* (all metadata) and *blobs* (all file content):
//!
//! ```text
//!  bootstrap                                            blob, named by its sha256
//! +--------------------------------------+             +------------------------------+
//! | super block, extended super block    |             | chunk 0, encoded             |
//! | device table, blob table             |      .----->| chunk 1, encoded   = piece 1 |
//! | inodes, directories, links, xattrs   |      |      | ...                          |
//! |   file: [blob 0, chunk 1, address]---|--.   |      +------------------------------+
//! | chunk table                          |  |   |      | chunk table (CI), header     |
//! |   blob 0, chunk 1: digest, ranges <--|--'---'      +------------------------------+
//! +--------------------------------------+
//! ```
//!
//! The bootstrap is verified once ([`Bootstrap::parse`]). Each chunk is verified whenever encoded bytes become file
//! content, in one place for every path: [`PieceTable::decode`].
//!
//! Features: `mount` adds the FUSE file system over a [`ChunkSource`], `oci` the registry client. Without them the crate
//! is synchronous and has no runtime.

mod archive;
mod blob;
mod blob_dir;
mod bootstrap;
mod builder;
mod check;
mod chunk_cache;
mod cipher;
mod codec;
mod error_chain;
mod expand;
mod export;
mod extent;
#[cfg(feature = "mount")]
mod fs;
mod image_file;
mod inspect;
#[cfg(feature = "mount")]
mod latency;
mod layout;
#[cfg(feature = "mount")]
mod mount;
#[cfg(feature = "oci")]
pub mod oci;
mod piece;
mod prefetch;
mod source;
mod stat;
mod trace;
mod unpack;
mod zran;

pub use archive::ArchiveError;
pub use blob::{
    Batch, ChunkInfo, ChunkTable, ChunkTableError, InBatch, Member, Toc, TocEntry, chunk_table_file,
    chunk_table_file_with,
};
pub use blob_dir::{BlobDir, BlobDirError, BlobDirReader, BlobPaths, DECODED_CACHE_BYTES};
pub use bootstrap::{
    Blob, Bootstrap, BootstrapError, ChunkRef, ChunkTableRange, Entry, InPlace, Inode, Kind, Look, MetaBlob,
    Metadata, NamedChunks, Nid, OwnBlob, SuperBlocks, TocRange,
};
pub use builder::{
    ArchiveLimits, BlobTarget, BuildError, BuildOptions, BuildReport, Builder, Encryption, ForeignLink, LayerBlob,
    LayerNotes, MAX_NOTES, MergeError, MergeOptions, MergeReport, OptimizeReport, Output, Progress, merge,
    merge_with,
};
pub use check::{CheckReport, CheckedBlob, KindCounts, Problem, check, check_file};
pub use chunk_cache::{ChunkCache, Lead};
pub use cipher::{Cipher, CipherError, CipherKey, WeakKey};
pub use codec::{Compressor, DecodeError, UnknownCompressor, digest};
pub use error_chain::chain;
pub use expand::{ExpandError, check_expanded, expand_blob, expand_pieces};
pub use export::export_block;
pub use extent::{Extent, extents};
pub use image_file::{ImageFile, ImageFileError};
pub use inspect::{BlobSummary, ChunkSummary, EntrySummary, ImageSummary, InodeSummary, inspect, inspect_path};
#[cfg(feature = "mount")]
pub use latency::{Latencies, ReadTimes};
#[cfg(feature = "mount")]
pub use mount::{
    KeptMount, Mount, MountError, MountKeeper, MountOptions, MountPresence, MountStats, MountTable, NativeMount,
    SESSION_VERSION, SessionRecord, Unmounted,
};
pub use piece::{Chunk, DecodedPiece, Piece, PieceTable, PieceTableError, VerifyError};
pub use prefetch::{PrefetchList, PrefetchListError};
pub use source::{ChunkError, ChunkId, ChunkReply, ChunkSource, for_part};
pub use stat::{ChunkCount, SharedChunks, SharedPair, SharingReport, sharing};
pub use trace::{Trace, TraceError, traced_chunks};
pub use unpack::{UnpackError, UnpackReport, unpack, unpack_layer};
pub use zran::InflateContext;
