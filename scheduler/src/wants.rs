//! Who wants what: waiters join and leave flights, and flights begin, look for a source, and end.

use shoal_proto::Priority;

use crate::{
    Action, Item, Origin, RequestId, Source, Time, WantError, WantFailure, WantId, Why,
    blobs::Piece,
    flights::{Flight, Gate, MAX_REQUESTS, Rank},
    requests::{Asked, Request},
    scheduler::Scheduler,
    timer::Timer,
};

impl Scheduler {
    pub(crate) fn want(
        &mut self,
        now: Time,
        want: WantId,
        item: Item,
        priority: Priority,
        deadline: Time,
        origin: Origin,
    ) {
        if self.wants.contains_key(&want) {
            return;
        }
        let named = self.blobs.piece(item);
        let named = named.and_then(|piece| Some((piece, self.blobs.at(piece.blob)?)));
        let named = named.filter(|(_, blob)| blob.extent(item.piece).is_some());
        let failure = match named {
            Some((_, blob)) if blob.present.contains(item.piece) => {
                return self.actions.push_back(Action::Complete { want, item, outcome: Ok(()) });
            }
            None => Err(WantFailure::Unknown),
            _ if deadline <= now => Err(WantFailure::Deadline),
            _ if self.wants.len() >= self.config.max_wants => Err(WantFailure::Overloaded),
            Some((piece, _)) => Ok(piece),
        };
        match failure {
            Ok(piece) => {
                self.wants.insert(want, (piece, deadline));
                self.want_deadlines.set(deadline, want);
                self.join(now, want, piece, priority, deadline, origin);
            }
            Err(reason) => {
                let outcome = Err(WantError { reason, tries: Vec::new() });
                self.actions.push_back(Action::Complete { want, item, outcome });
            }
        }
    }

    /// Adds a waiter to the piece's flight, which takes the highest priority of its waiters.
    fn join(&mut self, now: Time, want: WantId, piece: Piece, priority: Priority, deadline: Time, origin: Origin) {
        let Some(item) = self.blobs.item(piece) else { return };
        let rank = Rank::new(item, priority, self.arrivals, self.salt);
        self.arrivals += 1;
        let (flight, new) = self.flights.open(piece, || rank);
        flight.wants.push(want);
        flight.deadline = flight.deadline.max(deadline);
        let duty = origin == Origin::ForPeer && !flight.for_peer;
        flight.for_peer |= duty;
        let requests = flight.requests.clone();
        let (raised, seeking) = (priority > flight.priority(), flight.seeking);
        if raised {
            self.raise(piece, rank);
        }
        if requests.is_empty() {
            if new || duty || raised || !seeking {
                self.seek(piece);
            }
        } else if duty {
            // The home that we asked might be waiting for us in turn.
            let at_home = |&request: &RequestId| self.requests.at(request).is_some_and(Request::is_at_home);
            if requests.len() < MAX_REQUESTS && requests.iter().any(at_home) {
                self.seek(piece);
            }
        } else if raised {
            // Somebody waits now: what was slow as a prefetch is hedged a progress interval from here.
            requests.into_iter().for_each(|request| self.expect_progress(now, request));
        }
    }

    /// Sees to it that whoever comes to want the piece waits for the request that is about to bring it.
    pub(crate) fn foresee(&mut self, piece: Piece, priority: Priority) {
        let (arrivals, salt) = (self.arrivals, self.salt);
        if let Some(item) = self.blobs.item(piece) {
            self.flights.open(piece, || Rank::new(item, priority, arrivals, salt));
        }
    }

    fn raise(&mut self, piece: Piece, rank: Rank) {
        let Some(old) = self.flights.raise(piece, rank) else { return };
        let Some(flight) = self.flights.at_mut(piece) else { return };
        let (gate, seeking) = (flight.gate.take(), flight.seeking);
        if let Some(gate) = gate {
            self.queues.remove(gate, old, piece);
        }
        if seeking {
            self.seek(piece);
        }
    }

    pub(crate) fn unwant(&mut self, want: WantId) {
        let Some((piece, _)) = self.wants.remove(&want) else { return };
        self.leave(want, piece);
    }

    pub(crate) fn give_up_want(&mut self, want: WantId) {
        let Some((piece, _)) = self.wants.remove(&want) else { return };
        let tries = self.flights.at(piece).map(|flight| self.tries(flight)).unwrap_or_default();
        if let Some(item) = self.blobs.item(piece) {
            let outcome = Err(WantError { reason: WantFailure::Deadline, tries });
            self.actions.push_back(Action::Complete { want, item, outcome });
        }
        self.leave(want, piece);
    }

    /// What was tried for a flight, and what is still open.
    fn tries(&self, flight: &Flight) -> Vec<(Source, Why)> {
        let open = flight.requests.iter().filter_map(|&id| self.source(self.requests.at(id)?.asked));
        flight.tries().iter().copied().chain(open.map(|source| (source, Why::Open))).collect()
    }

    /// Whom a request went to, by name; nobody if the peer is gone.
    pub(crate) fn source(&self, asked: Asked) -> Option<Source> {
        match asked {
            Asked::Registry => Some(Source::Registry),
            Asked::Peer(slot) => self.peers.at(slot).map(|peer| Source::Peer(peer.id)),
            Asked::Home(slot) => self.peers.at(slot).map(|peer| Source::Home(peer.id)),
        }
    }

    /// A waiter leaves. A flight without waiters asks nobody any more, but what is under way may arrive: the bytes
    /// are spent already, and somebody will want them.
    fn leave(&mut self, want: WantId, piece: Piece) {
        let Some(flight) = self.flights.at_mut(piece) else { return };
        if let Some(at) = flight.wants.iter().position(|&waits| waits == want) {
            flight.wants.swap_remove(at);
        }
        if flight.wants.is_empty() {
            self.settle(piece);
            self.drop_if_over(piece);
        }
    }

    pub(crate) fn drop_if_over(&mut self, piece: Piece) {
        let flight = self.flights.at(piece);
        if flight.is_some_and(|flight| flight.wants.is_empty() && flight.requests.is_empty()) {
            self.settle(piece);
            self.timers.cancel(Timer::Retry(piece));
            self.flights.remove(piece);
        }
    }

    /// Has the flight look for a source at the next step.
    pub(crate) fn seek(&mut self, piece: Piece) {
        let Some(flight) = self.flights.at_mut(piece) else { return };
        flight.seeking = true;
        let rank = flight.rank.fresh();
        let waits = match flight.gate.replace(Gate::Fresh) {
            Some(Gate::Fresh) => flight.rank == rank,
            Some(gate) => {
                self.queues.remove(gate, flight.rank, piece);
                false
            }
            None => false,
        };
        flight.rank = rank;
        if !waits {
            self.queues.push(Gate::Fresh, rank, piece);
        }
        if let Some(blob) = self.blobs.at_mut(piece.blob) {
            if !blob.is_waiting() {
                self.active.insert(piece.blob);
            }
            blob.wait(piece.piece, rank.priority());
        }
    }

    /// Has the flight look no further.
    pub(crate) fn settle(&mut self, piece: Piece) {
        let Some(flight) = self.flights.at_mut(piece) else { return };
        if let Some(gate) = flight.gate.take() {
            self.queues.remove(gate, flight.rank, piece);
        }
        if std::mem::take(&mut flight.seeking)
            && let Some(blob) = self.blobs.at_mut(piece.blob)
        {
            blob.stop_waiting(piece.piece);
            if !blob.is_waiting() {
                self.active.remove(&piece.blob);
            }
        }
    }

    pub(crate) fn seek_if_idle(&mut self, piece: Piece) {
        if self.flights.at(piece).is_some_and(|flight| !flight.wants.is_empty() && flight.requests.is_empty()) {
            self.seek(piece);
        }
    }

    /// The piece is here: everyone who waited is served, every other request for it is stopped.
    pub(crate) fn arrived(&mut self, now: Time, piece: Piece) {
        if let Some(blob) = self.blobs.at_mut(piece.blob) {
            if blob.extent(piece.piece).is_some() {
                blob.present.insert(piece.piece);
            }
            self.close_flight(now, piece, None);
        }
    }

    /// There is no way left to get the piece.
    pub(crate) fn fail_flight(&mut self, now: Time, piece: Piece, reason: WantFailure) {
        self.close_flight(now, piece, Some(reason));
    }

    fn close_flight(&mut self, now: Time, piece: Piece, failure: Option<WantFailure>) {
        self.settle(piece);
        let Some((flight, item)) = self.flights.remove(piece).zip(self.blobs.item(piece)) else { return };
        if flight.trouble().is_some() {
            self.timers.cancel(Timer::Retry(piece));
        }
        for &want in &flight.wants {
            self.wants.remove(&want);
            let outcome = failure.map_or(Ok(()), |reason| Err(WantError { reason, tries: self.tries(&flight) }));
            self.actions.push_back(Action::Complete { want, item, outcome });
        }
        for request in flight.requests {
            self.release(now, request, piece);
        }
    }
}
