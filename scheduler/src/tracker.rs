//! The serving side: whom to serve, and whom to send to somebody who received the same a moment ago.
//!
//! A piece that everyone wants at once should not go through one uplink. Whoever serves remembers who received which
//! piece and, once it has more than a little to do, answers `busy` with these as alternates: each of them then serves
//! a few, and the piece spreads in about log2(N) piece times. Pure, like the scheduler beside it; the shell asks
//! [`admit`](Tracker::admit) before it serves a request, and tells what was [`sent`](Tracker::sent) and when the
//! request [`ended`](Tracker::ended).

use std::{
    collections::{BTreeMap, VecDeque, btree_map::Entry},
    time::Duration,
};

use shoal_proto::{PeerId, Priority};

use crate::{Item, Time};

/// The limits of a [`Tracker`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackerConfig {
    /// Encoded bytes being sent up to which everyone is served at least: enough for a connection to not run dry, little enough
    /// that a piece leaves soon and its receiver can pass it on. Default 1 MiB.
    pub relaxed: u64,
    /// Everyone is served as long as what is being sent takes no longer than this, at the rate of late: who is asked for
    /// much because it is fast need not send half of it away. Default 250 ms.
    pub backlog: Duration,
    /// So many peers are given a piece as far as the backlog allows. Later ones find less room, a fifth of it: others have
    /// the piece, and somebody may be waiting here for one that nobody has. Default 8.
    pub copies: u32,
    /// How many times what everyone is served up to may be on its way before prefetch is refused even without an
    /// alternate; on-demand at twice as many. Default 4.
    pub ceiling: u64,
    /// How long who received a piece is believed to have it. Default 30 s.
    pub memory: Duration,
    /// Alternates named in one answer. Default 4.
    pub alternates: usize,
    /// When to come again. Default 100 ms.
    pub retry_after: Duration,
    /// Pieces remembered. Default 16,384.
    pub max_items: usize,
}

impl Default for TrackerConfig {
    fn default() -> Self {
        Self {
            relaxed: 1 << 20,
            backlog: Duration::from_millis(250),
            copies: 8,
            ceiling: 4,
            memory: Duration::from_secs(30),
            alternates: 4,
            retry_after: Duration::from_millis(100),
            max_items: 1 << 14,
        }
    }
}

/// What to do with a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Admission {
    /// Serve it, and say so when it has [`ended`](Tracker::ended).
    Serve,
    /// Answer `busy` with these.
    Busy {
        /// When to come again.
        retry_after: Duration,
        /// Who has the pieces, probably; may be empty.
        alternates: Vec<PeerId>,
    },
}

/// Somebody who received a piece.
#[derive(Debug)]
struct Receiver {
    peer: PeerId,
    at: Time,
    /// How often it was named as an alternate since.
    named: u32,
}

/// Part of the backlog that is left for what was given to enough peers.
const SPREAD: u32 = 5;
/// The rate is taken over at least so long.
const SAMPLE: Duration = Duration::from_millis(100);
/// Receivers remembered for a piece.
const MAX_RECEIVERS: usize = 16;

/// A piece that was given to somebody.
#[derive(Debug, Default)]
struct Given {
    /// To how many peers since `since`, whether or not it is there yet.
    copies: u32,
    since: Time,
    receivers: VecDeque<Receiver>,
}

/// Remembers who received what, and what is being sent.
#[derive(Debug, Default)]
pub struct Tracker {
    config: TrackerConfig,
    /// Encoded bytes admitted and not ended.
    uploads: u64,
    /// The same for each peer that has any.
    shares: BTreeMap<PeerId, u64>,
    /// When a peer without any was refused last.
    starved: Option<Time>,
    /// Bytes sent since `since`.
    sent: u64,
    since: Time,
    bytes_per_s: u64,
    given: BTreeMap<Item, Given>,
    /// The items of `given`, oldest first.
    order: VecDeque<Item>,
}

impl Tracker {
    /// A tracker that remembers nothing yet.
    pub fn new(config: TrackerConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Whether to serve `peer` a run of pieces that begins with `first` and has so many encoded bytes.
    /// [`Admission::Serve`] counts them as being sent until [`ended`](Self::ended).
    pub fn admit(&mut self, now: Time, peer: PeerId, first: Item, bytes: u64, priority: Priority) -> Admission {
        // Copies of long ago may be gone, as their receivers are forgotten.
        let recent = |given: &&Given| now.since(given.since) < self.config.memory;
        let spread = self.given.get(&first).filter(recent).is_some_and(|given| given.copies >= self.config.copies);
        let relaxed = self.relaxed(if spread { self.config.backlog / SPREAD } else { self.config.backlog });
        let ceiling = relaxed.saturating_mul(match priority {
            Priority::Prefetch => self.config.ceiling,
            Priority::OnDemand => self.config.ceiling.saturating_mul(2),
        });
        let alternates = if self.uploads < relaxed { Vec::new() } else { self.name(now, peer, first) };
        let fair = priority == Priority::OnDemand || self.is_fair(now, peer, bytes, ceiling);
        if alternates.is_empty() && self.uploads < ceiling.max(1) && fair {
            self.uploads = self.uploads.saturating_add(bytes);
            let share = self.shares.entry(peer).or_default();
            *share = share.saturating_add(bytes);
            let memory = self.config.memory;
            let given = self.given(first);
            if now.since(given.since) >= memory {
                (given.copies, given.since) = (0, now);
            }
            given.copies = given.copies.saturating_add(1);
            return Admission::Serve;
        }
        if !self.shares.contains_key(&peer) {
            self.starved = Some(now);
        }
        Admission::Busy { retry_after: self.config.retry_after, alternates }
    }

    /// Whether a peer is left its part of what is sent at most. Who has just received something is the first to see that there
    /// is room again, so while others are refused nobody takes more than an equal part.
    fn is_fair(&self, now: Time, peer: PeerId, bytes: u64, most: u64) -> bool {
        let contended = self.starved.is_some_and(|at| now.since(at) < self.config.retry_after * 2);
        let share = self.shares.get(&peer).copied().unwrap_or(0);
        !contended || share == 0 || share.saturating_add(bytes) <= most / (self.shares.len() as u64 + 1)
    }

    /// Bytes being sent up to which everyone is served: what takes no longer than this at the rate of late.
    fn relaxed(&self, backlog: Duration) -> u64 {
        let millis = u64::try_from(backlog.as_millis()).unwrap_or(u64::MAX);
        self.config.relaxed.max(self.bytes_per_s.saturating_mul(millis) / 1000)
    }

    /// More was sent: the rate is taken over samples, half of it from the last one.
    fn count(&mut self, now: Time, bytes: u64) {
        self.sent = self.sent.saturating_add(bytes);
        let elapsed = now.since(self.since);
        if elapsed >= SAMPLE {
            let rate = u128::from(self.sent) * 1_000_000_000 / elapsed.as_nanos();
            self.bytes_per_s = self.bytes_per_s / 2 + u64::try_from(rate / 2).unwrap_or(u64::MAX / 2);
            (self.sent, self.since) = (0, now);
        }
    }

    /// Peers that received the first piece of a run, the least named first. The others were mostly sent with it, and who
    /// lacks one says so.
    fn name(&mut self, now: Time, asker: PeerId, first: Item) -> Vec<PeerId> {
        let Some(Given { receivers, .. }) = self.given.get_mut(&first) else { return Vec::new() };
        receivers.retain(|receiver| now.since(receiver.at) < self.config.memory);
        let mut found: Vec<_> = receivers.iter_mut().filter(|receiver| receiver.peer != asker).collect();
        found.sort_by_key(|receiver| (receiver.named, receiver.peer));
        let chosen = found.into_iter().take(self.config.alternates);
        chosen
            .map(|receiver| {
                receiver.named += 1;
                receiver.peer
            })
            .collect()
    }

    /// The last of a piece's so many encoded bytes went to `peer`.
    pub fn sent(&mut self, now: Time, peer: PeerId, item: Item, bytes: u64) {
        self.count(now, bytes);
        let receivers = &mut self.given(item).receivers;
        receivers.retain(|receiver| receiver.peer != peer);
        if receivers.len() >= MAX_RECEIVERS {
            receivers.pop_front();
        }
        receivers.push_back(Receiver { peer, at: now, named: 0 });
    }

    fn given(&mut self, item: Item) -> &mut Given {
        if !self.given.contains_key(&item) {
            self.order.push_back(item);
            if self.order.len() > self.config.max_items.max(1)
                && let Some(oldest) = self.order.pop_front()
            {
                self.given.remove(&oldest);
            }
        }
        self.given.entry(item).or_default()
    }

    /// A request of `peer` that was admitted with so many bytes is over, however it went.
    pub fn ended(&mut self, peer: PeerId, bytes: u64) {
        self.uploads = self.uploads.saturating_sub(bytes);
        if let Entry::Occupied(mut share) = self.shares.entry(peer) {
            *share.get_mut() = share.get().saturating_sub(bytes);
            if *share.get() == 0 {
                share.remove();
            }
        }
    }

    /// The peer is gone and is not named any more.
    pub fn forget(&mut self, peer: PeerId) {
        self.given.values_mut().for_each(|given| given.receivers.retain(|receiver| receiver.peer != peer));
    }

    /// Encoded bytes being sent.
    pub fn uploads(&self) -> u64 {
        self.uploads
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlobKey;

    fn peer(n: u8) -> PeerId {
        PeerId::new([n; 32])
    }

    const BLOB: BlobKey = BlobKey { id: [0; 32], variant: 0 };

    fn item(piece: u32) -> Item {
        Item { blob: BLOB, piece }
    }

    /// Serves one piece of 10 bytes to everyone.
    fn tracker() -> Tracker {
        Tracker::new(TrackerConfig {
            relaxed: 10,
            ceiling: 3,
            alternates: 1,
            max_items: 2,
            ..TrackerConfig::default()
        })
    }

    #[test]
    fn an_idle_peer_serves_and_a_busy_one_names_who_received_the_piece() {
        let mut tracker = tracker();
        let admit = |tracker: &mut Tracker, n| tracker.admit(Time::ZERO, peer(n), item(7), 10, Priority::Prefetch);
        tracker.sent(Time::ZERO, peer(1), item(7), 10);
        tracker.sent(Time::ZERO, peer(2), item(7), 10);
        assert_eq!(admit(&mut tracker, 3), Admission::Serve);
        let named = |admission| match admission {
            Admission::Busy { alternates, .. } => alternates,
            Admission::Serve => panic!("served"),
        };
        assert_eq!(named(admit(&mut tracker, 3)), [peer(1)]);
        assert_eq!(named(admit(&mut tracker, 4)), [peer(2)], "in turn");
        assert_eq!(named(admit(&mut tracker, 1)), [peer(2)], "not the asker itself");
        tracker.forget(peer(2));
        assert_eq!(admit(&mut tracker, 1), Admission::Serve);
        tracker.ended(peer(3), 10);
        assert_eq!(tracker.uploads(), 10);
    }

    #[test]
    fn who_was_served_last_leaves_room_for_those_who_were_refused() {
        let mut tracker = tracker();
        let admit = |tracker: &mut Tracker, now, n, piece| {
            tracker.admit(now, peer(n), item(piece), 10, Priority::Prefetch) == Admission::Serve
        };
        assert_eq!([1, 2, 3].map(|piece| admit(&mut tracker, Time::ZERO, 1, piece)), [true; 3], "alone it gets all");
        assert!(!admit(&mut tracker, Time::ZERO, 2, 4));
        tracker.ended(peer(1), 10);
        assert!(!admit(&mut tracker, Time::ZERO, 1, 5), "it has two of three parts");
        assert!(admit(&mut tracker, Time::ZERO, 2, 5));
        tracker.ended(peer(2), 10);
        let later = Time::ZERO + TrackerConfig::default().retry_after * 2;
        assert!(admit(&mut tracker, later, 1, 5), "nobody else has asked since");
    }

    #[test]
    fn limits_hold_with_room_for_on_demand() {
        let mut tracker = tracker();
        let mut serves = |priority| tracker.admit(Time::ZERO, peer(1), item(1), 10, priority) == Admission::Serve;
        assert_eq!([(); 4].map(|()| serves(Priority::Prefetch)), [true, true, true, false]);
        assert_eq!([(); 4].map(|()| serves(Priority::OnDemand)), [true, true, true, false]);
    }

    #[test]
    fn who_sends_fast_serves_more_before_it_names_others() {
        let mut tracker = tracker();
        for round in 1..20 {
            // 1,000 bytes per second.
            tracker.sent(Time::ZERO + SAMPLE * round, peer(1), item(7), 100);
        }
        let now = Time::ZERO + SAMPLE * 20;
        let mut served = |piece: fn(u32) -> u32| {
            let serves = |&turn: &u32| {
                tracker.admit(now, peer(2), item(piece(turn)), 10, Priority::Prefetch) == Admission::Serve
            };
            (0..200).filter(serves).count()
        };
        assert_eq!(served(|_| 7), 8, "which is more than a fifth of a quarter of a second's worth");
        assert_eq!(served(|turn| turn % 2), 2 * 8, "the rest of that is for other pieces");
    }

    #[test]
    fn copies_of_long_ago_do_not_count() {
        let mut tracker = tracker();
        for round in 1..20 {
            tracker.sent(Time::ZERO + SAMPLE * round, peer(1), item(7), 100);
        }
        let mut served = |now: Time| {
            tracker.sent(now, peer(1), item(7), 100);
            let serves = |_: &u32| tracker.admit(now, peer(2), item(7), 10, Priority::Prefetch) == Admission::Serve;
            let served = (0..200).filter(serves).count();
            tracker.ended(peer(2), 10 * served as u64);
            served
        };
        let now = Time::ZERO + SAMPLE * 20;
        assert_eq!(served(now), 8);
        assert_eq!(served(now + SAMPLE), 5, "eight have it");
        assert_eq!(served(now + TrackerConfig::default().memory), 8, "which may be gone by now");
    }

    #[test]
    fn memory_is_bounded_and_fades() {
        let mut tracker = tracker();
        for piece in 0..5 {
            (0..40).for_each(|n| tracker.sent(Time::ZERO, peer(n), item(piece), 10));
        }
        assert_eq!(tracker.given.keys().map(|item| item.piece).collect::<Vec<_>>(), [3, 4]);
        assert!(tracker.given.values().all(|given| given.receivers.len() == MAX_RECEIVERS));
        let later = Time::ZERO + TrackerConfig::default().memory;
        assert!(tracker.name(later, peer(50), item(4)).is_empty());
    }
}
