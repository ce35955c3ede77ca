//! Who comes and goes: connections, announcements, leases, and peers that we would like to be connected to.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use shoal_proto::{Bitfield, PeerId};

use crate::{
    Action, BlobKey, Item, Source, Time, Why,
    blobs::{Piece, Reach},
    flights::Gate,
    homes::{Lease, rank},
    peers::{self, Slot},
    scheduler::{Scheduler, random},
    timer::Timer,
};

/// Peers that we wait to be connected to, or could not reach, at a time.
const MAX_DIALS: usize = 256;
/// Pieces that an unconnected peer is said to have.
const MAX_RUMOURS: usize = 64;

/// A connection that is wished for.
#[derive(Debug, Default)]
struct Dial {
    waiting: bool,
    failures: u32,
    unreachable_until: Time,
    /// What the peer has, according to others.
    rumours: BTreeSet<Item>,
}

/// The connections that are wished for.
#[derive(Debug, Default)]
pub(crate) struct Dials(BTreeMap<PeerId, Dial>);

impl Scheduler {
    pub(crate) fn peer_up(&mut self, now: Time, peer: PeerId, zone: &str, labels: &BTreeMap<String, String>) {
        if peer == self.config.me {
            return;
        }
        if self.peers.slot(peer).is_some() {
            self.peer_down(now, peer);
        }
        if self.peers.len() >= self.config.max_peers {
            return;
        }
        let tier = peers::tier(&self.config, zone, labels);
        let salt = random(&mut self.rng, u32::MAX);
        let own_zone = zone == self.config.zone;
        let slot = self.peers.insert(now, &self.config, peer, tier, own_zone, salt);
        if let Some(&until) = self.banned.get(&peer) {
            self.close_peer(now, slot, until);
        }
        self.timers.cancel(Timer::Dial(peer));
        let dial = self.dials.0.remove(&peer).unwrap_or_default();
        dial.rumours.into_iter().for_each(|item| self.rumour(now, peer, item));
        self.peers.mark(slot);
    }

    pub(crate) fn peer_down(&mut self, now: Time, peer: PeerId) {
        let Some(slot) = self.peers.slot(peer) else { return };
        for request in self.requests.of_peer(slot) {
            self.give_up(now, request, Why::Transport);
        }
        let mut spoke = false;
        for blob in self.blobs.iter_mut() {
            spoke |= blob.have(slot).is_some();
            blob.forget(slot);
        }
        self.peers.remove(peer);
        self.timers.cancel(Timer::PeerDownload(peer));
        self.requeue_home(peer);
        self.nodes_changed(spoke);
    }

    pub(crate) fn peer_have(&mut self, peer: PeerId, key: BlobKey, first: u32, have: &Bitfield, full: bool) {
        let Some((slot, own_zone)) = self.peers.find(peer).map(|(slot, peer)| (slot, peer.own_zone)) else { return };
        if self.banned.contains_key(&peer) {
            return;
        }
        let Some(blob) = self.blobs.get_mut(key) else { return };
        let first_word = blob.have(slot).is_none();
        blob.learn(slot, own_zone, first, have, full);
        let pieces = have.iter().filter_map(|piece| first.checked_add(piece));
        self.peers.announced(slot, pieces.map(|piece| Item { blob: key, piece }));
        if blob.is_waiting() {
            self.peers.mark(slot);
        }
        self.nodes_changed(first_word);
    }

    /// Somebody else says that this peer has a piece.
    pub(crate) fn rumour(&mut self, now: Time, peer: PeerId, item: Item) {
        if peer == self.config.me || self.banned.contains_key(&peer) {
            return;
        }
        if let Some((slot, known)) = self.peers.find(peer) {
            let (denies, own_zone) = (known.denies(item), known.own_zone);
            if let Some(blob) = self.blobs.get_mut(item.blob).filter(|_| !denies) {
                blob.learn(slot, own_zone, item.piece, &Bitfield::full(1), false);
                self.peers.mark(slot);
            }
        } else if self.peers.within(self.reach) < self.config.enough_peers
            && self.dial(now, peer)
            && let Some(dial) = self.dials.0.get_mut(&peer)
            && dial.rumours.len() < MAX_RUMOURS
        {
            dial.rumours.insert(item);
        }
    }

    /// Whether a peer that is not connected may be waited for; asks for the connection.
    pub(crate) fn dial(&mut self, now: Time, peer: PeerId) -> bool {
        if self.dials.0.len() >= MAX_DIALS && !self.dials.0.contains_key(&peer) {
            let idle = |dial: &Dial| !dial.waiting && dial.unreachable_until <= now;
            let Some(old) = self.dials.0.iter().find(|(_, dial)| idle(dial)).map(|(&old, _)| old) else {
                return false;
            };
            self.dials.0.remove(&old);
        }
        let dial = self.dials.0.entry(peer).or_default();
        if !dial.waiting {
            if dial.unreachable_until > now {
                return false;
            }
            dial.waiting = true;
            self.timers.set(Timer::Dial(peer), now + self.config.connect_timeout);
            self.actions.push_back(Action::Connect { peer });
        }
        true
    }

    pub(crate) fn dial_timeout(&mut self, now: Time, peer: PeerId) {
        let Some(failures) = self.dials.0.get_mut(&peer).map(|dial| {
            dial.waiting = false;
            dial.failures += 1;
            dial.rumours.clear();
            dial.failures
        }) else {
            return;
        };
        let until = now + self.jittered(failures);
        if let Some(dial) = self.dials.0.get_mut(&peer) {
            dial.unreachable_until = until;
        }
        for piece in self.queues.items(Gate::Home(peer)) {
            if let Some(flight) = self.flights.at_mut(piece) {
                flight.tried(Source::Home(peer), Why::Unreachable);
            }
            self.seek(piece);
        }
    }

    pub(crate) fn lease(&mut self, now: Time, peer: PeerId, zone: String, capacity: u64, until: Time) {
        if until <= now {
            return self.lease_ended(peer);
        }
        if let Some(changed) = self.homes.renew(peer, Lease { zone, capacity, until }) {
            self.timers.set(Timer::Lease(peer), until);
            if changed {
                self.replace_all();
            }
        }
    }

    pub(crate) fn lease_ended(&mut self, peer: PeerId) {
        self.timers.cancel(Timer::Lease(peer));
        if self.homes.end(peer) {
            self.replace_all();
        }
    }

    /// Whom this node may ask for what they have, as the leases are.
    fn reach_of_zone(&self) -> Reach {
        let mut seeds = self.homes.of_zone(&self.config.zone).map(|(seed, _)| seed).peekable();
        if seeds.peek().is_none() || seeds.any(|seed| seed == self.config.me) { Reach::All } else { Reach::Zone }
    }

    /// Without seed peers the nodes are the homes, so what they say of a blob changes the order of homes.
    fn nodes_changed(&mut self, changed: bool) {
        if changed && self.homes.of_zone(&self.config.zone).next().is_none() {
            self.homes.epoch += 1;
        }
    }

    /// The leases have changed.
    fn replace_all(&mut self) {
        let reach = self.reach_of_zone();
        if std::mem::replace(&mut self.reach, reach) != reach {
            self.blobs.iter_mut().for_each(|blob| blob.set_reach(reach));
            self.peers.mark_all();
        }
        self.queues.all().into_iter().for_each(|piece| self.seek(piece));
    }

    /// The homes of a piece, best first.
    pub(crate) fn ranking(&mut self, piece: Piece) -> Option<Arc<[PeerId]>> {
        let (stripe_bytes, epoch) = (self.config.stripe, self.homes.epoch);
        let blob = self.blobs.at_mut(piece.blob)?;
        let (stripe, _) = blob.stripe(piece.piece, stripe_bytes)?;
        if blob.ranking_epoch != epoch {
            blob.ranking.clear();
            blob.ranking_epoch = epoch;
        }
        if let Some(known) = blob.ranking.get(&stripe) {
            return Some(known.clone());
        }
        let ranking: Arc<[PeerId]> = self.compute_ranking(piece)?.into();
        self.blobs.at_mut(piece.blob)?.ranking.insert(stripe, ranking.clone());
        Some(ranking)
    }

    /// The zone's live seed peers in the order of a hash of `id` and their capacities, the best eight at most: who keeps what is
    /// no blob, for nodes that agree about the leases.
    pub fn keepers(&self, id: &[u8; 32]) -> Vec<PeerId> {
        rank(id, 0, self.homes.of_zone(&self.config.zone))
    }

    pub(crate) fn compute_ranking(&self, piece: Piece) -> Option<Vec<PeerId>> {
        let (blob, key) = (self.blobs.at(piece.blob)?, self.blobs.item(piece)?.blob);
        let (stripe, _) = blob.stripe(piece.piece, self.config.stripe)?;
        let seeds = rank(&key.id, stripe, self.homes.of_zone(&self.config.zone));
        if !seeds.is_empty() {
            return Some(seeds);
        }
        let speakers = blob.speakers().filter_map(|slot| self.peers.at(slot)).filter(|peer| peer.own_zone);
        let nodes = speakers.map(|peer| peer.id).chain([self.config.me]);
        Some(rank(&key.id, stripe, nodes.map(|peer| (peer, 1))))
    }

    /// No request goes to the peer before `until`.
    pub(crate) fn close_peer(&mut self, now: Time, slot: Slot, until: Time) {
        self.peers.modify(now, &self.config, slot, |peer| peer.closed_until = peer.closed_until.max(until));
        self.openings.set(until, slot);
    }

    /// The peer failed: it is left alone for a while, longer each time.
    pub(crate) fn fail_peer(&mut self, now: Time, slot: Slot) {
        let Some((peer, failures)) = self.peers.modify(now, &self.config, slot, |peer| (peer.id, peer.failed()))
        else {
            return;
        };
        let until = now + self.jittered(failures);
        self.close_peer(now, slot, until);
        self.requeue_home(peer);
    }

    /// What queues at this home is to look for another.
    pub(crate) fn requeue_home(&mut self, peer: PeerId) {
        self.queues.items(Gate::Home(peer)).into_iter().for_each(|piece| self.seek(piece));
    }

    pub(crate) fn peer_reopened(&mut self, now: Time, slot: Slot) {
        self.peers.modify(now, &self.config, slot, |_| ());
        self.peers.mark(slot);
    }
}
