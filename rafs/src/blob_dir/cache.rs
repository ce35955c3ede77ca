//! Decoded chunks, as many as fit a number of bytes; the least recently used goes first.

use bytes::Bytes;
use lru::LruCache;

use super::DECODED_CACHE_BYTES;
use crate::source::ChunkId;

/// The cache. A chunk larger than all of it is not kept.
pub(super) struct Cache {
    chunks: LruCache<ChunkId, Bytes>,
    bytes: usize,
    limit: usize,
}

impl Default for Cache {
    fn default() -> Self {
        Self::new(DECODED_CACHE_BYTES)
    }
}

impl Cache {
    pub(super) fn new(limit: usize) -> Self {
        Self { chunks: LruCache::unbounded(), bytes: 0, limit }
    }

    /// A chunk, which becomes the most recently used.
    pub(super) fn get(&mut self, chunk: ChunkId) -> Option<Bytes> {
        self.chunks.get(&chunk).cloned()
    }

    pub(super) fn insert(&mut self, chunk: ChunkId, bytes: Bytes) {
        self.bytes += bytes.len();
        if let Some(previous) = self.chunks.put(chunk, bytes) {
            self.bytes -= previous.len();
        }
        while self.bytes > self.limit {
            let Some((_, oldest)) = self.chunks.pop_lru() else { break };
            self.bytes -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The model: a list with the most recent chunk last.
        #[test]
        fn behaves_like_a_list(operations in prop::collection::vec((0..12u32, prop::option::of(0..40usize)), 0..200)) {
            let mut cache = Cache::new(100);
            let mut model: Vec<(u32, usize)> = Vec::new();
            for (index, insert) in operations {
                let chunk = ChunkId { blob: 0, index };
                let found = model.iter().position(|(key, _)| *key == index).map(|position| model.remove(position));
                if let Some(len) = insert {
                    cache.insert(chunk, vec![0; len].into());
                    model.push((index, len));
                    while model.iter().map(|(_, len)| len).sum::<usize>() > 100 {
                        model.remove(0);
                    }
                } else {
                    prop_assert_eq!(cache.get(chunk).map(|bytes| bytes.len()), found.map(|(_, len)| len));
                    model.extend(found);
                }
                prop_assert_eq!(cache.bytes, model.iter().map(|(_, len)| len).sum::<usize>());
            }
        }
    }
}
