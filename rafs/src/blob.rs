//! The chunk table ("CI table") at the end of a data blob: where each chunk of the whole blob lies.
//!
//! ```text
//! chunk data                      back to back, no alignment
//! [tar header]                    in blobs made for registries by other builders
//! chunk table, maybe compressed   16 (v1) or 24 (v2) bytes per chunk, then 40 bytes per batch
//! header, 4096 bytes              magic, entries, offset, sizes ... magic
//! [tar header, more files]
//! ```
//!
//! The bootstrap's chunk table says the same and has the digests, but only of the chunks that the image uses, and it knows
//! nothing of batches: small chunks that were compressed as one. So the table here is what pieces are numbered by.
//!
//! For a gzip layer, which is a blob as it is, the table is a file of its own, and the contexts of [`zran`](crate::zran)
//! follow the entries: 40 bytes each, then the windows.
//!
//! In an encrypted blob table and header are encrypted, each by itself, after the table was compressed. Copies of the table
//! beside a bootstrap are not: that has the key anyway.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use zerocopy::FromBytes;

use crate::bootstrap::ChunkTableRange;
use crate::cipher::Cipher;
use crate::codec::{self, Compressor};
use crate::layout::{self, CI_HEADER, CiHeader, features};
use crate::zran::{CONTEXT, InflateContext, WINDOW};

mod encode;
mod entry;
mod members;
mod toc;
mod zran;

pub(crate) use encode::{Contexts, EncodedTable};
pub use entry::{Batch, ChunkInfo, InBatch};
pub use members::Member;
pub(crate) use members::{ReadAt, TAR_HEADER, checksum_matches, content, members, tar_header};
pub use toc::{Toc, TocEntry};
pub(crate) use zran::FEATURES as ZRAN_FEATURES;

/// Name of the chunk data among the files of a blob.
pub(crate) const DATA_NAME: &str = "image.blob";
/// Name of the chunk table and its header.
pub(crate) const TABLE_NAME: &str = "blob.meta";
/// Name of the table's header in the table of contents.
pub(crate) const TABLE_HEADER_NAME: &str = "blob.meta.header";
/// Name of the digests of all chunks.
pub(crate) const DIGESTS_NAME: &str = "blob.digest";
/// Name of a bootstrap inside a blob.
pub(crate) const BOOTSTRAP_NAME: &str = "image.boot";
/// Name of the table of contents.
pub(crate) const TOC_NAME: &str = "rafs.blob.toc";
/// Bytes of contexts and windows that are read: of a layer of 64 GiB and more.
const MAX_CONTEXTS: u64 = 1 << 30;

/// Why a chunk table could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ChunkTableError {
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A rule of the format is broken.
    #[error("{structure}: {problem}")]
    Invalid {
        /// What is broken.
        structure: &'static str,
        /// The rule, with the values found.
        problem: String,
    },
    /// The format allows it, this reader does not do it.
    #[error("chunk table with {what} is not supported")]
    Unsupported {
        /// What is asked for.
        what: &'static str,
    },
}

pub(crate) fn invalid(structure: &'static str, problem: impl Into<String>) -> ChunkTableError {
    ChunkTableError::Invalid { structure, problem: problem.into() }
}

/// A chunk table. Every entry was read once when it was made; they are read again when asked for, so that it takes no
/// more memory than its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkTable {
    header: Header,
    /// The decoded table: entries, then contexts.
    bytes: Bytes,
}

/// The header of a chunk table, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    features: u32,
    entries: u32,
    range: ChunkTableRange,
    /// Offset of the first context in the decoded table.
    context_offset: usize,
    contexts: u32,
    /// Bytes of contexts and windows.
    context_size: usize,
}

impl ChunkTable {
    /// Finds and reads the table of a stored blob.
    pub fn read(blob_file: &Path) -> Result<Self, ChunkTableError> {
        Self::read_with(blob_file, None)
    }

    /// The same of a blob that may be encrypted.
    pub fn read_with(blob_file: &Path, cipher: Option<&Cipher>) -> Result<Self, ChunkTableError> {
        let (_, header, bytes) = read_decoded(blob_file, cipher)?;
        Self::new(header, bytes.into())
    }

    /// Finds and reads the table in the bytes of the meta blob of a gzip layer; one that decodes to more than `limit` bytes is
    /// refused before it is decoded.
    pub fn read_meta(meta: &[u8], limit: u64) -> Result<Self, ChunkTableError> {
        let (_, header, bytes) = decoded_of(&meta, meta.len() as u64, limit, (Path::new("a meta blob"), None))?;
        Self::new(header, bytes.into())
    }

    /// Parses a `<digest>.blob.meta` file: see [`chunk_table_file`]. Keeps its bytes.
    pub fn parse(meta: &Bytes) -> Result<Self, ChunkTableError> {
        let table_len = meta.len().checked_sub(CI_HEADER as usize).filter(|len| len.is_multiple_of(4096));
        let table_len = table_len.ok_or_else(|| invalid("chunk table file", format!("{} bytes", meta.len())))?;
        let (_, header) = read_header(&meta[table_len..])?;
        let len = usize::try_from(header.range.decoded_size).ok();
        let len = len.filter(|len| len.next_multiple_of(4096) == table_len).ok_or_else(|| {
            invalid("chunk table file", format!("{table_len} bytes of a table of {}", header.range.decoded_size))
        })?;
        Self::new(header, meta.slice(..len))
    }

    fn new(header: Header, bytes: Bytes) -> Result<Self, ChunkTableError> {
        let table = Self { header, bytes };
        table.check_contexts()?;
        for index in 0..table.len() {
            let fail = |problem: &str| invalid("chunk table entry", format!("{index}: {problem}"));
            let chunk = table.entry(index).map_err(fail)?;
            if chunk.batch.is_some_and(|batch| batch.index >= header.contexts) {
                return Err(fail("its batch has no context"));
            }
        }
        Ok(table)
    }

    /// Feature bits of the format.
    pub fn features(&self) -> u32 {
        self.header.features
    }

    /// Where it lies in the blob, and how it is stored there.
    pub fn range(&self) -> ChunkTableRange {
        self.header.range
    }

    /// Chunks of the blob.
    pub fn len(&self) -> u32 {
        self.header.entries
    }

    /// Whether the blob has no chunks.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The chunk with this index.
    pub fn chunk(&self, index: u32) -> Option<ChunkInfo> {
        // Each was read when the table was made.
        (index < self.len()).then(|| self.entry(index).ok()).flatten()
    }

    /// All chunks of the blob, by index.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkInfo> {
        (0..self.len()).map_while(|index| self.chunk(index))
    }

    /// The batch with this number; none in a gzip layer.
    pub fn batch(&self, index: u32) -> Option<Batch> {
        let start = self.header.context_offset.checked_add(index as usize * CONTEXT)?;
        let known = index < self.header.contexts && !self.is_zran();
        known.then(|| self.bytes.get(start..start + CONTEXT).map(Batch::from_context)).flatten()
    }

    /// Whether the blob is a gzip layer, and its batches are what is inflated from a [`context`](Self::context).
    pub fn is_zran(&self) -> bool {
        self.header.features & features::ZRAN != 0
    }

    /// The context with this number, of a gzip layer.
    pub fn context(&self, index: u32) -> Option<InflateContext> {
        // Each was read when the table was made.
        (self.is_zran() && index < self.header.contexts).then(|| self.read_context(index).ok()).flatten()
    }

    fn entry(&self, index: u32) -> Result<ChunkInfo, &'static str> {
        let unit = entry_size(self.header.features);
        let start = index as usize * unit;
        let bytes = self.bytes.get(start..start + unit).ok_or("it lies behind the table")?;
        if unit == 16 {
            return ChunkInfo::from_v1(bytes);
        }
        if ChunkInfo::is_zran(bytes) != self.is_zran() {
            return Err("it is of a gzip layer and the others are not, or the other way round");
        }
        if ChunkInfo::is_encrypted(bytes) != (self.header.features & features::ENCRYPTED != 0) {
            return Err("it is encrypted and its blob is not, or the other way round");
        }
        ChunkInfo::from_v2(bytes)
    }
}

/// The chunk table of a stored blob as registries carry it next to the bootstrap (`image/<digest>.blob.meta`): the
/// decoded table, zeroes up to a multiple of 4096, the header as it is in the blob.
pub fn chunk_table_file(blob_file: &Path) -> Result<Vec<u8>, ChunkTableError> {
    chunk_table_file_with(blob_file, None)
}

/// The same of a blob that may be encrypted. The copy is not.
pub fn chunk_table_file_with(blob_file: &Path, cipher: Option<&Cipher>) -> Result<Vec<u8>, ChunkTableError> {
    let (header, _, table) = read_decoded(blob_file, cipher)?;
    Ok(table_file(&header, table))
}

/// The same from table and header alone, as they lie in the blob from `offset` on.
#[cfg(feature = "oci")]
pub(crate) fn chunk_table_file_of(
    stored: &[u8],
    offset: u64,
    cipher: Option<&Cipher>,
) -> Result<Vec<u8>, ChunkTableError> {
    let short = || invalid("chunk table", format!("{} bytes at {offset}", stored.len()));
    let (table, header) = stored.split_at(stored.len().checked_sub(CI_HEADER as usize).ok_or_else(short)?);
    let (stored_header, header) = read_header(&open_header(header, cipher)?)?;
    header.check_end(offset + table.len() as u64)?;
    if header.range.offset != offset {
        return Err(short());
    }
    Ok(table_file(&stored_header, header.decode(table, cipher)?))
}

/// Whether such a file has lost its table and is the header alone: the converter of the Nydus snapshotter decompresses zstd and
/// nothing else, and writes no more than that of a table in lz4.
#[cfg(feature = "oci")]
pub(crate) fn is_header_alone(file: &[u8]) -> bool {
    file.len() as u64 == CI_HEADER && read_header(file).is_ok_and(|(_, header)| header.range.decoded_size > 0)
}

fn table_file(header: &CiHeader, mut table: Vec<u8>) -> Vec<u8> {
    table.resize(table.len().next_multiple_of(4096), 0);
    table.extend_from_slice(&encode::header_block(header));
    table
}

impl Header {
    /// A table ends where its header starts.
    fn check_end(&self, end: u64) -> Result<(), ChunkTableError> {
        let ChunkTableRange { offset, encoded_size, .. } = self.range;
        if offset.checked_add(encoded_size) == Some(end) {
            return Ok(());
        }
        let problem = format!("{encoded_size} bytes at {offset} do not end at the header at {end}");
        Err(invalid("chunk table", problem))
    }

    fn decode(&self, stored: &[u8], cipher: Option<&Cipher>) -> Result<Vec<u8>, ChunkTableError> {
        let decoded = codec::open(cipher, self.range.compressor, stored, self.range.decoded_size as usize);
        decoded.map_err(|error| invalid("chunk table", error.to_string()))
    }
}

/// A header as readers see it.
fn open_header(stored: &[u8], cipher: Option<&Cipher>) -> Result<Vec<u8>, ChunkTableError> {
    let opened = codec::open(cipher, Compressor::None, stored, stored.len());
    opened.map_err(|error| invalid("chunk table header", error.to_string()))
}

/// Header, also as readers see it, and decoded table of a stored blob.
fn read_decoded(path: &Path, cipher: Option<&Cipher>) -> Result<(CiHeader, Header, Vec<u8>), ChunkTableError> {
    let failed = |source| ChunkTableError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    decoded_of(&file, size, u64::MAX, (path, cipher))
}

/// The same of `size` bytes, of which errors speak as `path`. The table has at most `limit` bytes.
fn decoded_of(
    file: &impl ReadAt,
    size: u64,
    limit: u64,
    (path, cipher): (&Path, Option<&Cipher>),
) -> Result<(CiHeader, Header, Vec<u8>), ChunkTableError> {
    let failed = |source| ChunkTableError::Io { path: path.to_owned(), source };
    // Its end is that of the file, or that of a member when files follow it.
    let members = members(file, size).map_err(failed)?;
    let end = members.iter().find(|member| member.name == TABLE_NAME).map_or(size, |member| member.range.end);
    let start =
        end.checked_sub(CI_HEADER).ok_or_else(|| invalid("blob", format!("{size} bytes have no chunk table")))?;
    let mut header = vec![0; CI_HEADER as usize];
    file.read_exact_at(&mut header, start).map_err(failed)?;
    let (stored_header, header) = read_header(&open_header(&header, cipher)?)?;
    let ChunkTableRange { offset, encoded_size, decoded_size, .. } = header.range;
    header.check_end(start)?;
    if decoded_size > limit {
        return Err(invalid(
            "chunk table",
            format!("it decodes to {decoded_size} bytes, at most {limit} are expected"),
        ));
    }
    let mut stored = vec![0; encoded_size as usize];
    file.read_exact_at(&mut stored, offset).map_err(failed)?;
    Ok((stored_header, header, header.decode(&stored, cipher)?))
}

/// Bytes of an entry.
pub(crate) fn entry_size(bits: u32) -> usize {
    if bits & features::CHUNK_INFO_V2 != 0 { 24 } else { 16 }
}

/// Whether a decoded table of this size can hold the entries. One with batches may have a context for each chunk, one of a
/// gzip layer also a window for each context.
pub(crate) fn size_fits(decoded_size: u64, entries: u32, bits: u32) -> bool {
    let table = u64::from(entries) * entry_size(bits) as u64;
    let context = match bits & (features::BATCH | features::ZRAN) {
        features::BATCH => CONTEXT,
        features::ZRAN => CONTEXT + WINDOW,
        _ => 0,
    };
    let contexts = (u64::from(entries) * context as u64).min(MAX_CONTEXTS);
    (table..=table + contexts).contains(&decoded_size)
}

fn read_header(bytes: &[u8]) -> Result<(CiHeader, Header), ChunkTableError> {
    let what = "chunk table header";
    let (stored, _) = CiHeader::read_from_prefix(bytes).map_err(|_| invalid(what, "it is too short"))?;
    let magic = layout::CI_MAGIC.to_le_bytes();
    if stored.magic.get() != layout::CI_MAGIC || !bytes.ends_with(&magic) {
        return Err(invalid(what, "no magic at both ends"));
    }
    let bits = stored.features.get();
    if bits & features::TARFS != 0 {
        return Err(ChunkTableError::Unsupported { what: "tarfs mode" });
    }
    if bits & features::ENCRYPTED != 0 && bits & features::CHUNK_INFO_V2 == 0 {
        return Err(invalid(what, format!("feature bits {bits:#x}: encryption, and entries that cannot say so")));
    }
    let entries = stored.entries.get();
    if entries > layout::MAX_CHUNKS + 1 {
        return Err(invalid(what, format!("{entries} entries")));
    }
    let (encoded_size, decoded_size) = (stored.encoded_size.get(), stored.decoded_size.get());
    if !size_fits(decoded_size, entries, bits) || encoded_size > decoded_size {
        return Err(invalid(what, format!("{entries} entries in {decoded_size} bytes, stored {encoded_size}")));
    }
    let code = stored.compressor.get();
    let compressor = Compressor::from_code(code);
    let compressor = compressor.ok_or_else(|| invalid(what, format!("unknown compressor {code}")))?;
    let range = ChunkTableRange { offset: stored.offset.get(), encoded_size, decoded_size, compressor };
    let (context_offset, context_size, contexts) = contexts(&stored)?;
    Ok((stored, Header { features: bits, entries, range, context_offset, contexts, context_size }))
}

/// Where the contexts of batches or of a gzip layer start, their bytes with all windows, and their number.
fn contexts(header: &CiHeader) -> Result<(usize, usize, u32), ChunkTableError> {
    let bits = header.features.get();
    let zran = bits & features::ZRAN != 0;
    if bits & features::BATCH == 0 && !zran {
        return Ok((0, 0, 0));
    }
    let (offset, size, count) = (header.context_offset.get(), header.context_size.get(), header.context_count.get());
    let table = u64::from(header.entries.get()) * entry_size(bits) as u64;
    let without_windows = u64::from(count) * CONTEXT as u64;
    let fits = bits & features::CHUNK_INFO_V2 != 0
        && (size == without_windows || zran && size > without_windows)
        && !(zran && bits & features::BATCH != 0)
        && offset >= table
        && offset.checked_add(size).is_some_and(|end| end <= header.decoded_size.get());
    match (usize::try_from(offset), usize::try_from(size)) {
        (Ok(offset), Ok(size)) if fits => Ok((offset, size, count)),
        _ => Err(invalid("chunk table header", format!("{count} contexts in {size} bytes at {offset}"))),
    }
}

#[cfg(test)]
mod tests;
