//! Decoded pieces in memory, and the reads that wait for one: what every [`ChunkSource`](crate::ChunkSource) has in
//! front of its bytes.
//!
//! The kernel asks for a chunk in several requests, often at once, and for many small chunks that lie in one piece. The
//! first to ask leads: it gets the piece; the others join and are answered with it, each with its own chunk. A piece
//! stays until newer ones push it out, so memory is bounded by the capacity plus what is being read at the moment.
//! Failures are not remembered. A short lock around the tables; replies are called outside of it.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;

use crate::{ChunkError, ChunkReply, DecodedPiece};

mod lru;

pub(crate) use lru::Lru;

/// Most reads that wait at a time. The kernel's own limits are far below.
const MAX_WAITING: usize = 1 << 16;

/// Decoded pieces by `K`, up to a number of bytes.
#[derive(Debug)]
pub struct ChunkCache<K: Hash + Eq>(Mutex<Tables<K>>);

/// What became of a read.
pub enum Lead {
    /// It was answered from memory.
    Answered,
    /// Somebody leads already; it is answered with the outcome.
    Joined,
    /// The caller is the first to wait: it must see to it that [`ChunkCache::complete`] is called for the piece, exactly
    /// once.
    Leads,
    /// Too many reads wait. The caller has to answer it with an error.
    Refused(ChunkReply),
}

impl std::fmt::Debug for Lead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Answered => "Answered",
            Self::Joined => "Joined",
            Self::Leads => "Leads",
            Self::Refused(_) => "Refused",
        })
    }
}

struct Tables<K: Hash + Eq> {
    pieces: Lru<K, Arc<DecodedPiece>>,
    /// By piece: index of the chunk that is wanted, and who wants it.
    waiting: HashMap<K, Vec<(u32, ChunkReply)>>,
    waiters: usize,
}

impl<K: Hash + Eq> std::fmt::Debug for Tables<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").field("pieces", &self.pieces).field("waiters", &self.waiters).finish_non_exhaustive()
    }
}

impl<K: Hash + Eq + Clone> ChunkCache<K> {
    /// An empty cache for `capacity` decoded bytes; a single larger piece is kept until the next one comes.
    pub fn new(capacity: u64) -> Self {
        let capacity = usize::try_from(capacity).unwrap_or(usize::MAX);
        Self(Mutex::new(Tables { pieces: Lru::new(capacity), waiting: HashMap::new(), waiters: 0 }))
    }

    /// Answers `reply` with the chunk from memory, now, or keeps it for the outcome of its piece.
    #[must_use = "whoever leads has to complete"]
    pub fn read(&self, piece: &K, chunk_index: u32, reply: ChunkReply) -> Lead {
        let mut tables = self.lock();
        if let Some(decoded) = tables.pieces.get(piece) {
            drop(tables);
            reply(chunk(&decoded, chunk_index));
            return Lead::Answered;
        }
        if tables.waiters == MAX_WAITING {
            return Lead::Refused(reply);
        }
        tables.waiters += 1;
        match tables.waiting.get_mut(piece) {
            Some(waiting) => {
                waiting.push((chunk_index, reply));
                Lead::Joined
            }
            None => {
                tables.waiting.insert(piece.clone(), vec![(chunk_index, reply)]);
                Lead::Leads
            }
        }
    }

    /// Keeps a piece that nobody has asked for yet.
    pub fn keep(&self, piece: K, decoded: Arc<DecodedPiece>) {
        let len = decoded.decoded_len();
        self.lock().pieces.insert(piece, decoded, len);
    }

    /// Ends the read that the caller leads: keeps the piece and answers everybody who waits for one of its chunks. An
    /// error is told each with the index of his own chunk.
    pub fn complete(&self, piece: K, outcome: Result<Arc<DecodedPiece>, ChunkError>) {
        let mut tables = self.lock();
        let waiting = tables.waiting.remove(&piece).unwrap_or_default();
        tables.waiters -= waiting.len();
        if let Ok(decoded) = &outcome {
            tables.pieces.insert(piece, decoded.clone(), decoded.decoded_len());
        }
        drop(tables);
        for (index, reply) in waiting {
            match &outcome {
                Ok(decoded) => reply(chunk(decoded, index)),
                Err(error) => reply(Err(ChunkError { index, ..error.clone() })),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tables<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn chunk(decoded: &DecodedPiece, index: u32) -> Result<Bytes, ChunkError> {
    let missing = || ChunkError { blob: decoded.blob(), index, reason: "its piece decodes without it".into() };
    decoded.chunk(index).ok_or_else(missing)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use shoal_proto::{Algorithm, BlobId};

    use super::*;
    use crate::{Batch, Chunk, Compressor, Piece, PieceTable, codec};

    /// A piece with two chunks, 5 and 6, of `len` bytes each.
    fn piece(len: u32) -> Arc<DecodedPiece> {
        let chunk = |index: u32| Chunk {
            index,
            digest: codec::digest(Algorithm::Blake3, &vec![index as u8; len as usize]),
            decoded_offset: u64::from(index) * 4096,
            decoded_len: len,
            compressed: false,
        };
        let batch = Batch { encoded_len: 2 * len, decoded_len: 2 * len };
        let piece = Piece::batch(0, 0, batch, Compressor::None, vec![(chunk(5), 0), (chunk(6), len)]);
        let table = PieceTable::new(BlobId::new([7; 32]), 1 << 20, 1, vec![piece]).unwrap();
        let encoded = [vec![5; len as usize], vec![6; len as usize]].concat();
        Arc::new(table.decode(0, &encoded).unwrap())
    }

    fn waiter() -> (ChunkReply, Receiver<Result<Bytes, ChunkError>>) {
        let (sender, receiver) = channel();
        (Box::new(move |outcome| sender.send(outcome).unwrap()), receiver)
    }

    #[test]
    fn one_leads_and_all_are_answered_once_with_their_own_chunk() {
        let cache = ChunkCache::new(100);
        let (first, five) = waiter();
        let (second, six) = waiter();
        assert!(matches!(cache.read(&1, 5, first), Lead::Leads));
        assert!(matches!(cache.read(&1, 6, second), Lead::Joined));
        assert!(five.try_recv().is_err());
        cache.complete(1, Ok(piece(3)));
        assert_eq!(
            (five.recv().unwrap().unwrap(), six.recv().unwrap().unwrap()),
            ([5; 3][..].into(), [6; 3][..].into())
        );
        let (third, again) = waiter();
        assert!(matches!(cache.read(&1, 6, third), Lead::Answered));
        assert_eq!(again.recv().unwrap().unwrap(), [6; 3][..]);
        let (fourth, none) = waiter();
        assert!(matches!(cache.read(&1, 7, fourth), Lead::Answered));
        assert_eq!(none.recv().unwrap().unwrap_err().index, 7);
    }

    #[test]
    fn the_oldest_go_when_it_is_full() {
        let cache = ChunkCache::new(20);
        for key in 0..4 {
            assert!(matches!(cache.read(&key, 5, Box::new(|_| {})), Lead::Leads));
            cache.complete(key, Ok(piece(4)));
        }
        let known = |key: u32| matches!(cache.read(&key, 5, Box::new(|_| {})), Lead::Answered);
        assert_eq!([3, 2, 1, 0].map(known), [true, true, false, false]);
        assert!(cache.lock().pieces.bytes() <= 20);
    }

    #[test]
    fn what_is_kept_before_it_is_asked_for_is_bounded_and_answers_nobody_who_waits() {
        let cache = ChunkCache::new(20);
        let (reply, waiting) = waiter();
        assert!(matches!(cache.read(&0, 5, reply), Lead::Leads));
        (0..4).for_each(|key| cache.keep(key, piece(4)));
        assert!(waiting.try_recv().is_err());
        cache.complete(0, Ok(piece(4)));
        assert_eq!(waiting.recv().unwrap().unwrap(), [5; 4][..]);
        assert!(matches!(cache.read(&3, 5, Box::new(|_| {})), Lead::Answered));
        assert!(cache.lock().pieces.bytes() <= 20);
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let cache = ChunkCache::new(10);
        let (reply, outcome) = waiter();
        assert!(matches!(cache.read(&1, 5, reply), Lead::Leads));
        let error = ChunkError { blob: BlobId::new([0; 32]), index: 9, reason: "the registry is down".into() };
        cache.complete(1, Err(error));
        assert_eq!(outcome.recv().unwrap().unwrap_err().index, 5);
        assert!(matches!(cache.read(&1, 5, Box::new(|_| {})), Lead::Leads));
    }

    #[test]
    fn waiters_are_bounded() {
        let cache = ChunkCache::new(10);
        for index in 0..MAX_WAITING as u32 {
            assert!(!matches!(cache.read(&1, index, Box::new(|_| {})), Lead::Refused(_)));
        }
        assert!(matches!(cache.read(&2, 5, Box::new(|_| {})), Lead::Refused(_)));
        cache.complete(1, Ok(piece(4)));
        assert!(matches!(cache.read(&2, 5, Box::new(|_| {})), Lead::Leads));
    }
}
