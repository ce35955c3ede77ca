//! The scheduler itself: takes events, keeps the books of wants and flights, and owns the parts that decide.
//!
//! Which source a flight goes to next is in `source.rs`, what an answer means in `answers.rs`, and what comes and
//! goes among peers and leases in `swarm.rs`; all are methods of [`Scheduler`].

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shoal_proto::{Bitfield, PeerId, Priority};

use crate::{
    Action, BlobKey, Config, Event, Item, Origin, RequestId, Source, Time, WantError, WantFailure, WantId, Why,
    blobs::{Blob, Reach},
    flights::{Flight, Flights, Gate, MAX_REQUESTS, Queues, Rank},
    homes::{self, Homes},
    inflow::Inflow,
    limits::Allowances,
    peers::Peers,
    requests::Requests,
    swarm::Dials,
    timer::{Timer, Timers},
};

/// Decides which piece to get, from whom and when. See the crate's documentation.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    rng: ChaCha8Rng,
    /// Makes this node's order of prefetches its own.
    salt: u64,
    arrivals: u64,
    pub(crate) blobs: BTreeMap<BlobKey, Blob>,
    /// The blobs that have pieces waiting for a source.
    pub(crate) active: BTreeSet<BlobKey>,
    wants: BTreeMap<WantId, (Item, Priority)>,
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
        Self {
            salt: rng.next_u64(),
            rng,
            arrivals: 0,
            blobs: BTreeMap::new(),
            active: BTreeSet::new(),
            wants: BTreeMap::new(),
            flights: Flights::default(),
            queues: Queues::default(),
            peers: Peers::default(),
            inflow: Inflow::default(),
            allowances: Allowances::new(now, &config.limits),
            banned: BTreeMap::new(),
            dials: Dials::default(),
            homes: Homes::new(config.max_leases),
            reach: Reach::All,
            requests: Requests::default(),
            registry_closed_until: Time::ZERO,
            timers: Timers::default(),
            actions: VecDeque::new(),
            config,
        }
    }

    /// Takes note of what happened. Never calls back; follow with [`poll_action`](Self::poll_action).
    pub fn handle_event(&mut self, now: Time, event: Event) {
        match event {
            Event::BlobAdded { blob, extents, present } => self.blob_added(now, blob, extents, present),
            Event::OneHome { blob } => {
                if let Some(blob) = self.blobs.get_mut(&blob) {
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
                self.give_back_found(now, item);
                self.arrived(now, item);
            }
            Event::Lost { item } => {
                if let Some(blob) = self.blobs.get_mut(&item.blob) {
                    blob.present.remove(item.piece);
                }
            }
            Event::Evicted { blob } => {
                if let Some(blob) = self.blobs.get_mut(&blob) {
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
        while let Some(timer) = self.timers.pop(now) {
            match timer {
                Timer::Want(want) => self.give_up_want(want),
                Timer::Request(request) => self.stalled(now, request),
                Timer::Retry(item) => self.seek_if_idle(item),
                Timer::Peer(peer) => self.peer_reopened(now, peer),
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
        }
        self.actions.pop_front()
    }

    /// When [`handle_timeout`](Self::handle_timeout) wants to be called, if nothing happens before.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.timers.next()
    }

    /// The home of a piece: the first in hash order of the zone's live seed peers, or of the nodes with this blob if
    /// there are none; possibly this node. Nothing if the blob or piece is unknown.
    pub fn home_of(&self, blob: BlobKey, piece: u32) -> Option<PeerId> {
        self.compute_ranking(blob, piece)?.first().copied()
    }

    /// This node's place in the hash order of a piece's homes, 0 being the home; the first eight count. Who asks as
    /// its home a node that has no place is answered `NotMyHome`; a place other than 0 is in order, since those
    /// before it may be out of the asker's reach.
    pub fn home_rank(&self, blob: BlobKey, piece: u32) -> Option<usize> {
        self.compute_ranking(blob, piece)?.iter().position(|&peer| peer == self.config.me)
    }

    /// The live seed peers of this zone, for the members of a `NotMyHome` answer.
    pub fn zone_members(&self) -> Vec<PeerId> {
        self.homes.of_zone(&self.config.zone).map(|(peer, _)| peer).collect()
    }

    /// The pieces of a blob that are here, as far as this scheduler was told.
    pub fn present(&self, blob: BlobKey) -> Option<&Bitfield> {
        self.blobs.get(&blob).map(|blob| &blob.present)
    }

    /// Lengths of the queues.
    pub fn stats(&self) -> Stats {
        let waiting = |priority| {
            self.active
                .iter()
                .filter_map(|key| self.blobs.get(key))
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
        match self.blobs.get_mut(&key) {
            Some(blob) => blob.extend(&extents),
            None => _ = self.blobs.insert(key, Blob::new(extents, &present)),
        }
        // Waiters of pieces that turn out to be here already.
        let here: Vec<_> = self.flights.of_blob(key).filter(|item| present.contains(item.piece)).collect();
        here.into_iter().for_each(|item| self.arrived(now, item));
        if let Some(blob) = self.blobs.get_mut(&key) {
            blob.present.union_with(&present);
        }
    }

    fn blob_removed(&mut self, now: Time, key: BlobKey) {
        for item in self.flights.of_blob(key).collect::<Vec<_>>() {
            self.fail_flight(now, item, WantFailure::Removed);
        }
        for request in self.requests.of_blob(key) {
            self.cancel(now, request);
        }
        self.active.remove(&key);
        self.blobs.remove(&key);
    }

    fn want(&mut self, now: Time, want: WantId, item: Item, priority: Priority, deadline: Time, origin: Origin) {
        if self.wants.contains_key(&want) {
            return;
        }
        let named = self.blobs.get(&item.blob).filter(|blob| blob.extent(item.piece).is_some());
        let failure = match named {
            Some(blob) if blob.present.contains(item.piece) => {
                return self.actions.push_back(Action::Complete { want, item, outcome: Ok(()) });
            }
            None => Some(WantFailure::Unknown),
            _ if deadline <= now => Some(WantFailure::Deadline),
            _ if self.wants.len() >= self.config.max_wants => Some(WantFailure::Overloaded),
            _ => None,
        };
        if let Some(reason) = failure {
            let outcome = Err(WantError { reason, tries: Vec::new() });
            return self.actions.push_back(Action::Complete { want, item, outcome });
        }
        self.wants.insert(want, (item, priority));
        self.timers.set(Timer::Want(want), deadline);
        self.join(now, want, item, priority, deadline, origin);
    }

    /// Adds a waiter to the piece's flight, which takes the highest priority of its waiters.
    fn join(&mut self, now: Time, want: WantId, item: Item, priority: Priority, deadline: Time, origin: Origin) {
        let rank = Rank::new(item, priority, self.arrivals, self.salt);
        self.arrivals += 1;
        let (flight, new) = self.flights.open(item, rank);
        flight.wants.insert(want);
        flight.deadline = flight.deadline.max(deadline);
        let duty = origin == Origin::ForPeer && !flight.for_peer;
        flight.for_peer |= duty;
        let requests = flight.requests.clone();
        let (raised, seeking) = (priority > flight.priority(), flight.seeking);
        if raised {
            self.raise(item, rank);
        }
        if requests.is_empty() {
            if new || duty || raised || !seeking {
                self.seek(item);
            }
        } else if duty {
            // The home that we asked might be waiting for us in turn.
            let at_home = |&request: &RequestId| {
                self.requests.at(request).is_some_and(|request| matches!(request.source, Source::Home(_)))
            };
            if requests.len() < MAX_REQUESTS && requests.iter().any(at_home) {
                self.seek(item);
            }
        } else if raised {
            // Somebody waits now: what was slow as a prefetch is hedged a progress interval from here.
            requests.into_iter().for_each(|request| self.expect_progress(now, request));
        }
    }

    /// Sees to it that whoever comes to want the piece waits for the request that is about to bring it.
    pub(crate) fn foresee(&mut self, item: Item, priority: Priority) {
        let rank = Rank::new(item, priority, self.arrivals, self.salt);
        self.flights.open(item, rank);
    }

    fn raise(&mut self, item: Item, rank: Rank) {
        let Some(flight) = self.flights.at_mut(item) else { return };
        let (old, gate, seeking) = (flight.rank, flight.gate.take(), flight.seeking);
        flight.rank = rank;
        if let Some(gate) = gate {
            self.queues.remove(gate, old, item);
        }
        if seeking {
            self.seek(item);
        }
    }

    fn unwant(&mut self, want: WantId) {
        let Some((item, _)) = self.wants.remove(&want) else { return };
        self.timers.cancel(Timer::Want(want));
        self.leave(want, item);
    }

    fn give_up_want(&mut self, want: WantId) {
        let Some((item, _)) = self.wants.remove(&want) else { return };
        let tries = self.flights.at(item).map(|flight| flight.tries().to_vec()).unwrap_or_default();
        let outcome = Err(WantError { reason: WantFailure::Deadline, tries });
        self.actions.push_back(Action::Complete { want, item, outcome });
        self.leave(want, item);
    }

    /// A waiter leaves. A flight without waiters asks nobody any more, but what is under way may arrive: the bytes
    /// are spent already, and somebody will want them.
    fn leave(&mut self, want: WantId, item: Item) {
        let Some(flight) = self.flights.at_mut(item) else { return };
        flight.wants.remove(&want);
        if flight.wants.is_empty() {
            self.settle(item);
            self.drop_if_over(item);
        }
    }

    pub(crate) fn drop_if_over(&mut self, item: Item) {
        let flight = self.flights.at(item);
        if flight.is_some_and(|flight| flight.wants.is_empty() && flight.requests.is_empty()) {
            self.settle(item);
            self.timers.cancel(Timer::Retry(item));
            self.flights.remove(item);
        }
    }

    /// Has the flight look for a source at the next step.
    pub(crate) fn seek(&mut self, item: Item) {
        let Some(flight) = self.flights.at_mut(item) else { return };
        if let Some(gate) = flight.gate.replace(Gate::Fresh) {
            self.queues.remove(gate, flight.rank, item);
        }
        flight.seeking = true;
        flight.rank = flight.rank.fresh();
        self.queues.push(Gate::Fresh, flight.rank, item);
        if let Some(blob) = self.blobs.get_mut(&item.blob) {
            blob.wait(item.piece, flight.rank.priority());
            self.active.insert(item.blob);
        }
    }

    /// Has the flight look no further.
    pub(crate) fn settle(&mut self, item: Item) {
        let Some(flight) = self.flights.at_mut(item) else { return };
        if let Some(gate) = flight.gate.take() {
            self.queues.remove(gate, flight.rank, item);
        }
        flight.seeking = false;
        if let Some(blob) = self.blobs.get_mut(&item.blob) {
            blob.stop_waiting(item.piece);
            if !blob.is_waiting() {
                self.active.remove(&item.blob);
            }
        }
    }

    pub(crate) fn seek_if_idle(&mut self, item: Item) {
        if self.flights.at(item).is_some_and(|flight| !flight.wants.is_empty() && flight.requests.is_empty()) {
            self.seek(item);
        }
    }

    /// The piece is here: everyone who waited is served, every other request for it is stopped.
    pub(crate) fn arrived(&mut self, now: Time, item: Item) {
        if let Some(blob) = self.blobs.get_mut(&item.blob) {
            if blob.extent(item.piece).is_some() {
                blob.present.insert(item.piece);
            }
            self.close_flight(now, item, |_| Ok(()));
        }
    }

    /// There is no way left to get the piece.
    pub(crate) fn fail_flight(&mut self, now: Time, item: Item, reason: WantFailure) {
        self.close_flight(now, item, |flight| Err(WantError { reason, tries: flight.tries().to_vec() }));
    }

    fn close_flight(&mut self, now: Time, item: Item, outcome: impl Fn(&Flight) -> Result<(), WantError>) {
        self.settle(item);
        self.timers.cancel(Timer::Retry(item));
        let Some(flight) = self.flights.remove(item) else { return };
        for &want in &flight.wants {
            self.wants.remove(&want);
            self.timers.cancel(Timer::Want(want));
            self.actions.push_back(Action::Complete { want, item, outcome: outcome(&flight) });
        }
        for request in flight.requests {
            self.release(now, request, item.piece);
        }
    }

    /// `length` and up to a quarter more, so that what failed together does not come back together.
    pub(crate) fn jittered(&mut self, failures: u32) -> Duration {
        let length = homes::backoff(self.config.backoff, self.config.max_backoff, failures);
        length + length * (self.rng.next_u32() >> 16) / (4 << 16)
    }

    pub(crate) fn random(&mut self, below: u32) -> u32 {
        ((u64::from(self.rng.next_u32()) * u64::from(below)) >> 32) as u32
    }

    pub(crate) fn tried(&mut self, item: Item, source: Source, why: Why) {
        if let Some(flight) = self.flights.at_mut(item) {
            flight.tried(source, why);
        }
    }
}
