//! The serving side: whom to serve, and whom to send to somebody who received the same a moment ago.
//!
//! A piece that everyone wants at once should not go through one uplink. Whoever serves remembers who received which
//! piece and, once it has more than a little to do, answers `busy` with these as alternates: each of them then serves
//! a few, and the piece spreads in about log2(N) piece times. Pure, like the scheduler beside it; the shell asks
//! [`admit`](Tracker::admit) before it serves a request, and tells what was [`sent`](Tracker::sent) and when the
//! request [`ended`](Tracker::ended).

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use shoal_proto::{PeerId, Priority};

use crate::{BlobKey, Item, Time};

/// The limits of a [`Tracker`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackerConfig {
    /// Pieces being sent up to which everyone is served at least. Default 8.
    pub relaxed: u32,
    /// Everyone is served as long as what is being sent takes no longer than this, at the rate of late: who is asked for
    /// much because it is fast need not send half of it away. Default none: it counts pieces, and where they are small a
    /// home that refuses nobody reads the registry piece by piece instead of in ranges (28,000 requests for 46,000 files
    /// where 11,000 do, 1.17 x the image with their headers where 1.05 x does).
    pub backlog: Duration,
    /// Pieces being sent beyond which prefetch is refused even without an alternate, and on-demand at twice as many; as
    /// many times more as `backlog` raises `relaxed`. Default 32.
    pub uploads: u32,
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
            relaxed: 8,
            backlog: Duration::ZERO,
            uploads: 32,
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

/// The rate is taken over at least so long.
const SAMPLE: Duration = Duration::from_millis(100);
/// Receivers remembered for a piece.
const MAX_RECEIVERS: usize = 16;

/// Remembers who received what, and what is being sent.
#[derive(Debug, Default)]
pub struct Tracker {
    config: TrackerConfig,
    uploads: u32,
    /// Pieces sent since `since`.
    sent: u32,
    since: Time,
    pieces_per_s: u32,
    receivers: BTreeMap<Item, VecDeque<Receiver>>,
    /// The items of `receivers`, oldest first.
    order: VecDeque<Item>,
}

impl Tracker {
    /// A tracker that remembers nothing yet.
    pub fn new(config: TrackerConfig) -> Self {
        Self { config, ..Self::default() }
    }

    /// Whether to serve `pieces` of `blob` to `peer`. [`Admission::Serve`] counts them as being sent until
    /// [`ended`](Self::ended).
    pub fn admit(&mut self, now: Time, peer: PeerId, blob: BlobKey, pieces: &[u32], priority: Priority) -> Admission {
        let relaxed = self.relaxed();
        let uploads =
            self.config.uploads.saturating_mul(relaxed / self.config.relaxed.max(1)).max(self.config.uploads);
        let hard = match priority {
            Priority::Prefetch => uploads,
            Priority::OnDemand => uploads.saturating_mul(2),
        };
        let alternates = if self.uploads < relaxed { Vec::new() } else { self.name(now, peer, blob, pieces) };
        if alternates.is_empty() && self.uploads < hard.max(1) {
            self.uploads += pieces.len() as u32;
            return Admission::Serve;
        }
        Admission::Busy { retry_after: self.config.retry_after, alternates }
    }

    /// Pieces being sent up to which everyone is served, at the rate of late.
    fn relaxed(&self) -> u32 {
        let millis = u32::try_from(self.config.backlog.as_millis()).unwrap_or(u32::MAX);
        self.config.relaxed.max(self.pieces_per_s.saturating_mul(millis) / 1000)
    }

    /// One more piece was sent: the rate is taken over samples, half of it from the last one.
    fn count(&mut self, now: Time) {
        self.sent += 1;
        let elapsed = now.since(self.since);
        if elapsed >= SAMPLE {
            let rate = u128::from(self.sent) * 1_000_000_000 / elapsed.as_nanos();
            self.pieces_per_s = self.pieces_per_s / 2 + u32::try_from(rate / 2).unwrap_or(u32::MAX / 2);
            (self.sent, self.since) = (0, now);
        }
    }

    /// Peers that received the first of these pieces, the least named first. The others of a run were mostly sent
    /// with it, and who lacks one says so.
    fn name(&mut self, now: Time, asker: PeerId, blob: BlobKey, pieces: &[u32]) -> Vec<PeerId> {
        let Some(&piece) = pieces.first() else { return Vec::new() };
        let Some(receivers) = self.receivers.get_mut(&Item { blob, piece }) else { return Vec::new() };
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

    /// The last byte of a piece went to `peer`.
    pub fn sent(&mut self, now: Time, peer: PeerId, item: Item) {
        self.count(now);
        if !self.receivers.contains_key(&item) {
            self.order.push_back(item);
            if self.order.len() > self.config.max_items.max(1)
                && let Some(oldest) = self.order.pop_front()
            {
                self.receivers.remove(&oldest);
            }
        }
        // Most pieces are sent once or twice.
        let receivers = self.receivers.entry(item).or_insert_with(|| VecDeque::with_capacity(1));
        receivers.retain(|receiver| receiver.peer != peer);
        if receivers.len() >= MAX_RECEIVERS {
            receivers.pop_front();
        }
        receivers.push_back(Receiver { peer, at: now, named: 0 });
    }

    /// A request that was admitted with so many pieces is over, however it went.
    pub fn ended(&mut self, pieces: usize) {
        self.uploads = self.uploads.saturating_sub(pieces as u32);
    }

    /// The peer is gone and is not named any more.
    pub fn forget(&mut self, peer: PeerId) {
        self.receivers.values_mut().for_each(|receivers| receivers.retain(|receiver| receiver.peer != peer));
    }

    /// Pieces being sent.
    pub fn uploads(&self) -> u32 {
        self.uploads
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::new([n; 32])
    }

    const BLOB: BlobKey = BlobKey { id: [0; 32], variant: 0 };

    fn tracker() -> Tracker {
        Tracker::new(TrackerConfig {
            relaxed: 1,
            uploads: 3,
            alternates: 1,
            max_items: 2,
            ..TrackerConfig::default()
        })
    }

    #[test]
    fn an_idle_peer_serves_and_a_busy_one_names_who_received_the_piece() {
        let mut tracker = tracker();
        let admit = |tracker: &mut Tracker, n| tracker.admit(Time::ZERO, peer(n), BLOB, &[7], Priority::Prefetch);
        tracker.sent(Time::ZERO, peer(1), Item { blob: BLOB, piece: 7 });
        tracker.sent(Time::ZERO, peer(2), Item { blob: BLOB, piece: 7 });
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
        tracker.ended(1);
        assert_eq!(tracker.uploads(), 1);
    }

    #[test]
    fn limits_hold_with_room_for_on_demand() {
        let mut tracker = tracker();
        let mut serves = |priority| tracker.admit(Time::ZERO, peer(1), BLOB, &[1], priority) == Admission::Serve;
        assert_eq!([(); 4].map(|()| serves(Priority::Prefetch)), [true, true, true, false]);
        assert_eq!([(); 4].map(|()| serves(Priority::OnDemand)), [true, true, true, false]);
    }

    #[test]
    fn memory_is_bounded_and_fades() {
        let mut tracker = tracker();
        for piece in 0..5 {
            (0..40).for_each(|n| tracker.sent(Time::ZERO, peer(n), Item { blob: BLOB, piece }));
        }
        assert_eq!(tracker.receivers.keys().map(|item| item.piece).collect::<Vec<_>>(), [3, 4]);
        assert!(tracker.receivers.values().all(|receivers| receivers.len() == MAX_RECEIVERS));
        let later = Time::ZERO + TrackerConfig::default().memory;
        assert!(tracker.name(later, peer(50), BLOB, &[4]).is_empty());
    }
}
