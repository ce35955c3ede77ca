//! What a blob that no image describes (an ordinary layer) is cut into: pieces of 1 MiB, each with its BLAKE3 digest.
//!
//! There is one such list of a blob, and whoever has verified the whole blob against its sha256 can make it. It is no proof of
//! anything: who got it from somebody else may exchange pieces by it, and compares the sha256 of all of them before the blob is
//! used.
//!
//! ```text
//! 0..8    "shoalHL1"
//! 8..16   bytes of the blob, little-endian
//! 16..    32 bytes for each piece
//! ```

/// In front of every list; the last character is the version.
const MAGIC: &[u8; 8] = b"shoalHL1";
const HEADER: usize = 16;
const DIGEST: usize = 32;

/// Why bytes are not a hash list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HashListError {
    /// They begin with something else.
    #[error("not a hash list of this version")]
    Magic,
    /// The blob is empty, or larger than [`HashList::MAX_BLOB`].
    #[error("a hash list of a blob of {0} bytes")]
    Size(u64),
    /// Not as many digests as a blob of that size has pieces.
    #[error("a hash list of {found} bytes, where one of a blob of {size} bytes has {expected}")]
    Length {
        /// Bytes of the blob.
        size: u64,
        /// Bytes that its list has.
        expected: usize,
        /// Bytes that there are.
        found: usize,
    },
}

/// The pieces of a plain blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashList {
    size: u64,
    digests: Vec<[u8; DIGEST]>,
}

impl HashList {
    /// Bytes of every piece but the last.
    pub const PIECE: u64 = 1 << 20;
    /// Most bytes of a blob.
    pub const MAX_BLOB: u64 = 256 << 30;
    /// Most bytes of an encoded list: about 8 MiB.
    pub const MAX_ENCODED: u64 = HEADER as u64 + Self::MAX_BLOB / Self::PIECE * DIGEST as u64;

    /// The list of a blob of `size` bytes.
    ///
    /// # Errors
    /// [`HashListError`] when there is no such blob, or it has another number of pieces.
    pub fn new(size: u64, digests: Vec<[u8; DIGEST]>) -> Result<Self, HashListError> {
        let expected = Self::encoded_len(size)?;
        let found = HEADER + digests.len() * DIGEST;
        if found != expected {
            return Err(HashListError::Length { size, expected, found });
        }
        Ok(Self { size, digests })
    }

    /// What [`encode`](Self::encode) made, from wherever it comes.
    ///
    /// # Errors
    /// [`HashListError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, HashListError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(HashListError::Magic)?;
        let (size, digests) = rest.split_first_chunk::<8>().ok_or(HashListError::Magic)?;
        let size = u64::from_le_bytes(*size);
        let (expected, found) = (Self::encoded_len(size)?, bytes.len());
        if found != expected {
            return Err(HashListError::Length { size, expected, found });
        }
        let digests = digests.chunks_exact(DIGEST);
        let digests = digests.map(|digest| digest.try_into().expect("chunks of that many bytes")).collect();
        Ok(Self { size, digests })
    }

    /// See the module.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + self.digests.len() * DIGEST);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.size.to_le_bytes());
        self.digests.iter().for_each(|digest| bytes.extend_from_slice(digest));
        bytes
    }

    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The BLAKE3 digest of each piece.
    pub fn digests(&self) -> &[[u8; DIGEST]] {
        &self.digests
    }

    fn encoded_len(size: u64) -> Result<usize, HashListError> {
        if size == 0 || size > Self::MAX_BLOB {
            return Err(HashListError::Size(size));
        }
        Ok(HEADER + size.div_ceil(Self::PIECE) as usize * DIGEST)
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn what_is_no_list_is_refused_by_its_reason() {
        let list = HashList::new(HashList::PIECE + 1, vec![[1; 32], [2; 32]]).unwrap();
        let bytes = list.encode();
        assert_eq!(HashList::parse(&bytes), Ok(list));
        assert_eq!(HashList::parse(b""), Err(HashListError::Magic));
        assert_eq!(HashList::parse(&bytes[..12]), Err(HashListError::Magic));
        assert!(matches!(HashList::parse(&bytes[..79]), Err(HashListError::Length { expected: 80, found: 79, .. })));
        let sized = |size: u64| [&MAGIC[..], &size.to_le_bytes()].concat();
        assert_eq!(HashList::parse(&sized(0)), Err(HashListError::Size(0)));
        assert_eq!(HashList::parse(&sized(u64::MAX)), Err(HashListError::Size(u64::MAX)));
        // One piece to the last byte, and one byte more.
        assert!(HashList::new(HashList::PIECE, vec![[0; 32]]).is_ok());
        assert!(HashList::new(HashList::PIECE + 1, vec![[0; 32]]).is_err());
        assert!(HashList::new(HashList::PIECE, vec![[0; 32]; 2]).is_err());
    }

    #[test]
    fn the_longest_list_fits_an_answer() {
        assert_eq!(HashList::encoded_len(HashList::MAX_BLOB), Ok(HashList::MAX_ENCODED as usize));
        const { assert!(HashList::MAX_ENCODED < crate::MAX_ANSWER) };
    }

    proptest! {
        #[test]
        fn round_trips(digests in vec(any::<[u8; 32]>(), 1..20), less in 0..HashList::PIECE) {
            let list = HashList::new(digests.len() as u64 * HashList::PIECE - less, digests).unwrap();
            prop_assert_eq!(HashList::parse(&list.encode()), Ok(list));
        }

        #[test]
        fn any_bytes_are_a_list_or_an_error(bytes in vec(any::<u8>(), 0..200)) {
            let bytes = [&MAGIC[..], &bytes].concat();
            if let Ok(list) = HashList::parse(&bytes) {
                prop_assert_eq!(list.encode(), bytes);
            }
        }
    }
}
