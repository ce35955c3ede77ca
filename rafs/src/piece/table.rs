//! The table of a blob's pieces, and decoding by it.

use bytes::Bytes;
use shoal_proto::{BlobId, DecodedId};

use super::{Chunk, Piece, PieceTableError, VerifyError};
use crate::codec;
use crate::layout::BLOCK;

/// All pieces of one blob, as one image describes them.
///
/// Memory is proportional to the number of pieces that the image names, not to [`len`](Self::len).
#[derive(Debug)]
pub struct PieceTable {
    blob: BlobId,
    encoded_size: u64,
    len: u32,
    /// Sorted by number, and thereby by the indexes of their chunks; dense when the image names every piece.
    pieces: Vec<Piece>,
}

impl PieceTable {
    /// A table of `len` pieces, of which `pieces` (in any order) are named.
    ///
    /// Refused: numbers out of range or twice, empty chunks, ranges that overlap or run against the order of the
    /// numbers, encoded ranges behind `encoded_size`. So no two pieces ever share a byte of a stored blob, but for those of
    /// a gzip layer: their encoded ranges only start in order. Where they are [kept](Piece::kept), these do not overlap either.
    pub fn new(blob: BlobId, encoded_size: u64, len: u32, mut pieces: Vec<Piece>) -> Result<Self, PieceTableError> {
        pieces.sort_unstable_by_key(|piece| piece.number);
        let (mut number, mut index, mut encoded, mut kept, mut decoded) = (0, 0, 0, 0, 0);
        for piece in &pieces {
            let fail = |index, problem| PieceTableError::Chunk { index, problem };
            let fail_first = |problem| fail(piece.first_index(), problem);
            piece.check().map_err(fail_first)?;
            if piece.number >= len {
                return Err(fail_first("its number is not below the number of pieces of the blob"));
            }
            if piece.number < number {
                return Err(fail_first("it is described twice"));
            }
            if piece.encoded_offset < encoded {
                return Err(fail_first("its encoded range overlaps that of an earlier chunk"));
            }
            if piece.kept_offset < kept {
                return Err(fail_first("it is kept where an earlier one is"));
            }
            for chunk in piece.chunks() {
                if chunk.index < index {
                    return Err(fail(chunk.index, "it is described twice"));
                }
                if chunk.decoded_offset < decoded {
                    return Err(fail(chunk.index, "its decoded range overlaps that of an earlier chunk"));
                }
                index = chunk.index.saturating_add(1);
                decoded = chunk.decoded_offset + u64::from(chunk.decoded_len);
            }
            number = piece.number + 1;
            let end = piece.encoded().end;
            kept = piece.kept().end;
            encoded = if piece.context().is_some() { piece.encoded_offset } else { end };
            if end > encoded_size {
                return Err(fail_first("its encoded range ends behind the blob"));
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
        let position = self.pieces.binary_search_by_key(&piece, |piece| piece.number).ok()?;
        self.pieces.get(position)
    }

    /// Number of the piece that holds a chunk, if the image names the chunk.
    pub fn piece_of_chunk(&self, chunk_index: u32) -> Option<u32> {
        self.find(chunk_index).map(|(piece, _)| piece.number)
    }

    /// The chunk with this index, if the image names it.
    pub fn chunk(&self, chunk_index: u32) -> Option<&Chunk> {
        self.find(chunk_index).map(|(_, chunk)| chunk)
    }

    fn find(&self, chunk_index: u32) -> Option<(&Piece, &Chunk)> {
        // In a blob without batches of which everything is named, chunks and pieces have the same numbers.
        let same = self.pieces.get(chunk_index as usize).filter(|piece| piece.first_index() == chunk_index);
        let piece = same.or_else(|| {
            let behind = self.pieces.partition_point(|piece| piece.first_index() <= chunk_index);
            self.pieces.get(behind.checked_sub(1)?)
        })?;
        let position = piece.chunks().binary_search_by_key(&chunk_index, |chunk| chunk.index).ok()?;
        Some((piece, &piece.chunks()[position]))
    }

    /// Every named piece with its number, in order.
    pub fn pieces(&self) -> impl ExactSizeIterator<Item = (u32, &Piece)> {
        self.pieces.iter().map(|piece| (piece.number, piece))
    }

    /// Names the blob's decoded form as far as the image names it: equal for two images exactly when they name the same
    /// pieces of the same blob and agree about each.
    ///
    /// BLAKE3 of: the label `shoal decoded 1`, the blob's id (32 bytes), and number (4, little-endian) and
    /// [fingerprint](Piece::fingerprint) (32) of each piece in order.
    pub fn decoded_id(&self) -> DecodedId {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"shoal decoded 1").update(self.blob.as_bytes());
        for (number, piece) in self.pieces() {
            hasher.update(&number.to_le_bytes()).update(piece.fingerprint().as_bytes());
        }
        DecodedId::new(*hasher.finalize().as_bytes())
    }

    /// Length in bytes of the blob's decoded form as far as the image names it: whole blocks, with holes where it names
    /// nothing.
    pub fn decoded_form_len(&self) -> u64 {
        let last = self.pieces.last().and_then(|piece| piece.chunks().last());
        let end = last.map_or(0, |chunk| chunk.decoded_offset + u64::from(chunk.decoded_len));
        end.next_multiple_of(BLOCK)
    }

    /// Bytes on disk that the decoded form takes up at most, without its holes.
    pub fn decoded_form_bytes(&self) -> u64 {
        let chunks = self.pieces.iter().flat_map(|piece| piece.chunks());
        // In a tar a chunk need not start at a block.
        let taken = |chunk: &Chunk| {
            let end = chunk.decoded_offset + u64::from(chunk.decoded_len);
            end.next_multiple_of(BLOCK) - chunk.decoded_offset / BLOCK * BLOCK
        };
        chunks.map(taken).sum()
    }

    /// Decodes a piece and checks length and digest of each of its named chunks: the one place where bytes become
    /// trusted.
    pub fn decode(&self, piece: u32, encoded: &[u8]) -> Result<DecodedPiece, VerifyError> {
        let blob = self.blob;
        let expected = self.piece(piece).ok_or(VerifyError::Unnamed { blob, piece })?;
        if encoded.len() != expected.encoded_len as usize {
            let (expected, found) = (expected.encoded_len.into(), encoded.len() as u64);
            return Err(VerifyError::EncodedLength { blob, piece, expected, found });
        }
        let decoded_len = expected.decoded_len() as usize;
        let bytes = expected.decode(encoded).map_err(|source| VerifyError::Decode { blob, piece, source })?;
        let verified = expected.members().map(|(chunk, offset)| {
            // The table was refused unless every member lies in its piece.
            let bytes = bytes.slice(offset as usize..offset as usize + chunk.decoded_len as usize);
            let found = codec::digest(chunk.digest.algorithm, &bytes);
            if found != chunk.digest {
                return Err(VerifyError::Digest { blob, chunk: chunk.index, expected: chunk.digest, found });
            }
            Ok((chunk.index, bytes))
        });
        Ok(DecodedPiece { blob, decoded_len, chunks: verified.collect::<Result<_, _>>()? })
    }
}

/// The verified content of a piece.
#[derive(Debug, Clone)]
pub struct DecodedPiece {
    blob: BlobId,
    decoded_len: usize,
    /// By index. All of them are slices of one buffer.
    chunks: Vec<(u32, Bytes)>,
}

impl DecodedPiece {
    /// The blob that it is a part of.
    pub fn blob(&self) -> BlobId {
        self.blob
    }

    /// Bytes that it keeps in memory.
    pub fn decoded_len(&self) -> usize {
        self.decoded_len
    }

    /// All decoded bytes of a chunk, if it is in this piece and the image names it. Keeps the whole piece in memory.
    pub fn chunk(&self, chunk_index: u32) -> Option<Bytes> {
        let position = self.chunks.binary_search_by_key(&chunk_index, |(index, _)| *index).ok()?;
        Some(self.chunks[position].1.clone())
    }

    /// Every named chunk of the piece with its index.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = (u32, &Bytes)> {
        self.chunks.iter().map(|(index, bytes)| (*index, bytes))
    }
}
