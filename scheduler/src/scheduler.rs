//! The scheduler itself: takes events, keeps the books of wants and flights, and owns the parts that decide.
//!
//! Who wants what is in `wants.rs`, which source a flight goes to next in `source.rs`, what an answer means in `answers.rs`, and
//! what comes and goes among peers and leases in `swarm.rs`; all are methods of [`Scheduler`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use foldhash::fast::FixedState;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shoal_proto::{Bitfield, PeerId, Priority};

use crate::{
    Action, BlobKey, Config, Event, Item, RequestId, Time, WantFailure, WantId,
    blobs::{Blob, BlobSlot, Blobs, Piece, Reach},
    flights::{Flights, Gate, Queues},
    homes::{self, Homes},
    inflow::Inflow,
    limits::Allowances,
    peers::{Peers, Slot},
    requests::Requests,
    swarm::Dials,
    timer::{Deadlines, Timer, Timers},
};

/// Decides which piece to get, from whom and when. See the crate's documentation.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) rng: ChaCha8Rng,
    /// Makes this node's order of prefetches its own.
    pub(crate) salt: u64,
    pub(crate) arrivals: u64,
    pub(crate) blobs: Blobs,
    /// The blobs that have pieces waiting for a source.
    pub(crate) active: BTreeSet<BlobSlot>,
    /// What each want is for, and when it gives up.
    pub(crate) wants: HashMap<WantId, (Piece, Time), FixedState>,
    pub(crate) flights: Flights,
    pub(crate) queues: Queues,
    pub(crate) peers: Peers,
    pub(crate) inflow: Inflow,
    pub(crate) allowances: Allowances,
    pub(crate) banned: BTreeMap<PeerId, Time>,
    pub(crate) dials: Dials,
    pub(crate) homes: Homes,
    /// Whom this node may ask for what they have.
    pub(crate) reach: Reach,
    pub(crate) requests: Requests,
    pub(crate) registry_closed_until: Time,
    pub(crate) timers: Timers,
    pub(crate) want_deadlines: Deadlines<WantId>,
    /// When requests owe a sign of life.
    pub(crate) progress_deadlines: Deadlines<RequestId>,
    /// When peers may be asked again.
    pub(crate) openings: Deadlines<Slot>,
    pub(crate) actions: VecDeque<Action>,
}

/// A look at the queues, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Open wants.
    pub wants: usize,
    /// Pieces wanted or on their way.
    pub flights: usize,
    /// Pieces that wait for a source, prefetch.
    pub waiting_prefetch: usize,
    /// Pieces that wait for a source, on-demand.
    pub waiting_on_demand: usize,
    /// Pieces that wait for a slot at the registry.
    pub registry_queue: usize,
    /// Requests under way at peers.
    pub peer_requests: usize,
    /// Requests under way at the registry.
    pub registry_requests: usize,
    /// Connected peers.
    pub peers: usize,
    /// Current leases, of all zones.
    pub leases: usize,
    /// Peers banned.
    pub banned: usize,
}

impl Scheduler {
    /// A scheduler that knows nothing yet. The same seed and events give the same actions.
    pub fn new(config: Config, now: Time, seed: [u8; 32]) -> Self {
        let mut rng = ChaCha8Rng::from_seed(seed);
        let salt = rng.next_u64();
        Self {
            salt,
            rng,
            arrivals: 0,
            blobs: Blobs::default(),
            active: BTreeSet::new(),
            wants: HashMap::default(),
            flights: Flights::new(salt),
            queues: Queues::default(),
            peers: Peers::new(salt),
            inflow: Inflow::default(),
            allowances: Allowances::new(now, &config.limits),
            banned: BTreeMap::new(),
            dials: Dials::default(),
            homes: Homes::new(config.max_leases),
            reach: Reach::All,
            requests: Requests::default(),
            registry_closed_until: Time::ZERO,
            timers: Timers::default(),
            want_deadlines: Deadlines::default(),
            progress_deadlines: Deadlines::default(),
            openings: Deadlines::default(),
            actions: VecDeque::new(),
            config,
        }
    }

    /// Takes note of what happened. Never calls back; follow with [`poll_action`](Self::poll_action).
    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::BlobAdded { blob, extents, present } => self.blob_added(now, blob, extents, present),
            Event::OneHome { blob } => {
                if let Some(blob) = self.blobs.get_mut(blob) {
                    blob.keep_whole();
                }
            }
            Event::BlobRemoved { blob } => self.blob_removed(now, blob),
            Event::Want { want, item, priority, deadline, origin } => {
                self.want(now, want, item, priority, deadline, origin);
            }
            Event::Unwant { want } => self.unwant(want),
            Event::Limits(limits) => self.set_limits(now, limits),
            Event::Present { item } => {
                if let Some(piece) = self.blobs.piece(item) {
                    self.give_back_found(now, piece);
                    self.arrived(now, piece);
                }
            }
            Event::Lost { item } => {
                if let Some(blob) = self.blobs.get_mut(item.blob) {
                    blob.present.remove(item.piece);
                }
            }
            Event::Evicted { blob } => {
                if let Some(blob) = self.blobs.get_mut(blob) {
                    blob.present = Bitfield::new(blob.len());
                }
            }
            Event::PeerUp { peer, zone, labels, role: _ } => self.peer_up(now, peer, &zone, &labels),
            Event::Lied { peer, item } => self.ban(now, peer, item),
            Event::PeerDown { peer } => self.peer_down(now, peer),
            Event::PeerHave { peer, blob, first, have, full } => self.peer_have(peer, blob, first, &have, full),
            Event::Lease { peer, zone, capacity, until } => self.lease(now, peer, zone, capacity, until),
            Event::LeaseEnded { peer } => self.lease_ended(peer),
            Event::Delivered { request, item, bytes } => self.delivered(now, request, item, bytes),
            Event::Progress { request } => self.progress(now, request),
            Event::NotHave { request, item } => self.not_have(now, request, item),
            Event::Pending { request, eta } => self.pending(now, request, eta),
            Event::Busy { request, retry_after, alternates } => self.busy(now, request, retry_after, &alternates),
            Event::NotMyHome { request, members } => self.not_my_home(now, request, &members),
            Event::CannotSource { request } => self.cannot_source(now, request),
            Event::Failed { request, reason } => self.failed(now, request, &reason),
            Event::Finished { request } => self.finished(now, request),
        }
    }

    /// To be called at or after the time that [`poll_timeout`](Self::poll_timeout) named.
    pub fn handle_timeout(&mut self, now: Time) {
        while let Some(want) = self.want_deadlines.pop(now, |want| Some(self.wants.get(&want)?.1)) {
            self.give_up_want(want);
        }
        while let Some(id) = self.progress_deadlines.pop(now, |id| Some(self.requests.at(id)?.due)) {
            self.requests.at_mut(id).into_iter().for_each(|request| request.due = Time::MAX);
            self.stalled(now, id);
        }
        while let Some(slot) = self.openings.pop(now, |slot| Some(self.peers.at(slot)?.closed_until)) {
            self.peer_reopened(now, slot);
        }
        while let Some(timer) = self.timers.pop(now) {
            match timer {
                Timer::Retry(piece) => self.seek_if_idle(piece),
                Timer::Ban(peer) => _ = self.banned.remove(&peer),
                Timer::Dial(peer) => self.dial_timeout(now, peer),
                Timer::Lease(peer) => self.lease_ended(peer),
                // The pump that follows looks at them anyway.
                Timer::PeerDownload(peer) => self.peer_download_eased(now, peer),
                Timer::Registry | Timer::Download(_) => {}
            }
        }
    }

    /// The next thing to do; call until there is none.
    pub fn poll_action(&mut self, now: Time) -> Option<Action> {
        if self.actions.is_empty() {
            self.pump(now);
            self.want_deadlines.tidy(self.wants.len(), |want| Some(self.wants.get(&want)?.1));
            self.progress_deadlines.tidy(self.requests.len(), |id| Some(self.requests.at(id)?.due));
            self.openings.tidy(self.peers.len(), |slot| Some(self.peers.at(slot)?.closed_until));
        }
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Time> {
        let others = [self.want_deadlines.next(), self.progress_deadlines.next(), self.openings.next()];
        self.timers.next().into_iter().chain(others.into_iter().flatten()).min()
    }

    /// The home of a piece: the first in hash order of the zone's live seed peers, or of the nodes with this blob if
    /// there are none; possibly this node. Nothing if the blob or piece is unknown.
    pub fn home_of(&self, blob: BlobKey, piece: u32) -> Option<PeerId> {
        self.compute_ranking(self.blobs.piece(Item { blob, piece })?)?.first().copied()
    }

    /// This node's place in the hash order of a piece's homes, 0 being the home; the first eight count. Who asks as
    /// its home a node that has no place is answered `NotMyHome`; a place other than 0 is in order, since those
    /// before it may be out of the asker's reach.
    pub fn home_rank(&self, blob: BlobKey, piece: u32) -> Option<usize> {
        let ranking = self.compute_ranking(self.blobs.piece(Item { blob, piece })?)?;
        ranking.iter().position(|&peer| peer == self.config.me)
    }

    /// The live seed peers of this zone, for the members of a `NotMyHome` answer.
    pub fn zone_members(&self) -> Vec<PeerId> {
        self.homes.of_zone(&self.config.zone).map(|(peer, _)| peer).collect()
    }

    /// The pieces of a blob that are here, as far as this scheduler was told.
    pub fn present(&self, blob: BlobKey) -> Option<&Bitfield> {
        self.blobs.get(blob).map(|blob| &blob.present)
    }

    /// How many neighbours are known to have a piece, of those that may be asked for it.
    pub fn holders(&self, item: Item) -> u32 {
        self.blobs.piece(item).map_or(0, |piece| self.holders_of(piece))
    }

    /// Lengths of the queues.
    pub fn stats(&self) -> Stats {
        let waiting = |priority| {
            self.active
                .iter()
                .filter_map(|&slot| self.blobs.at(slot))
                .map(|blob| blob.waiting(priority).count())
                .sum::<u32>()
        };
        Stats {
            wants: self.wants.len(),
            flights: self.flights.len(),
            waiting_prefetch: waiting(Priority::Prefetch) as usize,
            waiting_on_demand: waiting(Priority::OnDemand) as usize,
            registry_queue: self.queues.len(Gate::Registry),
            peer_requests: self.requests.at_peers() as usize,
            registry_requests: self.requests.at_registry() as usize,
            peers: self.peers.len(),
            leases: self.homes.len(),
            banned: self.banned.len(),
        }
    }

    fn blob_added(&mut self, now: Time, key: BlobKey, extents: Arc<[Range<u64>]>, present: Bitfield) {
        let Some(slot) = self.blobs.find(key) else {
            self.blobs.insert(Blob::new(key, extents, &present, self.reach));
            return;
        };
        self.blobs.at_mut(slot).into_iter().for_each(|blob| blob.extend(&extents));
        // Waiters of pieces that turn out to be here already.
        for piece in self.flights.of_blob(slot).into_iter().filter(|piece| present.contains(piece.piece)) {
            self.arrived(now, piece);
        }
        self.blobs.at_mut(slot).into_iter().for_each(|blob| blob.present.union_with(&present));
    }

    fn blob_removed(&mut self, now: Time, key: BlobKey) {
        let Some(slot) = self.blobs.find(key) else { return };
        for piece in self.flights.of_blob(slot) {
            self.fail_flight(now, piece, WantFailure::Removed);
        }
        for request in self.requests.of_blob(slot) {
            self.cancel(now, request);
        }
        self.active.remove(&slot);
        self.blobs.remove(slot);
    }

    /// `length` and up to a quarter more, so that what failed together does not come back together.
    pub(crate) fn jittered(&mut self, failures: u32) -> Duration {
        let length = homes::backoff(self.config.backoff, self.config.max_backoff, failures);
        length + length * (self.rng.next_u32() >> 16) / (4 << 16)
    }
}

/// A random number below this one.
pub(crate) fn random(rng: &mut ChaCha8Rng, below: u32) -> u32 {
    ((u64::from(rng.next_u32()) * u64::from(below)) >> 32) as u32
}
