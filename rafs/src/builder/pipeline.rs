//! From files to chunks in the blob, on all cores, in an order that does not depend on timing.
//!
//! ```text
//!  feed                    workers, as many as asked for            writer
//!  walks the tree or       read (files on disk), hash, compress     puts chunks back in order, drops those that are
//!  reads the archive,  ->  one chunk each, in any order         ->  known, hashes and appends the others
//!  cuts it into chunks
//!        ^                                                            |
//!        '------------------- buffers to use again -------------------'
//! ```
//!
//! Chunks are numbered when they are fed. The number of buffers bounds memory: each chunk holds one from the feed until
//! it was written, so with `t` workers at most `2 t + 2` chunks exist, decoded and encoded.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use super::blob::{BlobWriter, Known};
use super::scan::Version;
use super::tree::{ChunkPlace, InodeIndex};
use super::{BuildError, BuildOptions};
use crate::codec::{self, Encoder};

/// Most worker threads.
pub(super) const MAX_WORKERS: usize = 256;

/// A chunk that went through a worker, with the buffers that hold it.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    pub(super) decoded: Vec<u8>,
    pub(super) digest: [u8; 32],
    pub(super) crc32: u32,
    /// Whether `encoded` is the compressed form. Not so where that would be larger, and for chunks that the blob has.
    pub(super) compressed: bool,
    pub(super) encoded: Vec<u8>,
}

/// A file on disk, opened by the first worker that reads it.
#[derive(Debug)]
pub(super) struct SourceFile {
    path: PathBuf,
    version: Version,
    file: OnceLock<File>,
}

impl SourceFile {
    pub(super) fn new(path: PathBuf, version: Version) -> Self {
        Self { path, version, file: OnceLock::new() }
    }

    /// Reads part of the file. The version is compared after each read, so that all parts are of one version.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), BuildError> {
        let file = match self.file.get() {
            Some(file) => file,
            None => {
                let file = open(&self.path).map_err(BuildError::io("open", &self.path))?;
                self.file.get_or_init(|| file)
            }
        };
        let read = file.read_exact_at(bytes, offset);
        let now = file.metadata().map_err(BuildError::io("read", &self.path))?;
        self.version.check(&self.path, &now)?;
        read.map_err(BuildError::io("read", &self.path))
    }
}

/// Opens a file and nothing else: no link, and no waiting for the other end of a fifo.
fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}

struct Job {
    number: u64,
    inode: InodeIndex,
    chunk: Prepared,
    /// Where to read the chunk; absent if `chunk` has it already.
    source: Option<(Arc<SourceFile>, u64)>,
}

struct Done {
    number: u64,
    inode: InodeIndex,
    chunk: Result<Prepared, BuildError>,
}

/// What went through the pipeline.
pub(super) struct Stored {
    pub(super) writer: BlobWriter,
    /// Places of the chunks of each inode, by number.
    pub(super) places: Vec<Vec<ChunkPlace>>,
    pub(super) chunks: u64,
}

/// Takes chunks in, in the order in which they shall be stored.
pub(super) struct Feed {
    jobs: SyncSender<Job>,
    spare: Receiver<Prepared>,
    chunk_size: u64,
    next: u64,
}

impl Feed {
    /// A file on disk of `size` bytes.
    pub(super) fn file(&mut self, inode: InodeIndex, file: SourceFile, size: u64) -> Result<(), BuildError> {
        let file = Arc::new(file);
        for offset in (0..size).step_by(self.chunk_size as usize) {
            let mut chunk = self.spare()?;
            chunk.decoded.resize((size - offset).min(self.chunk_size) as usize, 0);
            self.submit(inode, chunk, Some((Arc::clone(&file), offset)))?;
        }
        Ok(())
    }

    /// The next `size` bytes of a stream. `failed` makes an error of what the stream says.
    pub(super) fn stream(
        &mut self,
        inode: InodeIndex,
        stream: &mut impl Read,
        size: u64,
        failed: impl Fn(io::Error) -> BuildError,
    ) -> Result<(), BuildError> {
        for offset in (0..size).step_by(self.chunk_size as usize) {
            let mut chunk = self.spare()?;
            chunk.decoded.resize((size - offset).min(self.chunk_size) as usize, 0);
            stream.read_exact(&mut chunk.decoded).map_err(&failed)?;
            self.submit(inode, chunk, None)?;
        }
        Ok(())
    }

    fn spare(&self) -> Result<Prepared, BuildError> {
        self.spare.recv().map_err(|_| BuildError::Worker)
    }

    fn submit(
        &mut self,
        inode: InodeIndex,
        chunk: Prepared,
        source: Option<(Arc<SourceFile>, u64)>,
    ) -> Result<(), BuildError> {
        let job = Job { number: self.next, inode, chunk, source };
        self.next += 1;
        self.jobs.send(job).map_err(|_| BuildError::Worker)
    }
}

/// Runs `feed` with workers and a writer behind it, until all that it fed is written. `progress` hears of decoded and
/// encoded bytes.
pub(super) fn run<T>(
    options: BuildOptions,
    writer: BlobWriter,
    progress: impl Fn(u64, u64) + Send,
    feed: impl FnOnce(&mut Feed) -> Result<T, BuildError>,
) -> Result<(T, Stored), BuildError> {
    let workers = options.workers();
    let window = 2 * workers + 2;
    let (jobs, queue) = sync_channel(window);
    let (done, finished) = sync_channel(window);
    let (free, spare) = sync_channel(window);
    for _ in 0..window {
        free.send(Prepared::default()).map_err(|_| BuildError::Worker)?;
    }
    let queue = Mutex::new(queue);
    let known = writer.known();
    thread::scope(|scope| {
        for _ in 0..workers {
            let done = done.clone();
            scope.spawn(|| work(&queue, options, &known, done));
        }
        drop(done);
        let collector =
            Collector { options, writer, progress, free, places: Vec::new(), chunks: 0, decoded_bytes: 0 };
        let writer = scope.spawn(move || collector.run(finished));
        let fed = {
            let mut feeder = Feed { jobs, spare, chunk_size: options.chunk_size.into(), next: 0 };
            feed(&mut feeder)
        };
        // The writer ends once the feed, and with it every worker, has ended. What stopped it, if anything, also stopped
        // the feed.
        let stored = writer.join().map_err(|_| BuildError::Worker)?;
        match (fed, stored) {
            (Ok(fed), Ok(stored)) => Ok((fed, stored)),
            (Err(BuildError::Worker) | Ok(_), Err(error)) | (Err(error), _) => Err(error),
        }
    })
}

fn work(queue: &Mutex<Receiver<Job>>, options: BuildOptions, known: &Known, done: SyncSender<Done>) {
    let mut encoder = Encoder::with_level(options.compressor, options.level);
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { number, inode, chunk, source }) = job else { return };
        // A chunk that never arrived would leave the writer waiting.
        let chunk = catch_unwind(AssertUnwindSafe(|| prepare(chunk, source, options, known, &mut encoder)));
        let chunk = chunk.unwrap_or(Err(BuildError::Worker));
        // The other end is gone when the build failed elsewhere.
        if done.send(Done { number, inode, chunk }).is_err() {
            return;
        }
    }
}

fn prepare(
    mut chunk: Prepared,
    source: Option<(Arc<SourceFile>, u64)>,
    options: BuildOptions,
    known: &Known,
    encoder: &mut io::Result<Encoder>,
) -> Result<Prepared, BuildError> {
    if let Some((file, offset)) = source {
        file.read(offset, &mut chunk.decoded)?;
    }
    chunk.digest = codec::digest(options.algorithm, &chunk.decoded).bytes;
    chunk.crc32 = crc32c::crc32c(&chunk.decoded);
    // Only a saving: whether the chunk is a duplicate is decided, in order, where chunks are appended.
    chunk.compressed = !known.contains(&chunk.digest) && {
        let failed = |error: &io::Error| BuildError::Encode { message: error.to_string() };
        let encoder = encoder.as_mut().map_err(|error| failed(error))?;
        encoder.encode_into(&chunk.decoded, &mut chunk.encoded).map_err(|error| failed(&error))?
    };
    Ok(chunk)
}

/// The writing end.
struct Collector<P> {
    options: BuildOptions,
    writer: BlobWriter,
    progress: P,
    free: SyncSender<Prepared>,
    places: Vec<Vec<ChunkPlace>>,
    chunks: u64,
    decoded_bytes: u64,
}

impl<P: Fn(u64, u64)> Collector<P> {
    fn run(mut self, finished: Receiver<Done>) -> Result<Stored, BuildError> {
        // No larger than the number of buffers.
        let mut early = BTreeMap::new();
        for done in finished {
            early.insert(done.number, done);
            while let Some(done) = early.remove(&self.chunks) {
                self.append(done.inode, done.chunk?)?;
            }
        }
        Ok(Stored { writer: self.writer, places: self.places, chunks: self.chunks })
    }

    fn append(&mut self, inode: InodeIndex, chunk: Prepared) -> Result<(), BuildError> {
        if self.places.len() <= inode {
            self.places.resize_with(inode + 1, Vec::new);
        }
        let places = &mut self.places[inode];
        let file_offset = places.len() as u64 * u64::from(self.options.chunk_size);
        places.push(self.writer.append(&chunk, file_offset)?);
        self.chunks += 1;
        self.decoded_bytes += chunk.decoded.len() as u64;
        (self.progress)(self.decoded_bytes, self.writer.encoded_size());
        // The feed is gone when everything was fed.
        let _ = self.free.try_send(chunk);
        Ok(())
    }
}
