//! What an answer means: for the request, for the peer that gave it, and for the flights that have to look further.

use std::time::Duration;

use shoal_proto::{PeerId, Priority};

use crate::{
    Action, BanReason, Failure, Item, RequestId, Source, Time, Why, flights::MAX_REQUESTS, requests::Request,
    scheduler::Scheduler, timer::Timer,
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
        let size = self.blobs.get(&item.blob).map_or(0, |blob| blob.size(item.piece));
        let asked = self.requests.at(id).filter(|request| request.blob == item.blob);
        if let Some((peer, lane)) = asked.map(|request| (request.peer(), request.lane())) {
            let owed = self.requests.take(id, item.piece);
            self.inflow.delivered(now, bytes);
            self.inflow.unload(lane, if owed { size } else { 0 });
            // An object may be of unknown size until it is here.
            self.allowances.charge(now, lane, bytes.saturating_sub(size));
            if let Some(slot) = peer.and_then(|peer| self.peers.slot(peer)) {
                self.peers.modify(now, &self.config, slot, |peer| {
                    peer.unload(u32::from(owed), if owed { size } else { 0 });
                    peer.delivered(now, bytes);
                });
                self.peers.mark(slot);
            }
            if let Some(flight) = self.flights.at_mut(item) {
                flight.requests.retain(|&request| request != id);
            }
            if self.requests.at(id).is_some_and(|request| request.pieces.is_empty()) {
                self.requests.close(id);
                self.timers.cancel(Timer::Request(id));
            } else {
                self.expect_progress(now, id);
            }
        }
        self.arrived(now, item);
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
        if let Some(slot) = peer.and_then(|peer| self.peers.slot(peer)) {
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
        self.timers.set(Timer::Request(id), request.pending_until.max(now) + patience + self.inflow.drain() * 2);
    }

    pub(crate) fn not_have(&mut self, now: Time, id: RequestId, item: Item) {
        let Some(request) = self.requests.at(id).filter(|request| request.blob == item.blob) else { return };
        let (source, peer, lane) = (request.source, request.peer(), request.lane());
        self.sign(now, id);
        if !self.requests.take(id, item.piece) {
            return;
        }
        let size = self.bytes(item.blob, &[item.piece]);
        self.inflow.unload(lane, size);
        self.give_back_refused(now, lane, peer, Why::NotHave, size);
        if let Some(slot) = peer.and_then(|peer| self.peers.slot(peer)) {
            if let Some(blob) = self.blobs.get_mut(&item.blob) {
                blob.unlearn(slot, item.piece);
            }
            let tired = self.peers.modify(now, &self.config, slot, |peer| {
                peer.deny(item);
                peer.unload(1, size);
                matches!(source, Source::Peer(_)) && peer.broke_promise()
            });
            self.peers.mark(slot);
            if let (Some(true), Some(peer)) = (tired, peer) {
                self.fail_peer(now, peer);
            }
        }
        if self.requests.at(id).is_some_and(|request| request.pieces.is_empty()) {
            self.requests.close(id);
            self.timers.cancel(Timer::Request(id));
        } else {
            self.expect_progress(now, id);
        }
        self.look_further(now, id, item, source, Why::NotHave);
    }

    pub(crate) fn pending(&mut self, now: Time, id: RequestId, eta: Duration) {
        let until = now + eta.min(self.config.max_eta);
        let Some(request) = self.requests.at_mut(id) else { return };
        request.pending_until = until;
        let request = request.clone();
        if matches!(request.source, Source::Home(_)) {
            // What was about to be asked for elsewhere, because the home was silent, is left to it after all.
            for &piece in &request.pieces {
                let item = Item { blob: request.blob, piece };
                if self.flights.at(item).is_some_and(|flight| flight.seeking && !flight.for_peer) {
                    self.settle(item);
                }
            }
        }
        self.sign(now, id);
        self.expect_progress(now, id);
    }

    pub(crate) fn busy(&mut self, now: Time, id: RequestId, retry_after: Duration, alternates: &[PeerId]) {
        let Some(request) = self.requests.at(id).cloned() else { return };
        let Some(peer) = request.peer() else { return };
        self.sign(now, id);
        for &alternate in alternates.iter().take(MAX_NAMED).filter(|&&alternate| alternate != peer) {
            for &piece in &request.pieces {
                self.rumour(now, alternate, Item { blob: request.blob, piece });
            }
        }
        if let Some(slot) = self.peers.slot(peer) {
            self.peers.modify(now, &self.config, slot, |peer| peer.refused());
        }
        self.close_peer(now, peer, now + retry_after.clamp(MIN_BUSY, self.config.max_eta.max(MIN_BUSY)));
        self.give_up(now, id, Why::Busy);
    }

    pub(crate) fn not_my_home(&mut self, now: Time, id: RequestId, members: &[PeerId]) {
        let Some(request) = self.requests.at(id).cloned() else { return };
        self.sign(now, id);
        for &piece in &request.pieces {
            if let Some(flight) = self.flights.at_mut(Item { blob: request.blob, piece }) {
                let others = members.iter().take(MAX_NAMED).filter(|&&member| member != self.config.me);
                flight.suggested = others.copied().collect();
            }
        }
        self.give_up(now, id, Why::NotMyHome);
    }

    pub(crate) fn cannot_source(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.at(id).cloned() else { return };
        self.sign(now, id);
        if let Some(slot) = request.peer().and_then(|peer| self.peers.slot(peer)) {
            let until = now + self.config.cannot_source;
            self.peers.modify(now, &self.config, slot, |peer| peer.cannot_source(request.blob, until));
        }
        self.give_up(now, id, Why::CannotSource);
    }

    pub(crate) fn failed(&mut self, now: Time, id: RequestId, reason: &Failure) {
        let Some(request) = self.requests.at(id).cloned() else { return };
        match (reason, request.peer()) {
            (Failure::Store, _) => self.give_up(now, id, Why::Store),
            (Failure::WrongBytes, Some(peer)) => {
                let item = Item { blob: request.blob, piece: request.pieces.first().copied().unwrap_or(0) };
                self.ban(now, peer, item);
            }
            (_, Some(peer)) => {
                self.fail_peer(now, peer);
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
        if let Some(peer) = request.peer() {
            self.fail_peer(now, peer);
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
        if let Some(slot) = self.peers.slot(peer) {
            self.blobs.values_mut().for_each(|blob| blob.forget(slot));
        }
        self.close_peer(now, peer, until);
        for request in self.requests.of_peer(peer) {
            self.actions.push_back(Action::Cancel { request });
            self.give_up(now, request, Why::WrongBytes);
        }
        self.requeue_home(peer);
    }

    /// A request was silent for its interval. Prefetch goes elsewhere at once, unless its peer is alive; for an on-demand piece somebody else
    /// is asked as well, and this one gets twice the time to come back.
    pub(crate) fn stalled(&mut self, now: Time, id: RequestId) {
        let Some(request) = self.requests.at_mut(id) else { return };
        request.stalls += 1;
        let request = request.clone();
        let Some(peer) = request.peer() else {
            self.actions.push_back(Action::Cancel { request: id });
            return self.give_up(now, id, Why::Stalled);
        };
        if self.is_only_slow(now, peer, &request) {
            return self.expect_progress(now, id);
        }
        if request.stalls > 1 || request.priority == Priority::Prefetch {
            self.actions.push_back(Action::Cancel { request: id });
            self.fail_peer(now, peer);
            return self.give_up(now, id, Why::Stalled);
        }
        let patience = self.patience(peer, &request);
        self.timers.set(Timer::Request(id), now + patience * 2);
        if let Some(slot) = self.peers.slot(peer) {
            self.peers.modify(now, &self.config, slot, crate::peers::Peer::suspect);
        }
        for &piece in &request.pieces {
            self.hedge(Item { blob: request.blob, piece }, request.source);
        }
        self.requeue_home(peer);
    }

    /// How long a peer may be silent about a request: less once somebody waits for one of its pieces, even if nobody did when
    /// it was made.
    fn patience(&self, peer: PeerId, request: &Request) -> Duration {
        let flight = |&piece: &u32| self.flights.at(Item { blob: request.blob, piece });
        let awaited = request.pieces.iter().filter_map(flight).map(|flight| flight.priority()).max();
        let priority = awaited.unwrap_or(request.priority);
        self.peers.peer(peer).map_or(self.config.progress, |peer| peer.patience(priority, &self.config))
    }

    /// What a peer owes that is alive and busy with the rest is worth waiting for, but not for ever: a prefetch because nobody
    /// waits for it, and any piece from its home because the next one would read the registry once more.
    fn is_only_slow(&self, now: Time, peer: PeerId, request: &Request) -> bool {
        let patience = self.patience(peer, request);
        let alive = self.peers.peer(peer).is_some_and(|peer| peer.was_alive(now, patience));
        let patient = request.priority == Priority::Prefetch || matches!(request.source, Source::Home(_));
        patient && request.stalls < MAX_SLOW && alive
    }

    fn hedge(&mut self, item: Item, source: Source) {
        let Some(flight) = self.flights.at_mut(item) else { return };
        if let Source::Home(home) = source {
            flight.refused.insert(home);
        }
        if !flight.wants.is_empty() && flight.requests.len() < MAX_REQUESTS {
            self.seek(item);
        }
    }

    /// Closes a request without its pieces, which look further.
    pub(crate) fn give_up(&mut self, now: Time, id: RequestId, why: Why) {
        let Some(request) = self.close(now, id) else { return };
        let bytes = self.bytes(request.blob, &request.pieces);
        self.give_back_refused(now, request.lane(), request.peer(), why, bytes);
        for &piece in &request.pieces {
            self.look_further(now, id, Item { blob: request.blob, piece }, request.source, why);
        }
    }

    /// Stops a request that nobody needs.
    pub(crate) fn cancel(&mut self, now: Time, id: RequestId) {
        if self.close(now, id).is_some() {
            self.actions.push_back(Action::Cancel { request: id });
        }
    }

    /// A request need not bring this piece any more; it is stopped if that was its last.
    pub(crate) fn release(&mut self, now: Time, id: RequestId, piece: u32) {
        let Some(request) = self.requests.at(id).filter(|request| request.pieces.contains(&piece)) else { return };
        if request.pieces.len() == 1 {
            return self.cancel(now, id);
        }
        let (peer, lane, bytes) = (request.peer(), request.lane(), self.bytes(request.blob, &[piece]));
        self.requests.take(id, piece);
        self.inflow.unload(lane, bytes);
        self.unload(now, peer, 1, bytes);
    }

    fn close(&mut self, now: Time, id: RequestId) -> Option<Request> {
        let request = self.requests.close(id)?;
        self.timers.cancel(Timer::Request(id));
        let bytes = self.bytes(request.blob, &request.pieces);
        self.inflow.unload(request.lane(), bytes);
        self.unload(now, request.peer(), request.pieces.len() as u32, bytes);
        Some(request)
    }

    fn unload(&mut self, now: Time, peer: Option<PeerId>, pieces: u32, bytes: u64) {
        let Some((id, slot)) = peer.and_then(|peer| Some((peer, self.peers.slot(peer)?))) else { return };
        let given_up = self.peers.modify(now, &self.config, slot, |peer| {
            peer.unload(pieces, bytes);
            peer.in_flight == 0 && peer.is_suspect()
        });
        self.peers.mark(slot);
        if given_up == Some(true) {
            // Nothing is left that could clear it of suspicion.
            self.fail_peer(now, id);
        }
    }

    /// One try of a flight is over without the piece.
    fn look_further(&mut self, now: Time, id: RequestId, item: Item, source: Source, why: Why) {
        let failures = self.flights.at(item).map_or(0, |flight| flight.registry_failures) + 1;
        let later = now + self.jittered(failures);
        let patience = self.config.home_patience;
        let Some(flight) = self.flights.at_mut(item) else { return };
        flight.requests.retain(|&request| request != id);
        flight.tried(source, why);
        match (source, why) {
            (_, Why::Store) | (Source::Peer(_), _) => {}
            (Source::Home(home), Why::Busy) => {
                let since = *flight.busy_since.get_or_insert(now);
                if flight.priority() == Priority::OnDemand && since + patience <= now {
                    flight.refused.insert(home);
                }
            }
            // It may be back when its back-off is over, or never: that is then known of the peer.
            (Source::Home(_), Why::Stalled | Why::Transport | Why::EndedEarly)
                if flight.priority() == Priority::Prefetch => {}
            (Source::Home(home), _) => _ = flight.refused.insert(home),
            (Source::Registry, Why::RegistryRefused) => flight.registry_refused = true,
            (Source::Registry, _) => {
                flight.registry_failures = failures;
                flight.not_before = later;
                flight.busy_since = None;
                flight.refused.clear();
                flight.suggested.clear();
            }
        }
        if flight.wants.is_empty() {
            return self.drop_if_over(item);
        }
        if why == Why::Store {
            flight.registry_failures = failures;
            return self.timers.set(Timer::Retry(item), later);
        }
        let others = flight.requests.clone();
        if others.iter().all(|&other| self.requests.at(other).is_some_and(|request| request.stalls > 0)) {
            self.seek(item);
        }
    }
}
