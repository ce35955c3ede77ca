//! From files to chunks in the blob, on all cores, in an order that does not depend on timing.
//!
//! ```text
//!  feed                    workers, as many as asked for            collector
//!  walks the tree or       read (files on disk), hash, compress     puts parcels back in order, drops chunks that are
//!  reads the archive,  ->  one parcel each, in any order        ->  known, hashes and appends the others
//!  cuts it into chunks            ^                                   |  |
//!        ^                        '------- batches to compress -------'  |
//!        '------------------- parcels to fill again ---------------------'
//! ```
//!
//! A parcel is one chunk, or several small ones. Parcels are numbered when they are fed. Their number bounds memory: each chunk
//! is in one from the feed until it was written, so with `t` workers at most `2 t + 2` parcels exist, decoded and encoded, and
//! with batches as many as `t + 2` of those. As many messages fit each channel, so that only the feed ever waits for room.

use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use super::batches::Batches;
use super::blob::{BlobWriter, Known};
use super::collector::{Collector, Stored};
use super::parcel::{Form, Parcel, SourceFile};
use super::tree::InodeIndex;
use super::{BuildError, BuildOptions};
use crate::cipher::{self, Cipher};
use crate::codec::{self, Encoder};

/// Most worker threads.
pub(super) const MAX_WORKERS: usize = 256;

/// A batch, with the buffers that hold it.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    pub(super) decoded: Vec<u8>,
    pub(super) encoded: Vec<u8>,
    pub(super) form: Form,
}

impl Prepared {
    /// What is written to the blob.
    pub(super) fn stored(&self) -> &[u8] {
        self.form.pick(&self.decoded, &self.encoded)
    }
}

/// What workers do.
pub(super) enum Job {
    Parcel { number: u64, parcel: Parcel },
    Batch { number: u32, batch: Prepared },
}

/// What the collector hears.
pub(super) enum Done {
    Parcel {
        number: u64,
        parcel: Result<Parcel, BuildError>,
    },
    Batch {
        number: u32,
        batch: Result<Prepared, BuildError>,
    },
    /// No more parcels than these will come.
    Fed {
        parcels: u64,
    },
}

/// Takes chunks in, in the order in which they shall be stored.
pub(super) struct Feed {
    jobs: SyncSender<Job>,
    spare: Receiver<Parcel>,
    options: BuildOptions,
    /// The parcel that the next chunk joins, if it has room.
    open: Option<Parcel>,
    /// Parcels that were handed over.
    parcels: u64,
}

impl Feed {
    /// A file on disk of `size` bytes.
    pub(super) fn file(&mut self, inode: InodeIndex, file: SourceFile, size: u64) -> Result<(), BuildError> {
        let file = Arc::new(file);
        for offset in (0..size).step_by(self.options.chunk_size as usize) {
            self.add(inode, size, offset, Some((Arc::clone(&file), offset)))?;
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
            let bytes = self.add(inode, size, offset, None)?;
            stream.read_exact(bytes).map_err(&failed)?;
        }
        Ok(())
    }

    /// Adds the chunk at `offset` of a file of `size` bytes, and gives the place for its bytes.
    fn add(
        &mut self,
        inode: InodeIndex,
        size: u64,
        offset: u64,
        source: Option<(Arc<SourceFile>, u64)>,
    ) -> Result<&mut [u8], BuildError> {
        let len = (size - offset).min(self.options.chunk_size.into()) as usize;
        if self.open.as_ref().is_some_and(|open| !open.has_room(len)) {
            self.hand_over()?;
        }
        let parcel = match self.open.take() {
            Some(parcel) => parcel,
            None => self.spare.recv().map_err(|_| BuildError::Worker)?,
        };
        // What is below half of a batch is one chunk: no batch is larger than a chunk.
        let alone = self.options.batch_size.is_none_or(|batch_size| size >= u64::from(batch_size / 2));
        Ok(self.open.insert(parcel).add(inode, alone, source, len))
    }

    /// Hands what was added to the workers.
    fn hand_over(&mut self) -> Result<(), BuildError> {
        let Some(parcel) = self.open.take() else { return Ok(()) };
        let number = self.parcels;
        self.parcels += 1;
        self.jobs.send(Job::Parcel { number, parcel }).map_err(|_| BuildError::Worker)
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
        free.send(Parcel::default()).map_err(|_| BuildError::Worker)?;
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
            let mut feeder = Feed { jobs, spare, options, open: None, parcels: 0 };
            let fed = feed(&mut feeder).and_then(|fed| feeder.hand_over().map(|()| fed));
            // A collector that failed is gone, and says why.
            let _ = done.send(Done::Fed { parcels: feeder.parcels });
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
            Ok(Job::Parcel { number, parcel }) => {
                let parcel = catch_unwind(AssertUnwindSafe(|| worker.parcel(parcel)));
                Done::Parcel { number, parcel: parcel.unwrap_or(Err(BuildError::Worker)) }
            }
            Ok(Job::Batch { number, batch }) => {
                let batch = catch_unwind(AssertUnwindSafe(|| worker.batch(batch)));
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
    fn parcel(&mut self, mut parcel: Parcel) -> Result<Parcel, BuildError> {
        let Parcel { decoded, encoded, chunks } = &mut parcel;
        encoded.clear();
        for chunk in chunks {
            let bytes = &mut decoded[chunk.decoded.clone()];
            if let Some((file, offset)) = chunk.source.take() {
                file.read(offset, bytes)?;
            }
            chunk.digest = codec::digest(self.options.algorithm, bytes).bytes;
            chunk.crc32 = crc32c::crc32c(bytes);
            // Only a saving: whether the chunk is a duplicate is decided, in order, where chunks are appended.
            if chunk.alone && !self.known.contains(&chunk.key()) {
                let start = encoded.len();
                chunk.form = self.encode(bytes, encoded)?;
                chunk.encoded = start..encoded.len();
            }
        }
        Ok(parcel)
    }

    fn batch(&mut self, mut batch: Prepared) -> Result<Prepared, BuildError> {
        batch.encoded.clear();
        batch.form = self.encode(&batch.decoded, &mut batch.encoded)?;
        Ok(batch)
    }

    /// Compresses a unit, if that makes it smaller, and encrypts it where that is asked for. What is to be written in its place,
    /// if anything, is appended to `encoded`.
    fn encode(&mut self, decoded: &[u8], encoded: &mut Vec<u8>) -> Result<Form, BuildError> {
        let failed = |error: &io::Error| BuildError::Encode { message: error.to_string() };
        let encoder = self.encoder.as_mut().map_err(|error| failed(error))?;
        let start = encoded.len();
        let mut compressed = encoder.encode_to(decoded, encoded).map_err(|error| failed(&error))?;
        if let Some(cipher) = self.cipher {
            compressed &= cipher::is_unmistakable(&encoded[start..]);
            let mut unit = if compressed { encoded.split_off(start) } else { decoded.to_vec() };
            cipher.seal(&mut unit);
            encoded.truncate(start);
            encoded.append(&mut unit);
        }
        Ok(Form { compressed, encrypted: self.cipher.is_some() })
    }
}
