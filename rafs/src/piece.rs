//! Pieces: the units of transfer and storage, and the one place where bytes become trusted.
//!
//! A [`PieceTable`] describes all pieces of one blob, numbered over the whole blob. An image may name only some of them
//! (a merged image drops files of its layers): the others have a number but no [`Piece`]. A piece is one chunk, or a
//! batch: small chunks that were compressed as one. Of a batch, too, an image may name some chunks and not others; only
//! those that it names are ever handed out. In a gzip layer, a batch is what is inflated from one
//! [context](crate::InflateContext) on; as blocks of deflate do not end where chunks do, the stored ranges of two may
//! overlap. Whoever keeps pieces gives each bytes of its own all the same ([`Piece::kept`]): the same content has many
//! encodings, so a piece that verifies need not have the bytes that its neighbour needs.
//!
//! [`PieceTable::decode`] is the only way from encoded bytes to file content in this project. It returns bytes exactly
//! when every named chunk of the piece has the length and the digest that the bootstrap states. It does no IO.
//!
//! Of an encrypted blob a piece is what lies in the blob: it is stored and passed on encrypted. Digests are those of plain
//! chunks, so whoever verifies decrypts, with the key that is in the bootstrap as the digests are.

use std::ops::Range;

use bytes::Bytes;
use shoal_proto::{Algorithm, BlobId, Digest, Fingerprint};

use crate::blob::Batch;
use crate::cipher::{self, Cipher};
use crate::codec::{self, Compressor, DecodeError};
use crate::layout::CHUNK_SIZES;
use crate::zran::InflateContext;

mod group;
mod table;

pub(crate) use group::{Named, agreement, group};
pub use table::{DecodedPiece, PieceTable};

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
    #[error("piece {piece} of blob {blob} does not decode")]
    Decode {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
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
pub enum PieceTableError {
    /// A chunk breaks a rule.
    #[error("chunk {index}: {problem}")]
    Chunk {
        /// Index of the chunk in the blob.
        index: u32,
        /// Which rule it breaks.
        problem: &'static str,
    },
    /// The blob's chunk table is of another length than the bootstrap says.
    #[error("the chunk table of the blob has {found} chunks, the bootstrap says {expected}")]
    Length {
        /// Chunks by the bootstrap.
        expected: u32,
        /// Entries of the table.
        found: u32,
    },
    /// The bootstrap alone does not say where the chunks of this blob lie.
    #[error("its chunk table is not there, and nothing else tells how its chunks are decoded")]
    NoChunkTable,
    /// The chunks of this blob have no digests.
    #[error(
        "it is a tar of which no chunk has a digest, so no part of it can be verified: such images are read from files only"
    )]
    NoDigests,
}

/// A chunk as the chunk table of the image describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Index in the blob's chunk table.
    pub index: u32,
    /// What the decoded bytes hash to.
    pub digest: Digest,
    /// Where it starts in the blob's decoded address space, a multiple of 4096, in a tar of 512.
    pub decoded_offset: u64,
    /// Decoded bytes, at most the chunk size.
    pub decoded_len: u32,
    /// Whether its encoded bytes, in a batch those of the batch, are compressed with the blob's compressor.
    pub compressed: bool,
}

/// The smallest range of a blob that decodes alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    number: u32,
    encoded_offset: u64,
    encoded_len: u32,
    /// Where it starts in a file that keeps pieces.
    kept_offset: u64,
    compressor: Compressor,
    /// What it is encrypted with; never in a gzip layer.
    cipher: Option<Cipher>,
    content: Content,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Content {
    One(Chunk),
    Batch(Box<Members>),
}

/// The named chunks of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Members {
    /// Bytes of the whole batch.
    decoded_len: u32,
    compressed: bool,
    /// By index.
    chunks: Vec<Chunk>,
    /// Where each of them starts in the decoded batch.
    offsets: Vec<u32>,
    /// How it is inflated, in a gzip layer.
    context: Option<InflateContext>,
}

impl Piece {
    /// A piece that is one plain chunk, in a blob without batches: its number is the chunk's index.
    pub fn plain(chunk: Chunk, encoded_offset: u64, encoded_len: u32, compressor: Compressor) -> Self {
        let (number, kept_offset, content) = (chunk.index, encoded_offset, Content::One(chunk));
        Self { number, encoded_offset, encoded_len, kept_offset, compressor, cipher: None, content }
    }

    /// The same piece in an encrypted blob.
    pub fn encrypted(mut self, cipher: Option<&Cipher>) -> Self {
        if let Content::Batch(members) = &mut self.content {
            let batch = Batch { encoded_len: self.encoded_len, decoded_len: members.decoded_len };
            members.compressed = batch.is_compressed_in(cipher);
        }
        Self { cipher: cipher.cloned(), ..self }
    }

    /// A piece of chunks that were compressed as one. `members` are those that the image names, by index, each with its
    /// offset in the decoded batch.
    pub fn batch(
        number: u32,
        encoded_offset: u64,
        batch: Batch,
        compressor: Compressor,
        members: Vec<(Chunk, u32)>,
    ) -> Self {
        let (chunks, offsets) = members.into_iter().unzip();
        let (decoded_len, compressed) = (batch.decoded_len, batch.is_compressed());
        let content = Content::Batch(Box::new(Members { decoded_len, compressed, chunks, offsets, context: None }));
        let (encoded_len, kept_offset) = (batch.encoded_len, encoded_offset);
        Self { number, encoded_offset, encoded_len, kept_offset, compressor, cipher: None, content }
    }

    /// A piece of a gzip layer: what is inflated from `context` on, kept from `kept_offset` on. `members` as for
    /// [`batch`](Self::batch).
    pub fn inflated(number: u32, context: InflateContext, kept_offset: u64, members: Vec<(Chunk, u32)>) -> Self {
        let (chunks, offsets) = members.into_iter().unzip();
        let (encoded_offset, encoded_len) = (context.encoded_offset, context.encoded_len);
        let members =
            Members { decoded_len: context.decoded_len, compressed: true, chunks, offsets, context: Some(context) };
        let content = Content::Batch(Box::new(members));
        let (compressor, cipher) = (Compressor::Gzip, None);
        Self { number, encoded_offset, encoded_len, kept_offset, compressor, cipher, content }
    }

    /// Where it lies in the stored blob.
    pub fn encoded(&self) -> Range<u64> {
        self.encoded_offset..self.encoded_offset + u64::from(self.encoded_len)
    }

    /// Where its encoded bytes lie in a file that keeps pieces of the blob: as in the blob, but for a gzip layer, whose pieces
    /// follow each other there. No two pieces of a blob overlap here, and the image does not matter: whoever has the same
    /// chunk table keeps a piece at the same place.
    pub fn kept(&self) -> Range<u64> {
        self.kept_offset..self.kept_offset + u64::from(self.encoded_len)
    }

    /// Bytes that it decodes to, those of chunks that the image does not name included.
    pub fn decoded_len(&self) -> u32 {
        match &self.content {
            Content::One(chunk) => chunk.decoded_len,
            Content::Batch(members) => members.decoded_len,
        }
    }

    /// Its chunks that the image names, by index.
    pub fn chunks(&self) -> &[Chunk] {
        match &self.content {
            Content::One(chunk) => std::slice::from_ref(chunk),
            Content::Batch(members) => &members.chunks,
        }
    }

    /// Its chunks that the image names, each with where it starts in the decoded piece.
    fn members(&self) -> impl ExactSizeIterator<Item = (&Chunk, u32)> {
        let offsets = match &self.content {
            Content::One(_) => &[0][..],
            Content::Batch(members) => &members.offsets,
        };
        self.chunks().iter().zip(offsets.iter().copied())
    }

    /// A hash over everything that decides what the piece must be and where: two images agree about a piece exactly when
    /// their fingerprints are equal. Images that name different chunks of a batch do not agree: neither can vouch for
    /// what the other reads from the same bytes.
    ///
    /// BLAKE3 of: the label `shoal piece 1`, compressor (1 byte), encoded offset (8) and length (4), number of chunks
    /// (4), then for each chunk index (4), algorithm (1), digest (32), decoded offset (8) and length (4), compressed (1);
    /// integers little-endian. For a batch then the label `batch`, its decoded length (4), and the offset of each chunk
    /// in it (4); for one of a gzip layer then the label `zran`, the bits (1) and byte (1) to start with, and the window; for one
    /// of an encrypted blob then the label `aes-128-xts`, key (32) and tweak (16). Fingerprints are shown to other nodes: 256
    /// random bits cannot be found by their hash.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"shoal piece 1");
        hasher.update(&[self.compressor.code() as u8]);
        hasher.update(&self.encoded_offset.to_le_bytes());
        hasher.update(&self.encoded_len.to_le_bytes());
        hasher.update(&(self.chunks().len() as u32).to_le_bytes());
        for chunk in self.chunks() {
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
        if let Content::Batch(members) = &self.content {
            hasher.update(b"batch");
            hasher.update(&members.decoded_len.to_le_bytes());
            members.offsets.iter().for_each(|offset| _ = hasher.update(&offset.to_le_bytes()));
            if let Some(context) = &members.context {
                hasher.update(b"zran").update(&[context.bits, context.byte]).update(&context.window);
            }
        }
        if let Some(cipher) = &self.cipher {
            let (key, iv) = cipher.key().parts();
            hasher.update(b"aes-128-xts").update(key).update(iv);
        }
        Fingerprint::new(*hasher.finalize().as_bytes())
    }

    /// Decodes its encoded bytes, of which there are as many as it has. Says nothing about what they decode to.
    fn decode(&self, encoded: &[u8]) -> Result<Bytes, DecodeError> {
        if let Some(context) = self.context() {
            return context.inflate(encoded);
        }
        let decoder = if self.is_raw() { Compressor::None } else { self.compressor };
        codec::open(self.cipher.as_ref(), decoder, encoded, self.decoded_len() as usize).map(Bytes::from)
    }

    /// Whether its bytes are not compressed.
    fn is_raw(&self) -> bool {
        match &self.content {
            Content::One(chunk) => !chunk.compressed,
            Content::Batch(members) => !members.compressed,
        }
    }

    /// How its stored bytes are inflated, in a gzip layer.
    fn context(&self) -> Option<&InflateContext> {
        match &self.content {
            Content::Batch(members) => members.context.as_ref(),
            Content::One(_) => None,
        }
    }

    /// Index of its first named chunk; the number of a piece without any means nothing.
    fn first_index(&self) -> u32 {
        self.chunks().first().map_or(self.number, |chunk| chunk.index)
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.encoded_len == 0 || self.chunks().iter().any(|chunk| chunk.decoded_len == 0) {
            return Err("it is empty");
        }
        if self.encoded_offset.checked_add(self.encoded_len.into()).is_none() {
            return Err("its encoded range overflows");
        }
        if self.kept_offset.checked_add(self.encoded_len.into()).is_none() {
            return Err("the range in which it is kept overflows");
        }
        let overflows = |chunk: &Chunk| chunk.decoded_offset.checked_add(chunk.decoded_len.into()).is_none();
        if self.chunks().iter().any(overflows) {
            return Err("its decoded range overflows");
        }
        self.check_sizes()?;
        self.check_members()
    }

    fn check_sizes(&self) -> Result<(), &'static str> {
        // Of what a context covers only parts are chunks; its limits are those of the context.
        if self.context().is_some() {
            return Ok(());
        }
        let (raw, decoded_len) = (self.is_raw(), self.decoded_len());
        // What is less than a block grows when it is encrypted, also what was compressed to that.
        let (stored_raw, most) = match self.cipher {
            Some(_) => (cipher::sealed_len(decoded_len), decoded_len.max(cipher::sealed_len(0))),
            None => (decoded_len, decoded_len),
        };
        if raw && self.encoded_len != stored_raw {
            return Err("it is stored raw, but encoded and decoded sizes differ");
        }
        if self.encoded_len > most {
            return Err("it is larger encoded than decoded");
        }
        if !raw && self.compressor == Compressor::None {
            return Err("it is compressed in a blob without compressor");
        }
        if self.decoded_len() > *CHUNK_SIZES.end() {
            return Err("it is larger than any chunk");
        }
        Ok(())
    }

    fn check_members(&self) -> Result<(), &'static str> {
        let Content::Batch(members) = &self.content else { return Ok(()) };
        if members.chunks.is_empty() {
            return Err("its batch has no chunk");
        }
        let mut end = 0;
        for (chunk, offset) in self.members() {
            if offset < end {
                return Err("it overlaps another chunk of its batch");
            }
            let stop = offset.checked_add(chunk.decoded_len).filter(|stop| *stop <= members.decoded_len);
            end = stop.ok_or("it ends behind its batch")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
