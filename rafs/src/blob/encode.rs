//! A chunk table as it is stored in a new blob.

use std::io;

use zerocopy::{FromZeros, IntoBytes};

use super::{Batch, ChunkInfo, entry_size};
use crate::cipher::{self, Cipher};
use crate::codec::{self, Compressor};
use crate::layout::{self, CI_HEADER, CiHeader, features};

/// What follows the entries of a table.
#[derive(Debug, Default)]
pub(crate) struct Contexts {
    /// Those that entries name by number.
    pub(super) count: u32,
    /// 40 bytes each; then, in a gzip layer, all windows.
    pub(super) bytes: Vec<u8>,
}

impl Contexts {
    /// Those of batches.
    pub(crate) fn of_batches(batches: &[Batch]) -> Self {
        let bytes = batches.iter().flat_map(|batch| batch.to_context()).collect();
        Self { count: batches.len() as u32, bytes }
    }
}

/// A chunk table with its header.
#[derive(Debug)]
pub(crate) struct EncodedTable {
    /// Entries, then contexts, as readers see them.
    pub(crate) decoded: Vec<u8>,
    /// The same as it is stored, unless it is stored as it is.
    stored: Option<Vec<u8>>,
    /// How it is stored.
    pub(crate) compressor: Compressor,
    pub(crate) header: CiHeader,
    cipher: Option<Cipher>,
}

impl EncodedTable {
    /// The table of a blob with these chunks and contexts, to lie at `offset` in its file. Of the feature bits
    /// [`CHUNK_INFO_V2`](features::CHUNK_INFO_V2) decides the form of the entries; contexts need it. The table is compressed
    /// with `compressor` where that makes it smaller, then encrypted with `cipher`.
    pub(crate) fn new(
        chunks: impl Iterator<Item = ChunkInfo>,
        contexts: &Contexts,
        bits: u32,
        offset: u64,
        (compressor, cipher): (Compressor, Option<&Cipher>),
    ) -> io::Result<Self> {
        let v2 = bits & features::CHUNK_INFO_V2 != 0;
        debug_assert!(v2 || contexts.count == 0);
        let mut decoded = Vec::new();
        for chunk in chunks {
            if v2 { decoded.extend(chunk.to_v2(bits)) } else { decoded.extend(chunk.to_v1()) }
        }
        let context_offset = decoded.len();
        let entries = context_offset / entry_size(bits);
        decoded.extend_from_slice(&contexts.bytes);
        let compressed = codec::Encoder::new(compressor)?.encode(&decoded)?;
        let compressed = compressed.filter(|table| cipher.is_none() || cipher::is_unmistakable(table));
        let compressor = if compressed.is_some() { compressor } else { Compressor::None };
        let stored = match cipher {
            Some(cipher) => {
                let mut table = compressed.unwrap_or_else(|| decoded.clone());
                if table.len() > cipher::MAX_UNIT {
                    let problem = format!(
                        "a chunk table of {} bytes, at most {} can be encrypted",
                        table.len(),
                        cipher::MAX_UNIT
                    );
                    return Err(io::Error::other(problem));
                }
                cipher.seal(&mut table);
                Some(table)
            }
            None => compressed,
        };
        let mut header = CiHeader {
            magic: layout::CI_MAGIC.into(),
            features: bits.into(),
            compressor: compressor.code().into(),
            entries: (entries as u32).into(),
            offset: offset.into(),
            encoded_size: (stored.as_ref().unwrap_or(&decoded).len() as u64).into(),
            decoded_size: (decoded.len() as u64).into(),
            ..CiHeader::new_zeroed()
        };
        if contexts.count > 0 {
            header.context_offset = (context_offset as u64).into();
            header.context_size = (contexts.bytes.len() as u64).into();
            header.context_count = contexts.count.into();
        }
        Ok(Self { decoded, stored, compressor, header, cipher: cipher.cloned() })
    }

    /// The table as it is stored.
    pub(crate) fn stored(&self) -> &[u8] {
        self.stored.as_ref().unwrap_or(&self.decoded)
    }

    /// The header as readers see it.
    pub(crate) fn header_block(&self) -> Vec<u8> {
        header_block(&self.header)
    }

    /// The header as it follows the table.
    pub(crate) fn stored_header(&self) -> Vec<u8> {
        let mut header = self.header_block();
        if let Some(cipher) = &self.cipher {
            cipher.seal(&mut header);
        }
        header
    }
}

/// A header as it is stored: zeroes behind it, and the magic once more at the end.
pub(super) fn header_block(header: &CiHeader) -> Vec<u8> {
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(CI_HEADER as usize - 4, 0);
    bytes.extend_from_slice(&layout::CI_MAGIC.to_le_bytes());
    bytes
}
