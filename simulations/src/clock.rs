//! What is to happen when: a queue in which what was put in first goes first among equals.

use std::{cmp::Reverse, collections::BinaryHeap};

use shoal_scheduler::Time;

/// Events by time.
#[derive(Debug)]
pub(crate) struct Agenda<T> {
    /// When, in which turn it was put in, and where it lies: what is moved around is small.
    queue: BinaryHeap<Reverse<(Time, u64, u32)>>,
    entries: Vec<Option<T>>,
    free: Vec<u32>,
    turn: u64,
}

impl<T> Agenda<T> {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { queue: BinaryHeap::new(), entries: Vec::new(), free: Vec::new(), turn: 0 }
    }

    pub(crate) fn push(&mut self, at: Time, what: T) {
        self.turn += 1;
        let slot = match self.free.pop() {
            Some(slot) => {
                self.entries[slot as usize] = Some(what);
                slot
            }
            None => {
                self.entries.push(Some(what));
                self.entries.len() as u32 - 1
            }
        };
        self.queue.push(Reverse((at, self.turn, slot)));
    }

    /// When the next is due.
    pub(crate) fn next(&self) -> Option<Time> {
        self.queue.peek().map(|Reverse((at, ..))| *at)
    }

    pub(crate) fn pop(&mut self) -> Option<T> {
        let Reverse((.., slot)) = self.queue.pop()?;
        self.free.push(slot);
        self.entries[slot as usize].take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_time_and_then_in_order() {
        let mut agenda = Agenda::new();
        for (at, what) in [(2, 'c'), (1, 'a'), (2, 'd'), (1, 'b')] {
            agenda.push(Time::from_nanos(at), what);
        }
        assert_eq!(agenda.next(), Some(Time::from_nanos(1)));
        assert_eq!(std::iter::from_fn(|| agenda.pop()).collect::<String>(), "abcd");
    }
}
