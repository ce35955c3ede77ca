//! What is known of each connected peer: how near, how busy, how fast, how reliable; and who can be asked next.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use shoal_proto::{PeerId, Priority};

use crate::{BlobKey, Config, Item, Time, allowance::Allowance};

/// A connected peer's place in the table; used again after it has gone.
pub(crate) type Slot = u32;

/// Most pieces of one peer remembered as denied; beyond, the lowest are forgotten and may be asked for once more.
const MAX_DENIED: usize = 4096;
/// Pieces in a row that a peer was said to have and did not, after which it is left alone for a while like one that failed.
const MAX_BROKEN: u32 = 32;
/// Parts of a piece that allowances are counted in.
const QUARTERS: u32 = 4;
/// Rate assumed before anything was measured, bytes per second: a gigabit.
const FIRST_RATE: u64 = 125_000_000;

/// One connected peer.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) id: PeerId,
    /// Whether it is in this node's zone.
    pub(crate) own_zone: bool,
    /// 0 is nearest.
    tier: u8,
    /// Random, so that not all nodes prefer the same of several equal peers.
    salt: u32,
    /// Pieces in flight at it.
    pub(crate) in_flight: u32,
    /// Encoded bytes of them.
    queued: u64,
    /// Prefetches that it may be asked for at a time, in quarters: a refusal halves what it had, a delivery adds one.
    /// Asked for all that a window allows, who is busy would refuse most of it, again and again.
    allowance: u32,
    /// Bytes per second, smoothed.
    rate: u64,
    /// Typical time between signs of life while it owes something, smoothed.
    gap: Duration,
    last_sign: Time,
    last_delivery: Time,
    failures: u32,
    /// Pieces that it was said to have and did not, since it last delivered one.
    broken: u32,
    /// Not asked before.
    pub(crate) closed_until: Time,
    /// Owes a sign of life; not asked until it gives one.
    suspect: bool,
    denied: BTreeSet<Item>,
    cannot_source: BTreeMap<BlobKey, Time>,
    /// What it may still be asked for within the limit of each peer.
    download: Allowance,
    /// When prefetch, and on-demand, may be asked of it again within that limit.
    download_opens: [Time; 2],
    /// Whether something may wait for it, prefetch and on-demand.
    marked: [bool; 2],
    /// Whether it is among those with room.
    ready: [bool; 2],
}

impl Peer {
    /// How many more pieces of this priority it can take now.
    pub(crate) fn room(&self, now: Time, priority: Priority, config: &Config) -> u32 {
        if self.suspect || self.closed_until > now || self.download_opens[priority as usize] > now {
            return 0;
        }
        let window = self.window(priority, config);
        match priority {
            Priority::OnDemand => window,
            Priority::Prefetch => window.min((self.allowance / QUARTERS).max(1).saturating_sub(self.in_flight)),
        }
    }

    /// The same as far as its window goes, whatever it refused of late.
    pub(crate) fn window(&self, priority: Priority, config: &Config) -> u32 {
        let limit = match priority {
            Priority::OnDemand => config.peer_window,
            Priority::Prefetch => config.peer_window.saturating_sub(config.peer_reserve),
        };
        limit.max(1).saturating_sub(self.in_flight)
    }

    /// How much of it to ask for at a time.
    pub(crate) fn share(&self, priority: Priority) -> u64 {
        self.download.share(priority)
    }

    /// Changes what it may still be asked for. Gives the next time at which more may be, if something has to wait now.
    pub(crate) fn change_download(&mut self, now: Time, change: impl FnOnce(&mut Allowance)) -> Option<Time> {
        change(&mut self.download);
        let polled = [Priority::Prefetch, Priority::OnDemand].map(|priority| self.download.poll(now, priority).err());
        self.download_opens = polled.map(|at| at.unwrap_or(Time::ZERO));
        polled.into_iter().flatten().min()
    }

    /// Whether it said that it does not have the piece, and not otherwise since.
    pub(crate) fn denies(&self, item: Item) -> bool {
        self.denied.contains(&item)
    }

    pub(crate) fn deny(&mut self, item: Item) {
        if self.denied.len() >= MAX_DENIED {
            self.denied.pop_first();
        }
        self.denied.insert(item);
    }

    /// It does not have a piece that it was said to have. True when that has happened too often: whoever says again and again
    /// that it has everything, and has nothing, would be asked each time before those that have it.
    pub(crate) fn broke_promise(&mut self) -> bool {
        self.broken += 1;
        self.broken.is_multiple_of(MAX_BROKEN)
    }

    pub(crate) fn cannot_source(&mut self, blob: BlobKey, until: Time) {
        if self.cannot_source.len() >= MAX_DENIED {
            self.cannot_source.pop_first();
        }
        self.cannot_source.insert(blob, until);
    }

    pub(crate) fn may_source(&self, blob: BlobKey, now: Time) -> bool {
        self.cannot_source.get(&blob).is_none_or(|&until| until <= now)
    }

    /// How long it may be silent.
    pub(crate) fn patience(&self, priority: Priority, config: &Config) -> Duration {
        let least = match priority {
            Priority::OnDemand => config.progress,
            Priority::Prefetch => config.prefetch_progress,
        };
        (self.gap * 4).clamp(least, config.max_progress.max(least))
    }

    /// Whether it gave a sign of life within this time.
    pub(crate) fn was_alive(&self, now: Time, within: Duration) -> bool {
        now.since(self.last_sign) < within
    }

    /// Takes in more pieces.
    pub(crate) fn load(&mut self, now: Time, pieces: u32, bytes: u64) {
        if self.in_flight == 0 {
            self.last_sign = now;
            self.last_delivery = now;
        }
        self.in_flight += pieces;
        self.queued += bytes;
    }

    /// Pieces left its hands, one way or another.
    pub(crate) fn unload(&mut self, pieces: u32, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(pieces);
        self.queued = self.queued.saturating_sub(bytes);
    }

    /// It gave a sign of life.
    pub(crate) fn sign(&mut self, now: Time) {
        self.gap = (self.gap * 7 + now.since(self.last_sign)) / 8;
        self.last_sign = now;
        self.suspect = false;
    }

    /// It refused a request.
    pub(crate) fn refused(&mut self) {
        self.allowance = self.allowance.min(self.in_flight * QUARTERS) / 2;
    }

    /// It delivered.
    pub(crate) fn delivered(&mut self, now: Time, bytes: u64) {
        self.allowance = self.allowance.saturating_add(1);
        let nanos = u64::try_from(now.since(self.last_delivery).as_nanos()).unwrap_or(u64::MAX).max(1000);
        self.last_delivery = now;
        let rate = bytes.saturating_mul(1_000_000_000) / nanos;
        self.rate = (self.rate - self.rate / 8 + rate / 8).max(1);
        self.failures = 0;
        self.broken = 0;
        self.sign(now);
    }

    /// It failed; returns how many times in a row.
    pub(crate) fn failed(&mut self) -> u32 {
        self.failures += 1;
        self.suspect = false;
        self.failures
    }

    pub(crate) fn suspect(&mut self) {
        self.suspect = true;
    }

    pub(crate) fn is_suspect(&self) -> bool {
        self.suspect
    }

    /// How often it failed in a row, while it is left alone for that.
    pub(crate) fn failures(&self, now: Time) -> u32 {
        if self.closed_until > now { self.failures } else { 0 }
    }

    /// Expected milliseconds until a further megabyte would be here.
    fn cost(&self) -> u64 {
        self.queued.saturating_add(1 << 20).saturating_mul(1000) / self.rate.max(1)
    }
}

/// Order in which peers are tried: near first, then least time to wait, then by chance.
type Place = (u8, u64, u32, Slot);

/// The connected peers.
#[derive(Debug, Default)]
pub(crate) struct Peers {
    index: BTreeMap<PeerId, Slot>,
    slots: Vec<Option<Peer>>,
    free: BTreeSet<Slot>,
    /// Those with room for a prefetch, and for an on-demand piece.
    ready: [BTreeSet<Place>; 2],
    /// Those of them for which something may wait.
    marked: [BTreeSet<Place>; 2],
    places: Vec<Place>,
}

impl Peers {
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// All of them.
    pub(crate) fn ids(&self) -> Vec<PeerId> {
        self.index.keys().copied().collect()
    }

    pub(crate) fn slot(&self, peer: PeerId) -> Option<Slot> {
        self.index.get(&peer).copied()
    }

    pub(crate) fn at(&self, slot: Slot) -> Option<&Peer> {
        self.slots.get(slot as usize)?.as_ref()
    }

    pub(crate) fn peer(&self, peer: PeerId) -> Option<&Peer> {
        self.at(self.slot(peer)?)
    }

    /// A peer with its slot.
    pub(crate) fn find(&self, peer: PeerId) -> Option<(Slot, &Peer)> {
        let slot = self.slot(peer)?;
        Some((slot, self.at(slot)?))
    }

    /// Those with room, in the order in which they should be asked.
    pub(crate) fn ready(&self, priority: Priority) -> impl Iterator<Item = Slot> + '_ {
        self.ready[priority as usize].iter().map(|&(.., slot)| slot)
    }

    pub(crate) fn insert(
        &mut self,
        now: Time,
        config: &Config,
        id: PeerId,
        tier: u8,
        own_zone: bool,
        salt: u32,
    ) -> Slot {
        let slot = self.free.pop_first().unwrap_or(self.slots.len() as Slot);
        if slot as usize == self.slots.len() {
            self.slots.push(None);
            self.places.push((0, 0, 0, slot));
        }
        self.slots[slot as usize] = Some(Peer {
            id,
            own_zone,
            tier,
            salt,
            in_flight: 0,
            queued: 0,
            allowance: config.peer_window.saturating_mul(QUARTERS),
            rate: FIRST_RATE,
            gap: Duration::ZERO,
            last_sign: now,
            last_delivery: now,
            failures: 0,
            broken: 0,
            closed_until: Time::ZERO,
            suspect: false,
            denied: BTreeSet::new(),
            cannot_source: BTreeMap::new(),
            download: Allowance::new(now, config.limits.download_per_peer),
            download_opens: [Time::ZERO; 2],
            marked: [false; 2],
            ready: [false; 2],
        });
        self.index.insert(id, slot);
        self.modify(now, config, slot, |_| ());
        slot
    }

    /// The peer has these pieces after all. Its place does not depend on it.
    pub(crate) fn announced(&mut self, slot: Slot, pieces: impl Iterator<Item = Item>) {
        if let Some(peer) = self.slots.get_mut(slot as usize).and_then(Option::as_mut)
            && !peer.denied.is_empty()
        {
            pieces.for_each(|item| _ = peer.denied.remove(&item));
        }
    }

    pub(crate) fn remove(&mut self, peer: PeerId) -> Option<Slot> {
        let slot = self.index.remove(&peer)?;
        self.unplace(slot);
        self.slots[slot as usize] = None;
        self.free.insert(slot);
        Some(slot)
    }

    /// Changes a peer and puts it where it then belongs.
    pub(crate) fn modify<T>(
        &mut self,
        now: Time,
        config: &Config,
        slot: Slot,
        change: impl FnOnce(&mut Peer) -> T,
    ) -> Option<T> {
        let peer = self.slots.get_mut(slot as usize)?.as_mut()?;
        let result = change(peer);
        let place = (peer.tier, peer.cost(), peer.salt, slot);
        let ready = [Priority::Prefetch, Priority::OnDemand].map(|priority| peer.room(now, priority, config) > 0);
        if (place, ready) == (self.places[slot as usize], peer.ready) {
            return Some(result);
        }
        self.unplace(slot);
        self.places[slot as usize] = place;
        let peer = self.slots[slot as usize].as_mut()?;
        peer.ready = ready;
        for class in [0, 1].into_iter().filter(|&class| ready[class]) {
            self.ready[class].insert(place);
            if peer.marked[class] {
                self.marked[class].insert(place);
            }
        }
        Some(result)
    }

    /// Something may wait for this peer: it comes up in [`next_marked`](Self::next_marked) once it has room.
    pub(crate) fn mark(&mut self, slot: Slot) {
        let Some(peer) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) else { return };
        for class in [0, 1] {
            if !std::mem::replace(&mut peer.marked[class], true) && peer.ready[class] {
                self.marked[class].insert(self.places[slot as usize]);
            }
        }
    }

    /// Something may wait for any of them.
    pub(crate) fn mark_all(&mut self) {
        (0..self.slots.len() as Slot).for_each(|slot| self.mark(slot));
    }

    /// Nothing of this priority waits for this peer.
    pub(crate) fn unmark(&mut self, slot: Slot, priority: Priority) {
        if let Some(peer) = self.slots.get_mut(slot as usize).and_then(Option::as_mut) {
            peer.marked[priority as usize] = false;
            self.marked[priority as usize].remove(&self.places[slot as usize]);
        }
    }

    /// Of the peers with room for which something may wait, the one to ask first.
    pub(crate) fn next_marked(&self, priority: Priority) -> Option<Slot> {
        self.marked[priority as usize].first().map(|&(.., slot)| slot)
    }

    fn unplace(&mut self, slot: Slot) {
        let Some(peer) = &self.slots[slot as usize] else { return };
        let place = self.places[slot as usize];
        for class in [0, 1].into_iter().filter(|&class| peer.ready[class]) {
            self.ready[class].remove(&place);
            if peer.marked[class] {
                self.marked[class].remove(&place);
            }
        }
    }
}

/// How near a peer is: the first label in `config.near_labels` on which both agree, then the zone, then the rest.
pub(crate) fn tier(config: &Config, zone: &str, labels: &BTreeMap<String, String>) -> u8 {
    let near = &config.near_labels;
    let agrees = |key: &String| config.labels.get(key).is_some_and(|mine| labels.get(key) == Some(mine));
    let tier = near.iter().position(agrees).unwrap_or(near.len() + usize::from(zone != config.zone));
    u8::try_from(tier).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setup(config: &Config, tiers: &[u8]) -> Peers {
        let mut peers = Peers::default();
        for (at, &tier) in tiers.iter().enumerate() {
            peers.insert(Time::ZERO, config, PeerId::new([at as u8; 32]), tier, true, at as u32);
        }
        peers
    }

    #[test]
    fn near_then_idle_peers_come_first_and_full_ones_not_at_all() {
        let config = Config { peer_window: 2, peer_reserve: 1, ..Config::new(PeerId::new([9; 32]), "a") };
        let mut peers = setup(&config, &[1, 0, 1]);
        let order = |peers: &Peers, priority| peers.ready(priority).collect::<Vec<_>>();
        assert_eq!(order(&peers, Priority::Prefetch), [1, 0, 2]);
        peers.modify(Time::ZERO, &config, 0, |peer| peer.load(Time::ZERO, 1, 1 << 20));
        assert_eq!(order(&peers, Priority::Prefetch), [1, 2], "one piece fills all that is not kept for on-demand");
        assert_eq!(order(&peers, Priority::OnDemand), [1, 2, 0]);
        peers.modify(Time::ZERO, &config, 0, |peer| peer.load(Time::ZERO, 1, 1 << 20));
        assert_eq!(order(&peers, Priority::OnDemand), [1, 2]);
        peers.modify(Time::ZERO, &config, 1, |peer| peer.suspect());
        peers.modify(Time::ZERO, &config, 2, |peer| peer.closed_until = Time::from_nanos(5));
        assert_eq!(order(&peers, Priority::OnDemand), []);
        peers.modify(Time::from_nanos(5), &config, 2, |_| ());
        peers.remove(PeerId::new([1; 32]));
        assert_eq!(order(&peers, Priority::OnDemand), [2]);
        assert_eq!(peers.insert(Time::ZERO, &config, PeerId::new([7; 32]), 0, true, 0), 1, "slots are used again");
    }

    #[test]
    fn measured_rates_decide_between_equals() {
        let config = Config::new(PeerId::new([9; 32]), "a");
        let mut peers = setup(&config, &[0, 0]);
        for (slot, bytes) in [(0, 1 << 10), (1, 1 << 24)] {
            for second in 1..20 {
                let now = Time::ZERO + Duration::from_secs(second);
                peers.modify(now, &config, slot, |peer| peer.delivered(now, bytes));
            }
        }
        assert_eq!(peers.ready(Priority::Prefetch).next(), Some(1));
    }

    #[test]
    fn nearness() {
        let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|&(k, v)| (k.into(), v.into())).collect();
        let mut config = Config::new(PeerId::new([9; 32]), "a");
        config.labels = labels(&[("host", "h1"), ("rack", "r1")]);
        assert_eq!(tier(&config, "a", &labels(&[("host", "h1"), ("rack", "r2")])), 0);
        assert_eq!(tier(&config, "a", &labels(&[("host", "h2"), ("rack", "r1")])), 1);
        assert_eq!(tier(&config, "a", &labels(&[("host", "h2")])), 2);
        assert_eq!(tier(&config, "b", &labels(&[])), 3);
    }
}
