//! Decoded chunks in memory, and the reads that wait for one: what every [`ChunkSource`](crate::ChunkSource) has in
//! front of its bytes.
//!
//! The kernel asks for a chunk in several requests, often at once. The first to ask leads: it gets the chunk; the others
//! join and are answered with it. A chunk stays until newer ones push it out, so memory is bounded by the capacity plus
//! what is being read at the moment. A short lock around the tables; replies are called outside of it.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use lru::LruCache;

use crate::{ChunkError, ChunkReply};

/// Decoded chunks by `K`, up to a number of bytes.
#[derive(Debug)]
pub struct ChunkCache<K: Hash + Eq>(Mutex<Tables<K>>);

struct Tables<K: Hash + Eq> {
    chunks: LruCache<K, Bytes>,
    bytes: u64,
    capacity: u64,
    waiting: HashMap<K, Vec<ChunkReply>>,
}

impl<K: Hash + Eq> std::fmt::Debug for Tables<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").field("bytes", &self.bytes).field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl<K: Hash + Eq + Clone> ChunkCache<K> {
    /// An empty cache for `capacity` bytes; a single larger chunk is kept until the next one comes.
    pub fn new(capacity: u64) -> Self {
        let tables = Tables { chunks: LruCache::unbounded(), bytes: 0, capacity, waiting: HashMap::new() };
        Self(Mutex::new(tables))
    }

    /// Answers `reply` from memory, now, or keeps it for the outcome. True when the caller is the first to wait: it must
    /// see to it that [`complete`](Self::complete) is called with the outcome, exactly once.
    #[must_use = "whoever leads has to complete"]
    pub fn lead(&self, key: &K, reply: ChunkReply) -> bool {
        let mut tables = self.lock();
        if let Some(chunk) = tables.chunks.get(key).cloned() {
            drop(tables);
            reply(Ok(chunk));
            return false;
        }
        match tables.waiting.get_mut(key) {
            Some(waiting) => {
                waiting.push(reply);
                false
            }
            None => {
                tables.waiting.insert(key.clone(), vec![reply]);
                true
            }
        }
    }

    /// Ends the read that the caller leads: keeps the chunk and answers everybody who waits for it.
    pub fn complete(&self, key: K, outcome: Result<Bytes, ChunkError>) {
        let mut tables = self.lock();
        let waiting = tables.waiting.remove(&key).unwrap_or_default();
        if let Ok(chunk) = &outcome {
            tables.keep(key, chunk.clone());
        }
        drop(tables);
        for reply in waiting {
            reply(outcome.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tables<K>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq> Tables<K> {
    fn keep(&mut self, key: K, chunk: Bytes) {
        self.bytes += chunk.len() as u64;
        if let Some(old) = self.chunks.put(key, chunk) {
            self.bytes -= old.len() as u64;
        }
        while self.bytes > self.capacity && self.chunks.len() > 1 {
            if let Some((_, oldest)) = self.chunks.pop_lru() {
                self.bytes -= oldest.len() as u64;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use super::*;

    fn counted(counter: &Arc<AtomicUsize>) -> ChunkReply {
        let counter = counter.clone();
        Box::new(move |outcome| {
            assert!(outcome.is_ok());
            counter.fetch_add(1, Relaxed);
        })
    }

    #[test]
    fn one_leads_and_all_are_answered_once() {
        let cache = ChunkCache::new(100);
        let answered = Arc::new(AtomicUsize::new(0));
        assert!(cache.lead(&1, counted(&answered)));
        assert!(!cache.lead(&1, counted(&answered)));
        assert_eq!(answered.load(Relaxed), 0);
        cache.complete(1, Ok(Bytes::from_static(b"abc")));
        assert_eq!(answered.load(Relaxed), 2);
        assert!(!cache.lead(&1, counted(&answered)), "answered from memory");
        assert_eq!(answered.load(Relaxed), 3);
    }

    #[test]
    fn the_oldest_go_when_it_is_full() {
        let cache = ChunkCache::new(10);
        let ignore = || -> ChunkReply { Box::new(|_| {}) };
        for key in 0..4 {
            assert!(cache.lead(&key, ignore()));
            cache.complete(key, Ok(Bytes::from(vec![0; 4])));
        }
        assert!(!cache.lead(&3, ignore()) && !cache.lead(&2, ignore()));
        assert!(cache.lead(&0, ignore()) && cache.lead(&1, ignore()));
        assert!(cache.lock().bytes <= 10);
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let cache = ChunkCache::new(10);
        let failed = Arc::new(AtomicUsize::new(0));
        let counter = failed.clone();
        let reply: ChunkReply = Box::new(move |outcome| {
            assert!(outcome.is_err());
            counter.fetch_add(1, Relaxed);
        });
        assert!(cache.lead(&1, reply));
        let error =
            ChunkError { blob: shoal_proto::BlobId::new([0; 32]), index: 1, reason: "the registry is down".into() };
        cache.complete(1, Err(error));
        assert_eq!(failed.load(Relaxed), 1);
        assert!(cache.lead(&1, Box::new(|_| {})));
    }
}
