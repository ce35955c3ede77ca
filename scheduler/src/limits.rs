//! The limits that this node keeps when it asks: a request begins when there is an allowance for what it will bring, so
//! nothing that is under way waits for a limit, and no source looks slow because of one.
//!
//! What was asked for is charged at once, and given back where the answer is that nothing comes. What breaks off half-way,
//! or is cancelled, stays charged: it may have come.

use shoal_proto::{PeerId, Priority};
use smallvec::SmallVec;

use crate::{
    Time, Why,
    allowance::{Allowance, Rates, Waits},
    blobs::Piece,
    flights::MAX_REQUESTS,
    inflow::Lane,
    peer::Peer,
    peers::Slot,
    scheduler::Scheduler,
    timer::Timer,
};

/// What this node may take in; see [`Event::Limits`](crate::Event::Limits).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes from peers. Default none.
    pub download: Rates,
    /// Bytes from each of them. Default none.
    pub download_per_peer: Rates,
    /// Bytes from the registry. Default none.
    pub registry: Rates,
    /// Reads of the registry that begin. Default none.
    pub registry_requests: Rates,
    /// Requests under way at the registry. Default 8.
    pub registry_slots: u32,
    /// Of these, kept for on-demand. Default 2.
    pub registry_reserve: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let none = Rates::default();
        Self {
            download: none,
            download_per_peer: none,
            registry: none,
            registry_requests: none,
            registry_slots: 8,
            registry_reserve: 2,
        }
    }
}

/// What had to wait for each of the [`Limits`] that are rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimitWaits {
    /// Bytes from peers.
    pub download: Waits,
    /// Bytes from the registry.
    pub registry: Waits,
    /// Reads of the registry.
    pub registry_requests: Waits,
}

/// What may still be asked for.
#[derive(Debug)]
pub(crate) struct Allowances {
    download: Allowance,
    registry: Allowance,
    registry_requests: Allowance,
}

impl Allowances {
    pub(crate) fn new(now: Time, limits: &Limits) -> Self {
        Self {
            download: Allowance::new(now, limits.download),
            registry: Allowance::new(now, limits.registry),
            registry_requests: Allowance::new(now, limits.registry_requests),
        }
    }

    /// How much to ask for at a time.
    pub(crate) fn share(&self, lane: Lane) -> u64 {
        match lane {
            Lane::Peers(priority) => self.download.share(priority),
            Lane::Registry(priority) => self.registry.share(priority),
        }
    }

    fn bytes(&mut self, lane: Lane) -> (&mut Allowance, Priority) {
        match lane {
            Lane::Peers(priority) => (&mut self.download, priority),
            Lane::Registry(priority) => (&mut self.registry, priority),
        }
    }

    /// Charges bytes that are asked for, or that came beyond those.
    pub(crate) fn charge(&mut self, now: Time, lane: Lane, bytes: u64) {
        let (allowance, priority) = self.bytes(lane);
        allowance.take(now, bytes, priority);
    }

    /// Charges a read of the registry beside its bytes.
    pub(crate) fn charge_read(&mut self, now: Time, priority: Priority) {
        self.registry_requests.take(now, 1, priority);
    }

    /// Bytes that were charged do not come.
    pub(crate) fn give_back(&mut self, now: Time, lane: Lane, bytes: u64) {
        let (allowance, priority) = self.bytes(lane);
        allowance.give_back(now, bytes, priority);
    }
}

impl Scheduler {
    /// What had to wait for a limit so far.
    pub fn waits(&self) -> LimitWaits {
        let Allowances { download, registry, registry_requests } = &self.allowances;
        LimitWaits {
            download: download.waits(),
            registry: registry.waits(),
            registry_requests: registry_requests.waits(),
        }
    }

    /// Keeps other limits from now on; what is under way is not touched.
    pub(crate) fn set_limits(&mut self, now: Time, limits: Limits) {
        let Allowances { download, registry, registry_requests } = &mut self.allowances;
        download.set(now, limits.download);
        registry.set(now, limits.registry);
        registry_requests.set(now, limits.registry_requests);
        let per_peer = self.config.limits.download_per_peer != limits.download_per_peer;
        self.config.limits = limits;
        if per_peer {
            for slot in self.peers.slots() {
                self.change_download(now, slot, |peer| peer.limit(now, limits.download_per_peer));
                self.peers.mark(slot);
            }
        }
    }

    /// Charges a peer for what it is asked for. It has no more room while that is more than it may send.
    pub(crate) fn charge_peer(&mut self, now: Time, slot: Slot, bytes: u64, priority: Priority) {
        if self.peers.at(slot).is_some_and(|peer| peer.download.is_some()) {
            self.change_download(now, slot, |peer| {
                peer.download.iter_mut().for_each(|download| download.take(now, bytes, priority));
            });
        }
    }

    /// A peer may be asked for more.
    pub(crate) fn peer_download_eased(&mut self, now: Time, peer: PeerId) {
        if let Some(slot) = self.peers.slot(peer) {
            self.change_download(now, slot, |_| ());
            self.peers.mark(slot);
        }
    }

    fn change_download(&mut self, now: Time, slot: Slot, change: impl FnOnce(&mut Peer)) {
        let changed = self.peers.modify(now, &self.config, slot, |peer| {
            change(peer);
            (peer.id, peer.poll_download(now))
        });
        if let Some((peer, Some(at))) = changed {
            self.timers.set(Timer::PeerDownload(peer), at);
        }
    }

    /// Whether a peer may be asked for something that waits; if a limit is what forbids it, it is looked at again when that
    /// does no more.
    pub(crate) fn may_ask(&mut self, now: Time, priority: Priority) -> bool {
        let at = self.allowances.download.poll(now, priority);
        if let Err(at) = at {
            self.timers.set(Timer::Download(priority), at);
        }
        at.is_ok()
    }

    /// Whether the registry may be read for something that waits; otherwise it is looked at again when it may.
    pub(crate) fn may_read(&mut self, now: Time, priority: Priority) -> bool {
        let polled = [&mut self.allowances.registry, &mut self.allowances.registry_requests]
            .map(|allowance| allowance.poll(now, priority));
        let waits = polled.into_iter().filter_map(Result::err).chain([self.registry_closed_until]);
        let at = waits.max().filter(|&at| at > now);
        if let Some(at) = at {
            self.timers.set(Timer::Registry, at);
        }
        at.is_none()
    }

    /// Who answers like this sends nothing.
    pub(crate) fn give_back_refused(&mut self, now: Time, lane: Lane, peer: Option<Slot>, why: Why, bytes: u64) {
        let refused = matches!(
            why,
            Why::NotHave
                | Why::Busy
                | Why::NotMyHome
                | Why::CannotSource
                | Why::EndedEarly
                | Why::Registry
                | Why::RegistryRefused
        );
        if refused {
            self.give_back(now, lane, peer, bytes);
        }
    }

    fn give_back(&mut self, now: Time, lane: Lane, peer: Option<Slot>, bytes: u64) {
        self.allowances.give_back(now, lane, bytes);
        if let Some((slot, Lane::Peers(priority))) = peer.map(|slot| (slot, lane))
            && self.peers.at(slot).is_some_and(|peer| peer.download.is_some())
        {
            self.change_download(now, slot, |peer| {
                peer.download.iter_mut().for_each(|download| download.give_back(now, bytes, priority));
            });
        }
    }

    /// The piece turned up here: what was asked for it does not come.
    pub(crate) fn give_back_found(&mut self, now: Time, piece: Piece) {
        let size = self.blobs.size(piece);
        let Some(flight) = self.flights.at(piece) else { return };
        let requests = flight.requests.iter().filter_map(|&id| self.requests.at(id));
        let owing = requests.filter(|request| request.owes(piece));
        let owing: SmallVec<[_; MAX_REQUESTS]> = owing.map(|request| (request.lane(), request.peer())).collect();
        for (lane, peer) in owing {
            self.give_back(now, lane, peer, size);
        }
    }
}
