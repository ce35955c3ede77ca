//! Peer, then home, then back to the source: where a piece is asked for, and what is joined into one request.
//!
//! Two moves meet here. A flight that looks for a source is *placed*: it goes to a neighbour that has the piece and
//! room, or it queues at a gate, its home or the registry. And whoever has room, a peer or the registry, is *filled*
//! from what waits for it. So an event costs work in proportion to what it changed, not to peers times pieces.

use std::ops::Range;

use shoal_proto::{PeerId, Priority};
use smallvec::SmallVec;

use crate::{
    Action, RequestId, Time, WantFailure,
    blobs::{Blob, BlobSlot, Piece, Reach},
    flights::{Flight, Gate, MAX_REQUESTS},
    inflow::Lane,
    peers::Slot,
    requests::{Asked, Pieces, Request},
    scheduler::{Scheduler, random},
    timer::Timer,
};

/// Most pieces of one request, as on the wire.
const MAX_RUN: usize = shoal_proto::MAX_RUN;
/// Failures in a row after which even a prefetch does not wait for a home.
const HOPELESS: u32 = 4;
/// Pieces picked at random, of which the rarest is prefetched.
const PICKS: usize = 8;
/// Part of the read ahead that a home reads where nothing shows yet that anybody goes on there. Eight nodes that started Python from
/// an image of 280 MB cost the registry 1.50 x what one of them needs, and 1.55 x with all of it everywhere: starts read here and
/// there, but mostly beside what they have read. A sixteenth everywhere would be 1.05 x, and more requests for who reads in order.
const FIRST_AHEAD: u64 = 16;
/// Most pieces of one registry read.
const MAX_JOINED: usize = 256;

/// Small pieces are asked for together up to this many bytes, as if they were one: one at a time, each would cost its home a
/// read of the registry with all its headers.
const SMALL_RUN: u64 = 64 << 10;

impl Scheduler {
    /// Finds sources for everything that can have one now.
    pub(crate) fn pump(&mut self, now: Time) {
        while let Some((rank, piece)) = self.queues.pop_fresh() {
            let waits = |flight: &Flight| flight.gate == Some(Gate::Fresh) && flight.rank == rank;
            if self.flights.at(piece).is_some_and(waits) {
                self.place(now, piece);
            }
        }
        while let Some((rank, piece)) = self.queues.first(Gate::Window)
            && self.has_room(rank.priority())
            && self.may_ask(now, rank.priority())
        {
            self.queues.remove(Gate::Window, rank, piece);
            self.place(now, piece);
        }
        self.fill_peers(now, Priority::OnDemand);
        while self.has_room(Priority::Prefetch)
            && let Some((slot, piece)) = self.next_unheld(now)
            && self.may_ask(now, Priority::Prefetch)
        {
            self.ask(now, Asked::Home(slot), piece);
        }
        self.fill_peers(now, Priority::Prefetch);
        self.fill_registry(now);
    }

    /// Whether more may be asked of peers.
    fn has_room(&self, priority: Priority) -> bool {
        if priority == Priority::Prefetch && self.flights.on_demand() > 0 {
            return self.inflow.room_beside_readers(&self.config);
        }
        let few = self.requests.at_peers() < self.config.min_requests;
        few || self.inflow.room(Lane::Peers(priority), &self.config)
    }

    fn fill_peers(&mut self, now: Time, priority: Priority) {
        while self.has_room(priority)
            && let Some(slot) = self.peers.next_marked(priority)
            && self.may_ask(now, priority)
        {
            self.fill(now, slot, priority);
        }
    }

    fn place(&mut self, now: Time, piece: Piece) {
        let Some(flight) = self.flights.at_mut(piece) else { return };
        flight.gate = None;
        // What others wait for does not wait for what this node waits for.
        let priority = flight.priority();
        let room = flight.for_peer || self.has_room(priority);
        let gate = match self.neighbour(piece) {
            Some(slot) if room && self.may_ask(now, priority) => {
                return self.ask(now, Asked::Peer(slot), piece);
            }
            Some(_) => Some(Gate::Window),
            None => self.next_gate(now, piece),
        };
        let Some(gate) = gate else {
            return self.fail_without_source(now, piece);
        };
        if let Gate::Home(peer) = gate {
            self.peers.slot(peer).into_iter().for_each(|slot| self.peers.mark(slot));
        }
        if let Some(flight) = self.flights.at_mut(piece) {
            flight.gate = Some(gate);
            self.queues.push(gate, flight.rank, piece);
        }
    }

    /// The best neighbour that has the piece and room for it.
    fn neighbour(&self, piece: Piece) -> Option<Slot> {
        let blob = self.blobs.at(piece.blob)?;
        if blob.holders(piece.piece) == 0 {
            return None;
        }
        let flight = self.flights.at(piece)?;
        let mut ready = self.peers.ready(flight.priority());
        ready.find(|&slot| blob.has(slot, piece.piece) && self.is_in_reach(slot) && !self.is_asking(flight, slot))
    }

    /// Whether a peer may be asked for what it has. Those of other zones may not as long as this one has a seed peer that brings
    /// in for all what they lack: what is between zones is thinner, or costs more, than what is within.
    fn is_in_reach(&self, slot: Slot) -> bool {
        self.reach == Reach::All || self.peers.at(slot).is_some_and(|peer| peer.own_zone)
    }

    /// Whether one of the flight's requests is at this peer.
    fn is_asking(&self, flight: &Flight, slot: Slot) -> bool {
        self.open_requests(flight).any(|request| request.peer() == Some(slot))
    }

    fn open_requests<'a>(&'a self, flight: &'a Flight) -> impl Iterator<Item = &'a Request> {
        flight.requests.iter().filter_map(|&id| self.requests.at(id))
    }

    /// Where the flight is to queue when no neighbour can take it: its home, the next in hash order, the registry.
    fn next_gate(&mut self, now: Time, piece: Piece) -> Option<Gate> {
        let flight = self.flights.at(piece)?;
        let for_peer = flight.for_peer;
        // A home that is at it will have it sooner than a second read of the registry, and so has our own read.
        let wait = |request: &Request| request.asked == Asked::Registry || (!for_peer && request.is_pending(now));
        if flight.requests.len() >= MAX_REQUESTS || self.open_requests(flight).any(wait) {
            return None;
        }
        if !for_peer && let Some(home) = self.next_home(now, piece) {
            return Some(Gate::Home(home));
        }
        let Some(trouble) = self.flights.at(piece)?.trouble() else { return Some(Gate::Registry) };
        if trouble.registry_refused {
            return None;
        }
        if trouble.not_before > now {
            self.timers.set(Timer::Retry(piece), trouble.not_before);
            return None;
        }
        Some(Gate::Registry)
    }

    /// The first home that is of use and not this node itself; nothing if the registry comes before it.
    fn next_home(&mut self, now: Time, piece: Piece) -> Option<PeerId> {
        let ranking = self.ranking(piece)?;
        for &home in ranking.iter() {
            if home == self.config.me {
                return None;
            }
            if self.is_of_use(now, piece, home) {
                return Some(home);
            }
        }
        let suggested = self.flights.at(piece)?.trouble()?.suggested.clone();
        suggested.into_iter().find(|&home| self.is_of_use(now, piece, home))
    }

    fn is_of_use(&mut self, now: Time, piece: Piece, home: PeerId) -> bool {
        let Some((flight, item)) = self.flights.at(piece).zip(self.blobs.item(piece)) else { return false };
        let refused = flight.trouble().is_some_and(|trouble| trouble.refused.contains(&home));
        if refused || self.banned.contains_key(&home) {
            return false;
        }
        let Some(slot) = self.peers.slot(home) else { return self.dial(now, home) };
        let Some(peer) = self.peers.at(slot) else { return false };
        // A prefetch gives a home the benefit of the doubt: the next one would read the registry again.
        let doubted = match flight.priority() {
            Priority::OnDemand => peer.is_suspect() || peer.failures(now) > 0,
            Priority::Prefetch => peer.failures(now) >= HOPELESS,
        };
        !self.is_asking(flight, slot) && !doubted && !peer.denies(item) && peer.may_source(item.blob, now)
    }

    /// The registry refuses, no home is left and no neighbour has it: better now than at the deadline.
    fn fail_without_source(&mut self, now: Time, piece: Piece) {
        let Some(flight) = self.flights.at(piece) else { return };
        if flight.is_refused_by_registry() && flight.requests.is_empty() && self.holders_of(piece) == 0 {
            self.fail_flight(now, piece, WantFailure::NoSource);
        }
    }

    /// How many neighbours have a piece.
    pub(crate) fn holders_of(&self, piece: Piece) -> u32 {
        self.blobs.at(piece.blob).map_or(0, |blob| blob.holders(piece.piece))
    }

    /// A prefetch that nobody but its home can bring, and the home, if that has room. It comes before all that somebody has: it
    /// is the rarest there is, and where homes send what is everywhere already, a swarm soon has nothing left to exchange.
    fn next_unheld(&mut self, now: Time) -> Option<(Slot, Piece)> {
        let with_room = |home: PeerId| {
            let slot = self.peers.slot(home)?;
            let room = self.peers.at(slot)?.room(now, Priority::Prefetch, &self.config);
            (room > 0).then_some((home, slot))
        };
        let homes: SmallVec<[_; 8]> = self.queues.homes().filter_map(with_room).collect();
        homes.into_iter().find_map(|(home, slot)| Some((slot, self.first_unheld(home)?)))
    }

    /// The first prefetch in line for a home that no neighbour has; what one has goes behind the others.
    fn first_unheld(&mut self, home: PeerId) -> Option<Piece> {
        let gate = Gate::Home(home);
        while let Some((rank, piece)) = self.queues.first(gate).filter(|(rank, _)| rank.is_unheld()) {
            if self.holders_of(piece) == 0 {
                return Some(piece);
            }
            let behind = rank.held();
            self.queues.push(gate, behind, piece);
            self.queues.remove(gate, rank, piece);
            self.flights.at_mut(piece).into_iter().for_each(|flight| flight.rank = behind);
        }
        None
    }

    /// Gives a peer one request for what it has, or else for what it is home to.
    fn fill(&mut self, now: Time, slot: Slot, priority: Priority) {
        let Some(gate) = self.peers.at(slot).map(|peer| Gate::Home(peer.id)) else { return };
        if let Some(piece) = self.waiting_for(slot, priority) {
            self.ask(now, Asked::Peer(slot), piece);
        } else if let Some((_, piece)) = self.queues.first(gate).filter(|(rank, _)| rank.priority() == priority) {
            self.ask(now, Asked::Home(slot), piece);
        } else {
            self.peers.unmark(slot, priority);
        }
    }

    /// A piece that waits and that this peer has. For prefetch the rarest of a few picked at random, so that nodes differ
    /// in what they get and who has everything is asked for what the others lack.
    fn waiting_for(&mut self, slot: Slot, priority: Priority) -> Option<Piece> {
        let reached = self.is_in_reach(slot);
        let mut matching = self.active.iter().filter(|_| reached).filter_map(|&key| Some((key, self.blobs.at(key)?)));
        let (key, blob) = matching.find(|(_, blob)| blob.next_waiting(slot, priority, 0).is_some())?;
        if priority == Priority::Prefetch {
            let picks = [(); PICKS].map(|()| random(&mut self.rng, blob.len()));
            let picks = picks.into_iter().filter_map(|from| blob.next_waiting(slot, priority, from));
            let rarest = picks.min_by_key(|&piece| blob.holders(piece)).map(|piece| Piece { blob: key, piece });
            if let Some(rarest) = rarest.filter(|&piece| self.may_bring(slot, piece)) {
                return Some(rarest);
            }
        }
        let found = |&key: &BlobSlot| {
            let blob = self.blobs.at(key)?;
            let from = |from| blob.next_waiting(slot, priority, from);
            let pieces = std::iter::successors(from(0), |&piece| from(piece.checked_add(1)?));
            pieces.map(|piece| Piece { blob: key, piece }).find(|&piece| self.may_bring(slot, piece))
        };
        self.active.iter().find_map(found)
    }

    /// Whether a piece waits that none of its requests asks this peer for.
    fn may_bring(&self, slot: Slot, piece: Piece) -> bool {
        self.flights.at(piece).is_some_and(|flight| !self.is_asking(flight, slot))
    }

    /// Asks a peer for a piece and the pieces after it that wait for the same.
    fn ask(&mut self, now: Time, asked: Asked, first: Piece) {
        let Some(slot) = asked.peer() else { return };
        let (Some(peer), Some(flight)) = (self.peers.at(slot), self.flights.at(first)) else { return };
        let (id, priority) = (peer.id, flight.priority());
        let room = peer.room(now, priority, &self.config).max(1) as usize;
        let most = peer.window(priority, &self.config).min(self.config.peer_run).clamp(1, MAX_RUN as u32);
        let share = self.allowances.share(Lane::Peers(priority)).min(peer.share(priority));
        let run_bytes = self.config.run_bytes.min(share);
        let mut pieces = Pieces::from_slice(&[first.piece]);
        let mut bytes = self.blobs.size(first);
        for piece in (first.piece + 1..).take(most as usize - 1).map(|piece| Piece { piece, ..first }) {
            let longer = bytes + self.blobs.size(piece);
            let enough = pieces.len() >= room && longer > SMALL_RUN;
            if enough || longer > run_bytes || !self.joins(slot, id, asked, piece, priority) {
                break;
            }
            pieces.push(piece.piece);
            bytes = longer;
        }
        self.peers.modify(now, &self.config, slot, |peer| peer.load(now, pieces.len() as u32, bytes));
        self.charge_peer(now, slot, bytes, priority);
        let (blob, source) = (first.blob, matches!(asked, Asked::Home(_)));
        let on_wire = pieces.to_vec();
        let (request, deadline) = self.open(now, Batch { asked, blob, pieces, bytes, priority });
        let Some(blob) = self.blobs.at(blob) else { return };
        self.actions.push_back(Action::Request {
            request,
            peer: id,
            blob: blob.key(),
            pieces: on_wire,
            priority,
            source,
            deadline,
            lacks: blob.lacks(),
        });
    }

    fn joins(&self, slot: Slot, id: PeerId, asked: Asked, piece: Piece, priority: Priority) -> bool {
        let Some((blob, flight)) = self.blobs.at(piece.blob).zip(self.flights.at(piece)) else { return false };
        let there = match asked {
            Asked::Home(_) => flight.gate == Some(Gate::Home(id)),
            _ => blob.has(slot, piece.piece),
        };
        there && blob.waiting(priority).contains(piece.piece) && !self.is_asking(flight, slot)
    }

    /// Enters a request in the books; returns its id and when its last waiter gives up.
    fn open(&mut self, now: Time, batch: Batch) -> (RequestId, Time) {
        let Batch { asked, blob, pieces, bytes, priority } = batch;
        let mut deadline = Time::ZERO;
        let (pending_until, due) = (Time::ZERO, Time::MAX);
        let request = Request { asked, blob, pieces: pieces.clone(), priority, pending_until, due, stalls: 0 };
        let lane = request.lane();
        let id = self.requests.open(request);
        self.inflow.load(now, lane, bytes);
        self.allowances.charge(now, lane, bytes);
        self.expect_progress(now, id);
        for piece in pieces.into_iter().map(|piece| Piece { blob, piece }) {
            self.settle(piece);
            if let Some(flight) = self.flights.at_mut(piece) {
                flight.requests.push(id);
                deadline = deadline.max(flight.deadline);
            }
        }
        (id, deadline)
    }

    fn fill_registry(&mut self, now: Time) {
        while let Some((rank, piece)) = self.queues.first(Gate::Registry)
            && self.requests.registry_room(rank.priority(), &self.config.limits)
            && self.inflow.room(Lane::Registry(rank.priority()), &self.config)
            && self.may_read(now, rank.priority())
        {
            self.read_registry(now, piece, rank.priority());
        }
    }

    fn read_registry(&mut self, now: Time, first: Piece, priority: Priority) {
        let Some((pieces, range)) = self.join_read(first, priority) else { return self.settle(first) };
        pieces.iter().for_each(|&piece| self.foresee(Piece { piece, ..first }, priority));
        let bytes = pieces.iter().map(|&piece| self.blobs.size(Piece { piece, ..first })).sum();
        let (asked, blob) = (Asked::Registry, first.blob);
        let on_wire = pieces.to_vec();
        let (request, deadline) = self.open(now, Batch { asked, blob, pieces, bytes, priority });
        // The gaps are read with it.
        self.allowances.charge(now, Lane::Registry(priority), (range.end - range.start).saturating_sub(bytes));
        self.allowances.charge_read(now, priority);
        let Some(blob) = self.blobs.at(blob).map(Blob::key) else { return };
        self.actions.push_back(Action::BackToSource { request, blob, pieces: on_wire, range, priority, deadline });
    }

    /// Whether the piece before this one is here or on its way: somebody reads in order.
    fn goes_on(&self, piece: Piece) -> bool {
        let Some(before) = piece.piece.checked_sub(1).map(|before| Piece { piece: before, ..piece }) else {
            return false;
        };
        let under_way = |flight: &Flight| !flight.requests.is_empty();
        self.blobs.at(piece.blob).is_some_and(|blob| blob.present.contains(before.piece))
            || self.flights.at(before).is_some_and(under_way)
    }

    /// What one read of the registry brings: the pieces from `first` on that wait for it too and lie close behind each other
    /// with what lies between them, and for the sake of others what comes next in the stripe.
    fn join_read(&self, first: Piece, priority: Priority) -> Option<(Pieces, Range<u64>)> {
        let (blob, flight) = (self.blobs.at(first.blob)?, self.flights.at(first)?);
        let most = self.config.max_join.min(self.allowances.share(Lane::Registry(priority)));
        let mut range = blob.extent(first.piece)?.clone();
        let (_, stripe_end) = blob.stripe(first.piece, self.config.stripe)?;
        // A large piece is worth a request of its own. What nobody asked for might be read in vain, or be lost with this home.
        let small = blob.size(first.piece) < self.config.read_ahead / 4;
        let ahead = match flight.for_peer && small {
            true if self.goes_on(first) => self.config.read_ahead,
            true => self.config.read_ahead / FIRST_AHEAD,
            false => 0,
        };
        let ahead_end = range.start.saturating_add(ahead).min(stripe_end);
        let (mut pieces, mut between) = (Pieces::from_slice(&[first.piece]), Pieces::new());
        for piece in (first.piece + 1..blob.len()).take(MAX_JOINED - 1) {
            let Some(next) = blob.extent(piece) else { continue };
            // Of a gzip layer the end of one and the start of the next may be the same bytes.
            let joins = next.start >= range.start
                && next.start.saturating_sub(range.end) <= self.config.max_gap
                && next.end - range.start <= most;
            if !joins {
                break;
            }
            let flight = self.flights.at(Piece { piece, ..first });
            let waits =
                flight.is_some_and(|flight| flight.gate == Some(Gate::Registry) && flight.priority() == priority);
            let lacking = flight.is_none() && !blob.present.contains(piece) && blob.holders(piece) == 0;
            if waits || lacking && next.end <= ahead_end {
                pieces.append(&mut between);
                pieces.push(piece);
                range.end = range.end.max(next.end);
            } else if lacking {
                between.push(piece);
            }
        }
        Some((pieces, range))
    }
}

/// A request that is about to be made.
struct Batch {
    asked: Asked,
    blob: BlobSlot,
    pieces: Pieces,
    /// Encoded, of all of them.
    bytes: u64,
    priority: Priority,
}
