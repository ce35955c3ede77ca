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
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender};

use super::batches::{Batches, ClosedBatch};
use super::blob::{BlobWriter, Placed};
use super::parcel::{Chunk, Parcel};
use super::pipeline::{Done, Job};
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
        chunk: Taken,
    },
    /// A batch that may still be with a worker.
    Batch {
        number: u32,
        first: u32,
    },
}

/// A chunk whose turn has come: the one at this position of a parcel, which is filled again once all of its chunks are stored.
#[derive(Clone)]
struct Taken {
    parcel: Arc<Parcel>,
    position: usize,
}

impl Taken {
    fn chunk(&self) -> &Chunk {
        &self.parcel.chunks[self.position]
    }
}

/// Takes chunks from the workers, and gives them batches.
pub(super) struct Collector<P> {
    options: BuildOptions,
    stored: Stored,
    progress: P,
    jobs: SyncSender<Job>,
    free: SyncSender<Parcel>,
    /// Parcels before their turn; no more than there are.
    early: BTreeMap<u64, Result<Parcel, BuildError>>,
    /// Parcels whose turn has come.
    parcels: u64,
    /// The next chunk in order, if it has come.
    next: Option<Taken>,
    batches: Batches,
    /// What will be appended next.
    queue: VecDeque<Unit>,
    decoded_bytes: u64,
}

impl<P: Fn(u64, u64)> Collector<P> {
    /// `jobs` must take as many batches as `batches` has buffers, beside all parcels, without waiting. Parcels go back to
    /// `free`.
    pub(super) fn new(
        options: BuildOptions,
        writer: BlobWriter,
        progress: P,
        jobs: SyncSender<Job>,
        free: SyncSender<Parcel>,
        batches: Batches,
    ) -> Self {
        Self {
            options,
            stored: Stored { writer, places: Vec::new(), chunks: 0 },
            progress,
            jobs,
            free,
            early: BTreeMap::new(),
            parcels: 0,
            next: None,
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
                Done::Parcel { number, parcel } => _ = self.early.insert(number, parcel),
                Done::Batch { number, batch } => self.batches.compressed(number, batch?),
                Done::Fed { parcels } => fed = Some(parcels),
            }
            self.advance()?;
            if fed == Some(self.parcels) && self.next.is_none() {
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
            match self.next()? {
                Some(taken) => self.take(taken)?,
                None => return Ok(()),
            }
        }
    }

    /// The next chunk in order, if it has come.
    fn next(&mut self) -> Result<Option<Taken>, BuildError> {
        if self.next.is_none()
            && let Some(parcel) = self.early.remove(&self.parcels)
        {
            self.parcels += 1;
            self.next = Some(Taken { parcel: Arc::new(parcel?), position: 0 });
        }
        let Some(taken) = self.next.take() else { return Ok(None) };
        let following = Taken { position: taken.position + 1, ..taken.clone() };
        self.next = (following.position < following.parcel.chunks.len()).then_some(following);
        Ok(Some(taken))
    }

    /// Appends what heads the queue, up to a batch that is not back yet.
    fn append_queued(&mut self) -> Result<(), BuildError> {
        while let Some(unit) = self.queue.pop_front() {
            match unit {
                Unit::Chunk { index, chunk: taken } => {
                    let chunk = taken.chunk();
                    self.stored.writer.store(index, taken.parcel.stored(chunk), chunk.form.compressed)?;
                    self.release(taken);
                }
                Unit::Batch { number, first } => {
                    let Some(batch) = self.batches.take(number) else {
                        self.queue.push_front(unit);
                        return Ok(());
                    };
                    self.stored.writer.store_batch(first, batch.stored(), batch.decoded.len() as u32)?;
                    self.batches.recycle(batch);
                }
            }
        }
        Ok(())
    }

    /// The next chunk in order.
    fn take(&mut self, taken: Taken) -> Result<(), BuildError> {
        let chunk = taken.chunk();
        let &Chunk { inode, alone, .. } = chunk;
        let places = &mut self.stored.places;
        if places.len() <= inode {
            places.resize_with(inode + 1, Vec::new);
        }
        let file_offset = places[inode].len() as u64 * u64::from(self.options.chunk_size);
        let placed = self.stored.writer.place(chunk.key(), chunk.crc32, file_offset)?;
        let (Placed::Known(place) | Placed::New(place)) = placed;
        places[inode].push(place);
        self.stored.chunks += 1;
        self.decoded_bytes += chunk.decoded.len() as u64;
        match placed {
            Placed::Known(_) => self.release(taken),
            Placed::New(ChunkPlace { index, .. }) if alone => {
                self.close_batch()?;
                self.queue.push_back(Unit::Chunk { index, chunk: taken });
            }
            Placed::New(ChunkPlace { index, .. }) => {
                if self.batches.would_overflow(chunk.decoded.len()) {
                    self.close_batch()?;
                }
                self.batches.add(index, taken.parcel.decoded(taken.chunk()));
                self.release(taken);
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

    fn release(&self, taken: Taken) {
        // While others of its chunks are to be stored, they hold it too.
        let Ok(mut parcel) = Arc::try_unwrap(taken.parcel) else { return };
        parcel.chunks.clear();
        // The feed is gone when everything was fed.
        let _ = self.free.try_send(parcel);
    }
}
