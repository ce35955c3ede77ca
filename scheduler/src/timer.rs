//! The table of deadlines; the earliest of them is `poll_timeout`.

use std::collections::{BTreeMap, BTreeSet};

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
}

/// At most one deadline for each thing.
#[derive(Debug, Default)]
pub(crate) struct Timers {
    by_timer: BTreeMap<Timer, Time>,
    by_time: BTreeSet<(Time, Timer)>,
}

impl Timers {
    pub(crate) fn set(&mut self, timer: Timer, at: Time) {
        self.cancel(timer);
        self.by_timer.insert(timer, at);
        self.by_time.insert((at, timer));
    }

    pub(crate) fn cancel(&mut self, timer: Timer) {
        if let Some(at) = self.by_timer.remove(&timer) {
            self.by_time.remove(&(at, timer));
        }
    }

    pub(crate) fn next(&self) -> Option<Time> {
        self.by_time.first().map(|&(at, _)| at)
    }

    /// Takes the earliest deadline that is not after `now`.
    pub(crate) fn pop(&mut self, now: Time) -> Option<Timer> {
        let &(at, timer) = self.by_time.first().filter(|(at, _)| *at <= now)?;
        self.by_time.remove(&(at, timer));
        self.by_timer.remove(&timer);
        Some(timer)
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
