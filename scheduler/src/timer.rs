//! The table of deadlines; the earliest of them is `poll_timeout`.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
};

use shoal_proto::{PeerId, Priority};

use crate::{Item, RequestId, Time, WantId};

/// What a deadline is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Timer {
    /// A want gives up.
    Want(WantId),
    /// A request owes a sign of life.
    Request(RequestId),
    /// A flight may try the registry again.
    Retry(Item),
    /// A peer may be asked again.
    Peer(PeerId),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pops_in_order_of_time_and_once() {
        let at = Time::from_nanos;
        let (a, b, c) = (Timer::Want(WantId(1)), Timer::Request(RequestId(1)), Timer::Registry);
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
}
