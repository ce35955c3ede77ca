//! From files to chunks in the blob, on all cores, in an order that does not depend on timing.
//!
//! ```text
//!  feed                    workers, as many as asked for            collector
//!  walks the tree or       read (files on disk), hash, compress     puts chunks back in order, drops those that are
//!  reads the archive,  ->  one chunk each, in any order         ->  known, hashes and appends the others
//!  cuts it into chunks            ^                                   |  |
//!        ^                        '------- batches to compress -------'  |
//!        '------------------- buffers to use again ----------------------'
//! ```
//!
//! Chunks are numbered when they are fed. The number of buffers bounds memory: each chunk holds one from the feed until
//! it was written, so with `t` workers at most `2 t + 2` chunks exist, decoded and encoded, and with batches as many as
//! `t + 2` of those. As many messages fit each channel, so that only the feed ever waits for room.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use super::batches::Batches;
use super::blob::{BlobWriter, ChunkKey, Known};
use super::collector::{Collector, Stored};
use super::scan::Version;
use super::tree::InodeIndex;
use super::{BuildError, BuildOptions};
use crate::cipher::{self, Cipher};
use crate::codec::{self, Encoder};

/// Most worker threads.
pub(super) const MAX_WORKERS: usize = 256;

/// A chunk or a batch that went through a worker, with the buffers that hold it.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    pub(super) decoded: Vec<u8>,
    /// Of a chunk.
    pub(super) digest: [u8; 32],
    /// Of a chunk.
    pub(super) crc32: u32,
    /// Whether `encoded` is the compressed form. Not so where that would be larger, and for chunks that the blob has or that
    /// go into a batch.
    pub(super) compressed: bool,
    /// Whether `encoded` is what is written although it may not be compressed: it is encrypted.
    pub(super) encrypted: bool,
    pub(super) encoded: Vec<u8>,
}

impl Prepared {
    /// What is written to the blob.
    pub(super) fn stored(&self) -> &[u8] {
        if self.compressed || self.encrypted { &self.encoded } else { &self.decoded }
    }

    /// What the chunk is known by.
    pub(super) fn key(&self) -> ChunkKey {
        (self.digest, self.decoded.len() as u32)
    }
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

/// What workers do.
pub(super) enum Job {
    Chunk {
        number: u64,
        inode: InodeIndex,
        /// Whether the chunk is stored alone, rather than in a batch.
        alone: bool,
        chunk: Prepared,
        /// Where to read the chunk; absent if `chunk` has it already.
        source: Option<(Arc<SourceFile>, u64)>,
    },
    Batch {
        number: u32,
        batch: Prepared,
    },
}

/// What the collector hears.
pub(super) enum Done {
    Chunk(DoneChunk),
    Batch {
        number: u32,
        batch: Result<Prepared, BuildError>,
    },
    /// No more chunks than these will come.
    Fed {
        chunks: u64,
    },
}

/// A chunk from a worker.
pub(super) struct DoneChunk {
    pub(super) number: u64,
    pub(super) inode: InodeIndex,
    pub(super) alone: bool,
    pub(super) chunk: Result<Prepared, BuildError>,
}

/// Takes chunks in, in the order in which they shall be stored.
pub(super) struct Feed {
    jobs: SyncSender<Job>,
    spare: Receiver<Prepared>,
    options: BuildOptions,
    next: u64,
}

impl Feed {
    /// A file on disk of `size` bytes.
    pub(super) fn file(&mut self, inode: InodeIndex, file: SourceFile, size: u64) -> Result<(), BuildError> {
        let file = Arc::new(file);
        for offset in (0..size).step_by(self.options.chunk_size as usize) {
            let chunk = self.spare(size - offset)?;
            self.submit(inode, size, chunk, Some((Arc::clone(&file), offset)))?;
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
        for offset in (0..size).step_by(self.options.chunk_size as usize) {
            let mut chunk = self.spare(size - offset)?;
            stream.read_exact(&mut chunk.decoded).map_err(&failed)?;
            self.submit(inode, size, chunk, None)?;
        }
        Ok(())
    }

    /// A buffer for the next chunk of a file that has `left` more bytes.
    fn spare(&self, left: u64) -> Result<Prepared, BuildError> {
        let mut chunk = self.spare.recv().map_err(|_| BuildError::Worker)?;
        chunk.decoded.resize(left.min(self.options.chunk_size.into()) as usize, 0);
        Ok(chunk)
    }

    /// Hands a chunk of a file of `size` bytes to the workers.
    fn submit(
        &mut self,
        inode: InodeIndex,
        size: u64,
        chunk: Prepared,
        source: Option<(Arc<SourceFile>, u64)>,
    ) -> Result<(), BuildError> {
        // What is below half of a batch is one chunk: no batch is larger than a chunk.
        let alone = self.options.batch_size.is_none_or(|batch_size| size >= u64::from(batch_size / 2));
        let job = Job::Chunk { number: self.next, inode, alone, chunk, source };
        self.next += 1;
        self.jobs.send(job).map_err(|_| BuildError::Worker)
    }
}

/// Runs `feed` with workers and a collector behind it, until all that it fed is written. `progress` hears of decoded and
/// encoded bytes.
pub(super) fn run<T>(
    options: BuildOptions,
    writer: BlobWriter,
    progress: impl Fn(u64, u64) + Send,
    feed: impl FnOnce(&mut Feed) -> Result<T, BuildError>,
) -> Result<(T, Stored), BuildError> {
    let workers = options.workers();
    let window = 2 * workers + 2;
    // Without batches one buffer stays empty.
    let batch_buffers = if options.batch_size.is_some() { workers + 2 } else { 1 };
    let (jobs, queue) = sync_channel(window + batch_buffers);
    let (done, finished) = sync_channel(window + batch_buffers + 1);
    let (free, spare) = sync_channel(window);
    for _ in 0..window {
        free.send(Prepared::default()).map_err(|_| BuildError::Worker)?;
    }
    let queue = Mutex::new(queue);
    let (known, cipher) = (writer.known(), writer.cipher.clone());
    thread::scope(|scope| {
        for _ in 0..workers {
            let done = done.clone();
            scope.spawn(|| work(&queue, options, (&known, cipher.as_ref()), done));
        }
        // What is less than a block grows when it is encrypted, and its length would tell readers that it is compressed.
        let least = if cipher.is_some() { cipher::BLOCK } else { 0 };
        let batches = Batches::new(options.batch_size.unwrap_or(0) as usize, least, batch_buffers);
        let collector = Collector::new(options, writer, progress, jobs.clone(), free, batches);
        let collector = scope.spawn(move || collector.run(finished));
        let fed = {
            let mut feeder = Feed { jobs, spare, options, next: 0 };
            let fed = feed(&mut feeder);
            // A collector that failed is gone, and says why.
            let _ = done.send(Done::Fed { chunks: feeder.next });
            fed
        };
        // The collector ends once all that was fed is stored, and with it every worker. What stopped it, if anything, also
        // stopped the feed.
        let stored = collector.join().map_err(|_| BuildError::Worker)?;
        match (fed, stored) {
            (Ok(fed), Ok(stored)) => Ok((fed, stored)),
            (Err(BuildError::Worker) | Ok(_), Err(error)) | (Err(error), _) => Err(error),
        }
    })
}

fn work(
    queue: &Mutex<Receiver<Job>>,
    options: BuildOptions,
    (known, cipher): (&Known, Option<&Cipher>),
    done: SyncSender<Done>,
) {
    let encoder = Encoder::with_level(options.compressor, options.level);
    let mut worker = Worker { options, known, cipher, encoder };
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        // What never arrived would leave the collector waiting.
        let finished = match job {
            Ok(Job::Chunk { number, inode, alone, chunk, source }) => {
                let chunk = catch_unwind(AssertUnwindSafe(|| worker.chunk(chunk, source, alone)));
                let chunk = chunk.unwrap_or(Err(BuildError::Worker));
                Done::Chunk(DoneChunk { number, inode, alone, chunk })
            }
            Ok(Job::Batch { number, batch }) => {
                let batch = catch_unwind(AssertUnwindSafe(|| worker.encode(batch)));
                Done::Batch { number, batch: batch.unwrap_or(Err(BuildError::Worker)) }
            }
            Err(_) => return,
        };
        // The other end is gone when the build failed elsewhere.
        if done.send(finished).is_err() {
            return;
        }
    }
}

struct Worker<'a> {
    options: BuildOptions,
    known: &'a Known,
    cipher: Option<&'a Cipher>,
    encoder: io::Result<Encoder>,
}

impl Worker<'_> {
    fn chunk(
        &mut self,
        mut chunk: Prepared,
        source: Option<(Arc<SourceFile>, u64)>,
        alone: bool,
    ) -> Result<Prepared, BuildError> {
        if let Some((file, offset)) = source {
            file.read(offset, &mut chunk.decoded)?;
        }
        chunk.digest = codec::digest(self.options.algorithm, &chunk.decoded).bytes;
        chunk.crc32 = crc32c::crc32c(&chunk.decoded);
        (chunk.compressed, chunk.encrypted) = (false, false);
        // Only a saving: whether the chunk is a duplicate is decided, in order, where chunks are appended.
        if alone && !self.known.contains(&chunk.key()) { self.encode(chunk) } else { Ok(chunk) }
    }

    /// Compresses what is there, if that makes it smaller, and encrypts it where that is asked for.
    fn encode(&mut self, mut unit: Prepared) -> Result<Prepared, BuildError> {
        let failed = |error: &io::Error| BuildError::Encode { message: error.to_string() };
        let encoder = self.encoder.as_mut().map_err(|error| failed(error))?;
        unit.compressed = encoder.encode_into(&unit.decoded, &mut unit.encoded).map_err(|error| failed(&error))?;
        unit.encrypted = self.cipher.is_some();
        if let Some(cipher) = self.cipher {
            unit.compressed &= cipher::is_unmistakable(&unit.encoded);
            if !unit.compressed {
                unit.encoded.clone_from(&unit.decoded);
            }
            cipher.seal(&mut unit.encoded);
        }
        Ok(unit)
    }
}
