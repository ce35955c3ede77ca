//! Chunks from a folder of blob files: the image alone, with no peer and no registry.
//!
//! [`BlobDirReader`] reads and verifies one chunk at a time in the caller's thread; `check` and `unpack` use it.
//! [`BlobDir`] is the [`ChunkSource`] over it: its own few threads, on-demand before prefetch, one decode for all that
//! wait for a chunk, and a cache of decoded chunks, because a reader asks for 128 KiB at a time and a chunk has 1 MiB.
//! Nothing that failed is remembered: a blob file that is mended serves again.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use bytes::Bytes;
use shoal_proto::{BlobId, Priority};

use crate::bootstrap::Bootstrap;
use crate::error_chain::chain;
use crate::piece::PieceTable;
use crate::source::{ChunkError, ChunkId, ChunkReply, ChunkSource};

mod cache;

use cache::Cache;

/// Bytes of decoded chunks that a [`BlobDir`] keeps: a few files read in turns, little next to the page cache.
pub const DECODED_CACHE_BYTES: usize = 32 << 20;
/// Most reads that wait at a time; further ones fail. The kernel's own limits are far below.
const MAX_WAITING: usize = 1 << 16;

/// A blob of the image that is not in the folder.
#[derive(Debug, thiserror::Error)]
#[error("cannot open blob file {}", path.display())]
pub struct BlobDirError {
    /// The file.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

/// The blob files of one image, in a folder, named by blob id.
#[derive(Debug)]
pub struct BlobDirReader {
    blobs: Vec<BlobFile>,
}

impl BlobDirReader {
    /// Opens every blob of an image. Says nothing yet about their bytes.
    pub fn open(bootstrap: &Bootstrap, dir: &Path) -> Result<Self, BlobDirError> {
        let tables = (0..bootstrap.blobs().len() as u32).map(|blob| bootstrap.piece_table(blob));
        Ok(Self { blobs: tables.map(|table| BlobFile::open(table, dir)).collect::<Result<_, _>>()? })
    }

    /// Reads, decodes and verifies one chunk.
    pub fn read(&self, chunk: ChunkId) -> Result<Bytes, ChunkError> {
        match self.blobs.get(chunk.blob as usize) {
            Some(blob) => blob.read(chunk.index),
            None => Err(self.error(chunk, format!("the image has no blob {}", chunk.blob))),
        }
    }

    fn error(&self, chunk: ChunkId, reason: impl Into<Arc<str>>) -> ChunkError {
        // A blob that the image does not have has no id.
        let blob = self.blobs.get(chunk.blob as usize).map_or(BlobId::new([0; 32]), |blob| blob.table.blob());
        ChunkError { blob, index: chunk.index, reason: reason.into() }
    }
}

/// One stored blob.
#[derive(Debug)]
pub(crate) struct BlobFile {
    file: File,
    table: Arc<PieceTable>,
}

impl BlobFile {
    pub(crate) fn open(table: Arc<PieceTable>, dir: &Path) -> Result<Self, BlobDirError> {
        let path = dir.join(table.blob().to_string());
        let file = File::open(&path).map_err(|source| BlobDirError { path, source })?;
        Ok(Self { file, table })
    }

    /// Reads, decodes and verifies the chunk with this index.
    pub(crate) fn read(&self, index: u32) -> Result<Bytes, ChunkError> {
        let table = &self.table;
        let failed = |reason: String| ChunkError { blob: table.blob(), index, reason: reason.into() };
        let named = table.piece_of_chunk(index).and_then(|number| Some((number, table.piece(number)?)));
        let (number, piece) = named.ok_or_else(|| failed("the image does not name it".into()))?;
        let range = piece.encoded();
        let mut encoded = vec![0; (range.end - range.start) as usize];
        self.file.read_exact_at(&mut encoded, range.start).map_err(|error| failed(format!("blob file: {error}")))?;
        let decoded = table.decode(number, &encoded).map_err(|error| failed(chain(&error)))?;
        decoded.chunk(index).ok_or_else(|| failed("its piece decodes without it".into()))
    }
}

/// The [`ChunkSource`] of an image whose blobs lie in a folder. Dropping it answers what still waits with an error.
#[derive(Debug)]
pub struct BlobDir {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    reader: BlobDirReader,
    /// Held for look-ups only, never while reading, decoding or replying.
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    on_demand: VecDeque<ChunkId>,
    prefetch: VecDeque<ChunkId>,
    /// Who waits for which chunk; the chunk is in a queue or with a worker.
    flights: HashMap<ChunkId, Flight>,
    waiting: usize,
    cache: Cache,
    closed: bool,
}

struct Flight {
    replies: Vec<ChunkReply>,
    priority: Priority,
    /// A worker has it.
    running: bool,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("flights", &self.flights.len()).field("waiting", &self.waiting).finish()
    }
}

impl BlobDir {
    /// Opens the blobs of an image in `dir` and starts `threads` workers (0: one per processor).
    pub fn open(bootstrap: Bootstrap, dir: &Path, threads: usize) -> Result<Self, BlobDirError> {
        let reader = BlobDirReader::open(&bootstrap, dir)?;
        let shared = Arc::new(Shared { reader, state: Mutex::default(), work: Condvar::new() });
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let worker = |number| {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new().name(format!("decode-{number}")).spawn(move || shared.run());
            thread.map_err(|source| BlobDirError { path: dir.to_owned(), source })
        };
        let workers = (0..threads).map(worker).collect::<Result<_, _>>();
        let workers = workers.inspect_err(|_| shared.close())?;
        Ok(Self { shared, workers })
    }
}

impl ChunkSource for BlobDir {
    fn read(&self, chunk: ChunkId, priority: Priority, reply: ChunkReply) {
        if let Some((reply, outcome)) = self.shared.submit(chunk, priority, reply) {
            reply(outcome);
        }
    }
}

impl Drop for BlobDir {
    fn drop(&mut self) {
        self.shared.close();
        let current = thread::current().id();
        // The last owner may be a reply, which runs on a worker.
        for worker in self.workers.drain(..).filter(|worker| worker.thread().id() != current) {
            // A worker that panicked has said so on standard error.
            let _ = worker.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a read, or gives it back with its outcome when that is known at once.
    fn submit(
        &self,
        chunk: ChunkId,
        priority: Priority,
        reply: ChunkReply,
    ) -> Option<(ChunkReply, Result<Bytes, ChunkError>)> {
        let mut state = self.lock();
        if let Some(bytes) = state.cache.get(chunk) {
            return Some((reply, Ok(bytes)));
        }
        if state.closed || state.waiting == MAX_WAITING {
            let reason = if state.closed { "the image is being closed" } else { "too many reads wait" };
            return Some((reply, Err(self.reader.error(chunk, reason))));
        }
        state.waiting += 1;
        let flight = state.flights.get_mut(&chunk);
        let queue = match flight {
            Some(flight) => {
                flight.replies.push(reply);
                let urgent = priority > flight.priority && !flight.running;
                flight.priority = flight.priority.max(priority);
                urgent
            }
            None => {
                state.flights.insert(chunk, Flight { replies: vec![reply], priority, running: false });
                true
            }
        };
        if queue {
            // An older place in the other queue is skipped when its turn comes.
            let queue = if priority == Priority::OnDemand { &mut state.on_demand } else { &mut state.prefetch };
            queue.push_back(chunk);
            self.work.notify_one();
        }
        None
    }

    fn run(&self) {
        while let Some(chunk) = self.next() {
            let outcome = self.reader.read(chunk);
            for reply in self.finish(chunk, &outcome) {
                reply(outcome.clone());
            }
        }
    }

    /// Waits for a chunk to read; `None` when closed.
    fn next(&self) -> Option<ChunkId> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            let next = state.on_demand.pop_front().or_else(|| state.prefetch.pop_front());
            let Some(chunk) = next else {
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if let Some(flight) = state.flights.get_mut(&chunk).filter(|flight| !flight.running) {
                flight.running = true;
                return Some(chunk);
            }
        }
    }

    fn finish(&self, chunk: ChunkId, outcome: &Result<Bytes, ChunkError>) -> Vec<ChunkReply> {
        let mut state = self.lock();
        if let Ok(bytes) = outcome {
            state.cache.insert(chunk, bytes.clone());
        }
        let replies = state.flights.remove(&chunk).map_or_else(Vec::new, |flight| flight.replies);
        state.waiting -= replies.len();
        replies
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let mut waiting = Vec::new();
        for (chunk, flight) in &mut state.flights {
            // What runs is answered by its worker.
            if !flight.running {
                waiting.extend(flight.replies.drain(..).map(|reply| (*chunk, reply)));
            }
        }
        state.waiting -= waiting.len();
        self.work.notify_all();
        drop(state);
        for (chunk, reply) in waiting {
            reply(Err(self.reader.error(chunk, "the image is being closed")));
        }
    }
}

#[cfg(test)]
mod tests;
