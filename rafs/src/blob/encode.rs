//! A chunk table as it is stored in a new blob.

use std::io;

use zerocopy::{FromZeros, IntoBytes};

use super::{Batch, ChunkInfo, entry_size};
use crate::codec::{self, Compressor};
use crate::layout::{self, CI_HEADER, CiHeader, features};

/// A chunk table with its header.
#[derive(Debug)]
pub(crate) struct EncodedTable {
    /// Entries, then contexts of batches, as readers see them.
    pub(crate) decoded: Vec<u8>,
    /// The same as it is stored, unless it is stored as it is.
    compressed: Option<Vec<u8>>,
    /// How it is stored.
    pub(crate) compressor: Compressor,
    pub(crate) header: CiHeader,
}

impl EncodedTable {
    /// The table of a blob with these chunks and batches, to lie at `offset` in it. Of the feature bits
    /// [`CHUNK_INFO_V2`](features::CHUNK_INFO_V2) decides the form of the entries; batches need it. The table is compressed
    /// with `compressor` where that makes it smaller.
    pub(crate) fn new(
        chunks: impl Iterator<Item = ChunkInfo>,
        batches: &[Batch],
        bits: u32,
        offset: u64,
        compressor: Compressor,
    ) -> io::Result<Self> {
        let v2 = bits & features::CHUNK_INFO_V2 != 0;
        debug_assert!(v2 || batches.is_empty());
        let mut decoded = Vec::new();
        for chunk in chunks {
            if v2 { decoded.extend(chunk.to_v2()) } else { decoded.extend(chunk.to_v1()) }
        }
        let context_offset = decoded.len();
        let entries = context_offset / entry_size(bits);
        batches.iter().for_each(|batch| decoded.extend(batch.to_context()));
        let compressed = codec::Encoder::new(compressor)?.encode(&decoded)?;
        let compressor = if compressed.is_some() { compressor } else { Compressor::None };
        let mut header = CiHeader {
            magic: layout::CI_MAGIC.into(),
            features: bits.into(),
            compressor: compressor.code().into(),
            entries: (entries as u32).into(),
            offset: offset.into(),
            encoded_size: (compressed.as_ref().unwrap_or(&decoded).len() as u64).into(),
            decoded_size: (decoded.len() as u64).into(),
            ..CiHeader::new_zeroed()
        };
        if !batches.is_empty() {
            header.context_offset = (context_offset as u64).into();
            header.context_size = ((decoded.len() - context_offset) as u64).into();
            header.context_count = (batches.len() as u32).into();
        }
        Ok(Self { decoded, compressed, compressor, header })
    }

    /// The table as it is stored.
    pub(crate) fn stored(&self) -> &[u8] {
        self.compressed.as_ref().unwrap_or(&self.decoded)
    }

    /// The header as it follows the table.
    pub(crate) fn header_block(&self) -> Vec<u8> {
        header_block(&self.header)
    }
}

/// A header as it is stored: zeroes behind it, and the magic once more at the end.
pub(super) fn header_block(header: &CiHeader) -> Vec<u8> {
    let mut bytes = header.as_bytes().to_vec();
    bytes.resize(CI_HEADER as usize - 4, 0);
    bytes.extend_from_slice(&layout::CI_MAGIC.to_le_bytes());
    bytes
}
