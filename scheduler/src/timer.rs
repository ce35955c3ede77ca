//! The table of deadlines; the earliest of them is `poll_timeout`.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use shoal_proto::{PeerId, Priority};

use crate::{Time, blobs::Piece};

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A flight may try the registry again.
    Retry(Piece),
    /// A ban ends.
    Ban(PeerId),
    /// A connection was waited for long enough, or an unreachable peer may be tried again.
    Dial(PeerId),
    /// A lease ends.
    Lease(PeerId),
    /// The registry may be asked again.
    Registry,
    /// The limit of what comes from peers lets something of this priority through.
    Download(Priority),
    /// The limit of what comes from this peer lets something through.
    PeerDownload(PeerId),
}

/// Entries of the queue that may be out of date before it is made anew.
const MAX_STALE: usize = 64;

/// At most one deadline for each thing. Most are cancelled or moved long before their time, so the queue is a heap in which
/// what is out of date stays until it comes up, or until half of the heap is.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    /// When, and which of the entries in `queue` says so.
    current: BTreeMap<Timer, (Time, u64)>,
    /// The first is current.
    queue: BinaryHeap<Reverse<(Time, u64, Timer)>>,
    turn: u64,
}

impl Timers {
    pub(crate) fn set(&mut self, timer: Timer, at: Time) {
        self.turn += 1;
        self.queue.push(Reverse((at, self.turn, timer)));
        if self.current.insert(timer, (at, self.turn)).is_some() {
            self.tidy();
        }
    }

    pub(crate) fn cancel(&mut self, timer: Timer) {
        if self.current.remove(&timer).is_some() {
            self.tidy();
        }
    }

    pub(crate) fn next(&self) -> Option<Time> {
        self.queue.peek().map(|Reverse((at, ..))| *at)
    }

    /// Takes the earliest deadline that is not after `now`.
    pub(crate) fn pop(&mut self, now: Time) -> Option<Timer> {
        let Reverse((.., timer)) = *self.queue.peek().filter(|Reverse((at, ..))| *at <= now)?;
        self.cancel(timer);
        Some(timer)
    }

    /// An entry is out of date.
    fn tidy(&mut self) {
        if self.queue.len() > 2 * self.current.len() + MAX_STALE {
            let current = self.current.iter().map(|(&timer, &(at, turn))| Reverse((at, turn, timer)));
            self.queue = current.collect();
        }
        while let Some(Reverse((at, turn, timer))) = self.queue.peek()
            && self.current.get(timer) != Some(&(*at, *turn))
        {
            self.queue.pop();
        }
    }
}

/// Deadlines of things that keep their own: every want and every request has one, and hardly any of them comes. So nothing is
/// looked up here when one is put off or its owner is gone: that shows once its entry comes to the front. For everything with
/// a deadline there is an entry at that time or before.
#[derive(Debug)]
pub(crate) struct Deadlines<K>(BinaryHeap<Reverse<(Time, K)>>);

impl<K: Ord + Copy> Default for Deadlines<K> {
    fn default() -> Self {
        Self(BinaryHeap::new())
    }
}

impl<K: Ord + Copy> Deadlines<K> {
    /// A new deadline, or one that is now sooner; it need not be called for one that is later.
    pub(crate) fn set(&mut self, at: Time, key: K) {
        self.0.push(Reverse((at, key)));
    }

    /// The first, as of the last time that the queue was tidied.
    pub(crate) fn next(&self) -> Option<Time> {
        self.0.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes the first that is due; `due` says when something is, if it is still there. What is taken has to be set again.
    pub(crate) fn pop(&mut self, now: Time, due: impl Fn(K) -> Option<Time>) -> Option<K> {
        while let Some(&Reverse((_, key))) = self.0.peek().filter(|Reverse((at, _))| *at <= now) {
            self.0.pop();
            match due(key) {
                Some(later) if later > now => self.set(later, key),
                Some(_) => return Some(key),
                None => {}
            }
        }
        None
    }

    /// Sees to it that the first is true, and that there are no more than about twice as many entries as things `there`.
    pub(crate) fn tidy(&mut self, there: usize, due: impl Fn(K) -> Option<Time>) {
        if self.0.len() > 2 * there + MAX_STALE {
            let mut keys: Vec<K> = self.0.drain().map(|Reverse((_, key))| key).collect();
            keys.sort_unstable();
            keys.dedup();
            self.0.extend(keys.into_iter().filter_map(|key| Some(Reverse((due(key)?, key)))));
        }
        while let Some(&Reverse((at, key))) = self.0.peek() {
            let later = due(key).filter(|&due| due > at);
            if later.is_none() && due(key).is_some() {
                return;
            }
            self.0.pop();
            later.into_iter().for_each(|later| self.set(later, key));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pops_in_order_of_time_and_once() {
        let at = Time::from_nanos;
        let (a, b, c) =
            (Timer::Retry(Piece { blob: 0, piece: 1 }), Timer::Lease(PeerId::new([1; 32])), Timer::Registry);
        let mut timers = Timers::default();
        timers.set(a, at(5));
        timers.set(b, at(3));
        timers.set(c, at(4));
        timers.set(a, at(2));
        timers.cancel(c);
        assert_eq!(timers.next(), Some(at(2)));
        assert_eq!(timers.pop(at(1)), None);
        assert_eq!(timers.pop(at(9)), Some(a));
        assert_eq!(timers.pop(at(9)), Some(b));
        assert_eq!(timers.pop(at(9)), None);
        assert_eq!(timers.next(), None);
    }
    #[test]
    fn what_is_gone_is_dropped_and_what_is_put_off_comes_later() {
        let at = Time::from_nanos;
        let mut deadlines = Deadlines::default();
        (0..1000).for_each(|key| deadlines.set(at(key), key));
        // Even ones are gone, and 1 is put off.
        let due = |key: u64| (!key.is_multiple_of(2)).then(|| at(if key == 1 { 6 } else { key }));
        deadlines.tidy(500, due);
        assert_eq!((deadlines.next(), deadlines.0.len()), (Some(at(3)), 998), "only at the front");
        deadlines.tidy(400, due);
        assert_eq!(deadlines.0.len(), 500);
        let popped = [at(2), at(5), at(5), at(5), at(6)].map(|now| deadlines.pop(now, due));
        assert_eq!(popped, [None, Some(3), Some(5), None, Some(1)]);
    }
}
