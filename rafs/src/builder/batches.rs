//! Small chunks on their way to being compressed as one.
//!
//! The rule is that of other builders: the chunk of a file that has only one, below half of the batch size, joins the open
//! batch. That is closed when one more chunk would fill it, when a chunk comes that goes alone, and at the end, so that the
//! chunks of a batch have consecutive indexes. Closed batches are compressed by the workers, in any order.

use std::collections::BTreeMap;

use super::pipeline::Prepared;

/// Batches between the first chunk and the blob. Each holds one of a fixed number of buffers meanwhile.
#[derive(Debug)]
pub(super) struct Batches {
    /// A batch stays below this many bytes.
    size: usize,
    /// A batch has at least this many bytes, zeroes behind its chunks if need be.
    least: usize,
    spare: Vec<Prepared>,
    open: Option<OpenBatch>,
    closed: u32,
    /// Compressed ones, by number.
    done: BTreeMap<u32, Prepared>,
}

#[derive(Debug)]
struct OpenBatch {
    first: u32,
    batch: Prepared,
}

/// A batch that is complete and not yet compressed.
#[derive(Debug)]
pub(super) struct ClosedBatch {
    /// Its number in the order of the blob.
    pub(super) number: u32,
    /// Index of its first chunk.
    pub(super) first: u32,
    pub(super) batch: Prepared,
}

impl Batches {
    /// Batches of at least `least` and below `size` bytes, of which `buffers` exist at a time.
    pub(super) fn new(size: usize, least: usize, buffers: usize) -> Self {
        let spare = (0..buffers).map(|_| Prepared::default()).collect();
        Self { size, least, spare, open: None, closed: 0, done: BTreeMap::new() }
    }

    /// Whether the next chunk can be taken, whatever it is: it opens at most one batch.
    pub(super) fn has_room(&self) -> bool {
        !self.spare.is_empty()
    }

    /// Whether the open batch has to be closed before a chunk of `len` bytes is added.
    pub(super) fn would_overflow(&self, len: usize) -> bool {
        self.open.as_ref().is_some_and(|open| open.batch.decoded.len() + len >= self.size)
    }

    /// Adds a chunk with this index to the open batch, or begins one. There is [room](Self::has_room).
    pub(super) fn add(&mut self, index: u32, bytes: &[u8]) {
        let spare = &mut self.spare;
        let open = self.open.get_or_insert_with(|| {
            let mut batch = spare.pop().unwrap_or_default();
            batch.decoded.clear();
            OpenBatch { first: index, batch }
        });
        open.batch.decoded.extend_from_slice(bytes);
    }

    /// Takes the open batch, if there is one.
    pub(super) fn close(&mut self) -> Option<ClosedBatch> {
        let OpenBatch { first, mut batch } = self.open.take()?;
        batch.decoded.resize(batch.decoded.len().max(self.least), 0);
        self.closed += 1;
        Some(ClosedBatch { number: self.closed - 1, first, batch })
    }

    /// A worker has compressed a batch.
    pub(super) fn compressed(&mut self, number: u32, batch: Prepared) {
        self.done.insert(number, batch);
    }

    /// The batch with this number, once it is compressed. Its buffer comes back by [`recycle`](Self::recycle).
    pub(super) fn take(&mut self, number: u32) -> Option<Prepared> {
        self.done.remove(&number)
    }

    pub(super) fn recycle(&mut self, batch: Prepared) {
        self.spare.push(batch);
    }
}
