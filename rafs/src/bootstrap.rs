//! The bootstrap: all metadata of an image, verified once and then read in place.
//!
//! [`Bootstrap::parse`] walks everything that can be reached: both super blocks, every table, every inode, directory,
//! symbolic link, xattr and chunk index. What it returns is immutable and safe to walk without further thought: no
//! cycles, every directory has one parent, names are names, every chunk of a file resolves to a digest. It takes bytes
//! from strangers; whatever they are, it ends, with memory proportional to their number, in a tree or in an error that
//! names the structure and its offset.
//!
//! Nothing is unpacked: inodes and chunks are decoded from the file's bytes when asked for. Which *pieces* of a blob hold
//! the chunks is the matter of [`PieceTable`]s, which are made of a bootstrap and, for blobs with batches, of the blob's
//! own chunk table.
//!
//! Whoever only mounts an image need not have all of this: see [`Metadata`].
//!
//! RAFS v5 is translated first, see `builder/v5.rs`.
//!
//! In *tarfs* mode the blobs are tars as they are, and a block has 512 bytes. Such images have digests of chunks if Shoal
//! made them; upstream's builder writes none. Then there are no pieces by the bootstrap alone, but [`BlobDirReader`] makes
//! them of a tar that has the sha256 that names it.
//!
//! Of encrypted blobs it has the keys: whoever holds such a bootstrap can read the image.
//!
//! [`BlobDirReader`]: crate::BlobDirReader

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use shoal_proto::{Algorithm, BlobId, Digest};

use crate::blob::ChunkTable;
use crate::builder::v5;
use crate::cipher::Cipher;
use crate::codec::Compressor;
use crate::layout::{self, ChunkRecord, features};
use crate::piece::{self, Chunk, Named, PieceTable, PieceTableError};
use crate::source::ChunkId;

mod chunks;
mod directory;
mod error;
mod image;
mod inode;
mod metadata;
mod superblock;
mod tables;
mod walk;
mod windows;
mod xattr;

#[cfg(feature = "mount")]
pub(crate) use directory::BlockStart;
pub(crate) use error::At;
pub use error::BootstrapError;
pub(crate) use image::{slice, view};
pub use inode::{ChunkRef, Entry, Inode, Kind};
pub use metadata::{InPlace, Look, Metadata, NamedChunks};
pub use superblock::SuperBlocks;
pub(crate) use superblock::algorithms;
pub(crate) use walk::is_name;

use image::{Content, Image, Source};
use superblock::Declared;

/// Where an inode lies: its offset from the start of the meta area in units of 32 bytes. Unique within an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u64);

impl std::fmt::Display for Nid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// A data blob as the bootstrap describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Registry digest of the stored file.
    pub id: BlobId,
    /// Bytes of the stored file.
    pub encoded_size: u64,
    /// Bytes of its decoded address space, a multiple of 4096; of a tar, its own.
    pub decoded_size: u64,
    /// Chunks of the whole blob, also those that this image does not use.
    pub chunk_count: u32,
    /// How its chunks are compressed.
    pub compressor: Compressor,
    /// How its chunks are digested.
    pub algorithm: Algorithm,
    /// First byte behind the chunks in the stored file.
    pub data_end: u64,
    /// Where its chunk table lies.
    pub chunk_table: ChunkTableRange,
    /// Feature bits of the format.
    pub features: u32,
    /// Where its decoded form lies on a flat device, in blocks of the image; 0 where nobody has said.
    pub mapped_block: u32,
    /// The table of contents at its end, if it has one and the bootstrap knows.
    pub toc: Option<TocRange>,
    /// The file with the chunk table of a gzip layer, if it is not the one that holds the bootstrap.
    pub meta: Option<MetaBlob>,
    /// What its chunks and its chunk table are encrypted with, if they are.
    pub cipher: Option<Cipher>,
}

/// A file beside a blob that holds what is otherwise at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetaBlob {
    /// The sha256 of its bytes.
    pub id: BlobId,
    /// Their number.
    pub size: u64,
}

/// The table of contents of a blob, with its tar header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocRange {
    /// Bytes.
    pub size: u32,
    /// Their sha256.
    pub sha256: [u8; 32],
}

/// The stored blob that a bootstrap lies in: what the bootstrap, which was complete before the blob, cannot know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OwnBlob {
    /// Registry digest of the stored file.
    pub id: BlobId,
    /// Bytes of the stored file.
    pub encoded_size: u64,
    /// The table of contents at its end, if it has one.
    pub toc: Option<TocRange>,
}

impl Blob {
    /// Whether small chunks may have been compressed as one: where those lie, only the blob's own chunk table tells.
    pub fn has_batches(&self) -> bool {
        self.features & features::BATCH != 0
    }

    /// Whether the blob is a gzip layer as registries have it: how its chunks are inflated, only a chunk table tells, which
    /// lies in another file.
    pub fn is_gzip_layer(&self) -> bool {
        self.features & features::ZRAN != 0
    }

    /// Whether it belongs to an image of RAFS v5: it has chunks and nothing behind them.
    pub fn is_v5(&self) -> bool {
        self.features & features::INTERNAL != 0
    }

    /// Whether it is a tar as it is, whose files are the chunks.
    pub fn is_tar(&self) -> bool {
        self.features & features::TARFS != 0
    }

    /// Whether a chunk table lies at its end, or in a file beside it.
    pub fn has_chunk_table(&self) -> bool {
        !self.is_v5() && !self.is_tar()
    }

    /// Whether the bootstrap alone does not say where the chunks lie.
    pub fn needs_chunk_table(&self) -> bool {
        self.has_batches() || self.is_gzip_layer()
    }
}

/// Where the chunk table of a blob lies in the stored file. A header of 4096 bytes follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkTableRange {
    /// Offset of its first byte.
    pub offset: u64,
    /// Stored bytes.
    pub encoded_size: u64,
    /// Bytes once decoded.
    pub decoded_size: u64,
    /// How it is compressed.
    pub compressor: Compressor,
}

/// What a bootstrap came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// A file of its own.
    File,
    /// A blob, which it names `xxxx...`.
    Blob(OwnBlob),
    /// Such a blob, of which only the name is known: somebody took the bootstrap out of it.
    Extracted(BlobId),
    /// A bootstrap of RAFS v5.
    V5,
}

/// A verified bootstrap. Immutable, cheap to clone. `Debug` does not show its bytes: there may be keys among them.
#[derive(Clone)]
pub struct Bootstrap {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Bootstrap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bootstrap").field("super_blocks", &self.super_blocks()).finish_non_exhaustive()
    }
}

struct Inner {
    bytes: Bytes,
    image: Image,
    content: Content,
    root: Nid,
    algorithm: Algorithm,
    compressor: Compressor,
    prefetch: Vec<Nid>,
    declared: Declared,
    super_blocks: SuperBlocks,
    tables: Vec<(Range<u64>, &'static str)>,
    walked: walk::Walked,
}

impl Bootstrap {
    /// Verifies a bootstrap in full. Time and memory are proportional to `bytes`.
    pub fn parse(bytes: Bytes) -> Result<Self, BootstrapError> {
        Self::parse_as(bytes, Origin::File)
    }

    /// Of RAFS v5 it is always a file.
    fn parse_as(bytes: Bytes, origin: Origin) -> Result<Self, BootstrapError> {
        match v5::is_v5(&bytes) {
            true => Self::parse_in(v5::translate(&bytes)?.into(), Origin::V5),
            false => Self::parse_in(bytes, origin),
        }
    }

    /// Like [`parse`](Self::parse), for a bootstrap that was found inside the blob `own`.
    pub fn parse_inlined(bytes: Bytes, own: OwnBlob) -> Result<Self, BootstrapError> {
        Self::parse_in(bytes, Origin::Blob(own))
    }

    /// Like [`parse`](Self::parse), for a bootstrap that somebody took out of the blob `own`. How large that became, it does
    /// not know; it says how many bytes came before it.
    pub fn parse_extracted(bytes: Bytes, own: BlobId) -> Result<Self, BootstrapError> {
        Self::parse_as(bytes, Origin::Extracted(own))
    }

    fn parse_in(bytes: Bytes, origin: Origin) -> Result<Self, BootstrapError> {
        let source = Source::Memory(bytes.clone());
        let header = superblock::read(&source)?;
        let blobs = tables::blobs(&source, &header, origin)?;
        let chunks = chunks::Chunks::read(chunks::Chunks::table(&bytes, &header)?, &header, &blobs)?;
        let (image, mut content) = (Image::new(source, &header), Content { blobs, chunks });
        let mut walked = walk::walk(&image, &content, header.root)?;
        if !content.chunks.have_digests() {
            let indexed = std::mem::take(&mut walked.indexed);
            content.chunks = chunks::Chunks::of_files(&header, &content.blobs, indexed)?;
        }
        let prefetch = tables::prefetch(&image.source, &header, |nid| walked.reached(nid))?;
        Ok(Self {
            inner: Arc::new(Inner {
                root: header.root,
                algorithm: header.algorithm,
                compressor: header.compressor,
                declared: header.declared,
                super_blocks: header.super_blocks(),
                tables: header.tables(),
                bytes,
                image,
                content,
                prefetch,
                walked,
            }),
        })
    }

    /// Reads and verifies a bootstrap file.
    pub fn open(path: &Path) -> Result<Self, BootstrapError> {
        let bytes = std::fs::read(path).map_err(|source| BootstrapError::Io { path: path.to_owned(), source })?;
        Self::parse(bytes.into())
    }

    /// The bytes that were parsed; for RAFS v5 those of the translation.
    pub fn as_bytes(&self) -> &Bytes {
        &self.inner.bytes
    }

    /// Size of every chunk but the last of a file: a power of two from 4 KiB to 16 MiB.
    pub fn chunk_size(&self) -> u32 {
        self.inner.image.chunk_size
    }

    /// Bytes of a block: 4096, or 512 in [tarfs mode](Self::is_tarfs).
    pub fn block_size(&self) -> u64 {
        self.inner.image.block
    }

    /// Whether the blobs are tars as they are.
    pub fn is_tarfs(&self) -> bool {
        self.block_size() == layout::TAR_BLOCK
    }

    /// Whether chunks have digests, by which they can be verified one by one. Only in tarfs mode they may have none; then the
    /// digest of each is zero, and means nothing.
    pub fn has_digests(&self) -> bool {
        self.inner.content.chunks.have_digests()
    }

    /// Digest algorithm in the super block; a blob may have another.
    pub fn algorithm(&self) -> Algorithm {
        self.inner.algorithm
    }

    /// Compressor in the super block, that of the last builder; each blob has its own.
    pub fn compressor(&self) -> Compressor {
        self.inner.compressor
    }

    /// The data blobs, in the order of the device table.
    pub fn blobs(&self) -> &[Blob] {
        &self.inner.content.blobs
    }

    /// The pieces of a blob; `blob` is a position in [`blobs`](Self::blobs). With its own chunk table, both tables are
    /// compared; without, a blob with batches is refused, as is one whose chunks have no digests.
    ///
    /// # Panics
    ///
    /// Panics if there is no such blob.
    pub fn piece_table(&self, blob: u32, table: Option<&ChunkTable>) -> Result<PieceTable, PieceTableError> {
        self.inner.content.piece_table(blob, table)
    }

    /// The pieces of a tar whose chunks have no digests: these, in the order of the chunks, were made of the tar that the
    /// blob's name vouches for.
    pub(crate) fn tar_pieces(
        &self,
        blob: u32,
        digests: impl Iterator<Item = Digest>,
    ) -> Result<PieceTable, PieceTableError> {
        let known = self.named(blob).zip(digests);
        let named = known.map(|(named, digest)| Named { chunk: Chunk { digest, ..named.chunk }, ..named });
        piece::group(&self.blobs()[blob as usize], named, None)
    }

    /// Whether any of its blobs is encrypted, so that its bytes hold keys.
    pub fn is_encrypted(&self) -> bool {
        self.blobs().iter().any(|blob| blob.cipher.is_some())
    }

    /// A chunk as the image names it. Whether its stored bytes are compressed, it knows of plain chunks only.
    pub fn chunk(&self, id: ChunkId) -> Option<Chunk> {
        self.inner.content.chunk(id).map(|named| named.chunk)
    }

    /// Every chunk of a blob that the image names, by index.
    pub fn chunks(&self, blob: u32) -> impl Iterator<Item = Chunk> {
        self.named(blob).map(|named| named.chunk)
    }

    pub(crate) fn named_chunk(&self, id: ChunkId) -> Option<Named> {
        self.inner.content.chunk(id)
    }

    /// Both super blocks, for people who want to see them.
    pub fn super_blocks(&self) -> SuperBlocks {
        self.inner.super_blocks
    }

    pub(crate) fn named(&self, blob: u32) -> impl Iterator<Item = Named> {
        self.inner.content.named(blob)
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.inner.root
    }

    /// Distinct inodes in the tree.
    pub fn inode_count(&self) -> u64 {
        self.inner.walked.inodes
    }

    /// Names in the tree, the root included: more than inodes where files have several.
    pub fn name_count(&self) -> u64 {
        self.inner.walked.names
    }

    /// What the super blocks state of the rest.
    pub(crate) fn declared(&self) -> Declared {
        self.inner.declared
    }

    /// Super blocks and tables: where they lie, and what they are called.
    pub(crate) fn tables(&self) -> Vec<(Range<u64>, &'static str)> {
        self.inner.tables.clone()
    }

    /// The chunk table as it lies in the file.
    pub(crate) fn records(&self) -> impl Iterator<Item = &ChunkRecord> {
        self.inner.content.chunks.records()
    }

    /// Decodes an inode. Only inodes of the tree exist: any other nid is [`BootstrapError::UnknownInode`].
    pub fn inode(&self, nid: Nid) -> Result<Inode<'_>, BootstrapError> {
        if !self.inner.walked.reached(nid) {
            return Err(BootstrapError::UnknownInode { nid });
        }
        Inode::decode(&self.inner.image, nid)
    }

    /// Files and directories that the builder wants read early, in order.
    pub fn prefetch(&self) -> &[Nid] {
        &self.inner.prefetch
    }
}
