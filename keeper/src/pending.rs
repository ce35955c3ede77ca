//! Events that wait for an answer: which the daemon has been told of, and for how long they may wait. No descriptor and no clock
//! is needed to decide it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Most events that wait at a time, a descriptor each. Further ones stay in the kernel, whose readers wait as well.
pub const MAX_PENDING: usize = 4096;

/// Events with a descriptor `F` each.
#[derive(Debug)]
pub struct Pending<F> {
    patience: Duration,
    waiting: BTreeMap<u64, Waiting<F>>,
    next: u64,
    /// All ids below this one have been told.
    told: u64,
}

/// An event that has not been answered.
#[derive(Debug)]
pub struct Waiting<F> {
    /// The file.
    pub file: F,
    /// First byte that its reader wants.
    pub offset: u64,
    /// How many.
    pub len: u64,
    since: Instant,
}

impl<F> Pending<F> {
    /// None yet. `patience` is how long an event may wait.
    pub fn new(patience: Duration) -> Self {
        Self { patience, waiting: BTreeMap::new(), next: 0, told: 0 }
    }

    /// Takes note of an event.
    pub fn arrived(&mut self, now: Instant, file: F, offset: u64, len: u64) {
        self.waiting.insert(self.next, Waiting { file, offset, len, since: now });
        self.next += 1;
    }

    /// The next event that the daemon is to be told of, with its id, which is never that of another.
    pub fn untold(&self) -> Option<(u64, &Waiting<F>)> {
        self.waiting.range(self.told..).next().map(|(id, waiting)| (*id, waiting))
    }

    /// It has been told of this one, and all before.
    pub fn told(&mut self, id: u64) {
        self.told = self.told.max(id + 1);
    }

    /// Another daemon, which knows of none: all are to be told again.
    pub fn tell_again(&mut self) {
        self.told = 0;
    }

    /// An event is about to be answered; none if it has been.
    pub fn answered(&mut self, id: u64) -> Option<F> {
        self.waiting.remove(&id).map(|waiting| waiting.file)
    }

    /// Events that have waited for too long: they wait no more.
    pub fn overdue(&mut self, now: Instant) -> Vec<F> {
        let patience = self.patience;
        let mut files = Vec::new();
        // The ids are in the order of arrival.
        while let Some(first) = self.waiting.first_entry()
            && now.saturating_duration_since(first.get().since) >= patience
        {
            files.push(first.remove().file);
        }
        files
    }

    /// All events, which wait no more.
    pub fn take_all(&mut self) -> Vec<F> {
        std::mem::take(&mut self.waiting).into_values().map(|waiting| waiting.file).collect()
    }

    /// When the first event will have waited for too long.
    pub fn due(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|(_, waiting)| waiting.since + self.patience)
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether no more may be taken from the kernel for now.
    pub fn is_full(&self) -> bool {
        self.waiting.len() >= MAX_PENDING
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn each_is_told_once_to_each_daemon_and_answered_once() {
        let (start, mut pending) = (Instant::now(), Pending::new(PATIENCE));
        for name in ["a", "b", "c"] {
            pending.arrived(start, name, 0, 1);
        }
        let told = |pending: &mut Pending<&'static str>| {
            let mut names = Vec::new();
            while let Some((id, waiting)) = pending.untold() {
                names.push(waiting.file);
                pending.told(id);
            }
            names
        };
        assert_eq!(told(&mut pending), ["a", "b", "c"]);
        assert_eq!((pending.answered(1), pending.answered(1), pending.answered(9)), (Some("b"), None, None));
        assert_eq!(told(&mut pending), [""; 0]);
        pending.tell_again();
        pending.arrived(start, "d", 0, 1);
        assert_eq!(told(&mut pending), ["a", "c", "d"]);
        assert_eq!((pending.take_all(), pending.len(), pending.untold().is_none()), (vec!["a", "c", "d"], 0, true));
    }

    #[test]
    fn who_waits_for_too_long_waits_no_more() {
        let (start, mut pending) = (Instant::now(), Pending::new(PATIENCE));
        assert_eq!(pending.due(), None);
        pending.arrived(start, 1, 0, 1);
        pending.arrived(start + PATIENCE / 2, 2, 0, 1);
        assert_eq!(pending.due(), Some(start + PATIENCE));
        assert_eq!(pending.overdue(start + PATIENCE / 2), [0; 0]);
        assert_eq!(pending.overdue(start + PATIENCE), [1]);
        assert_eq!(pending.overdue(start + PATIENCE * 2), [2]);
        assert!(pending.is_empty() && !pending.is_full());
        for number in 0..MAX_PENDING {
            pending.arrived(start, number, 0, 1);
        }
        assert!(pending.is_full());
    }
}
