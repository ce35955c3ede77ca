//! Long names by short ones, for as long as they are mentioned.

use std::{collections::HashMap, hash::Hash};

use foldhash::fast::FixedState;

/// A table of names. A name has a place while somebody mentions it; the place is used again afterwards.
#[derive(Debug)]
pub(crate) struct Names<K> {
    index: HashMap<K, u32, FixedState>,
    /// By place: the name, and how often it is mentioned.
    entries: Vec<(K, u64)>,
    free: Vec<u32>,
}

impl<K> Default for Names<K> {
    fn default() -> Self {
        Self { index: HashMap::default(), entries: Vec::new(), free: Vec::new() }
    }
}

impl<K: Hash + Eq + Copy> Names<K> {
    /// The place of a name that is mentioned.
    pub(crate) fn find(&self, name: &K) -> Option<u32> {
        self.index.get(name).copied()
    }

    /// The name at a place.
    pub(crate) fn name(&self, at: u32) -> Option<&K> {
        self.entries.get(at as usize).map(|(name, _)| name)
    }

    /// Mentions a name, until a [`release`](Self::release); a new place is at most the number of places before.
    pub(crate) fn mention(&mut self, name: K) -> u32 {
        let (entries, free) = (&mut self.entries, &mut self.free);
        let at = *self.index.entry(name).or_insert_with(|| {
            let at = free.pop().unwrap_or(entries.len() as u32);
            match entries.get_mut(at as usize) {
                Some(entry) => *entry = (name, 0),
                None => entries.push((name, 0)),
            }
            at
        });
        self.entries[at as usize].1 += 1;
        at
    }

    /// Takes a mention back.
    pub(crate) fn release(&mut self, at: u32) {
        let Some((name, mentions)) = self.entries.get_mut(at as usize).filter(|(_, mentions)| *mentions > 0) else {
            return;
        };
        *mentions -= 1;
        if *mentions == 0 {
            self.index.remove(name);
            self.free.push(at);
        }
    }

    /// Names that are mentioned.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_its_place_while_it_is_mentioned() {
        let mut names = Names::default();
        let places = ["a", "b", "a"].map(|name| names.mention(name));
        assert_eq!((places, names.len()), ([0, 1, 0], 2));
        names.release(0);
        assert_eq!((names.find(&"a"), names.name(0)), (Some(0), Some(&"a")));
        names.release(0);
        names.release(0);
        assert_eq!((names.find(&"a"), names.find(&"b"), names.len()), (None, Some(1), 1));
        assert_eq!((names.mention("c"), names.name(0)), (0, Some(&"c")));
    }
}
