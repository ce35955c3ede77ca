//! The data blob under construction: appends chunks, remembers them, names the file by its sha256.

use std::collections::HashMap;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use shoal_proto::{Algorithm, BlobId};
use zerocopy::FromZeros;

use super::pipeline::Prepared;
use super::tree::ChunkPlace;
use super::{BuildError, BuildOptions};
use crate::blob::{ChunkInfo, ChunkTable};
use crate::layout::{self, BLOCK, BlobEntry, ChunkRecord, CiHeader, chunk_flags, features};

/// Chunks that need not be stored again, by digest. Written by the thread that appends, read by the workers, both for
/// the length of one look-up.
#[derive(Debug, Clone, Default)]
pub(super) struct Known(Arc<Mutex<HashMap<[u8; 32], ChunkPlace>>>);

impl Known {
    pub(super) fn contains(&self, digest: &[u8; 32]) -> bool {
        self.place(digest).is_some()
    }

    fn place(&self, digest: &[u8; 32]) -> Option<ChunkPlace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(digest).copied()
    }

    fn insert(&self, digest: [u8; 32], place: ChunkPlace) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(digest, place);
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

    /// Bytes of chunks written so far.
    pub(super) fn encoded_size(&self) -> u64 {
        self.encoded_size
    }

    /// Place of the chunk; new ones are appended. Two chunks with one digest have one content, so also one length.
    pub(super) fn append(&mut self, chunk: &Prepared, file_offset: u64) -> Result<ChunkPlace, BuildError> {
        if let Some(place) = self.known.place(&chunk.digest) {
            return Ok(place);
        }
        let index = self.records.len() as u32;
        self.check_limits(index)?;
        let stored = if chunk.compressed { &chunk.encoded } else { &chunk.decoded };
        let compressed = if chunk.compressed { chunk_flags::COMPRESSED } else { 0 };
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
        let place = ChunkPlace { blob: 0, index, block: (self.decoded_size / BLOCK) as u32 };
        self.decoded_size += (chunk.decoded.len() as u64).next_multiple_of(BLOCK);
        self.known.insert(chunk.digest, place);
        self.write(stored)?;
        Ok(place)
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

impl FinishedBlob {
    /// How the blob table of a bootstrap describes it.
    pub(super) fn entry(&self, options: BuildOptions) -> BlobEntry {
        let digester = match options.algorithm {
            Algorithm::Blake3 => 0,
            Algorithm::Sha256 => 1,
        };
        let mut blob_id = [0; 64];
        blob_id.copy_from_slice(self.id.to_string().as_bytes());
        BlobEntry {
            blob_id,
            chunk_size: options.chunk_size.into(),
            chunk_count: (self.records.len() as u32).into(),
            compressor: options.compressor.code().into(),
            digester: digester.into(),
            features: (features::ALIGNED | features::CAP_TAR_TOC).into(),
            encoded_size: self.encoded_size.into(),
            decoded_size: self.decoded_size.into(),
            ci_compressor: self.table.compressor,
            ci_offset: self.table.offset,
            ci_encoded_size: self.table.encoded_size,
            ci_decoded_size: self.table.decoded_size,
            ..BlobEntry::new_zeroed()
        }
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
