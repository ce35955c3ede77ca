//! Who is connected, being dialled, backed off from or banned. Pure: time is an argument, the links are the caller's.
//!
//! Two peers keep one connection. When both dial at once, both see two connections, and both keep the one that the
//! peer with the smaller id dialled. Later than [`SIMULTANEOUS`] a second connection is no coincidence: the other
//! side has lost the first, by a crash for instance, and the newer one counts.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, Instant},
};

use shoal_proto::PeerId;

use super::Closing;

/// How long after a connection came up another one counts as opened at the same time; a handshake takes no longer.
pub(super) const SIMULTANEOUS: Duration = Duration::from_secs(5);
/// Wait after the first failed dial; doubles with each one that follows.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// Longest wait between dials.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// Most peers whose bans and back-offs are remembered; the soonest over is forgotten first.
const MAX_REMEMBERED: usize = 4096;

/// A connection as the table knows it.
#[derive(Debug, Clone)]
pub(super) struct Entry<L> {
    /// Whether this node dialled.
    pub dialled: bool,
    /// When its hello was accepted.
    pub since: Instant,
    /// The connection.
    pub link: L,
}

#[derive(Debug, Clone, Copy)]
struct Wait {
    failures: u32,
    until: Instant,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Table<L> {
    me: PeerId,
    capacity: usize,
    links: HashMap<PeerId, Entry<L>>,
    dialling: HashSet<PeerId>,
    waits: HashMap<PeerId, Wait>,
    bans: HashMap<PeerId, Instant>,
}

impl<L: Clone + PartialEq> Table<L> {
    pub(super) fn new(me: PeerId, capacity: usize) -> Self {
        Self {
            me,
            capacity,
            links: HashMap::new(),
            dialling: HashSet::new(),
            waits: HashMap::new(),
            bans: HashMap::new(),
        }
    }

    /// More connections from now on, or fewer: those that are open stay.
    pub(super) fn resize(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    pub(super) fn link(&self, peer: &PeerId) -> Option<&L> {
        self.links.get(peer).map(|entry| &entry.link)
    }

    pub(super) fn links(&self) -> impl Iterator<Item = (&PeerId, &Entry<L>)> {
        self.links.iter()
    }

    /// Whether to dial `peer` now. If so it counts as being dialled until [`Table::dialled`].
    pub(super) fn dial(&mut self, peer: PeerId, limit: usize, now: Instant) -> bool {
        let wait = self.waits.get(&peer).is_some_and(|wait| now < wait.until);
        let open = peer != self.me
            && !wait
            && !self.is_banned(&peer, now)
            && !self.links.contains_key(&peer)
            && self.dialling.len() < limit
            && self.links.len() < self.capacity;
        open && self.dialling.insert(peer)
    }

    /// Dials under way.
    pub(super) fn dials(&self) -> usize {
        self.dialling.len()
    }

    /// A dial ended; a failed one is not repeated for a while.
    pub(super) fn dialled(&mut self, peer: PeerId, success: bool, now: Instant) {
        self.dialling.remove(&peer);
        if success || self.links.contains_key(&peer) {
            self.waits.remove(&peer);
        } else {
            let failures = self.waits.get(&peer).map_or(0, |wait| wait.failures);
            let wait = FIRST_WAIT.saturating_mul(1 << failures.min(16)).min(LONGEST_WAIT);
            remember(&mut self.waits, peer, Wait { failures: failures + 1, until: now + wait }, |wait| wait.until);
        }
    }

    /// A peer broke the protocol: it is not dialled for the longest wait.
    pub(super) fn avoid(&mut self, peer: PeerId, now: Instant) {
        let wait = Wait { failures: 8, until: now + LONGEST_WAIT };
        remember(&mut self.waits, peer, wait, |wait| wait.until);
    }

    /// Refuses `peer` for `time` and gives its connection, to be closed.
    pub(super) fn ban(&mut self, peer: PeerId, time: Duration, now: Instant) -> Option<L> {
        remember(&mut self.bans, peer, now + time, |until| *until);
        self.link(&peer).cloned()
    }

    pub(super) fn is_banned(&self, peer: &PeerId, now: Instant) -> bool {
        self.bans.get(peer).is_some_and(|until| now < *until)
    }

    /// Takes a connection in whose hello was accepted, and gives the one that it replaces.
    ///
    /// Fails with the reason to close it for.
    pub(super) fn enter(&mut self, peer: PeerId, entry: Entry<L>) -> Result<Option<L>, Closing> {
        if peer == self.me {
            return Err(Closing::Duplicate);
        }
        if self.is_banned(&peer, entry.since) {
            return Err(Closing::Banned);
        }
        let preferred = self.me < peer;
        match self.links.get(&peer) {
            Some(known)
                if known.dialled == preferred
                    && entry.dialled != preferred
                    && entry.since.saturating_duration_since(known.since) < SIMULTANEOUS =>
            {
                Err(Closing::Duplicate)
            }
            None if self.links.len() >= self.capacity => Err(Closing::Full),
            _ => Ok(self.links.insert(peer, entry).map(|replaced| replaced.link)),
        }
    }

    /// Takes a connection out that ended; false if another one took its place before.
    pub(super) fn leave(&mut self, peer: &PeerId, link: &L) -> bool {
        let current = self.link(peer) == Some(link);
        if current {
            self.links.remove(peer);
        }
        current
    }
}

/// Inserts into a bounded map, from which the soonest over has to go when it is full.
fn remember<T>(map: &mut HashMap<PeerId, T>, peer: PeerId, value: T, until: impl Fn(&T) -> Instant) {
    if map.len() >= MAX_REMEMBERED && !map.contains_key(&peer) {
        let soonest = map.iter().min_by_key(|(_, value)| until(value)).map(|(peer, _)| *peer);
        soonest.map(|peer| map.remove(&peer));
    }
    map.insert(peer, value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u32) -> PeerId {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&n.to_be_bytes());
        PeerId::new(bytes)
    }

    fn entry(dialled: bool, since: Instant, link: u32) -> Entry<u32> {
        Entry { dialled, since, link }
    }

    /// Both ends of two connections opened at once, for every order in which each end sees them.
    #[test]
    fn simultaneous_opens_leave_the_same_connection_on_both_sides() {
        let now = Instant::now();
        // Connection 1 was dialled by the smaller peer, connection 2 by the larger.
        for (small_first, large_first) in [(1, 1), (1, 2), (2, 1), (2, 2)] {
            let mut small = Table::new(peer(1), 8);
            let mut large = Table::new(peer(2), 8);
            for link in [small_first, 3 - small_first] {
                let _ = small.enter(peer(2), entry(link == 1, now, link));
            }
            for link in [large_first, 3 - large_first] {
                let _ = large.enter(peer(1), entry(link == 2, now, link));
            }
            assert_eq!((small.link(&peer(2)), large.link(&peer(1))), (Some(&1), Some(&1)));
        }
    }

    #[test]
    fn a_later_connection_replaces_one_that_the_peer_must_have_lost() {
        let now = Instant::now();
        let mut table = Table::new(peer(1), 8);
        assert_eq!(table.enter(peer(2), entry(true, now, 1)), Ok(None));
        assert_eq!(table.enter(peer(2), entry(false, now, 2)), Err(Closing::Duplicate));
        assert_eq!(table.enter(peer(2), entry(false, now + SIMULTANEOUS, 3)), Ok(Some(1)));
        assert!(!table.leave(&peer(2), &1));
        assert!(table.leave(&peer(2), &3));
        assert_eq!(table.link(&peer(2)), None);
    }

    #[test]
    fn dials_are_single_bounded_and_backed_off() {
        let now = Instant::now();
        let mut table = Table::<u32>::new(peer(1), 8);
        assert!(!table.dial(peer(1), 2, now), "never itself");
        assert!(table.dial(peer(2), 2, now));
        assert!(!table.dial(peer(2), 2, now), "one at a time");
        assert!(table.dial(peer(3), 2, now));
        assert!(!table.dial(peer(4), 2, now), "two at most");
        table.dialled(peer(2), false, now);
        assert!(!table.dial(peer(2), 2, now));
        assert!(table.dial(peer(2), 2, now + FIRST_WAIT));
        table.dialled(peer(2), false, now + FIRST_WAIT);
        assert!(!table.dial(peer(2), 2, now + FIRST_WAIT * 2));
        for _ in 0..40 {
            table.dialled(peer(2), false, now);
        }
        assert!(table.dial(peer(2), 2, now + LONGEST_WAIT));
        table.dialled(peer(2), true, now);
        assert!(table.dial(peer(2), 2, now));
    }

    #[test]
    fn bans_close_refuse_and_end() {
        let now = Instant::now();
        let mut table = Table::new(peer(1), 8);
        assert_eq!(table.enter(peer(2), entry(true, now, 7)), Ok(None));
        assert_eq!(table.ban(peer(2), Duration::from_secs(60), now), Some(7));
        assert!(table.leave(&peer(2), &7));
        assert!(!table.dial(peer(2), 8, now));
        assert_eq!(table.enter(peer(2), entry(false, now, 8)), Err(Closing::Banned));
        assert_eq!(table.enter(peer(2), entry(false, now + Duration::from_secs(60), 9)), Ok(None));
    }

    #[test]
    fn every_map_is_bounded() {
        let now = Instant::now();
        let mut table = Table::new(peer(0), 3);
        for n in 1..=(MAX_REMEMBERED as u32 + 10) {
            table.ban(peer(n), Duration::from_secs(u64::from(n)), now);
            table.avoid(peer(n), now);
        }
        assert_eq!((table.bans.len(), table.waits.len()), (MAX_REMEMBERED, MAX_REMEMBERED));
        assert!(table.is_banned(&peer(MAX_REMEMBERED as u32 + 10), now));
        let fresh = 100_000;
        for n in 0..3 {
            assert_eq!(table.enter(peer(fresh + n), entry(false, now, n)), Ok(None));
        }
        assert_eq!(table.enter(peer(fresh + 3), entry(false, now, 3)), Err(Closing::Full));
        table.resize(4);
        assert_eq!(table.enter(peer(fresh + 3), entry(false, now, 3)), Ok(None));
    }
}
