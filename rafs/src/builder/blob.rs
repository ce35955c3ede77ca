//! The data blob under construction: gives chunks their places, appends them, remembers them.
//!
//! A chunk has its place in the decoded address space as soon as it is known to be new. Where it lies in the stored blob is
//! only known when everything before it was appended: a batch may still be on its way through a worker.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::output::{BlobFile, BlobTarget};
use super::tree::ChunkPlace;
use super::{BuildError, BuildOptions};
use crate::blob::{Batch, ChunkInfo, InBatch};
use crate::cipher::Cipher;
use crate::layout::{self, BLOCK, ChunkRecord, chunk_flags};

/// What a chunk is known by: digest and decoded length. One algorithm is meant.
pub(super) type ChunkKey = ([u8; 32], u32);

/// Chunks that need not be stored again. Written by the thread that appends, read by the workers, both for the length of
/// one look-up.
#[derive(Debug, Clone, Default)]
pub(super) struct Known(Arc<Mutex<HashMap<ChunkKey, ChunkPlace>>>);

impl Known {
    pub(super) fn new(chunks: HashMap<ChunkKey, ChunkPlace>) -> Self {
        Self(Arc::new(Mutex::new(chunks)))
    }

    pub(super) fn contains(&self, key: &ChunkKey) -> bool {
        self.place(key).is_some()
    }

    fn place(&self, key: &ChunkKey) -> Option<ChunkPlace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key).copied()
    }

    fn insert(&self, key: ChunkKey, place: ChunkPlace) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, place);
    }
}

/// Whether a chunk must be stored.
#[derive(Debug, Clone, Copy)]
pub(super) enum Placed {
    /// It lies there already.
    Known(ChunkPlace),
    /// It is new and has this place.
    New(ChunkPlace),
}

/// A batch in the stored blob.
#[derive(Debug, Clone, Copy)]
struct StoredBatch {
    /// Index of its first chunk; the others follow.
    first: u32,
    encoded_offset: u64,
    batch: Batch,
}

/// Writes the chunks of a blob.
pub(super) struct BlobWriter {
    pub(super) options: BuildOptions,
    pub(super) file: BlobFile,
    pub(super) cipher: Option<Cipher>,
    decoded_size: u64,
    known: Known,
    /// By index.
    pub(super) records: Vec<ChunkRecord>,
    batches: Vec<StoredBatch>,
}

impl BlobWriter {
    /// A writer of a new blob, for what is not in `known`.
    pub(super) fn new(target: BlobTarget<'_>, options: BuildOptions, known: Known) -> Result<Self, BuildError> {
        let cipher = options.encryption.cipher()?;
        let file = BlobFile::new(target)?;
        Ok(Self { options, file, cipher, decoded_size: 0, known, records: Vec::new(), batches: Vec::new() })
    }

    pub(super) fn known(&self) -> Known {
        self.known.clone()
    }

    /// Bytes of chunks written so far.
    pub(super) fn encoded_size(&self) -> u64 {
        self.file.len()
    }

    /// Size of the decoded address space so far.
    pub(super) fn decoded_size(&self) -> u64 {
        self.decoded_size
    }

    /// Finds the place of a chunk, or gives it one. New chunks are to be stored in the order of their places.
    pub(super) fn place(&mut self, key: ChunkKey, crc32: u32, file_offset: u64) -> Result<Placed, BuildError> {
        if let Some(place) = self.known.place(&key) {
            return Ok(Placed::Known(place));
        }
        let index = self.records.len() as u32;
        self.check_limits(index)?;
        let encrypted = if self.cipher.is_some() { chunk_flags::ENCRYPTED } else { 0 };
        let (digest, decoded_len) = key;
        self.records.push(ChunkRecord {
            digest,
            blob: 0.into(),
            flags: (chunk_flags::HAS_CRC | encrypted).into(),
            // What a chunk in a batch keeps, as other builders have it.
            encoded_size: 0.into(),
            encoded_offset: 0.into(),
            decoded_size: decoded_len.into(),
            decoded_offset: self.decoded_size.into(),
            file_offset: file_offset.into(),
            index: index.into(),
            crc32: crc32.into(),
        });
        let place = ChunkPlace { blob: 0, index, block: (self.decoded_size / BLOCK) as u32 };
        self.decoded_size += u64::from(decoded_len).next_multiple_of(BLOCK);
        self.known.insert(key, place);
        Ok(Placed::New(place))
    }

    fn check_limits(&self, index: u32) -> Result<(), BuildError> {
        let too_large = |what, found, limit| Err(BuildError::TooLarge { what, found, limit });
        if index >= layout::MAX_CHUNKS {
            return too_large("distinct chunks", u64::from(index) + 1, layout::MAX_CHUNKS.into());
        }
        // Strictly below, so that the number of blocks fits 32 bits.
        let decoded_size = self.decoded_size + u64::from(self.options.chunk_size);
        if decoded_size >= layout::MAX_DECODED {
            return too_large("bytes of distinct chunks", decoded_size, layout::MAX_DECODED);
        }
        Ok(())
    }

    /// Appends a chunk as a unit of its own.
    pub(super) fn store(&mut self, index: u32, stored: &[u8], compressed: bool) -> Result<(), BuildError> {
        let record = &mut self.records[index as usize];
        record.encoded_offset = self.file.len().into();
        record.encoded_size = (stored.len() as u32).into();
        if compressed {
            record.flags |= chunk_flags::COMPRESSED;
        }
        self.write(stored)
    }

    /// Appends chunks as one unit: those from `first` on, whose bytes, back to back, are the `decoded_len` of the batch.
    pub(super) fn store_batch(&mut self, first: u32, stored: &[u8], decoded_len: u32) -> Result<(), BuildError> {
        let encoded_len = stored.len() as u32;
        self.batches.push(StoredBatch {
            first,
            encoded_offset: self.file.len(),
            batch: Batch { encoded_len, decoded_len },
        });
        self.write(stored)
    }

    fn write(&mut self, stored: &[u8]) -> Result<(), BuildError> {
        let (found, limit) = (self.file.len() + stored.len() as u64, layout::MAX_ENCODED);
        if found > limit {
            return Err(BuildError::TooLarge { what: "bytes of stored chunks", found, limit });
        }
        self.file.write(stored)
    }

    /// The batches in stored order.
    pub(super) fn batches(&self) -> Vec<Batch> {
        self.batches.iter().map(|stored| stored.batch).collect()
    }

    /// What the chunk table says of each chunk, by index.
    pub(super) fn chunks(&self) -> impl Iterator<Item = ChunkInfo> {
        let mut batches = (0..).zip(&self.batches).peekable();
        // Batch that is being passed, and where the next chunk starts in it.
        let mut open: Option<(u32, StoredBatch, u32)> = None;
        self.records.iter().map(move |record| {
            if let Some((number, stored)) = batches.next_if(|(_, stored)| stored.first == record.index.get()) {
                open = Some((number, *stored, 0));
            }
            // Chunks of batches have no stored bytes of their own.
            let batched = open.as_mut().filter(|_| record.encoded_size.get() == 0);
            match batched {
                None => plain(record),
                Some((number, stored, offset)) => {
                    let batch = InBatch { index: *number, offset: *offset };
                    *offset += record.decoded_size.get();
                    // The format has chunks of batches compressed, whether or not the batch is.
                    let (encoded_offset, compressed) = (stored.encoded_offset, true);
                    ChunkInfo { encoded_offset, compressed, batch: Some(batch), ..plain(record) }
                }
            }
        })
    }
}

/// A checksum is left out: readers that find one compare it in place of the digest, which says more.
fn plain(record: &ChunkRecord) -> ChunkInfo {
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
