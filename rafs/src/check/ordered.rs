//! The sha256 of a file whose parts come from several threads, each in its turn.

use std::io;
use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

/// What the bytes of a file are.
pub(super) struct Hashed {
    pub(super) id: BlobId,
    /// The sha256 of the bytes before the offset that was asked about, if the file has as many.
    pub(super) prefix: Option<[u8; 32]>,
}

/// A digest that is being taken. Whoever has a part waits for those that have the parts before it, and they for nobody: parts
/// are to be begun in their order.
pub(super) struct OrderedDigest {
    /// Held while a part is hashed; all others that want it would have to wait in any case.
    state: Mutex<State>,
    turn: Condvar,
    /// Where the prefix ends.
    prefix: u64,
    len: u64,
}

#[derive(Default)]
struct State {
    at: u64,
    hasher: Sha256,
    prefix: Option<[u8; 32]>,
    failed: bool,
}

impl OrderedDigest {
    /// Of a file of `len` bytes, and of its first `prefix` bytes unless these are 0.
    pub(super) fn new(len: u64, prefix: u64) -> Self {
        Self { state: Mutex::default(), turn: Condvar::new(), prefix, len }
    }

    /// Adds the bytes of a range of the file, or that they could not be read. The last part gets the result, or the first that
    /// failed its error.
    pub(super) fn add(&self, range: &Range<u64>, bytes: io::Result<&[u8]>) -> Option<io::Result<Hashed>> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.turn.wait_while(state, |state| state.at != range.start);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        state.at = range.end;
        self.turn.notify_all();
        match bytes {
            _ if state.failed => return None,
            Ok(bytes) => state.update(bytes, self.prefix.checked_sub(range.start)),
            Err(error) => {
                state.failed = true;
                return Some(Err(error));
            }
        }
        (range.end == self.len).then(|| {
            let id = BlobId::new(std::mem::take(&mut state.hasher).finalize().into());
            Ok(Hashed { id, prefix: state.prefix })
        })
    }
}

impl State {
    /// `prefix` is where in these bytes the prefix ends, if it does not end before them.
    fn update(&mut self, bytes: &[u8], prefix: Option<u64>) {
        let split =
            prefix.and_then(|prefix| bytes.split_at_checked(prefix as usize)).filter(|(first, _)| !first.is_empty());
        let (first, rest) = split.unwrap_or((&[], bytes));
        self.hasher.update(first);
        if split.is_some() {
            self.prefix = Some(self.hasher.clone().finalize().into());
        }
        self.hasher.update(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sha256(bytes: &[u8]) -> [u8; 32] {
        Sha256::digest(bytes).into()
    }

    #[test]
    fn parts_from_several_threads_give_the_digest_of_the_file() {
        let bytes: Vec<u8> = (0..10_000u32).flat_map(u32::to_le_bytes).collect();
        // At an edge between parts, within one, at the end, behind it, none.
        for prefix in [1000, 1234, 40_000, 40_001, 0] {
            let digest = OrderedDigest::new(40_000, prefix);
            let next = std::sync::atomic::AtomicU64::new(0);
            let part = || {
                let mut found = None;
                loop {
                    let start = next.fetch_add(1000, std::sync::atomic::Ordering::Relaxed);
                    if start >= 40_000 {
                        return found;
                    }
                    let range = start..start + 1000;
                    found = digest.add(&range, Ok(&bytes[start as usize..][..1000])).or(found);
                }
            };
            let found: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(part)).collect();
                threads.into_iter().filter_map(|thread| thread.join().unwrap()).collect()
            });
            let [Ok(Hashed { id, prefix: found })] = &found[..] else { panic!("{} results", found.len()) };
            assert_eq!(*id, BlobId::new(sha256(&bytes)));
            let expected = (1..=40_000).contains(&prefix).then(|| sha256(&bytes[..prefix as usize]));
            assert_eq!(*found, expected, "{prefix}");
        }
    }

    #[test]
    fn a_part_that_cannot_be_read_is_told_once() {
        let digest = OrderedDigest::new(3, 0);
        assert!(digest.add(&(0..1), Ok(b"a")).is_none());
        assert!(matches!(digest.add(&(1..2), Err(io::ErrorKind::UnexpectedEof.into())), Some(Err(_))));
        assert!(digest.add(&(2..3), Ok(b"c")).is_none());
        let empty = OrderedDigest::new(0, 0).add(&(0..0), Ok(b""));
        assert!(matches!(empty, Some(Ok(Hashed { id, .. })) if id == BlobId::new(sha256(b""))));
    }
}
