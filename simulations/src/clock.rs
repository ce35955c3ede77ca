//! What is to happen when: a queue in which what was put in first goes first among equals.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
};

use shoal_scheduler::Time;

/// Events by time.
#[derive(Debug)]
pub(crate) struct Agenda<T> {
    entries: BinaryHeap<Reverse<Entry<T>>>,
    turn: u64,
}

#[derive(Debug)]
struct Entry<T> {
    at: Time,
    turn: u64,
    what: T,
}

impl<T> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.turn) == (other.at, other.turn)
    }
}

impl<T> Eq for Entry<T> {}

impl<T> PartialOrd for Entry<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Entry<T> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.turn).cmp(&(other.at, other.turn))
    }
}

impl<T> Agenda<T> {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self { entries: BinaryHeap::new(), turn: 0 }
    }

    pub(crate) fn push(&mut self, at: Time, what: T) {
        self.turn += 1;
        self.entries.push(Reverse(Entry { at, turn: self.turn, what }));
    }

    /// When the next is due.
    pub(crate) fn next(&self) -> Option<Time> {
        self.entries.peek().map(|Reverse(entry)| entry.at)
    }

    pub(crate) fn pop(&mut self) -> Option<T> {
        self.entries.pop().map(|Reverse(entry)| entry.what)
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
