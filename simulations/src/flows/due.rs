//! When each flow will be done: a binary heap that knows where every entry stands, so that a time can be moved.
//!
//! The pending set is the flows under way and nothing else: a flow whose rate changes moves its one entry instead of
//! leaving a stale one behind.

/// Entries of (nanoseconds, slot), earliest first, ties by slot.
#[derive(Debug, Default)]
pub(super) struct Due {
    heap: Vec<(u64, u32)>,
    /// Where each slot stands in `heap`; [`ABSENT`] if it does not.
    places: Vec<u32>,
}

const ABSENT: u32 = u32::MAX;

impl Due {
    /// The earliest entry.
    pub(super) fn first(&self) -> Option<(u64, u32)> {
        self.heap.first().copied()
    }

    /// The time that stands for a slot.
    pub(super) fn of(&self, slot: u32) -> Option<u64> {
        let place = *self.places.get(slot as usize)?;
        self.heap.get(place as usize).map(|&(nanos, _)| nanos)
    }

    /// Enters or moves a slot.
    pub(super) fn set(&mut self, slot: u32, nanos: u64) {
        if slot as usize >= self.places.len() {
            self.places.resize(slot as usize + 1, ABSENT);
        }
        let mut place = self.places[slot as usize] as usize;
        if place == ABSENT as usize {
            place = self.heap.len();
            self.heap.push((nanos, slot));
            self.places[slot as usize] = place as u32;
        } else {
            self.heap[place].0 = nanos;
        }
        self.restore(place);
    }

    /// Takes a slot out.
    pub(super) fn remove(&mut self, slot: u32) {
        let Some(place) =
            self.places.get(slot as usize).map(|&place| place as usize).filter(|&at| at < self.heap.len())
        else {
            return;
        };
        self.heap.swap_remove(place);
        self.places[slot as usize] = ABSENT;
        if place < self.heap.len() {
            self.places[self.heap[place].1 as usize] = place as u32;
            self.restore(place);
        }
    }

    /// Moves the entry at a place to where it belongs.
    fn restore(&mut self, mut place: usize) {
        while place > 0 && self.heap[place] < self.heap[(place - 1) / 2] {
            self.swap(place, (place - 1) / 2);
            place = (place - 1) / 2;
        }
        loop {
            let children = [2 * place + 1, 2 * place + 2].into_iter().filter(|&child| child < self.heap.len());
            match children.min_by_key(|&child| self.heap[child]) {
                Some(child) if self.heap[child] < self.heap[place] => {
                    self.swap(place, child);
                    place = child;
                }
                _ => return,
            }
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.places[self.heap[a].1 as usize] = a as u32;
        self.places[self.heap[b].1 as usize] = b as u32;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_sorted_map(steps in vec((0..20u32, prop::option::of(0..50u64)), 0..200)) {
            let (mut due, mut model) = (Due::default(), BTreeMap::new());
            for (slot, nanos) in steps {
                match nanos {
                    Some(nanos) => {
                        due.set(slot, nanos);
                        model.insert(slot, nanos);
                    }
                    None => {
                        due.remove(slot);
                        model.remove(&slot);
                    }
                }
                prop_assert_eq!(due.first(), model.iter().map(|(&slot, &nanos)| (nanos, slot)).min());
                prop_assert_eq!(due.of(slot), model.get(&slot).copied());
            }
        }
    }
}
