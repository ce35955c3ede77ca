//! One read request: from a range of a file to bytes, by way of the chunk source.
//!
//! Nothing waits here. Every chunk of the range is asked for at once, in order, and whichever thread delivers the
//! last one completes the request. A range within one chunk is what the source gave. Parts of several
//! chunks are copied into one buffer as they come, so that a waiting request holds its own length and no chunks.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use shoal_proto::Priority;

use crate::bootstrap::{Inode, Kind};
use crate::extent::{Extent, extents};
use crate::source::{ChunkError, ChunkId, ChunkSource};

/// Why a read ended without bytes.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    #[error("{chunk:?} gave {found} bytes, {expected} are needed")]
    Short { chunk: ChunkId, expected: usize, found: usize },
    #[error("the image names chunks for {found} of {expected} bytes")]
    Unnamed { expected: u64, found: u64 },
    #[error("the source of chunks let the request fall")]
    Unanswered,
}

type Outcome<'a> = Result<&'a [u8], ReadError>;
type Done = Box<dyn FnOnce(Outcome<'_>) + Send>;

/// Reads up to `len` bytes from `offset` on, less at the end of the file, and calls `done` exactly once, now or
/// later, on any thread.
pub(super) fn read(
    source: &dyn ChunkSource,
    inode: &Inode<'_>,
    offset: u64,
    len: u64,
    done: impl FnOnce(Outcome<'_>) + Send + 'static,
) {
    let completion = Completion(Some(Box::new(done)));
    let size = if inode.kind() == Kind::File { inode.size() } else { 0 };
    let expected = len.min(size.saturating_sub(offset));
    let found = extents(inode, offset, len).map(|extent| u64::from(extent.len)).sum();
    if found != expected {
        return completion.call(Err(ReadError::Unnamed { expected, found }));
    }
    let mut parts = extents(inode, offset, len);
    match (parts.next(), parts.next()) {
        (None, _) => completion.call(Ok(&[])),
        (Some(extent), None) => {
            let reply = Box::new(move |bytes| completion.call(whole(extent, &bytes)));
            source.read_part(extent.chunk, extent.part(), Priority::OnDemand, reply);
        }
        _ => gather(source, extents(inode, offset, len), expected as usize, completion),
    }
}

fn gather(source: &dyn ChunkSource, parts: impl Iterator<Item = Extent>, len: usize, completion: Completion) {
    let state = Gathered { buffer: vec![0; len], missing: len, completion };
    let request = Arc::new(Mutex::new(Some(state)));
    let mut start = 0;
    for extent in parts {
        let (request, at) = (Arc::clone(&request), start);
        start += extent.len as usize;
        let reply = Box::new(move |bytes| deliver(&request, at, whole(extent, &bytes)));
        source.read_part(extent.chunk, extent.part(), Priority::OnDemand, reply);
    }
}

/// The bytes of an extent, if they are all there.
fn whole(extent: Extent, bytes: &Result<Bytes, ChunkError>) -> Outcome<'_> {
    let bytes = bytes.as_ref().map_err(Clone::clone)?;
    let (expected, found) = (extent.len as usize, bytes.len());
    if found == expected { Ok(bytes) } else { Err(ReadError::Short { chunk: extent.chunk, expected, found }) }
}

/// A request that waits for several chunks; `None` once it is answered. Locked for a copy of at most the request's
/// length; replies are sent outside.
type Request = Mutex<Option<Gathered>>;

struct Gathered {
    buffer: Vec<u8>,
    missing: usize,
    completion: Completion,
}

/// Takes the part that belongs at `at`; the last part, or the first error, answers the request.
fn deliver(request: &Request, at: usize, part: Outcome<'_>) {
    let mut slot = request.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(state) = slot.as_mut() else { return };
    let outcome = part.map(|bytes| {
        state.buffer[at..at + bytes.len()].copy_from_slice(bytes);
        state.missing -= bytes.len();
    });
    if outcome.is_ok() && state.missing > 0 {
        return;
    }
    let Some(Gathered { buffer, completion, .. }) = slot.take() else { return };
    drop(slot);
    completion.call(outcome.map(|()| buffer.as_slice()));
}

/// Who waits for the outcome. Dropped uncalled, which a source that ends may cause, it calls with an error.
struct Completion(Option<Done>);

impl Completion {
    fn call(mut self, outcome: Outcome<'_>) {
        if let Some(done) = self.0.take() {
            done(outcome);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err(ReadError::Unanswered));
        }
    }
}

#[cfg(test)]
mod tests;
