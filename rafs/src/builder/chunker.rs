//! Reads files once, in order, and turns them into chunks; hashing and compressing happen on worker threads.
//!
//! One thread reads and appends, so the blob does not depend on timing; the workers only see single chunks. A window
//! bounds the chunks in memory.

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::blob::{BlobWriter, Known};
use super::tree::{Node, NodeIndex, Tree, Version};
use super::{BuildError, BuildOptions};
use crate::codec::{self, Encoder};

/// Most worker threads: with more, reading and appending are the limit.
const MAX_WORKERS: usize = 8;

/// A chunk that went through a worker.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) decoded: Vec<u8>,
    pub(super) digest: [u8; 32],
    pub(super) crc32: u32,
    /// Compressed form, where it is smaller. Absent also for chunks that the blob already had.
    pub(super) encoded: Option<Vec<u8>>,
}

struct Job {
    decoded: Vec<u8>,
    reply: SyncSender<io::Result<Prepared>>,
}

/// Reads all files of a tree into the blob. Returns the number of chunks; `chunks` receives their indexes per file.
pub(super) fn run(
    tree: &Tree,
    options: BuildOptions,
    writer: &mut BlobWriter,
    chunks: &mut HashMap<NodeIndex, Vec<u32>>,
) -> Result<u64, BuildError> {
    let workers = thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
    let window = workers + 2;
    let (jobs, queue) = sync_channel::<Job>(window);
    let queue = Mutex::new(queue);
    let known = writer.known();
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| work(&queue, options, &known));
        }
        let pending = VecDeque::with_capacity(window);
        let mut reader = Reader { tree, options, writer, chunks, jobs, pending, window, spare: Vec::new(), count: 0 };
        for (index, node) in tree.files().filter(|(_, node)| node.size > 0) {
            reader.file(index, node)?;
        }
        while !reader.pending.is_empty() {
            reader.append()?;
        }
        Ok(reader.count)
    })
}

struct Reader<'a> {
    tree: &'a Tree,
    options: BuildOptions,
    writer: &'a mut BlobWriter,
    chunks: &'a mut HashMap<NodeIndex, Vec<u32>>,
    jobs: SyncSender<Job>,
    /// Chunks with the workers, in the order in which they were read.
    pending: VecDeque<(NodeIndex, Receiver<io::Result<Prepared>>)>,
    window: usize,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
    count: u64,
}

impl Reader<'_> {
    fn file(&mut self, index: NodeIndex, node: &Node) -> Result<(), BuildError> {
        let path = self.tree.path(index);
        let mut file = open(&path).map_err(BuildError::io("open", &path))?;
        check_version(&path, &file, &node.version)?;
        let mut left = node.size;
        while left > 0 {
            let len = left.min(self.options.chunk_size.into());
            let mut decoded = self.spare.pop().unwrap_or_default();
            decoded.clear();
            let read = file.by_ref().take(len).read_to_end(&mut decoded).map_err(BuildError::io("read", &path))?;
            if (read as u64) < len {
                let what = format!("it ended {} bytes early", left - read as u64);
                return Err(BuildError::Changed { path, what });
            }
            left -= len;
            self.submit(index, decoded)?;
        }
        check_version(&path, &file, &node.version)
    }

    fn submit(&mut self, index: NodeIndex, decoded: Vec<u8>) -> Result<(), BuildError> {
        if self.pending.len() == self.window {
            self.append()?;
        }
        let (reply, done) = sync_channel(1);
        self.jobs.send(Job { decoded, reply }).map_err(|_| BuildError::Worker)?;
        self.pending.push_back((index, done));
        Ok(())
    }

    /// Takes the oldest chunk back and appends it to the blob.
    fn append(&mut self) -> Result<(), BuildError> {
        let Some((index, done)) = self.pending.pop_front() else { return Ok(()) };
        let prepared = done.recv().map_err(|_| BuildError::Worker)?;
        let prepared = prepared.map_err(|error| BuildError::io("compress", &self.tree.path(index))(error))?;
        let chunks = self.chunks.entry(index).or_default();
        let file_offset = chunks.len() as u64 * u64::from(self.options.chunk_size);
        chunks.push(self.writer.append(&prepared, file_offset)?);
        self.count += 1;
        self.spare.push(prepared.decoded);
        Ok(())
    }
}

fn work(queue: &Mutex<Receiver<Job>>, options: BuildOptions, known: &Known) {
    let mut encoder = Encoder::new(options.compressor);
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { decoded, reply }) = job else { return };
        let digest = codec::digest(options.algorithm, &decoded).bytes;
        // Only a saving: whether the chunk is a duplicate is decided, in order, where chunks are appended.
        let encoded = match &mut encoder {
            _ if known.contains(&digest) => Ok(None),
            Ok(encoder) => encoder.encode(&decoded),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let crc32 = crc32c::crc32c(&decoded);
        // The other end is gone when the build failed elsewhere.
        let _ = reply.send(encoded.map(|encoded| Prepared { decoded, digest, crc32, encoded }));
    }
}

/// Opens a file and nothing else: no link, and no waiting for the other end of a fifo.
fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}

fn check_version(path: &Path, file: &File, expected: &Version) -> Result<(), BuildError> {
    let now = Version::of(&file.metadata().map_err(BuildError::io("read", path))?);
    match expected.difference(&now) {
        Some(what) => Err(BuildError::Changed { path: path.to_owned(), what }),
        None => Ok(()),
    }
}
