//! All that the file system asks of whoever has the bytes.
//!
//! One trait with real implementations on both sides of the network: [`BlobDir`](crate::BlobDir) reads blob files in a
//! folder, the peer's implementation asks the swarm. Callbacks rather than futures keep this crate free of a runtime and
//! let a FUSE reply be completed from any thread.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use shoal_proto::{BlobId, Priority};

/// A chunk as an image names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChunkId {
    /// Position of the blob in the bootstrap's blob table.
    pub blob: u32,
    /// Index of the chunk in that blob's chunk table.
    pub index: u32,
}

/// Why a chunk could not be read. The reader gets EIO; the text goes to the log.
#[derive(Debug, Clone, thiserror::Error)]
#[error("chunk {index} of blob {blob}: {reason}")]
pub struct ChunkError {
    /// The blob that holds the chunk.
    pub blob: BlobId,
    /// Index of the chunk in the blob.
    pub index: u32,
    /// What was tried and how each try ended.
    pub reason: Arc<str>,
}

/// Takes the outcome of a read, exactly once, on any thread: all that was asked for of the chunk, decoded and verified.
pub type ChunkReply = Box<dyn FnOnce(Result<Bytes, ChunkError>) + Send + 'static>;

/// Gives verified chunks of one image.
pub trait ChunkSource: Send + Sync + 'static {
    /// Reads one chunk and calls `reply` exactly once, now (when the bytes are in memory) or later from another thread,
    /// within a deadline of the source's own. Never blocks on a fetch or a disk.
    ///
    /// A `chunk` that the image does not name is answered with an error.
    fn read(&self, chunk: ChunkId, priority: Priority, reply: ChunkReply);

    /// As [`read`](Self::read), but what is asked for, and given, is only a part of the chunk: less where the chunk ends before
    /// the part does. For sources to which a part costs less than the chunk.
    fn read_part(&self, chunk: ChunkId, part: Range<u32>, priority: Priority, reply: ChunkReply) {
        self.read(chunk, priority, for_part(part, reply));
    }
}

/// Takes a chunk, and passes on the part of it that `reply` is to be given.
pub fn for_part(part: Range<u32>, reply: ChunkReply) -> ChunkReply {
    let cut = move |chunk: Bytes| {
        let [start, end] = [part.start, part.end].map(|at| (at as usize).min(chunk.len()));
        chunk.slice(start..end.max(start))
    };
    Box::new(move |outcome| reply(outcome.map(cut)))
}
