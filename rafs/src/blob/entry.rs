//! One entry of a chunk table, in both of its forms, and the context of a batch.

use crate::cipher::{self, Cipher};
use crate::layout::features;

/// Where a chunk lies in its blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkInfo {
    /// Offset in the stored blob, below 2^40.
    pub encoded_offset: u64,
    /// Stored bytes, 1 to 2^24; 0 in a batch, which has stored bytes only as a whole. In a gzip layer no more than a hint.
    pub encoded_len: u32,
    /// Offset in the decoded address space, a multiple of 4096 below 2^44.
    pub decoded_offset: u64,
    /// Decoded bytes, 1 to 2^24.
    pub decoded_len: u32,
    /// Whether it is compressed.
    pub compressed: bool,
    /// CRC-32C of the decoded bytes, in tables of the second form.
    pub crc32: Option<u32>,
    /// The batch, or in a gzip layer the context, that it is a part of, in tables of the second form.
    pub batch: Option<InBatch>,
}

/// Where a chunk lies in a batch, or in what is inflated from a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InBatch {
    /// Number of the batch or context in its blob.
    pub index: u32,
    /// Where the chunk starts in what that decodes to.
    pub offset: u32,
}

/// Small chunks that were compressed as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Stored bytes.
    pub encoded_len: u32,
    /// Bytes of its chunks together.
    pub decoded_len: u32,
}

impl Batch {
    /// Whether it is compressed with the blob's compressor; the format has no flag for it.
    pub fn is_compressed(self) -> bool {
        self.encoded_len != self.decoded_len
    }

    /// The same in an encrypted blob, where less than a block grows.
    pub(crate) fn is_compressed_in(self, cipher: Option<&Cipher>) -> bool {
        match cipher {
            Some(_) => self.encoded_len != cipher::sealed_len(self.decoded_len),
            None => self.is_compressed(),
        }
    }

    /// From its context of 40 bytes: stored size, decoded size, reserved.
    pub(super) fn from_context(bytes: &[u8]) -> Self {
        let [sizes] = words(bytes);
        Self { encoded_len: sizes as u32, decoded_len: (sizes >> 32) as u32 }
    }

    /// The 40 bytes of [`from_context`](Self::from_context).
    pub(super) fn to_context(self) -> [u8; 40] {
        let mut bytes = [0; 40];
        bytes[..4].copy_from_slice(&self.encoded_len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.decoded_len.to_le_bytes());
        bytes
    }
}

/// Flags of an entry of the second form.
mod v2_flags {
    pub(super) const COMPRESSED: u64 = 1;
    pub(super) const ZRAN: u64 = 2;
    pub(super) const BATCH: u64 = 4;
    pub(super) const ENCRYPTED: u64 = 8;
    pub(super) const HAS_CRC: u64 = 0x10;
}

const OFFSET_BITS: u64 = (1 << 40) - 1;
const BLOCK_ADDRESS: u64 = 0xFFF_FFFF_F000;

fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
    }
    words
}

impl ChunkInfo {
    /// From 16 bytes: word 0 has the decoded offset in place (bits 12..44), word 1 the encoded offset (bits 0..40); both
    /// have the size - 1, its lower 20 bits on top (44..64), its upper 4 below (8..12 and 40..44).
    pub(super) fn from_v1(bytes: &[u8]) -> Result<Self, &'static str> {
        let [decoded, encoded] = words(bytes);
        if decoded & 0xFF != 0 {
            return Err("reserved bits are set");
        }
        let decoded_len = ((decoded >> 44) | (decoded >> 8 & 0xF) << 20) as u32 + 1;
        let encoded_len = ((encoded >> 44) | (encoded >> 40 & 0xF) << 20) as u32 + 1;
        Ok(Self {
            encoded_offset: encoded & OFFSET_BITS,
            encoded_len,
            decoded_offset: decoded & BLOCK_ADDRESS,
            decoded_len,
            compressed: encoded_len != decoded_len,
            crc32: None,
            batch: None,
        })
    }

    /// The 16 bytes of [`from_v1`](Self::from_v1).
    pub(super) fn to_v1(self) -> [u8; 16] {
        let sizes = |len: u32, upper: u32| {
            let size = u64::from(len - 1);
            (size & 0xF_FFFF) << 44 | (size >> 20) << upper
        };
        let decoded = self.decoded_offset | sizes(self.decoded_len, 8);
        let encoded = self.encoded_offset | sizes(self.encoded_len, 40);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&decoded.to_le_bytes());
        bytes[8..].copy_from_slice(&encoded.to_le_bytes());
        bytes
    }

    /// From 24 bytes: word 0 decoded offset / 4096 (0..32), size - 1 (32..56), flags (56..64); word 1 encoded offset
    /// (0..40), size (40..64); word 2 the checksum, or offset in the batch or context (0..32) and its number (32..64).
    pub(super) fn from_v2(bytes: &[u8]) -> Result<Self, &'static str> {
        use v2_flags::{BATCH, COMPRESSED, ENCRYPTED, HAS_CRC, ZRAN};
        let [decoded, encoded, data] = words(bytes);
        let flags = decoded >> 56;
        if flags & !(COMPRESSED | ZRAN | BATCH | ENCRYPTED | HAS_CRC) != 0 {
            return Err("it has unknown flags");
        }
        let (batched, zran) = (flags & BATCH != 0, flags & ZRAN != 0);
        if (batched || zran) && flags & HAS_CRC != 0 || batched && zran {
            return Err("it has a checksum in place of its batch, or two batches");
        }
        let encoded_len = (encoded >> 40) as u32;
        if (encoded_len == 0) != batched && !zran {
            return Err(if batched { "it has stored bytes beside its batch" } else { "it has no stored bytes" });
        }
        Ok(Self {
            encoded_offset: encoded & OFFSET_BITS,
            encoded_len,
            decoded_offset: (decoded & 0xFFFF_FFFF) << 12,
            decoded_len: (decoded >> 32 & 0xFF_FFFF) as u32 + 1,
            compressed: flags & COMPRESSED != 0,
            crc32: (flags & HAS_CRC != 0).then_some(data as u32),
            batch: (batched || zran).then_some(InBatch { index: (data >> 32) as u32, offset: data as u32 }),
        })
    }

    /// Whether an entry of the second form is one of a gzip layer.
    pub(super) fn is_zran(bytes: &[u8]) -> bool {
        bytes.get(7).is_some_and(|flags| u64::from(*flags) & v2_flags::ZRAN != 0)
    }

    /// Whether an entry of the second form is one of an encrypted blob.
    pub(super) fn is_encrypted(bytes: &[u8]) -> bool {
        bytes.get(7).is_some_and(|flags| u64::from(*flags) & v2_flags::ENCRYPTED != 0)
    }

    /// The 24 bytes of [`from_v2`](Self::from_v2), in a table with these feature bits: they say whether what it is a part of is
    /// a batch or a context, and whether it is encrypted. A chunk has a checksum or one of those, not both.
    pub(super) fn to_v2(self, bits: u32) -> [u8; 24] {
        debug_assert!(self.crc32.is_none() || self.batch.is_none());
        let grouped = if bits & features::ZRAN != 0 { v2_flags::ZRAN } else { v2_flags::BATCH };
        let flag = |set: bool, flag: u64| if set { flag } else { 0 };
        let flags = flag(self.compressed, v2_flags::COMPRESSED)
            | flag(self.batch.is_some(), grouped)
            | flag(bits & features::ENCRYPTED != 0, v2_flags::ENCRYPTED)
            | flag(self.crc32.is_some(), v2_flags::HAS_CRC);
        let batch = self.batch.map(|batch| u64::from(batch.index) << 32 | u64::from(batch.offset));
        let words = [
            flags << 56 | u64::from(self.decoded_len - 1) << 32 | self.decoded_offset >> 12,
            u64::from(self.encoded_len) << 40 | self.encoded_offset,
            batch.or(self.crc32.map(u64::from)).unwrap_or(0),
        ];
        let mut bytes = [0; 24];
        for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_first_form_round_trips(
            encoded_offset in 0..1u64 << 40,
            encoded_len in 1..=1u32 << 24,
            block in 0..1u64 << 32,
            decoded_len in 1..=1u32 << 24,
        ) {
            let compressed = encoded_len != decoded_len;
            let decoded_offset = block << 12;
            let chunk = ChunkInfo { encoded_offset, encoded_len, decoded_offset, decoded_len, compressed, crc32: None, batch: None };
            prop_assert_eq!(ChunkInfo::from_v1(&chunk.to_v1()), Ok(chunk));
        }

        #[test]
        fn the_second_form_round_trips(
            encoded_offset in 0..1u64 << 40,
            encoded_len in 1..1u32 << 24,
            block in 0..1u64 << 32,
            decoded_len in 1..=1u32 << 24,
            compressed: bool,
            data in prop_oneof![
                Just((None, None)),
                any::<u32>().prop_map(|crc32| (Some(crc32), None)),
                (any::<u32>(), any::<u32>()).prop_map(|(index, offset)| (None, Some(InBatch { index, offset }))),
            ],
        ) {
            let (crc32, batch) = data;
            // A chunk in a batch has no stored bytes of its own.
            let encoded_len = if batch.is_some() { 0 } else { encoded_len };
            let decoded_offset = block << 12;
            let chunk = ChunkInfo { encoded_offset, encoded_len, decoded_offset, decoded_len, compressed, crc32, batch };
            prop_assert_eq!(ChunkInfo::from_v2(&chunk.to_v2(features::BATCH)), Ok(chunk));
        }

        #[test]
        fn any_bytes_of_the_second_form_are_read_or_refused(bytes in any::<[u8; 24]>()) {
            if let Ok(chunk) = ChunkInfo::from_v2(&bytes) {
                prop_assert!(chunk.decoded_offset.is_multiple_of(4096));
                prop_assert!((1..=1 << 24).contains(&chunk.decoded_len));
            }
        }

        #[test]
        fn contexts_round_trip(encoded_len: u32, decoded_len: u32) {
            let batch = Batch { encoded_len, decoded_len };
            prop_assert_eq!(Batch::from_context(&batch.to_context()), batch);
        }

        #[test]
        fn chunks_of_gzip_layers_round_trip(
            encoded_offset in 0..1u64 << 40,
            encoded_len in 0..1u32 << 24,
            block in 0..1u64 << 32,
            decoded_len in 1..=1u32 << 24,
            index: u32,
            offset: u32,
        ) {
            let chunk = ChunkInfo {
                encoded_offset,
                encoded_len,
                decoded_offset: block << 12,
                decoded_len,
                compressed: true,
                crc32: None,
                batch: Some(InBatch { index, offset }),
            };
            let bytes = chunk.to_v2(features::ZRAN);
            prop_assert!(ChunkInfo::is_zran(&bytes));
            prop_assert_eq!(ChunkInfo::from_v2(&bytes), Ok(chunk));
        }
    }

    #[test]
    fn the_second_form_is_read() {
        let words: [u64; 3] = [0x11 << 56 | 0xFFF << 32 | 3, 100 << 40 | 7, 0xDEAD_BEEF];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let expected = ChunkInfo {
            encoded_offset: 7,
            encoded_len: 100,
            decoded_offset: 3 * 4096,
            decoded_len: 4096,
            compressed: true,
            crc32: Some(0xDEAD_BEEF),
            batch: None,
        };
        assert_eq!(ChunkInfo::from_v2(&bytes), Ok(expected));
    }

    #[test]
    fn chunks_of_batches_are_read() {
        let entry = |flags: u64, encoded_len: u64, data: u64| -> Vec<u8> {
            let words = [flags << 56 | 99 << 32 | 3, encoded_len << 40 | 7, data];
            words.iter().flat_map(|word| word.to_le_bytes()).collect()
        };
        let chunk = ChunkInfo::from_v2(&entry(5, 0, 2 << 32 | 100)).unwrap();
        assert_eq!(chunk.batch, Some(InBatch { index: 2, offset: 100 }));
        assert_eq!((chunk.encoded_offset, chunk.encoded_len, chunk.decoded_len), (7, 0, 100));
        for wrong in [entry(5, 1, 0), entry(0x15, 0, 0), entry(1, 0, 0), entry(6, 0, 0), entry(0x20, 1, 0)] {
            assert!(ChunkInfo::from_v2(&wrong).is_err());
        }
        let context = [&100u32.to_le_bytes()[..], &300u32.to_le_bytes(), &[0; 32]].concat();
        let batch = Batch::from_context(&context);
        assert_eq!((batch.encoded_len, batch.decoded_len, batch.is_compressed()), (100, 300, true));
    }
}
