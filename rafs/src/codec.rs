//! Compressors and digests of chunks. Decoding is bounded by the length that the image states.

use std::cell::RefCell;
use std::io::{Cursor, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use shoal_proto::{Algorithm, Digest};

use crate::cipher::{Cipher, CipherError};

/// Level at which zstd compresses unless told, that of the Nydus builder.
const ZSTD_LEVEL: i32 = 3;
/// Levels of zstd: the negative ones are faster than 1 and compress less.
pub(crate) const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = -7..=22;

/// How the chunks of a blob are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compressor {
    /// Stored as they are.
    None,
    /// Raw LZ4 blocks without a size prefix.
    Lz4,
    /// One gzip member per chunk. Read only.
    Gzip,
    /// Ordinary zstd frames.
    #[default]
    Zstd,
}

impl Compressor {
    /// The number of the format.
    pub fn code(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Gzip => 2,
            Self::Zstd => 3,
        }
    }

    /// From the number of the format.
    pub fn from_code(code: u32) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Gzip, Self::Zstd].into_iter().find(|compressor| compressor.code() == code)
    }
}

impl std::fmt::Display for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// A text that names no compressor that can be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown compressor {found:?}: use zstd, lz4 or none")]
pub struct UnknownCompressor {
    /// What was found.
    pub found: String,
}

impl FromStr for Compressor {
    type Err = UnknownCompressor;

    fn from_str(text: &str) -> Result<Self, UnknownCompressor> {
        match text {
            "none" => Ok(Self::None),
            "lz4" | "lz4_block" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd),
            _ => Err(UnknownCompressor { found: text.chars().take(80).collect() }),
        }
    }
}

/// Why compressed bytes were not accepted.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The decoder refused them.
    #[error("{compressor} data is malformed: {message}")]
    Malformed {
        /// The compressor.
        compressor: Compressor,
        /// What its library said.
        message: String,
    },
    /// They decode to another number of bytes than stated.
    #[error("{compressor} data must decode to {expected} bytes, found {found}")]
    Length {
        /// The compressor.
        compressor: Compressor,
        /// Bytes stated.
        expected: usize,
        /// Bytes found; for data that is too long, some number above `expected`.
        found: usize,
    },
    /// They cannot be decrypted.
    #[error(transparent)]
    Cipher(#[from] CipherError),
}

thread_local! {
    static ZSTD_DECODER: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Decodes to exactly `expected` bytes. Allocates those and no more.
pub(crate) fn decode(compressor: Compressor, encoded: &[u8], expected: usize) -> Result<Vec<u8>, DecodeError> {
    let malformed = |message: String| DecodeError::Malformed { compressor, message };
    let (decoded, found) = match compressor {
        Compressor::None => (encoded.to_vec(), encoded.len()),
        Compressor::Lz4 => {
            let mut decoded = vec![0; expected];
            let found =
                lz4_flex::block::decompress_into(encoded, &mut decoded).map_err(|e| malformed(e.to_string()))?;
            (decoded, found)
        }
        Compressor::Gzip => {
            let mut decoded = Vec::with_capacity(expected);
            let limit = expected as u64 + 1;
            let found = flate2::read::GzDecoder::new(encoded).take(limit).read_to_end(&mut decoded);
            (decoded, found.map_err(|e| malformed(e.to_string()))?)
        }
        Compressor::Zstd => {
            let mut decoded = Vec::with_capacity(expected);
            let found = decode_zstd(encoded, &mut decoded).map_err(|e| malformed(e.to_string()))?;
            (decoded, found)
        }
    };
    if found != expected {
        return Err(DecodeError::Length { compressor, expected, found });
    }
    Ok(decoded)
}

/// Decrypts, where there is a cipher, and decodes to exactly `expected` bytes.
pub(crate) fn open(
    cipher: Option<&Cipher>,
    compressor: Compressor,
    stored: &[u8],
    expected: usize,
) -> Result<Vec<u8>, DecodeError> {
    match (cipher, compressor) {
        (None, compressor) => decode(compressor, stored, expected),
        (Some(cipher), Compressor::None) => {
            let unit = cipher.open(stored, expected)?;
            match unit.len() {
                found if found == expected => Ok(unit),
                found => Err(DecodeError::Length { compressor, expected, found }),
            }
        }
        (Some(cipher), compressor) => decode(compressor, &cipher.open_compressed(stored)?, expected),
    }
}

/// Decodes into the capacity of `decoded`; a frame that needs more is an error.
fn decode_zstd(encoded: &[u8], decoded: &mut Vec<u8>) -> std::io::Result<usize> {
    ZSTD_DECODER.with_borrow_mut(|slot| {
        let decoder = match slot {
            Some(decoder) => decoder,
            None => slot.insert(zstd::bulk::Decompressor::new()?),
        };
        decoder.decompress_to_buffer(encoded, decoded)
    })
}

/// Compresses, or returns `None` where that would not make it smaller.
pub(crate) struct Encoder {
    compressor: Compressor,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Encoder {
    /// An encoder for one thread, at the usual level.
    pub(crate) fn new(compressor: Compressor) -> std::io::Result<Self> {
        Self::with_level(compressor, None)
    }

    /// Like [`new`](Self::new), at one of [`ZSTD_LEVELS`]; the other compressors have none.
    pub(crate) fn with_level(compressor: Compressor, level: Option<i32>) -> std::io::Result<Self> {
        let zstd = match compressor {
            Compressor::Zstd => Some(zstd::bulk::Compressor::new(level.unwrap_or(ZSTD_LEVEL))?),
            Compressor::None | Compressor::Lz4 => None,
            Compressor::Gzip => return Err(std::io::Error::other("gzip blobs are read, not written")),
        };
        Ok(Self { compressor, zstd })
    }

    /// The encoded form if it is smaller than `decoded`.
    pub(crate) fn encode(&mut self, decoded: &[u8]) -> std::io::Result<Option<Vec<u8>>> {
        let mut encoded = Vec::new();
        Ok(self.encode_to(decoded, &mut encoded)?.then_some(encoded))
    }

    /// Appends the encoded form to `encoded` if it is smaller than `decoded`, and says whether it is; if not, nothing is
    /// appended.
    pub(crate) fn encode_to(&mut self, decoded: &[u8], encoded: &mut Vec<u8>) -> std::io::Result<bool> {
        let start = encoded.len();
        match &mut self.zstd {
            Some(zstd) => {
                encoded.reserve(zstd::zstd_safe::compress_bound(decoded.len()));
                let mut end = Cursor::new(&mut *encoded);
                end.set_position(start as u64);
                zstd.compress_to_buffer(decoded, &mut end)?;
            }
            None if self.compressor == Compressor::Lz4 => {
                encoded.resize(start + lz4_flex::block::get_maximum_output_size(decoded.len()), 0);
                let len = lz4_flex::block::compress_into(decoded, &mut encoded[start..]);
                encoded.truncate(start + len.map_err(std::io::Error::other)?);
            }
            None => return Ok(false),
        }
        let smaller = encoded.len() - start < decoded.len();
        if !smaller {
            encoded.truncate(start);
        }
        Ok(smaller)
    }
}

/// The digest of bytes, as chunks have them.
pub fn digest(algorithm: Algorithm, bytes: &[u8]) -> Digest {
    let bytes = match algorithm {
        Algorithm::Blake3 => *blake3::hash(bytes).as_bytes(),
        Algorithm::Sha256 => Sha256::digest(bytes).into(),
    };
    Digest { algorithm, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_compressor_round_trips_and_never_exceeds_the_stated_length() {
        let plain = b"shoal ".repeat(1000);
        for compressor in [Compressor::Lz4, Compressor::Zstd] {
            let encoded = Encoder::new(compressor).unwrap().encode(&plain).unwrap().unwrap();
            assert_eq!(decode(compressor, &encoded, plain.len()).unwrap(), plain);
            for wrong in [0, 1, plain.len() - 1, plain.len() + 1] {
                assert!(decode(compressor, &encoded, wrong).is_err(), "{compressor} {wrong}");
            }
        }
        assert!(matches!(Encoder::new(Compressor::None).unwrap().encode(&plain), Ok(None)));
    }

    #[test]
    fn every_level_round_trips_behind_whatever_the_buffer_holds() {
        let plain: Vec<u8> = (0..50_000u32).flat_map(|n| (n / 7).to_string().into_bytes()).collect();
        let lz4 = (Compressor::Lz4, None);
        for (compressor, level) in ZSTD_LEVELS.map(|level| (Compressor::Zstd, Some(level))).chain([lz4]) {
            let mut encoded = b"before".to_vec();
            let mut encoder = Encoder::with_level(compressor, level).unwrap();
            assert!(encoder.encode_to(&plain, &mut encoded).unwrap());
            assert!(!encoder.encode_to(b"x", &mut encoded).unwrap());
            let encoded = encoded.strip_prefix(b"before").unwrap();
            assert_eq!(decode(compressor, encoded, plain.len()).unwrap(), plain, "{compressor} {level:?}");
        }
    }

    #[test]
    fn bytes_that_do_not_shrink_stay_raw() {
        for compressor in [Compressor::Lz4, Compressor::Zstd] {
            assert_eq!(Encoder::new(compressor).unwrap().encode(b"x").unwrap(), None);
        }
    }

    #[test]
    fn gzip_is_read() {
        use std::io::Write;
        let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        writer.write_all(b"hello hello hello").unwrap();
        let encoded = writer.finish().unwrap();
        assert_eq!(decode(Compressor::Gzip, &encoded, 17).unwrap(), b"hello hello hello");
        assert!(decode(Compressor::Gzip, &encoded, 16).is_err());
        assert!(Encoder::new(Compressor::Gzip).is_err());
    }

    #[test]
    fn names_and_numbers_round_trip() {
        for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
            assert_eq!(compressor.to_string().parse(), Ok(compressor));
            assert_eq!(Compressor::from_code(compressor.code()), Some(compressor));
        }
        assert_eq!(Compressor::from_code(4), None);
        assert!("brotli".parse::<Compressor>().is_err());
    }
}
