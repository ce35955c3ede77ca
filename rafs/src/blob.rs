//! The chunk table ("CI table") at the end of a data blob: where each chunk of the whole blob lies.
//!
//! ```text
//! chunk data                      back to back, no alignment
//! [tar header]                    in blobs made for registries by other builders
//! chunk table, maybe compressed   16 (v1) or 24 (v2) bytes per chunk
//! header, 4096 bytes              magic, entries, offset, sizes ... magic
//! [tar header, more files]
//! ```
//!
//! The bootstrap's chunk table says the same and has the digests, so reading files needs none of this: the table matters
//! to `check`, to pushes (which put it next to the bootstrap) and to numbering the pieces of a blob without a bootstrap.
//! Contexts of batched and ZRAN chunks are refused.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::codec::{self, Compressor};
use crate::layout::{self, CI_HEADER, CiHeader, features};

mod entry;

pub use entry::ChunkInfo;

/// Most files that may follow the chunk table in a blob.
const MAX_TRAILERS: usize = 8;

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

fn invalid(structure: &'static str, problem: impl Into<String>) -> ChunkTableError {
    ChunkTableError::Invalid { structure, problem: problem.into() }
}

/// A chunk table, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkTable {
    /// Feature bits of the format.
    pub features: u32,
    /// How the table is stored in the blob.
    pub compressor: Compressor,
    /// Where it starts in the blob.
    pub offset: u64,
    /// Its stored size.
    pub encoded_size: u64,
    /// All chunks of the blob by index.
    pub chunks: Vec<ChunkInfo>,
}

impl ChunkTable {
    /// Finds and reads the table of a stored blob.
    pub fn read(blob_file: &Path) -> Result<Self, ChunkTableError> {
        let (header, table) = read_decoded(blob_file)?;
        Self::decode(&header, &table)
    }

    /// Parses a `<digest>.blob.meta` file: see [`chunk_table_file`].
    pub fn parse(meta: &[u8]) -> Result<Self, ChunkTableError> {
        let table_len = meta.len().checked_sub(CI_HEADER as usize).filter(|len| len.is_multiple_of(4096));
        let table_len = table_len.ok_or_else(|| invalid("chunk table file", format!("{} bytes", meta.len())))?;
        let header = read_header(&meta[table_len..])?;
        let len =
            usize::try_from(header.decoded_size.get()).ok().filter(|len| len.next_multiple_of(4096) == table_len);
        let len = len.ok_or_else(|| {
            invalid("chunk table file", format!("{table_len} bytes of a table of {}", header.decoded_size))
        })?;
        Self::decode(&header, &meta[..len])
    }

    fn decode(header: &CiHeader, table: &[u8]) -> Result<Self, ChunkTableError> {
        let unit = entry_size(header.features.get());
        let chunks = table.chunks_exact(unit).enumerate().map(|(index, bytes)| {
            let chunk = if unit == 16 { ChunkInfo::from_v1(bytes) } else { ChunkInfo::from_v2(bytes) };
            chunk.map_err(|problem| invalid("chunk table entry", format!("{index}: {problem}")))
        });
        Ok(Self {
            features: header.features.get(),
            compressor: compressor(header)?,
            offset: header.offset.get(),
            encoded_size: header.encoded_size.get(),
            chunks: chunks.collect::<Result<_, _>>()?,
        })
    }

    /// The bytes that follow the chunk data at `offset` in a new blob (table and header), and the table's description.
    pub(crate) fn encode(
        chunks: &[ChunkInfo],
        offset: u64,
        compressor: Compressor,
    ) -> io::Result<(Vec<u8>, CiHeader)> {
        let decoded: Vec<u8> = chunks.iter().flat_map(|chunk| chunk.to_v1()).collect();
        let smaller = codec::Encoder::new(compressor)?.encode(&decoded)?;
        let stored_with = if smaller.is_some() { compressor } else { Compressor::None };
        let decoded_size = decoded.len() as u64;
        let mut bytes = smaller.unwrap_or(decoded);
        let header = CiHeader {
            magic: layout::CI_MAGIC.into(),
            features: (features::ALIGNED | features::CAP_TAR_TOC).into(),
            compressor: stored_with.code().into(),
            entries: (chunks.len() as u32).into(),
            offset: offset.into(),
            encoded_size: (bytes.len() as u64).into(),
            decoded_size: decoded_size.into(),
            ..CiHeader::new_zeroed()
        };
        append_header(&mut bytes, &header);
        Ok((bytes, header))
    }
}

/// The chunk table of a stored blob as registries carry it next to the bootstrap (`image/<digest>.blob.meta`): the
/// decoded table, zeroes up to a multiple of 4096, the header as it is in the blob.
pub fn chunk_table_file(blob_file: &Path) -> Result<Vec<u8>, ChunkTableError> {
    let (header, mut bytes) = read_decoded(blob_file)?;
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    append_header(&mut bytes, &header);
    Ok(bytes)
}

fn append_header(bytes: &mut Vec<u8>, header: &CiHeader) {
    let start = bytes.len();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(start + CI_HEADER as usize - 4, 0);
    bytes.extend_from_slice(&layout::CI_MAGIC.to_le_bytes());
}

/// Header and decoded table of a stored blob.
fn read_decoded(path: &Path) -> Result<(CiHeader, Vec<u8>), ChunkTableError> {
    let failed = |source| ChunkTableError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let end = find_end(&file, size).map_err(failed)?;
    let start =
        end.checked_sub(CI_HEADER).ok_or_else(|| invalid("blob", format!("{size} bytes have no chunk table")))?;
    let mut header = vec![0; CI_HEADER as usize];
    file.read_exact_at(&mut header, start).map_err(failed)?;
    let header = read_header(&header)?;
    let (offset, encoded_size) = (header.offset.get(), header.encoded_size.get());
    if offset.checked_add(encoded_size) != Some(start) {
        let problem = format!("{encoded_size} bytes at {offset} do not end at the header at {start}");
        return Err(invalid("chunk table", problem));
    }
    let mut stored = vec![0; encoded_size as usize];
    file.read_exact_at(&mut stored, offset).map_err(failed)?;
    let table = codec::decode(compressor(&header)?, &stored, header.decoded_size.get() as usize)
        .map_err(|error| invalid("chunk table", error.to_string()))?;
    Ok((header, table))
}

/// End of the header: that of the file, or of the tar member `blob.meta` when files follow it. Tar headers stand behind
/// their data here, so the way leads backwards.
fn find_end(file: &File, size: u64) -> io::Result<u64> {
    let mut end = size;
    for _ in 0..MAX_TRAILERS {
        let Some(start) = end.checked_sub(512) else { break };
        let mut block = [0; 512];
        file.read_exact_at(&mut block, start)?;
        let header = tar::Header::from_byte_slice(&block);
        if header.as_gnu().is_none() || !checksum_matches(header) {
            break;
        }
        if header.path_bytes().as_ref() == b"blob.meta" {
            return Ok(start);
        }
        let Some(previous) = header.entry_size().ok().and_then(|len| start.checked_sub(len)) else { break };
        end = previous;
    }
    Ok(size)
}

/// Whether a tar header is one.
pub(crate) fn checksum_matches(header: &tar::Header) -> bool {
    let mut copy = header.clone();
    copy.set_cksum();
    copy.cksum().ok().zip(header.cksum().ok()).is_some_and(|(expected, found)| expected == found)
}

fn compressor(header: &CiHeader) -> Result<Compressor, ChunkTableError> {
    let code = header.compressor.get();
    Compressor::from_code(code).ok_or_else(|| invalid("chunk table header", format!("unknown compressor {code}")))
}

fn entry_size(bits: u32) -> usize {
    if bits & features::CHUNK_INFO_V2 != 0 { 24 } else { 16 }
}

fn read_header(bytes: &[u8]) -> Result<CiHeader, ChunkTableError> {
    let what = "chunk table header";
    let (header, _) = CiHeader::read_from_prefix(bytes).map_err(|_| invalid(what, "it is too short"))?;
    let magic = layout::CI_MAGIC.to_le_bytes();
    if header.magic.get() != layout::CI_MAGIC || !bytes.ends_with(&magic) {
        return Err(invalid(what, "no magic at both ends"));
    }
    let bits = header.features.get();
    let refused = [
        (features::ZRAN, "zran contexts"),
        (features::BATCH, "batches"),
        (features::ENCRYPTED, "encryption"),
        (features::TARFS, "tarfs mode"),
    ];
    if let Some((_, what)) = refused.into_iter().find(|(bit, _)| bits & bit != 0) {
        return Err(ChunkTableError::Unsupported { what });
    }
    let entries = header.entries.get();
    if entries > layout::MAX_CHUNKS + 1 {
        return Err(invalid(what, format!("{entries} entries")));
    }
    let (encoded, decoded) = (header.encoded_size.get(), header.decoded_size.get());
    if decoded != u64::from(entries) * entry_size(bits) as u64 || encoded > decoded {
        return Err(invalid(what, format!("{entries} entries in {decoded} bytes, stored {encoded}")));
    }
    Ok(header)
}

#[cfg(test)]
mod tests;
