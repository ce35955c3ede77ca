//! The serving side: whom to serve, and whom to send to somebody who received the same a moment ago.
//!
//! A piece that everyone wants at once should not go through one uplink. Whoever serves remembers who received which
//! piece and, once it has more than a little to do, answers `busy` with these as alternates: each of them then serves
//! a few, and the piece spreads in about log2(N) piece times. Pure, like the scheduler beside it; the shell asks
//! [`admit`](Tracker::admit) before it serves a request, and tells what was [`sent`](Tracker::sent) and when the
//! request [`ended`](Tracker::ended).

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use foldhash::fast::FixedState;
use shoal_proto::{PeerId, Priority};
use smallvec::SmallVec;

use crate::{BlobKey, Item, Time, names::Names, need::Need};

/// The limits of a [`Tracker`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackerConfig {
    /// Encoded bytes being sent up to which everyone is served at least: enough for a connection to not run dry, little enough
    /// that a piece leaves soon and its receiver can pass it on. Default 1 MiB.
    pub relaxed: u64,
    /// The same before anything is known of the rate, when it is too early to send somebody away. Default 4 MiB.
    pub unmeasured: u64,
    /// The same for the first request of a peer to its home. Nobody else has what is asked for, and it is sent to all that asked once
    /// it has come from the registry; if most were refused, they would come again later, and the home would have little to do.
    /// Default 64 MiB.
    pub unmeasured_home: u64,
    /// Everyone is served as long as what is being sent takes no longer than this, at the best rate of late: who is asked for
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
            unmeasured: 4 << 20,
            unmeasured_home: 64 << 20,
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

/// A request as far as it matters to who serves it.
#[derive(Debug, Clone, Copy)]
pub struct Ask {
    /// Who asks.
    pub peer: PeerId,
    /// The first of a run of pieces.
    pub first: Item,
    /// Encoded bytes of the run.
    pub bytes: u64,
    /// How urgent.
    pub priority: Priority,
    /// Thousandths of the blob that the asker lacks, as it says itself; 0 if it does not.
    pub lacks: u16,
    /// Whether it is asked as the home.
    pub home: bool,
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
    /// In [`Tracker::peers`], which it is counted in.
    peer: u32,
    /// How often it was named as an alternate since.
    named: u32,
    at: Time,
}

/// Part of the backlog that is left for what was given to enough peers.
const SPREAD: u32 = 5;
/// The best rate of late loses this part with each sample.
const FADES: u64 = 64;
/// The rate is taken over at least so long.
const SAMPLE: Duration = Duration::from_millis(100);
/// Receivers remembered for a piece.
const MAX_RECEIVERS: usize = 16;

/// A piece by its blob's place in [`Tracker::blobs`].
type Piece = (u32, u32);

/// A piece that was given to somebody.
#[derive(Debug)]
struct Given {
    piece: Piece,
    /// To how many peers since `since`, whether or not it is there yet.
    copies: u32,
    since: Time,
    receivers: SmallVec<[Receiver; 1]>,
}

/// Remembers who received what, and what is being sent. A piece takes about a hundred bytes, and a dozen more for each of its
/// receivers.
#[derive(Debug)]
pub struct Tracker {
    config: TrackerConfig,
    /// Encoded bytes admitted and not ended.
    uploads: u64,
    /// Who is remembered: a mention for each of their requests under way, and for each piece that they received.
    peers: Names<PeerId>,
    /// The part of `uploads` of each of them, and how many have one.
    shares: Vec<u64>,
    sharers: u64,
    /// When a peer without any was refused last.
    starved: Option<Time>,
    need: Need,
    /// Bytes sent since `since`.
    sent: u64,
    since: Time,
    bytes_per_s: u64,
    /// The best of late: what little is asked for says nothing of what could be sent.
    best_bytes_per_s: u64,
    /// A mention for each piece remembered.
    blobs: Names<BlobKey>,
    /// Oldest first; so many were there before the first.
    given: VecDeque<Given>,
    forgotten: u32,
    /// Where each piece is in `given`, counted from the very first.
    index: HashMap<Piece, u32, FixedState>,
}

impl Tracker {
    /// A tracker that remembers nothing yet.
    pub fn new(config: TrackerConfig) -> Self {
        Self {
            config,
            uploads: 0,
            peers: Names::default(),
            shares: Vec::new(),
            sharers: 0,
            starved: None,
            need: Need::default(),
            sent: 0,
            since: Time::ZERO,
            bytes_per_s: 0,
            best_bytes_per_s: 0,
            blobs: Names::default(),
            given: VecDeque::new(),
            forgotten: 0,
            index: HashMap::default(),
        }
    }

    /// Whether to serve a request. [`Admission::Serve`] counts its bytes as being sent until [`ended`](Self::ended).
    ///
    /// Prefetch is served by need: who lacks more of the blob than others that ask may have more on its way.
    pub fn admit(&mut self, now: Time, ask: Ask) -> Admission {
        let Ask { peer, first, bytes, priority, lacks, home } = ask;
        // Copies of long ago may be gone, as their receivers are forgotten.
        let recent = |given: &Given| now.since(given.since) < self.config.memory;
        let spread = |given: &Given| recent(given) && given.copies >= self.config.copies;
        let known = self.find(first);
        let spread = known.is_some_and(|at| spread(&self.given[at]));
        let first_of_home = home && self.share(peer) == 0;
        let unmeasured = if first_of_home { self.config.unmeasured_home } else { self.config.unmeasured };
        let even = self.relaxed(if spread { self.config.backlog / SPREAD } else { self.config.backlog }, unmeasured);
        let (relaxed, times) = match priority {
            Priority::Prefetch => (self.need.part(even, lacks), self.config.ceiling),
            Priority::OnDemand => (even, self.config.ceiling.saturating_mul(2)),
        };
        let ceiling = relaxed.saturating_mul(times);
        let alternates = if self.uploads < relaxed { Vec::new() } else { self.name(now, peer, known) };
        let fair = priority == Priority::OnDemand || self.is_fair(now, peer, bytes, ceiling);
        if alternates.is_empty() && self.uploads < ceiling.max(1) && fair {
            self.uploads = self.uploads.saturating_add(bytes);
            self.add_share(peer, bytes);
            let memory = self.config.memory;
            let at = known.unwrap_or_else(|| self.remember(first));
            let given = &mut self.given[at];
            if now.since(given.since) >= memory {
                (given.copies, given.since) = (0, now);
            }
            given.copies = given.copies.saturating_add(1);
            return Admission::Serve;
        }
        if self.share(peer) == 0 {
            self.starved = Some(now);
        }
        Admission::Busy { retry_after: self.config.retry_after, alternates }
    }

    /// Whether a peer is left its part of what is sent at most. Who has just received something is the first to see that there
    /// is room again, so while others are refused nobody takes more than an equal part.
    fn is_fair(&self, now: Time, peer: PeerId, bytes: u64, most: u64) -> bool {
        let contended = self.starved.is_some_and(|at| now.since(at) < self.config.retry_after * 2);
        let share = if contended { self.share(peer) } else { 0 };
        share == 0 || share.saturating_add(bytes) <= most / (self.sharers + 1)
    }

    /// How much is being sent to a peer.
    fn share(&self, peer: PeerId) -> u64 {
        self.peers.find(&peer).map_or(0, |at| self.shares[at as usize])
    }

    fn mention(&mut self, peer: PeerId) -> u32 {
        let at = self.peers.mention(peer);
        if at as usize >= self.shares.len() {
            self.shares.push(0);
        }
        at
    }

    /// A request of a peer begins.
    fn add_share(&mut self, peer: PeerId, bytes: u64) {
        let at = self.mention(peer);
        let share = &mut self.shares[at as usize];
        let before = *share;
        *share = share.saturating_add(bytes);
        self.sharers += u64::from(before == 0 && bytes > 0);
    }

    /// Bytes being sent up to which everyone is served: what takes no longer than this at the best rate of late.
    fn relaxed(&self, backlog: Duration, unmeasured: u64) -> u64 {
        let millis = u64::try_from(backlog.as_millis()).unwrap_or(u64::MAX);
        let least = if self.best_bytes_per_s == 0 { unmeasured } else { self.config.relaxed };
        least.max(self.best_bytes_per_s.saturating_mul(millis) / 1000)
    }

    /// More was sent: the rate is taken over samples, half of it from the last one.
    fn count(&mut self, now: Time, bytes: u64) {
        self.sent = self.sent.saturating_add(bytes);
        let elapsed = now.since(self.since);
        if elapsed >= SAMPLE {
            let rate = u128::from(self.sent) * 1_000_000_000 / elapsed.as_nanos();
            self.bytes_per_s = self.bytes_per_s / 2 + u64::try_from(rate / 2).unwrap_or(u64::MAX / 2);
            self.best_bytes_per_s = self.bytes_per_s.max(self.best_bytes_per_s - self.best_bytes_per_s / FADES);
            (self.sent, self.since) = (0, now);
        }
    }

    /// Peers that received the first piece of a run, the least named first. The others were mostly sent with it, and who
    /// lacks one says so.
    fn name(&mut self, now: Time, asker: PeerId, first: Option<usize>) -> Vec<PeerId> {
        let Some(at) = first else { return Vec::new() };
        let asker = self.peers.find(&asker);
        let (peers, memory) = (&mut self.peers, self.config.memory);
        let receivers = &mut self.given[at].receivers;
        retain(receivers, peers, |receiver| now.since(receiver.at) < memory);
        let mut found: SmallVec<[_; MAX_RECEIVERS]> =
            receivers.iter_mut().filter(|receiver| Some(receiver.peer) != asker).collect();
        found.sort_by_key(|receiver| (receiver.named, receiver.at));
        let chosen = found.into_iter().take(self.config.alternates);
        chosen
            .filter_map(|receiver| {
                receiver.named += 1;
                peers.name(receiver.peer).copied()
            })
            .collect()
    }

    /// The last of a piece's so many encoded bytes went to `peer`.
    pub fn sent(&mut self, now: Time, peer: PeerId, item: Item, bytes: u64) {
        self.count(now, bytes);
        let peer = self.mention(peer);
        let at = self.find(item).unwrap_or_else(|| self.remember(item));
        let receivers = &mut self.given[at].receivers;
        retain(receivers, &mut self.peers, |receiver| receiver.peer != peer);
        if receivers.len() >= MAX_RECEIVERS {
            self.peers.release(receivers.remove(0).peer);
        }
        receivers.push(Receiver { peer, named: 0, at: now });
    }

    /// Where a piece that is remembered is in `given`.
    fn find(&self, item: Item) -> Option<usize> {
        let piece = (self.blobs.find(&item.blob)?, item.piece);
        self.index.get(&piece).map(|at| at.wrapping_sub(self.forgotten) as usize)
    }

    /// Remembers a piece from now on, and gives its place; the oldest makes room for it.
    fn remember(&mut self, item: Item) -> usize {
        if self.given.len() >= self.config.max_items.max(1)
            && let Some(oldest) = self.given.pop_front()
        {
            self.forgotten = self.forgotten.wrapping_add(1);
            self.index.remove(&oldest.piece);
            self.blobs.release(oldest.piece.0);
            oldest.receivers.into_iter().for_each(|receiver| self.peers.release(receiver.peer));
        }
        let piece = (self.blobs.mention(item.blob), item.piece);
        let at = self.given.len();
        self.index.insert(piece, self.forgotten.wrapping_add(at as u32));
        self.given.push_back(Given { piece, copies: 0, since: Time::ZERO, receivers: SmallVec::new() });
        at
    }

    /// A request of `peer` that was admitted with so many bytes is over, however it went.
    pub fn ended(&mut self, peer: PeerId, bytes: u64) {
        self.uploads = self.uploads.saturating_sub(bytes);
        if let Some(at) = self.peers.find(&peer) {
            let share = &mut self.shares[at as usize];
            let before = *share;
            *share = share.saturating_sub(bytes);
            self.sharers -= u64::from(before > 0 && *share == 0);
            self.peers.release(at);
        }
    }

    /// The peer is gone and is not named any more.
    pub fn forget(&mut self, peer: PeerId) {
        let Some(gone) = self.peers.find(&peer) else { return };
        for given in &mut self.given {
            retain(&mut given.receivers, &mut self.peers, |receiver| receiver.peer != gone);
        }
    }

    /// Encoded bytes being sent.
    pub fn uploads(&self) -> u64 {
        self.uploads
    }
}

/// Keeps the receivers that `stay`.
fn retain(receivers: &mut SmallVec<[Receiver; 1]>, peers: &mut Names<PeerId>, stay: impl Fn(&Receiver) -> bool) {
    receivers.retain(|receiver| {
        let stays = stay(receiver);
        if !stays {
            peers.release(receiver.peer);
        }
        stays
    });
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

    /// For a piece of 10 bytes.
    fn ask(n: u8, piece: u32, priority: Priority) -> Ask {
        Ask { peer: peer(n), first: item(piece), bytes: 10, priority, lacks: 0, home: false }
    }

    /// Serves one piece of 10 bytes to everyone.
    fn tracker() -> Tracker {
        Tracker::new(TrackerConfig {
            relaxed: 10,
            unmeasured: 10,
            ceiling: 3,
            alternates: 1,
            max_items: 2,
            ..TrackerConfig::default()
        })
    }

    #[test]
    fn an_idle_peer_serves_and_a_busy_one_names_who_received_the_piece() {
        let mut tracker = tracker();
        let admit = |tracker: &mut Tracker, n| tracker.admit(Time::ZERO, ask(n, 7, Priority::Prefetch));
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
            tracker.admit(now, ask(n, piece, Priority::Prefetch)) == Admission::Serve
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
        let mut serves = |priority| tracker.admit(Time::ZERO, ask(1, 1, priority)) == Admission::Serve;
        assert_eq!([(); 4].map(|()| serves(Priority::Prefetch)), [true, true, true, false]);
        assert_eq!([(); 4].map(|()| serves(Priority::OnDemand)), [true, true, true, false]);
    }

    #[test]
    fn a_home_that_knows_nothing_yet_takes_one_request_of_each() {
        let config = TrackerConfig { unmeasured: 10, unmeasured_home: 40, ceiling: 1, ..TrackerConfig::default() };
        let mut tracker = Tracker::new(config);
        let mut serves = |n, home| {
            tracker.admit(Time::ZERO, Ask { home, ..ask(n, n.into(), Priority::Prefetch) }) == Admission::Serve
        };
        assert!(serves(1, true) && !serves(1, true) && !serves(2, false));
        assert_eq!([2, 3, 4, 5].map(|n| serves(n, true)), [true, true, true, false]);
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
            let serves =
                |&turn: &u32| tracker.admit(now, ask(2, piece(turn), Priority::Prefetch)) == Admission::Serve;
            (0..200).filter(serves).count()
        };
        assert_eq!(served(|_| 7), 8, "which is more than a fifth of a quarter of a second's worth");
        assert_eq!(served(|turn| turn % 2), 2 * 8, "the rest of that is for other pieces");
    }

    #[test]
    fn who_lacks_more_than_others_is_served_more() {
        let config = TrackerConfig { relaxed: 1000, unmeasured: 1000, ceiling: 1, ..TrackerConfig::default() };
        let mut tracker = Tracker::new(config);
        let mut next = 0;
        let mut serves = |lacks| {
            next += 1;
            tracker.admit(Time::ZERO, Ask { lacks, ..ask(next, next.into(), Priority::Prefetch) }) == Admission::Serve
        };
        assert_eq!((0..60).filter(|_| serves(100)).count(), 60);
        assert!(!serves(80), "half of the room is taken");
        assert_eq!((0..60).filter(|_| serves(100)).count(), 40);
        assert!(!serves(0), "who does not say");
        assert!(serves(120), "a fifth more than usual");
        assert!(serves(u16::MAX));
    }

    #[test]
    fn copies_of_long_ago_do_not_count() {
        let mut tracker = tracker();
        for round in 1..20 {
            tracker.sent(Time::ZERO + SAMPLE * round, peer(1), item(7), 100);
        }
        let mut served = |now: Time| {
            tracker.sent(now, peer(1), item(7), 100);
            let serves = |_: &u32| tracker.admit(now, ask(2, 7, Priority::Prefetch)) == Admission::Serve;
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
        assert_eq!(tracker.given.iter().map(|given| given.piece.1).collect::<Vec<_>>(), [3, 4]);
        assert!(tracker.given.iter().all(|given| given.receivers.len() == MAX_RECEIVERS));
        assert_eq!((tracker.index.len(), tracker.peers.len()), (2, MAX_RECEIVERS));
        let later = Time::ZERO + TrackerConfig::default().memory;
        let last = tracker.find(item(4));
        assert!(last.is_some() && tracker.name(later, peer(50), last).is_empty());
    }
}
