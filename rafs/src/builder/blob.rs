//! The data blob under construction: appends chunks, remembers them, names the file by its sha256.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

use super::chunker::Prepared;
use super::{BuildError, BuildOptions};
use crate::blob::{ChunkInfo, ChunkTable};
use crate::layout::{self, BLOCK, ChunkRecord, CiHeader, chunk_flags};

/// Digests of the chunks in the blob with their indexes. Written by the thread that appends, read by the workers, both
/// for the length of one look-up.
#[derive(Debug, Clone, Default)]
pub(super) struct Known(Arc<Mutex<HashMap<[u8; 32], u32>>>);

impl Known {
    pub(super) fn contains(&self, digest: &[u8; 32]) -> bool {
        self.index(digest).is_some()
    }

    fn index(&self, digest: &[u8; 32]) -> Option<u32> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(digest).copied()
    }

    fn insert(&self, digest: [u8; 32], index: u32) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, index);
    }
}

/// A finished blob.
#[derive(Debug)]
pub(super) struct FinishedBlob {
    pub(super) id: BlobId,
    pub(super) encoded_size: u64,
    pub(super) decoded_size: u64,
    /// By index.
    pub(super) records: Vec<ChunkRecord>,
    pub(super) table: CiHeader,
}

/// Writes a blob to a temporary file.
pub(super) struct BlobWriter {
    dir: PathBuf,
    options: BuildOptions,
    file: BufWriter<tempfile::NamedTempFile>,
    hasher: Sha256,
    encoded_size: u64,
    decoded_size: u64,
    known: Known,
    records: Vec<ChunkRecord>,
}

impl BlobWriter {
    pub(super) fn new(dir: &Path, options: BuildOptions) -> Result<Self, BuildError> {
        Ok(Self {
            dir: dir.to_owned(),
            options,
            file: BufWriter::with_capacity(1 << 20, super::temporary(dir)?),
            hasher: Sha256::new(),
            encoded_size: 0,
            decoded_size: 0,
            known: Known::default(),
            records: Vec::new(),
        })
    }

    pub(super) fn known(&self) -> Known {
        self.known.clone()
    }

    /// Index of the chunk; new ones are appended. Two chunks with one digest have one content, so also one length.
    pub(super) fn append(&mut self, chunk: &Prepared, file_offset: u64) -> Result<u32, BuildError> {
        if let Some(index) = self.known.index(&chunk.digest) {
            return Ok(index);
        }
        let index = self.records.len() as u32;
        self.check_limits(index)?;
        let stored = chunk.encoded.as_ref().unwrap_or(&chunk.decoded);
        let compressed = if chunk.encoded.is_some() { chunk_flags::COMPRESSED } else { 0 };
        self.records.push(ChunkRecord {
            digest: chunk.digest,
            blob: 0.into(),
            flags: (compressed | chunk_flags::HAS_CRC).into(),
            encoded_size: (stored.len() as u32).into(),
            decoded_size: (chunk.decoded.len() as u32).into(),
            encoded_offset: self.encoded_size.into(),
            decoded_offset: self.decoded_size.into(),
            file_offset: file_offset.into(),
            index: index.into(),
            crc32: chunk.crc32.into(),
        });
        self.decoded_size += (chunk.decoded.len() as u64).next_multiple_of(BLOCK);
        self.known.insert(chunk.digest, index);
        self.write(stored)?;
        Ok(index)
    }

    fn check_limits(&self, index: u32) -> Result<(), BuildError> {
        let too_large = |what, found, limit| Err(BuildError::TooLarge { what, found, limit });
        if index >= layout::MAX_CHUNKS {
            return too_large("distinct chunks", u64::from(index) + 1, layout::MAX_CHUNKS.into());
        }
        // Room for one more chunk, and for the table and header behind the chunks.
        let table = (u64::from(index) + 1) * 16 + layout::CI_HEADER;
        let chunk = u64::from(self.options.chunk_size);
        if self.encoded_size + chunk + table > layout::MAX_ENCODED {
            return too_large("bytes of stored chunks", self.encoded_size + chunk + table, layout::MAX_ENCODED);
        }
        // Strictly below, so that the number of blocks fits 32 bits.
        if self.decoded_size + chunk >= layout::MAX_DECODED {
            return too_large("bytes of distinct chunks", self.decoded_size + chunk, layout::MAX_DECODED);
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.hasher.update(bytes);
        self.file.write_all(bytes).map_err(BuildError::io("write a blob in", &self.dir))?;
        self.encoded_size += bytes.len() as u64;
        Ok(())
    }

    /// Appends table and header and gives the file its name. No chunks, no blob.
    pub(super) fn finish(mut self) -> Result<Option<FinishedBlob>, BuildError> {
        if self.records.is_empty() {
            return Ok(None);
        }
        let chunks: Vec<_> = self.records.iter().map(chunk_info).collect();
        let (bytes, table) = ChunkTable::encode(&chunks, self.encoded_size, self.options.compressor)
            .map_err(BuildError::io("compress the chunk table of a blob in", &self.dir))?;
        self.write(&bytes)?;
        let id = BlobId::new(self.hasher.finalize().into());
        let path = self.dir.join(id.to_string());
        let file = self.file.into_inner().map_err(|error| BuildError::io("write", &path)(error.into_error()))?;
        super::persist(file, &path)?;
        Ok(Some(FinishedBlob {
            id,
            encoded_size: self.encoded_size,
            decoded_size: self.decoded_size,
            records: self.records,
            table,
        }))
    }
}

fn chunk_info(record: &ChunkRecord) -> ChunkInfo {
    ChunkInfo {
        encoded_offset: record.encoded_offset.get(),
        encoded_len: record.encoded_size.get(),
        decoded_offset: record.decoded_offset.get(),
        decoded_len: record.decoded_size.get(),
        compressed: record.flags.get() & chunk_flags::COMPRESSED != 0,
        crc32: None,
        batch: None,
    }
}
