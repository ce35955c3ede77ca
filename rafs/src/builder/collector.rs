//! The writing end of the pipeline: chunks in order, each stored once.
//!
//! ```text
//! chunks, in any order --> in order --> known? --yes--> nothing to store
//!                                         |
//!                                         no --> small? --yes--> open batch --closed--> a worker compresses it --.
//!                                                  |                                                             |
//!                                                  no --> queue, in order: chunks, and batches that are awaited <'
//!                                                           '--> blob
//! ```
//!
//! What is stored and where depends on the order of the chunks alone, never on that of the workers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, SyncSender};

use super::batches::{Batches, ClosedBatch};
use super::blob::{BlobWriter, Placed};
use super::pipeline::{Done, DoneChunk, Job, Prepared};
use super::tree::ChunkPlace;
use super::{BuildError, BuildOptions};

/// What went through the pipeline.
pub(super) struct Stored {
    pub(super) writer: BlobWriter,
    /// Places of the chunks of each inode, by number.
    pub(super) places: Vec<Vec<ChunkPlace>>,
    pub(super) chunks: u64,
}

/// A range of the blob to be.
enum Unit {
    Chunk {
        index: u32,
        chunk: Prepared,
    },
    /// A batch that may still be with a worker.
    Batch {
        number: u32,
        first: u32,
    },
}

/// Takes chunks from the workers, and gives them batches.
pub(super) struct Collector<P> {
    options: BuildOptions,
    stored: Stored,
    progress: P,
    jobs: SyncSender<Job>,
    free: SyncSender<Prepared>,
    /// Chunks before their turn; no more than there are buffers.
    early: BTreeMap<u64, DoneChunk>,
    batches: Batches,
    /// What will be appended next.
    queue: VecDeque<Unit>,
    decoded_bytes: u64,
}

impl<P: Fn(u64, u64)> Collector<P> {
    /// `jobs` must take as many batches as `batches` has buffers, beside all chunks, without waiting. Buffers of chunks go
    /// back to `free`.
    pub(super) fn new(
        options: BuildOptions,
        writer: BlobWriter,
        progress: P,
        jobs: SyncSender<Job>,
        free: SyncSender<Prepared>,
        batches: Batches,
    ) -> Self {
        Self {
            options,
            stored: Stored { writer, places: Vec::new(), chunks: 0 },
            progress,
            jobs,
            free,
            early: BTreeMap::new(),
            batches,
            queue: VecDeque::new(),
            decoded_bytes: 0,
        }
    }

    /// Runs until all that was fed is stored.
    pub(super) fn run(mut self, finished: Receiver<Done>) -> Result<Stored, BuildError> {
        let mut fed = None;
        for done in finished {
            match done {
                Done::Chunk(chunk) => _ = self.early.insert(chunk.number, chunk),
                Done::Batch { number, batch } => self.batches.compressed(number, batch?),
                Done::Fed { chunks } => fed = Some(chunks),
            }
            self.advance()?;
            if fed == Some(self.stored.chunks) {
                self.close_batch()?;
                if self.queue.is_empty() {
                    return Ok(self.stored);
                }
            }
        }
        // The workers wait for jobs as long as this end can send them.
        Err(BuildError::Worker)
    }

    /// Stores what can be stored.
    fn advance(&mut self) -> Result<(), BuildError> {
        loop {
            self.append_queued()?;
            if !self.batches.has_room() {
                return Ok(());
            }
            match self.early.remove(&self.stored.chunks) {
                Some(done) => self.take(done)?,
                None => return Ok(()),
            }
        }
    }

    /// Appends what heads the queue, up to a batch that is not back yet.
    fn append_queued(&mut self) -> Result<(), BuildError> {
        while let Some(unit) = self.queue.pop_front() {
            match unit {
                Unit::Chunk { index, chunk } => {
                    self.stored.writer.store(index, &chunk)?;
                    self.release(chunk);
                }
                Unit::Batch { number, first } => {
                    let Some(batch) = self.batches.take(number) else {
                        self.queue.push_front(unit);
                        return Ok(());
                    };
                    self.stored.writer.store_batch(first, &batch)?;
                    self.batches.recycle(batch);
                }
            }
        }
        Ok(())
    }

    /// The next chunk in order.
    fn take(&mut self, done: DoneChunk) -> Result<(), BuildError> {
        let DoneChunk { inode, alone, chunk, .. } = done;
        let chunk = chunk?;
        let places = &mut self.stored.places;
        if places.len() <= inode {
            places.resize_with(inode + 1, Vec::new);
        }
        let file_offset = places[inode].len() as u64 * u64::from(self.options.chunk_size);
        let placed = self.stored.writer.place(&chunk, file_offset)?;
        let (Placed::Known(place) | Placed::New(place)) = placed;
        places[inode].push(place);
        self.stored.chunks += 1;
        self.decoded_bytes += chunk.decoded.len() as u64;
        match placed {
            Placed::Known(_) => self.release(chunk),
            Placed::New(ChunkPlace { index, .. }) if alone => {
                self.close_batch()?;
                self.queue.push_back(Unit::Chunk { index, chunk });
            }
            Placed::New(ChunkPlace { index, .. }) => {
                if self.batches.would_overflow(chunk.decoded.len()) {
                    self.close_batch()?;
                }
                self.batches.add(index, &chunk.decoded);
                self.release(chunk);
            }
        }
        (self.progress)(self.decoded_bytes, self.stored.writer.encoded_size());
        Ok(())
    }

    /// Sends the open batch to a worker, and leaves it its place in the queue.
    fn close_batch(&mut self) -> Result<(), BuildError> {
        let Some(ClosedBatch { number, first, batch }) = self.batches.close() else { return Ok(()) };
        self.queue.push_back(Unit::Batch { number, first });
        self.jobs.send(Job::Batch { number, batch }).map_err(|_| BuildError::Worker)
    }

    fn release(&self, chunk: Prepared) {
        // The feed is gone when everything was fed.
        let _ = self.free.try_send(chunk);
    }
}
