//! What an answer means: for the request, for the peer that gave it, and for the flights that have to look further.

use std::time::Duration;

use shoal_proto::{PeerId, Priority};
use smallvec::SmallVec;

use crate::{
    Action, BanReason, Failure, Item, RequestId, Source, Time, Why,
    blobs::Piece,
    flights::{Flight, MAX_REQUESTS},
    peer::Peer,
    peers::Slot,
    requests::{Asked, Request},
    scheduler::Scheduler,
    timer::Timer,
};

/// Shortest time that a busy peer is left alone.
const MIN_BUSY: Duration = Duration::from_millis(10);
/// Longest time that the registry can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);
/// Intervals without progress that a peer is given which answers other requests meanwhile.
const MAX_SLOW: u32 = 4;
/// Peers remembered from one answer.
const MAX_NAMED: usize = 32;

impl Scheduler {
    pub(crate) fn delivered(&mut self, now: Time, id: RequestId, item: Item, bytes: u64) {
        let Some(piece) = self.blobs.piece(item) else { return };
        let size = self.blobs.size(piece);
        let asked = self.requests.at(id).filter(|request| request.blob == piece.blob);
        if let Some((peer, lane)) = asked.map(|request| (request.peer(), request.lane())) {
            let owed = self.requests.take(id, piece.piece);
            self.inflow.delivered(now, bytes);
            self.inflow.unload(lane, if owed { size } else { 0 });
            // An object may be of unknown size until it is here.
            self.allowances.charge(now, lane, bytes.saturating_sub(size));
            if let Some(slot) = peer {
                self.peers.modify(now, &self.config, slot, |peer| {
                    peer.unload(u32::from(owed), if owed { size } else { 0 });
                    peer.delivered(now, bytes);
                });
                self.peers.mark(slot);
            }
            if let Some(flight) = self.flights.at_mut(piece) {
                flight.requests.retain(|request| *request != id);
            }
            self.close_if_done(now, id);
        }
        self.arrived(now, piece);
    }

    /// Closes a request that owes nothing any more; any other owes a sign of life again.
    fn close_if_done(&mut self, now: Time, id: RequestId) {
        if self.requests.at(id).is_some_and(|request| request.pieces.is_empty()) {
            self.requests.close(id);
        } else {
            self.expect_progress(now, id);
        }
    }

    pub(crate) fn progress(&mut self, now: Time, id: RequestId) {
        if self.requests.at(id).is_some() {
            self.sign(now, id);
            self.expect_progress(now, id);
        }
    }

    /// The peer behind a request gave a sign of life.
    fn sign(&mut self, now: Time, id: RequestId) {
        let peer = self.requests.at_mut(id).and_then(|request| {
            request.stalls = 0;
            request.peer()
        });
        if let Some(slot) = peer {
            let suspect = self.peers.at(slot).is_some_and(|peer| peer.is_suspect());
            self.peers.modify(now, &self.config, slot, |peer| peer.sign(now));
            if suspect {
                self.peers.mark(slot);
            }
        }
    }

    /// The request has to give a sign of life an interval from now.
    pub(crate) fn expect_progress(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.at(id) else { return };
        let patience = match request.peer() {
            Some(peer) => self.patience(peer, request),
            None => self.config.registry_progress,
        };
        self.expect_until(id, request.pending_until.max(now) + patience + self.inflow.drain() * 2);
    }

    fn expect_until(&mut self, id: RequestId, due: Time) {
        if let Some(request) = self.requests.at_mut(id)
            && std::mem::replace(&mut request.due, due) > due
        {
            self.progress_deadlines.set(due, id);
        }
    }

    pub(crate) fn not_have(&mut self, now: Time, id: RequestId, item: Item) {
        let Some(piece) = self.blobs.piece(item) else { return };
        let Some(request) = self.requests.at(id).filter(|request| request.blob == piece.blob) else { return };
        let (asked, peer, lane) = (request.asked, request.peer(), request.lane());
        self.sign(now, id);
        if !self.requests.take(id, piece.piece) {
            return;
        }
        let size = self.blobs.size(piece);
        self.inflow.unload(lane, size);
        self.give_back_refused(now, lane, peer, Why::NotHave, size);
        if let Some(slot) = peer {
            self.blobs.at_mut(piece.blob).into_iter().for_each(|blob| blob.unlearn(slot, piece.piece));
            let tired = self.peers.modify(now, &self.config, slot, |peer| {
                peer.deny(item);
                peer.unload(1, size);
                matches!(asked, Asked::Peer(_)) && peer.broke_promise()
            });
            self.peers.mark(slot);
            if tired == Some(true) {
                self.fail_peer(now, slot);
            }
        }
        self.close_if_done(now, id);
        self.look_further(now, id, piece, asked, Why::NotHave);
    }

    pub(crate) fn pending(&mut self, now: Time, id: RequestId, eta: Duration) {
        let until = now + eta.min(self.config.max_eta);
        let Some(request) = self.requests.at_mut(id) else { return };
        request.pending_until = until;
        if request.is_at_home() {
            // What was about to be asked for elsewhere, because the home was silent, is left to it after all.
            for piece in request.clone().owed() {
                if self.flights.at(piece).is_some_and(|flight| flight.seeking && !flight.for_peer) {
                    self.settle(piece);
                }
            }
        }
        self.sign(now, id);
        self.expect_progress(now, id);
    }

    pub(crate) fn busy(&mut self, now: Time, id: RequestId, retry_after: Duration, alternates: &[PeerId]) {
        let Some(request) = self.requests.at(id) else { return };
        let Some((slot, peer)) = request.peer().and_then(|slot| Some((slot, self.peers.at(slot)?.id))) else {
            return;
        };
        let items: SmallVec<[_; 4]> = request.owed().filter_map(|piece| self.blobs.item(piece)).collect();
        self.sign(now, id);
        for &alternate in alternates.iter().take(MAX_NAMED).filter(|&&alternate| alternate != peer) {
            items.iter().for_each(|&item| self.rumour(now, alternate, item));
        }
        self.peers.modify(now, &self.config, slot, Peer::refused);
        self.close_peer(now, slot, now + retry_after.clamp(MIN_BUSY, self.config.max_eta.max(MIN_BUSY)));
        self.give_up(now, id, Why::Busy);
    }

    pub(crate) fn not_my_home(&mut self, now: Time, id: RequestId, members: &[PeerId]) {
        let Some(request) = self.requests.at(id) else { return };
        for piece in request.owed() {
            if let Some(flight) = self.flights.at_mut(piece) {
                let others = members.iter().take(MAX_NAMED).filter(|&&member| member != self.config.me);
                flight.trouble_mut().suggested = others.copied().collect();
            }
        }
        self.sign(now, id);
        self.give_up(now, id, Why::NotMyHome);
    }

    pub(crate) fn cannot_source(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.at(id) else { return };
        let key = request.owed().next().and_then(|piece| self.blobs.item(piece)).map(|item| item.blob);
        if let Some((slot, key)) = request.peer().zip(key) {
            let until = now + self.config.cannot_source;
            self.sign(now, id);
            self.peers.modify(now, &self.config, slot, |peer| peer.cannot_source(key, until));
        }
        self.give_up(now, id, Why::CannotSource);
    }

    pub(crate) fn failed(&mut self, now: Time, id: RequestId, reason: &Failure) {
        let Some(request) = self.requests.at(id) else { return };
        match (reason, request.peer()) {
            (Failure::Store, _) => self.give_up(now, id, Why::Store),
            (Failure::WrongBytes, Some(slot)) => {
                let item = request.owed().next().and_then(|piece| self.blobs.item(piece));
                let peer = self.peers.at(slot).map(|peer| peer.id);
                peer.zip(item).into_iter().for_each(|(peer, item)| self.ban(now, peer, item));
            }
            (_, Some(slot)) => {
                self.fail_peer(now, slot);
                self.give_up(now, id, Why::Transport);
            }
            (Failure::Registry { retry_after, permanent }, None) => {
                if let Some(after) = retry_after {
                    self.registry_closed_until = now + (*after).min(MAX_RETRY_AFTER);
                    self.timers.set(Timer::Registry, self.registry_closed_until);
                }
                self.give_up(now, id, if *permanent { Why::RegistryRefused } else { Why::Registry });
            }
            (Failure::WrongBytes, None) => self.give_up(now, id, Why::WrongBytes),
            (Failure::Transport, None) => self.give_up(now, id, Why::Transport),
        }
    }

    pub(crate) fn finished(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.at(id) else { return };
        if let Some(slot) = request.peer() {
            self.fail_peer(now, slot);
        }
        self.give_up(now, id, Why::EndedEarly);
    }

    /// Whoever sends wrong bytes has nothing that we want for a while.
    pub(crate) fn ban(&mut self, now: Time, peer: PeerId, item: Item) {
        let until = now + self.config.ban;
        if self.banned.len() >= self.config.max_peers {
            self.banned.pop_first();
        }
        self.banned.insert(peer, until);
        self.actions.push_back(Action::Ban { peer, until, reason: BanReason::WrongBytes(item) });
        self.timers.set(Timer::Ban(peer), until);
        if let Some(slot) = self.peers.slot(peer) {
            self.close_peer(now, slot, until);
            self.blobs.iter_mut().for_each(|blob| blob.forget(slot));
            for request in self.requests.of_peer(slot) {
                self.actions.push_back(Action::Cancel { request });
                self.give_up(now, request, Why::WrongBytes);
            }
        }
        self.requeue_home(peer);
    }

    /// A request was silent for its interval. Prefetch goes elsewhere at once, unless its peer is alive; for an on-demand piece somebody else
    /// is asked as well, and this one gets twice the time to come back.
    pub(crate) fn stalled(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.at_mut(id) else { return };
        request.stalls += 1;
        let request = request.clone();
        let known = request.peer().and_then(|slot| Some((slot, self.peers.at(slot)?.id)));
        let Some((slot, peer)) = known else {
            self.actions.push_back(Action::Cancel { request: id });
            return self.give_up(now, id, Why::Stalled);
        };
        if self.is_only_slow(now, slot, &request) {
            return self.expect_progress(now, id);
        }
        if request.stalls > 1 || request.priority == Priority::Prefetch {
            self.actions.push_back(Action::Cancel { request: id });
            self.fail_peer(now, slot);
            return self.give_up(now, id, Why::Stalled);
        }
        self.expect_until(id, now + self.patience(slot, &request) * 2);
        self.peers.modify(now, &self.config, slot, Peer::suspect);
        for piece in request.owed() {
            self.hedge(piece, request.is_at_home().then_some(peer));
        }
        self.requeue_home(peer);
    }

    /// How long a peer may be silent about a request: less once somebody waits for one of its pieces, even if nobody did when
    /// it was made.
    fn patience(&self, slot: Slot, request: &Request) -> Duration {
        let awaited = request.owed().filter_map(|piece| self.flights.at(piece)).map(|flight| flight.priority()).max();
        let priority = awaited.unwrap_or(request.priority);
        self.peers.at(slot).map_or(self.config.progress, |peer| peer.patience(priority, &self.config))
    }

    /// What a peer owes that is alive and busy with the rest is worth waiting for, but not for ever: a prefetch because nobody
    /// waits for it, and any piece from its home because the next one would read the registry once more.
    fn is_only_slow(&self, now: Time, slot: Slot, request: &Request) -> bool {
        let patience = self.patience(slot, request);
        let alive = self.peers.at(slot).is_some_and(|peer| peer.was_alive(now, patience));
        let patient = request.priority == Priority::Prefetch || request.is_at_home();
        patient && request.stalls < MAX_SLOW && alive
    }

    fn hedge(&mut self, piece: Piece, home: Option<PeerId>) {
        let Some(flight) = self.flights.at_mut(piece) else { return };
        if let Some(home) = home {
            flight.trouble_mut().refused.insert(home);
        }
        if !flight.wants.is_empty() && flight.requests.len() < MAX_REQUESTS {
            self.seek(piece);
        }
    }

    /// Closes a request without its pieces, which look further.
    pub(crate) fn give_up(&mut self, now: Time, id: RequestId, why: Why) {
        let Some(request) = self.close(now, id) else { return };
        let bytes = request.owed().map(|piece| self.blobs.size(piece)).sum();
        self.give_back_refused(now, request.lane(), request.peer(), why, bytes);
        for piece in request.owed() {
            self.look_further(now, id, piece, request.asked, why);
        }
    }

    /// Stops a request that nobody needs.
    pub(crate) fn cancel(&mut self, now: Time, id: RequestId) {
        if self.close(now, id).is_some() {
            self.actions.push_back(Action::Cancel { request: id });
        }
    }

    /// A request need not bring this piece any more; it is stopped if that was its last.
    pub(crate) fn release(&mut self, now: Time, id: RequestId, piece: Piece) {
        let Some(request) = self.requests.at(id).filter(|request| request.owes(piece)) else { return };
        if request.pieces.len() == 1 {
            return self.cancel(now, id);
        }
        let (peer, lane, bytes) = (request.peer(), request.lane(), self.blobs.size(piece));
        self.requests.take(id, piece.piece);
        self.inflow.unload(lane, bytes);
        self.unload(now, peer, 1, bytes);
    }

    fn close(&mut self, now: Time, id: RequestId) -> Option<Request> {
        let request = self.requests.close(id)?;
        let bytes = request.owed().map(|piece| self.blobs.size(piece)).sum();
        self.inflow.unload(request.lane(), bytes);
        self.unload(now, request.peer(), request.pieces.len() as u32, bytes);
        Some(request)
    }

    fn unload(&mut self, now: Time, peer: Option<Slot>, pieces: u32, bytes: u64) {
        let Some(slot) = peer else { return };
        let given_up = self.peers.modify(now, &self.config, slot, |peer| {
            peer.unload(pieces, bytes);
            peer.in_flight == 0 && peer.is_suspect()
        });
        self.peers.mark(slot);
        if given_up == Some(true) {
            // Nothing is left that could clear it of suspicion.
            self.fail_peer(now, slot);
        }
    }

    /// One try of a flight is over without the piece.
    fn look_further(&mut self, now: Time, id: RequestId, piece: Piece, asked: Asked, why: Why) {
        let failures =
            self.flights.at(piece).and_then(Flight::trouble).map_or(0, |trouble| trouble.registry_failures) + 1;
        let later = now + self.jittered(failures);
        let patience = self.config.home_patience;
        let Some(source) = self.source(asked) else { return };
        let Some(flight) = self.flights.at_mut(piece) else { return };
        flight.requests.retain(|request| *request != id);
        flight.tried(source, why);
        let priority = flight.priority();
        let trouble = flight.trouble_mut();
        match (source, why) {
            (_, Why::Store) | (Source::Peer(_), _) => {}
            (Source::Home(home), Why::Busy) => {
                let since = *trouble.busy_since.get_or_insert(now);
                if priority == Priority::OnDemand && since + patience <= now {
                    trouble.refused.insert(home);
                }
            }
            // It may be back when its back-off is over, or never: that is then known of the peer.
            (Source::Home(_), Why::Stalled | Why::Transport | Why::EndedEarly) if priority == Priority::Prefetch => {}
            (Source::Home(home), _) => _ = trouble.refused.insert(home),
            (Source::Registry, Why::RegistryRefused) => trouble.registry_refused = true,
            (Source::Registry, _) => {
                trouble.registry_failures = failures;
                trouble.not_before = later;
                trouble.busy_since = None;
                trouble.refused.clear();
                trouble.suggested.clear();
            }
        }
        if why == Why::Store {
            trouble.registry_failures = failures;
        }
        if flight.wants.is_empty() {
            return self.drop_if_over(piece);
        }
        if why == Why::Store {
            return self.timers.set(Timer::Retry(piece), later);
        }
        let stalls = |other: &RequestId| self.requests.at(*other).is_some_and(|request| request.stalls > 0);
        if flight.requests.iter().all(stalls) {
            self.seek(piece);
        }
    }
}
