//! A blob on its way from one place to another: hashed as it passes, and able to go on anywhere after a break.
//!
//! The state of the hash is kept at places on the way. A part that goes on begins at the last of these, so that what the other
//! side has already is read again from there and hashed, but not sent.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{Buf, Bytes};
use futures::{StreamExt, stream};
use sha2::{Digest, Sha256};
use shoal_proto::ObjectId;

use super::{BlobStream, RegistryError};

/// Bytes between places where the state is kept, unless that were too many.
const STEP: u64 = 4 << 20;
/// Most places: a hundred KiB of memory.
const MAX_MARKS: u64 = 1024;

/// A blob that is being copied.
#[derive(Clone)]
pub(super) struct Passage(Arc<Shared>);

struct Shared {
    id: ObjectId,
    size: u64,
    step: u64,
    /// The hash of all before a place. Held for a look-up only.
    marks: Mutex<BTreeMap<u64, Sha256>>,
}

impl Passage {
    pub(super) fn new(id: ObjectId, size: u64) -> Self {
        let (step, marks) = (STEP.max(size.div_ceil(MAX_MARKS)), Mutex::new(BTreeMap::from([(0, Sha256::new())])));
        Self(Arc::new(Shared { id, size, step, marks }))
    }

    /// Where to begin to read for what follows the first `from` bytes.
    pub(super) fn start(&self, from: u64) -> u64 {
        self.0.marks().range(..=from).next_back().map_or(0, |(place, _)| *place)
    }

    /// What follows the first `from` bytes, of a stream from `start` to the end. The last bytes are given only if the digest of the
    /// whole is right.
    pub(super) fn through(&self, stream: BlobStream, start: u64, from: u64) -> BlobStream {
        let (what, length) = (stream.what().to_owned(), self.0.size.saturating_sub(from));
        let hasher = self.0.marks().get(&start).cloned().unwrap_or_default();
        let state = Part { shared: self.0.clone(), stream, hasher, at: start, from };
        let rest = stream::try_unfold(state, |mut part| async move {
            while let Some(bytes) = part.next().await? {
                if !bytes.is_empty() {
                    return Ok(Some((bytes, part)));
                }
            }
            Ok(None)
        });
        BlobStream::new(rest.boxed(), what, length)
    }
}

impl Shared {
    fn marks(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Sha256>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the state at a place, if the last one is far enough behind.
    fn mark(&self, at: u64, hasher: &Sha256) {
        let mut marks = self.marks();
        if marks.last_key_value().is_none_or(|(last, _)| at >= last + self.step) {
            marks.insert(at, hasher.clone());
        }
    }
}

impl fmt::Debug for Passage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Passage").field("id", &self.0.id).field("size", &self.0.size).finish_non_exhaustive()
    }
}

struct Part {
    shared: Arc<Shared>,
    stream: BlobStream,
    hasher: Sha256,
    at: u64,
    from: u64,
}

impl Part {
    /// The next bytes that the other side wants, maybe none of those that came.
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let Some(bytes) = self.stream.next().await else { return Ok(None) };
        let mut bytes = bytes?;
        self.hasher.update(&bytes);
        let behind = self.from.saturating_sub(self.at).min(bytes.len() as u64);
        self.at += bytes.len() as u64;
        if self.at == self.shared.size {
            let (expected, found) = (self.shared.id, ObjectId::new(self.hasher.clone().finalize().into()));
            if found != expected {
                let (what, found) = (self.stream.what().to_owned(), format!("sha256:{found}"));
                return Err(RegistryError::WrongDigest { what, expected, found });
            }
        }
        self.shared.mark(self.at, &self.hasher);
        bytes.advance(behind as usize);
        Ok(Some(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(bytes: &[u8], start: u64) -> BlobStream {
        let chunks: Vec<_> = bytes[start as usize..].chunks(700_000).map(|b| Ok(Bytes::copy_from_slice(b))).collect();
        BlobStream::new(stream::iter(chunks).boxed(), "blob".to_owned(), bytes.len() as u64 - start)
    }

    #[tokio::test]
    async fn it_goes_on_from_anywhere_and_knows_the_whole() {
        let bytes: Vec<u8> = (0..20_000_000u32).map(|n| (n % 251) as u8).collect();
        let (id, size) = (super::super::registry::sha256(&bytes), bytes.len() as u64);
        let passage = Passage::new(id, size);
        assert_eq!(passage.through(stream(&bytes, 0), 0, 0).collect(u64::MAX).await.unwrap(), bytes);
        let starts: Vec<_> = [0, 4_200_000, 12_000_000, size].map(|from| passage.start(from)).into();
        assert_eq!(starts, [0, 4_200_000, 8_400_000, 16_800_000], "in chunks as they came");
        for from in [1, 4_199_999, 4_200_000, 4_200_001, 19_999_999] {
            let start = passage.start(from);
            let rest = passage.through(stream(&bytes, start), start, from).collect(u64::MAX).await.unwrap();
            assert!(rest == bytes[from as usize..], "{from}");
        }
        // Other bytes before or behind the place where it goes on.
        for (changed, from) in [(9_000_000, 12_000_000), (19_999_999, 12_000_000)] {
            let mut wrong = bytes.clone();
            wrong[changed] ^= 1;
            let start = passage.start(from);
            let mut rest = passage.through(stream(&wrong, start), start, from);
            let mut given = 0;
            let error = loop {
                match rest.next().await.unwrap() {
                    Ok(bytes) => given += bytes.len() as u64,
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, RegistryError::WrongDigest { .. }) && given < size - from, "{error}");
        }
    }
}
