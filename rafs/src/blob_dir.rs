//! Chunks from a folder of blob files: the image alone, with no peer and no registry.
//!
//! [`BlobDirReader`] reads and verifies in the caller's thread; `check`, `unpack` and `expand` use it. [`BlobDir`] is the
//! [`ChunkSource`] over it: its own few threads, on-demand before prefetch, and a [`ChunkCache`] in front, because a reader
//! asks for 128 KiB at a time and a chunk has 1 MiB. Nothing that failed is remembered: a blob file that is mended serves
//! again.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use shoal_proto::{BlobId, Priority};

use crate::blob::ChunkTableError;
use crate::bootstrap::{Blob, Bootstrap};
use crate::chunk_cache::{ChunkCache, Lead};
use crate::piece::{Piece, PieceTableError};
use crate::source::{ChunkId, ChunkReply, ChunkSource};

mod reader;
mod tar;

pub use reader::BlobDirReader;
pub(crate) use reader::{BlobFile, PieceId};

/// Bytes of decoded chunks that a [`BlobDir`] keeps: a few files read in turns, little next to the page cache.
pub const DECODED_CACHE_BYTES: u64 = 32 << 20;

/// Where the blob files of an image are.
#[derive(Debug, Clone, Default)]
pub struct BlobPaths {
    dir: Option<PathBuf>,
    own: Option<(BlobId, PathBuf)>,
}

impl BlobPaths {
    /// The blob of `own` is the file beside it; any other lies in `dir` under its id.
    pub fn new(dir: Option<&Path>, own: Option<(BlobId, PathBuf)>) -> Self {
        Self { dir: dir.map(Path::to_owned), own }
    }

    /// Where a blob should be, if anybody has said.
    pub fn path(&self, blob: BlobId) -> Option<PathBuf> {
        let own = self.own.as_ref().filter(|(id, _)| *id == blob).map(|(_, path)| path.clone());
        own.or_else(|| Some(self.dir.as_ref()?.join(blob.to_string())))
    }

    /// Where the chunk table of a blob should be: in the blob, or for a gzip layer in a file beside it, which may be the one
    /// that holds the bootstrap.
    pub(crate) fn chunk_table(&self, blob: &Blob) -> Option<PathBuf> {
        match blob.meta {
            Some(meta) => self.path(meta.id),
            None if blob.is_gzip_layer() => self.own.as_ref().map(|(_, path)| path.clone()),
            None => self.path(blob.id),
        }
    }
}

/// Why a blob of the image cannot be read from the folder.
#[derive(Debug, thiserror::Error)]
pub enum BlobDirError {
    /// It, or its chunk table, is not in the file that holds the bootstrap, and no folder was given.
    #[error("blob {blob} or its chunk table is in another file, and no folder of blobs is given")]
    NoFolder {
        /// The blob.
        blob: BlobId,
    },
    /// Its file cannot be opened.
    #[error("cannot open blob file {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Its chunk table, without which its batches cannot be found, is not in the file.
    #[error("cannot read the chunk table of {}", path.display())]
    ChunkTable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: ChunkTableError,
    },
    /// It is a tar without digests of chunks, and could not be read to its end.
    #[error("cannot read all of the tar {}, whose chunks have no digests", path.display())]
    Tar {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is a tar without digests of chunks, and not the one that the image names.
    #[error("{} has sha256 {found}, not {expected}, and nothing else tells whether it is the tar of the image", path.display())]
    OtherTar {
        /// The file.
        path: PathBuf,
        /// The name of the blob.
        expected: BlobId,
        /// The sha256 of the file.
        found: BlobId,
    },
    /// Its tables contradict themselves or each other.
    #[error("blob file {}", path.display())]
    Pieces {
        /// The file.
        path: PathBuf,
        /// Which rule they break.
        #[source]
        source: PieceTableError,
    },
    /// A thread could not be started.
    #[error("cannot start a thread")]
    Thread {
        /// What the system said.
        #[source]
        source: io::Error,
    },
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
    cache: ChunkCache<PieceId>,
    /// Held for look-ups only, never while reading, decoding or replying.
    queues: Mutex<Queues>,
    work: Condvar,
    bytes_read: AtomicU64,
}

/// Pieces that somebody waits for and no worker has yet.
#[derive(Debug, Default)]
struct Queues {
    on_demand: VecDeque<PieceId>,
    prefetch: VecDeque<PieceId>,
    /// What is queued, and how urgently. A place in a queue that this does not confirm is void.
    queued: HashMap<PieceId, Priority>,
    closed: bool,
}

impl BlobDir {
    /// Opens the blobs of an image in `dir` and starts `threads` workers (0: one per processor).
    pub fn open(bootstrap: Bootstrap, dir: &Path, threads: usize) -> Result<Self, BlobDirError> {
        Self::new(BlobDirReader::open(&bootstrap, dir)?, threads)
    }

    /// Over blobs that are open.
    pub fn new(reader: BlobDirReader, threads: usize) -> Result<Self, BlobDirError> {
        let cache = ChunkCache::new(DECODED_CACHE_BYTES);
        let shared = Arc::new(Shared {
            reader,
            cache,
            queues: Mutex::default(),
            work: Condvar::new(),
            bytes_read: AtomicU64::new(0),
        });
        let threads = if threads == 0 { thread::available_parallelism().map_or(1, usize::from) } else { threads };
        let worker = |number| {
            let shared = Arc::clone(&shared);
            let thread = thread::Builder::new().name(format!("decode-{number}")).spawn(move || shared.run());
            thread.map_err(|source| BlobDirError::Thread { source })
        };
        let workers = (0..threads).map(worker).collect::<Result<_, _>>();
        let workers = workers.inspect_err(|_| shared.close())?;
        Ok(Self { shared, workers })
    }

    /// Encoded bytes that were read of blob files so far.
    pub fn bytes_read(&self) -> u64 {
        self.shared.bytes_read.load(Relaxed)
    }
}

impl ChunkSource for BlobDir {
    fn read(&self, chunk: ChunkId, priority: Priority, reply: ChunkReply) {
        let shared = &self.shared;
        let Some(piece) = shared.reader.piece_of(chunk) else {
            return reply(Err(shared.reader.error(chunk, "the image does not name it")));
        };
        match shared.cache.read(&piece, chunk.index, reply) {
            Lead::Answered => {}
            Lead::Refused(reply) => reply(Err(shared.reader.error(chunk, "too many reads wait"))),
            Lead::Leads => shared.queue(piece, priority),
            Lead::Joined => shared.lift(piece, priority),
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
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(&self, piece: PieceId, priority: Priority) {
        let mut queues = self.lock();
        if queues.closed {
            drop(queues);
            return self.refuse(piece);
        }
        queues.push(piece, priority);
        self.work.notify_one();
    }

    /// Moves a piece that is queued for prefetch before those, when somebody waits for it now.
    fn lift(&self, piece: PieceId, priority: Priority) {
        let mut queues = self.lock();
        // Not queued: a worker has it, or is about to get it from whoever leads.
        if queues.queued.get(&piece).is_some_and(|queued| priority > *queued) {
            queues.push(piece, priority);
            self.work.notify_one();
        }
    }

    fn run(&self) {
        while let Some(piece) = self.next() {
            let range = self.reader.table(piece.blob).and_then(|table| table.piece(piece.piece)).map(Piece::encoded);
            self.bytes_read.fetch_add(range.map_or(0, |range| range.end - range.start), Relaxed);
            self.cache.complete(piece, self.reader.piece(piece).map(Arc::new));
        }
    }

    /// Waits for a piece to read; `None` when closed.
    fn next(&self) -> Option<PieceId> {
        let mut queues = self.lock();
        loop {
            if queues.closed {
                return None;
            }
            match queues.pop() {
                Some(piece) => return Some(piece),
                None => queues = self.work.wait(queues).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    fn close(&self) {
        let mut queues = self.lock();
        queues.closed = true;
        // What a worker has, it answers.
        let queued = std::mem::take(&mut queues.queued);
        self.work.notify_all();
        drop(queues);
        for piece in queued.into_keys() {
            self.refuse(piece);
        }
    }

    fn refuse(&self, piece: PieceId) {
        // The index is that of each waiter.
        let chunk = ChunkId { blob: piece.blob, index: 0 };
        self.cache.complete(piece, Err(self.reader.error(chunk, "the image is being closed")));
    }
}

impl Queues {
    fn push(&mut self, piece: PieceId, priority: Priority) {
        self.queued.insert(piece, priority);
        if priority == Priority::OnDemand { &mut self.on_demand } else { &mut self.prefetch }.push_back(piece);
    }

    fn pop(&mut self) -> Option<PieceId> {
        loop {
            let piece = self.on_demand.pop_front().or_else(|| self.prefetch.pop_front())?;
            if self.queued.remove(&piece).is_some() {
                return Some(piece);
            }
        }
    }
}

#[cfg(test)]
mod tests;
