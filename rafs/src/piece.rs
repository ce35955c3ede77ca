//! Pieces: the units of transfer and storage, and the one place where bytes become trusted.
//!
//! A [`PieceTable`] describes all pieces of one blob, numbered over the whole blob. An image may name only some of them
//! (a merged image drops files of its layers): the others have a number but no [`Piece`]. For the blobs read so far a
//! piece is one chunk and its number is the chunk's index in the blob's chunk table.
//!
//! [`PieceTable::decode`] is the only way from encoded bytes to file content in this project. It returns bytes exactly
//! when every chunk of the piece has the length and the digest that the bootstrap states. It does no IO.

use std::ops::Range;

use bytes::Bytes;
use shoal_proto::{Algorithm, BlobId, Digest, Fingerprint};

use crate::codec::{self, Compressor, DecodeError};

/// Why encoded bytes were not accepted as a piece.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The image does not name this piece, so there is nothing to verify it with.
    #[error("piece {piece} of blob {blob} is not named by the image")]
    Unnamed {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
    },
    /// More or fewer bytes than the piece has.
    #[error("piece {piece} of blob {blob} has {expected} encoded bytes, got {found}")]
    EncodedLength {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
        /// Bytes that the image states.
        expected: u64,
        /// Bytes that came.
        found: u64,
    },
    /// The compressed data is malformed, or decodes to another length than the image states.
    #[error("chunk {chunk} of blob {blob} does not decode")]
    Decode {
        /// The blob.
        blob: BlobId,
        /// Index of the chunk.
        chunk: u32,
        /// What the decoder said.
        #[source]
        source: DecodeError,
    },
    /// The decoded bytes are not those that the image names.
    #[error("chunk {chunk} of blob {blob} must have digest {expected}, found {found}")]
    Digest {
        /// The blob.
        blob: BlobId,
        /// Index of the chunk.
        chunk: u32,
        /// Digest in the image.
        expected: Digest,
        /// Digest of the bytes.
        found: Digest,
    },
}

/// Why a list of chunks is not a table of pieces.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("chunk {index}: {problem}")]
pub struct PieceTableError {
    /// Index of the offending chunk in the blob.
    pub index: u32,
    /// Which rule it breaks.
    pub problem: &'static str,
}

/// A chunk as the chunk table of the image describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index in the blob's chunk table.
    pub index: u32,
    /// What the decoded bytes hash to.
    pub digest: Digest,
    /// Where it starts in the blob's decoded address space, a multiple of 4096.
    pub decoded_offset: u64,
    /// Decoded bytes, at most the chunk size.
    pub decoded_len: u32,
    /// Whether its encoded bytes are compressed with the blob's compressor, or the decoded bytes as they are.
    pub compressed: bool,
}

/// The smallest range of a blob that decodes alone. So far always a single chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    encoded_offset: u64,
    encoded_len: u32,
    compressor: Compressor,
    chunks: [Chunk; 1],
}

impl Piece {
    /// A piece that is one plain chunk.
    pub fn plain(chunk: Chunk, encoded_offset: u64, encoded_len: u32, compressor: Compressor) -> Self {
        Self { encoded_offset, encoded_len, compressor, chunks: [chunk] }
    }

    /// Where it lies in the stored blob.
    pub fn encoded(&self) -> Range<u64> {
        self.encoded_offset..self.encoded_offset + u64::from(self.encoded_len)
    }

    /// Decoded bytes of all its chunks.
    pub fn decoded_len(&self) -> u64 {
        self.chunks.iter().map(|chunk| u64::from(chunk.decoded_len)).sum()
    }

    /// Its chunks that the image names, by index.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// A hash over everything that decides what the piece must be and where: two images agree about a piece exactly when
    /// their fingerprints are equal.
    ///
    /// BLAKE3 of: the label `shoal piece 1`, compressor (1 byte), encoded offset (8) and length (4), number of chunks
    /// (4), then for each chunk index (4), algorithm (1), digest (32), decoded offset (8) and length (4), compressed (1);
    /// integers little-endian.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"shoal piece 1");
        hasher.update(&[self.compressor.code() as u8]);
        hasher.update(&self.encoded_offset.to_le_bytes());
        hasher.update(&self.encoded_len.to_le_bytes());
        hasher.update(&(self.chunks.len() as u32).to_le_bytes());
        for chunk in &self.chunks {
            hasher.update(&chunk.index.to_le_bytes());
            hasher.update(&[match chunk.digest.algorithm {
                Algorithm::Blake3 => 0,
                Algorithm::Sha256 => 1,
            }]);
            hasher.update(&chunk.digest.bytes);
            hasher.update(&chunk.decoded_offset.to_le_bytes());
            hasher.update(&chunk.decoded_len.to_le_bytes());
            hasher.update(&[u8::from(chunk.compressed)]);
        }
        Fingerprint::new(*hasher.finalize().as_bytes())
    }

    fn number(&self) -> u32 {
        self.chunks[0].index
    }

    fn check(&self) -> Result<(), &'static str> {
        let chunk = &self.chunks[0];
        if chunk.decoded_len == 0 || self.encoded_len == 0 {
            return Err("it is empty");
        }
        if !chunk.compressed && self.encoded_len != chunk.decoded_len {
            return Err("it is stored raw, but encoded and decoded sizes differ");
        }
        if self.encoded_len > chunk.decoded_len {
            return Err("it is larger encoded than decoded");
        }
        if chunk.compressed && self.compressor == Compressor::None {
            return Err("it is compressed in a blob without compressor");
        }
        if self.encoded_offset.checked_add(self.encoded_len.into()).is_none() {
            return Err("its encoded range overflows");
        }
        if chunk.decoded_offset.checked_add(chunk.decoded_len.into()).is_none() {
            return Err("its decoded range overflows");
        }
        Ok(())
    }
}

/// All pieces of one blob, as one image describes them.
///
/// Memory is proportional to the number of pieces that the image names, not to [`len`](Self::len).
#[derive(Debug)]
pub struct PieceTable {
    blob: BlobId,
    encoded_size: u64,
    len: u32,
    /// Sorted by number; dense when the image names every piece.
    pieces: Vec<Piece>,
}

impl PieceTable {
    /// A table of `len` pieces, of which `pieces` (in any order) are named.
    ///
    /// Refused: numbers out of range or twice, empty chunks, ranges that overlap or run against the order of the
    /// numbers, encoded ranges behind `encoded_size`. So no two pieces ever share a byte of a stored blob.
    pub fn new(blob: BlobId, encoded_size: u64, len: u32, mut pieces: Vec<Piece>) -> Result<Self, PieceTableError> {
        pieces.sort_unstable_by_key(Piece::number);
        let (mut number, mut encoded, mut decoded) = (0, 0, 0);
        for piece in &pieces {
            let fail = |problem| PieceTableError { index: piece.number(), problem };
            piece.check().map_err(fail)?;
            let chunk = &piece.chunks[0];
            if chunk.index >= len {
                return Err(fail("its index is not below the number of chunks of the blob"));
            }
            if chunk.index < number {
                return Err(fail("it is described twice"));
            }
            if piece.encoded_offset < encoded {
                return Err(fail("its encoded range overlaps that of an earlier chunk"));
            }
            if chunk.decoded_offset < decoded {
                return Err(fail("its decoded range overlaps that of an earlier chunk"));
            }
            number = chunk.index + 1;
            encoded = piece.encoded().end;
            decoded = chunk.decoded_offset + u64::from(chunk.decoded_len);
            if encoded > encoded_size {
                return Err(fail("its encoded range ends behind the blob"));
            }
        }
        pieces.shrink_to_fit();
        Ok(Self { blob, encoded_size, len, pieces })
    }

    /// The blob.
    pub fn blob(&self) -> BlobId {
        self.blob
    }

    /// Pieces of the whole blob, named or not.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the blob has no pieces.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Size of the stored blob in bytes.
    pub fn encoded_size(&self) -> u64 {
        self.encoded_size
    }

    /// The piece with this number, if the image names it.
    pub fn piece(&self, piece: u32) -> Option<&Piece> {
        if self.pieces.len() == self.len as usize {
            return self.pieces.get(piece as usize);
        }
        let position = self.pieces.binary_search_by_key(&piece, Piece::number).ok()?;
        self.pieces.get(position)
    }

    /// Number of the piece that holds a chunk, if the image names the chunk.
    pub fn piece_of_chunk(&self, chunk_index: u32) -> Option<u32> {
        self.piece(chunk_index).map(Piece::number)
    }

    /// The chunk with this index, if the image names it.
    pub fn chunk(&self, chunk_index: u32) -> Option<&Chunk> {
        self.piece(chunk_index).map(|piece| &piece.chunks[0])
    }

    /// Every named piece with its number, in order.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = (u32, &Piece)> {
        self.pieces.iter().map(|piece| (piece.number(), piece))
    }

    /// Decodes a piece and checks length and digest of each of its chunks: the one place where bytes become trusted.
    pub fn decode(&self, piece: u32, encoded: &[u8]) -> Result<DecodedPiece, VerifyError> {
        let blob = self.blob;
        let expected = self.piece(piece).ok_or(VerifyError::Unnamed { blob, piece })?;
        if encoded.len() != expected.encoded_len as usize {
            let (expected, found) = (expected.encoded_len.into(), encoded.len() as u64);
            return Err(VerifyError::EncodedLength { blob, piece, expected, found });
        }
        let chunk = &expected.chunks[0];
        let compressor = if chunk.compressed { expected.compressor } else { Compressor::None };
        let bytes = codec::decode(compressor, encoded, chunk.decoded_len as usize)
            .map_err(|source| VerifyError::Decode { blob, chunk: chunk.index, source })?;
        let found = codec::digest(chunk.digest.algorithm, &bytes);
        if found != chunk.digest {
            return Err(VerifyError::Digest { blob, chunk: chunk.index, expected: chunk.digest, found });
        }
        Ok(DecodedPiece { first: chunk.index, chunks: vec![bytes.into()] })
    }
}

/// The verified content of a piece.
#[derive(Debug, Clone)]
pub struct DecodedPiece {
    first: u32,
    chunks: Vec<Bytes>,
}

impl DecodedPiece {
    /// All decoded bytes of a chunk, if it is in this piece.
    pub fn chunk(&self, chunk_index: u32) -> Option<Bytes> {
        let position = chunk_index.checked_sub(self.first)?;
        self.chunks.get(position as usize).cloned()
    }

    /// Every chunk of the piece with its index.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = (u32, &Bytes)> {
        self.chunks.iter().enumerate().map(|(position, bytes)| (self.first + position as u32, bytes))
    }
}

#[cfg(test)]
mod tests;
