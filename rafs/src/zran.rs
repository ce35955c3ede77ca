//! ZRAN: reading a gzip stream from the middle.
//!
//! A layer as registries have it is one gzip stream, which can only be read from its start: a back reference reaches up to
//! 32 KiB back, and blocks of deflate start at any bit. But what an inflater needs to go on from a block is little: the
//! position of that block to the bit, and the 32 KiB before it. That is an [`InflateContext`]. With one for every few MiB of
//! a layer, a file in it is read from the registry by a range of bytes, and nothing of the layer is converted or stored
//! twice.
//!
//! [`Indexer`] makes contexts while it reads a stream, [`InflateContext::inflate`] reads by one. What comes out is not to be
//! trusted more than what went in: deflate has many encodings of the same bytes, contexts come from strangers too. The
//! digests of chunks decide, in [`PieceTable::decode`](crate::PieceTable::decode) as for everything else.

use bytes::Bytes;

use crate::codec::{Compressor, DecodeError};

mod header;
mod indexer;
mod inflater;

pub(crate) use indexer::{Checkpoint, Indexer, Position};
use inflater::{Inflater, Step, Stop};

/// Bytes that a back reference of deflate reaches back.
pub(crate) const WINDOW: usize = 32 << 10;
/// Most bytes of the stream that one context covers, encoded or decoded. A chunk has 16 MiB at most, and a context made by
/// [`Indexer`] covers 2 MiB, a block of deflate and a chunk; this bounds what one read can cost.
pub(crate) const MAX_SPAN: u32 = 64 << 20;
/// Bytes of a context on disk, without its window.
pub(crate) const CONTEXT: usize = 40;
/// Bytes of the checksum and length that end a member of a gzip stream.
const TRAILER: usize = 8;

/// Where inflating can start, and how far the chunks that are reached from there extend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InflateContext {
    /// Offset of the first whole byte in the stored stream.
    pub encoded_offset: u64,
    /// Bytes of the stored stream.
    pub encoded_len: u32,
    /// Offset in the decoded stream.
    pub decoded_offset: u64,
    /// Bytes of the decoded stream.
    pub decoded_len: u32,
    /// The byte before the first, where some of its bits belong to the block.
    pub byte: u8,
    /// How many of its upper bits do; 0 to 7.
    pub bits: u8,
    /// What the decoded stream has before the offset: at most 32 KiB, nothing at the start of a gzip member.
    pub window: Bytes,
}

impl InflateContext {
    /// The first `decoded_len` bytes that the stream has from here on. `encoded` are the stored bytes; members of a gzip
    /// stream may end and begin among them, their checksums are not looked at. Allocates window and output and no more.
    pub(crate) fn inflate(&self, encoded: &[u8]) -> Result<Bytes, DecodeError> {
        let mut output = vec![0; self.decoded_len as usize];
        let mut inflater = Inflater::at_block(self.bits & 7, upper_bits(self.byte, self.bits), &self.window);
        let (mut filled, mut input) = (0, encoded);
        while filled < output.len() {
            let Step { consumed, produced, stop } =
                inflater.step(input, &mut output[filled..], false).map_err(malformed)?;
            filled += produced;
            input = &input[consumed..];
            match stop {
                _ if filled == output.len() => {}
                Stop::End => {
                    // The next member knows nothing of this one.
                    input = header::skip(input.get(TRAILER..).unwrap_or(&[])).map_err(malformed)?;
                    inflater.reset();
                }
                _ if consumed == 0 && produced == 0 => {
                    let (compressor, expected) = (Compressor::Gzip, output.len());
                    return Err(DecodeError::Length { compressor, expected, found: filled });
                }
                _ => {}
            }
        }
        Ok(output.into())
    }
}

/// The upper `bits` of a byte.
fn upper_bits(byte: u8, bits: u8) -> u8 {
    byte.checked_shr(8 - u32::from(bits & 7)).unwrap_or(0)
}

fn malformed(message: impl Into<String>) -> DecodeError {
    DecodeError::Malformed { compressor: Compressor::Gzip, message: message.into() }
}

#[cfg(test)]
mod tests;
