//! What was used last, as much as fits a number of bytes; the least recently used goes first.

use std::hash::Hash;

use lru::LruCache;

/// The store below a [`ChunkCache`](super::ChunkCache). A single entry larger than all of it is kept until the next one
/// comes: a reader that asks for a large chunk bit by bit must not have it decoded each time.
pub(crate) struct Lru<K: Hash + Eq, V> {
    entries: LruCache<K, (V, usize)>,
    bytes: usize,
    capacity: usize,
}

impl<K: Hash + Eq, V: Clone> Lru<K, V> {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { entries: LruCache::unbounded(), bytes: 0, capacity }
    }

    /// An entry, which becomes the most recently used.
    pub(crate) fn get(&mut self, key: &K) -> Option<V> {
        self.entries.get(key).map(|(value, _)| value.clone())
    }

    /// Keeps an entry that takes `bytes`.
    pub(crate) fn insert(&mut self, key: K, value: V, bytes: usize) {
        self.bytes += bytes;
        if let Some((_, previous)) = self.entries.put(key, (value, bytes)) {
            self.bytes -= previous;
        }
        while self.bytes > self.capacity && self.entries.len() > 1 {
            let Some((_, (_, oldest))) = self.entries.pop_lru() else { break };
            self.bytes -= oldest;
        }
    }

    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<K: Hash + Eq, V> std::fmt::Debug for Lru<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lru").field("bytes", &self.bytes).field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The model: a list with the most recent entry last.
        #[test]
        fn behaves_like_a_list(operations in prop::collection::vec((0..12u32, prop::option::of(0..140usize)), 0..200)) {
            let mut cache = Lru::new(100);
            let mut model: Vec<(u32, usize)> = Vec::new();
            for (key, insert) in operations {
                let found = model.iter().position(|(other, _)| *other == key).map(|position| model.remove(position));
                if let Some(bytes) = insert {
                    cache.insert(key, bytes, bytes);
                    model.push((key, bytes));
                    while model.len() > 1 && model.iter().map(|(_, bytes)| bytes).sum::<usize>() > 100 {
                        model.remove(0);
                    }
                } else {
                    prop_assert_eq!(cache.get(&key), found.map(|(_, bytes)| bytes));
                    model.extend(found);
                }
                prop_assert_eq!(cache.bytes(), model.iter().map(|(_, bytes)| bytes).sum::<usize>());
            }
        }
    }
}
