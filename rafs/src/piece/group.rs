//! From the two tables of chunks to pieces.
//!
//! The bootstrap names chunks: digest, place in the decoded address space and, but for batches, place in the blob. The
//! blob's own chunk table has all chunks of the blob, and alone knows the batches and, for a gzip layer, the contexts to
//! inflate from. Where both speak of a chunk they must say the same; a blob without batches can be read by the bootstrap
//! alone.

use super::{Chunk, Piece, PieceTable, PieceTableError};
use crate::blob::{Batch, ChunkInfo, ChunkTable};
use crate::bootstrap::Blob;
use crate::zran::InflateContext;

/// How often the contexts of a gzip layer may cover it. Each reaches into the next by at most as much as that has, so an
/// index that means what it says covers a layer about once and never more than twice; this bounds what a store must keep.
const MAX_COVER: u64 = 4;

/// A chunk as the bootstrap describes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Named {
    pub(crate) chunk: Chunk,
    /// Where it lies in the stored blob; means nothing for a chunk in a batch.
    pub(crate) encoded_offset: u64,
    pub(crate) encoded_len: u32,
}

/// The pieces of a blob. `named` are its chunks in the bootstrap, by index.
pub(crate) fn group(
    blob: &Blob,
    named: impl Iterator<Item = Named>,
    table: Option<&ChunkTable>,
) -> Result<PieceTable, PieceTableError> {
    let Some(table) = table else {
        if blob.needs_chunk_table() {
            return Err(PieceTableError::NoChunkTable);
        }
        let plain = |named: Named| plain(named, blob);
        return PieceTable::new(blob.id, blob.encoded_size, blob.chunk_count, named.map(plain).collect());
    };
    if table.len() != blob.chunk_count {
        return Err(PieceTableError::Length { expected: blob.chunk_count, found: table.len() });
    }
    let mut grouping = Grouping { blob, table, number: 0, next_batch: 0, kept: 0, open: None, pieces: Vec::new() };
    let mut named = named.peekable();
    for (index, entry) in (0..).zip(table.chunks()) {
        let named = named.next_if(|named| named.chunk.index == index);
        grouping.add(index, &entry, named).map_err(|problem| PieceTableError::Chunk { index, problem })?;
    }
    grouping.close();
    PieceTable::new(blob.id, blob.encoded_size, grouping.number, grouping.pieces)
}

/// A chunk that is a piece of its own.
fn plain(Named { chunk, encoded_offset, encoded_len }: Named, blob: &Blob) -> Piece {
    Piece::plain(chunk, encoded_offset, encoded_len, blob.compressor).encrypted(blob.cipher.as_ref())
}

/// Whether the two tables say the same of a chunk.
pub(crate) fn agreement(named: &Named, entry: &ChunkInfo) -> Result<(), &'static str> {
    let chunk = &named.chunk;
    if (chunk.decoded_offset, chunk.decoded_len) != (entry.decoded_offset, entry.decoded_len) {
        return Err("its decoded range in the blob's chunk table is another than in the bootstrap");
    }
    let same = (named.encoded_offset, named.encoded_len) == (entry.encoded_offset, entry.encoded_len)
        && chunk.compressed == entry.compressed;
    // Of a batch the bootstrap knows nothing.
    if entry.batch.is_none() && !same {
        return Err("its encoded range in the blob's chunk table is another than in the bootstrap");
    }
    Ok(())
}

/// Chunks in the order of their indexes on the way to pieces.
struct Grouping<'a> {
    blob: &'a Blob,
    table: &'a ChunkTable,
    /// Pieces so far, the open batch not counted.
    number: u32,
    /// Batches are numbered in the order of their chunks.
    next_batch: u32,
    /// Bytes of the contexts so far, named or not: what keeping them takes.
    kept: u64,
    open: Option<OpenBatch>,
    pieces: Vec<Piece>,
}

struct OpenBatch {
    index: u32,
    encoded_offset: u64,
    source: Source,
    members: Vec<(Chunk, u32)>,
}

/// What the chunks of a batch come from.
enum Source {
    Batch(Batch),
    /// Of a gzip layer, where each chunk states its own offset; with where it is kept.
    Context(InflateContext, u64),
}

impl Grouping<'_> {
    fn add(&mut self, index: u32, entry: &ChunkInfo, named: Option<Named>) -> Result<(), &'static str> {
        debug_assert!(named.is_none_or(|named| named.chunk.index == index));
        named.as_ref().map_or(Ok(()), |named| agreement(named, entry))?;
        let Some(place) = entry.batch else {
            self.close();
            if let Some(named) = named {
                self.pieces.push(Piece { number: self.number, ..plain(named, self.blob) });
            }
            self.number += 1;
            return Ok(());
        };
        if self.open.as_ref().is_none_or(|open| open.index != place.index) {
            self.close();
            self.open = Some(self.begin(place.index, entry.encoded_offset)?);
        }
        let open = self.open.as_mut().ok_or("its batch is unknown")?;
        let compressed = match &open.source {
            Source::Batch(_) if open.encoded_offset != entry.encoded_offset => {
                return Err("its batch lies at another offset for another of its chunks");
            }
            Source::Batch(batch) => batch.is_compressed_in(self.blob.cipher.as_ref()),
            Source::Context(..) => true,
        };
        if let Some(Named { chunk, .. }) = named {
            open.members.push((Chunk { compressed, ..chunk }, place.offset));
        }
        Ok(())
    }

    fn begin(&mut self, index: u32, encoded_offset: u64) -> Result<OpenBatch, &'static str> {
        if index < self.next_batch {
            return Err("its batch is interrupted by other chunks");
        }
        self.next_batch = index + 1;
        let kept = self.kept;
        let (encoded_offset, encoded_len, source) = match (self.table.batch(index), self.table.context(index)) {
            (Some(batch), _) => (encoded_offset, batch.encoded_len, Source::Batch(batch)),
            (_, Some(context)) => {
                self.kept += u64::from(context.encoded_len);
                (context.encoded_offset, context.encoded_len, Source::Context(context, kept))
            }
            _ => return Err("its batch is unknown"),
        };
        let end = encoded_offset.checked_add(encoded_len.into());
        if end.is_none_or(|end| end > self.blob.data_end) {
            return Err("its batch ends behind the chunk data");
        }
        if self.kept > self.blob.data_end.saturating_mul(MAX_COVER) {
            return Err("its layer is covered too often by the contexts up to this one");
        }
        Ok(OpenBatch { index, encoded_offset, source, members: Vec::new() })
    }

    /// Ends the open batch. One of which the image names nothing has a number and no piece.
    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        if !open.members.is_empty() {
            self.pieces.push(match open.source {
                Source::Batch(batch) => {
                    let compressor = self.blob.compressor;
                    let piece = Piece::batch(self.number, open.encoded_offset, batch, compressor, open.members);
                    piece.encrypted(self.blob.cipher.as_ref())
                }
                Source::Context(context, kept) => Piece::inflated(self.number, context, kept, open.members),
            });
        }
        self.number += 1;
    }
}

#[cfg(test)]
mod tests;
