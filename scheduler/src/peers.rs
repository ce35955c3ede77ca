//! What is known of each connected peer: how near, how busy, how fast, how reliable; and who can be asked next.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use foldhash::fast::FixedState;
use shoal_proto::{PeerId, Priority};

use crate::{
    BlobKey, Config, Item, Time,
    allowance::{Allowance, Rates},
    blobs::Reach,
};

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
    /// What it may still be asked for within the limit of each peer, if there is one.
    pub(crate) download: Option<Box<Allowance>>,
    /// When prefetch, and on-demand, may be asked of it again within that limit.
    download_opens: [Time; 2],
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
        self.download.as_ref().map_or(u64::MAX, |download| download.share(priority))
    }

    /// Limits what it may be asked for.
    pub(crate) fn limit(&mut self, now: Time, rates: Rates) {
        if rates == Rates::default() {
            self.download = None;
        } else {
            self.download.get_or_insert_with(|| Box::new(Allowance::new(now, rates))).set(now, rates);
        }
    }

    /// Takes note of what it may be asked for now. Gives the next time at which more may be, if something has to wait.
    pub(crate) fn poll_download(&mut self, now: Time) -> Option<Time> {
        let mut poll = |priority| self.download.as_mut()?.poll(now, priority).err();
        let polled = [poll(Priority::Prefetch), poll(Priority::OnDemand)];
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

    /// Expected milliseconds until a further megabyte would be here, on a scale of eight steps for each doubling: it changes
    /// with every piece, and peers that differ by less are as good as each other.
    fn cost(&self) -> u16 {
        let millis = self.queued.saturating_add(1 << 20).saturating_mul(1000) / self.rate.max(1);
        match millis.checked_ilog2() {
            Some(doublings @ 3..) => (doublings << 3 | (millis >> (doublings - 3) & 7) as u32) as u16,
            _ => millis as u16,
        }
    }
}

/// Order in which peers are tried: near first, then least time to wait, then by chance.
type Place = (u8, u16, u32, Slot);

/// Where a peer stands.
#[derive(Debug, Clone, Copy, Default)]
struct Standing {
    place: Place,
    /// Whether it has room, for a prefetch and for an on-demand piece.
    ready: [bool; 2],
    /// Whether something may wait for it.
    marked: [bool; 2],
}

/// The connected peers. They are few enough to be kept in one sorted list, which is walked and moved in less time than a tree
/// is searched: 1,000 peers are 12 KiB.
#[derive(Debug)]
pub(crate) struct Peers {
    index: HashMap<PeerId, Slot, FixedState>,
    slots: Vec<Option<Peer>>,
    free: BTreeSet<Slot>,
    /// How many are in this node's zone.
    own_zone: u32,
    /// In the order in which they are tried.
    order: Vec<Place>,
    /// By slot.
    standing: Vec<Standing>,
    /// How many are both ready and marked.
    waited_for: [u32; 2],
}

impl Peers {
    /// Nobody yet. The seed keeps strangers from choosing ids that lie in one place of the table.
    pub(crate) fn new(seed: u64) -> Self {
        Self {
            index: HashMap::with_hasher(FixedState::with_seed(seed)),
            slots: Vec::new(),
            free: BTreeSet::new(),
            own_zone: 0,
            order: Vec::new(),
            standing: Vec::new(),
            waited_for: [0; 2],
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// How many may be asked for what they have.
    pub(crate) fn within(&self, reach: Reach) -> usize {
        match reach {
            Reach::All => self.index.len(),
            Reach::Zone => self.own_zone as usize,
        }
    }

    /// All of them.
    pub(crate) fn slots(&self) -> Vec<Slot> {
        (0..).zip(&self.slots).filter(|(_, peer)| peer.is_some()).map(|(slot, _)| slot).collect()
    }

    pub(crate) fn slot(&self, peer: PeerId) -> Option<Slot> {
        self.index.get(&peer).copied()
    }

    pub(crate) fn at(&self, slot: Slot) -> Option<&Peer> {
        self.slots.get(slot as usize)?.as_ref()
    }

    /// A peer with its slot.
    pub(crate) fn find(&self, peer: PeerId) -> Option<(Slot, &Peer)> {
        let slot = self.slot(peer)?;
        Some((slot, self.at(slot)?))
    }

    /// Those with room, in the order in which they should be asked.
    pub(crate) fn ready(&self, priority: Priority) -> impl Iterator<Item = Slot> + '_ {
        let slots = self.order.iter().map(|&(.., slot)| slot);
        slots.filter(move |&slot| self.standing[slot as usize].ready[priority as usize])
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
            self.standing.push(Standing::default());
        }
        let place = (tier, 0, salt, slot);
        self.standing[slot as usize] = Standing { place, ..Standing::default() };
        let at = self.order.partition_point(|other| *other < place);
        self.order.insert(at, place);
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
            download: None,
            download_opens: [Time::ZERO; 2],
        });
        self.index.insert(id, slot);
        self.own_zone += u32::from(own_zone);
        self.modify(now, config, slot, |peer| peer.limit(now, config.limits.download_per_peer));
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
        self.stand(slot, |standing| standing.ready = [false; 2]);
        let place = self.standing[slot as usize].place;
        if let Ok(at) = self.order.binary_search(&place) {
            self.order.remove(at);
        }
        let gone = self.slots[slot as usize].take();
        self.own_zone -= u32::from(gone.is_some_and(|peer| peer.own_zone));
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
        self.stand(slot, |standing| standing.ready = ready);
        let old = std::mem::replace(&mut self.standing[slot as usize].place, place);
        if old != place
            && let Ok(from) = self.order.binary_search(&old)
        {
            let to = self.order.partition_point(|other| *other < place);
            self.order[from] = place;
            if from < to {
                self.order[from..to].rotate_left(1);
            } else {
                self.order[to..=from].rotate_right(1);
            }
        }
        Some(result)
    }

    /// Changes the standing of a peer, and who is waited for with it.
    fn stand(&mut self, slot: Slot, change: impl FnOnce(&mut Standing)) {
        let Some(standing) = self.standing.get_mut(slot as usize) else { return };
        let counts =
            |standing: &Standing| [0, 1].map(|class| u32::from(standing.ready[class] && standing.marked[class]));
        let before = counts(standing);
        change(standing);
        let after = counts(standing);
        for class in [0, 1] {
            self.waited_for[class] = self.waited_for[class] + after[class] - before[class];
        }
    }

    /// Something may wait for this peer: it comes up in [`next_marked`](Self::next_marked) once it has room.
    pub(crate) fn mark(&mut self, slot: Slot) {
        self.stand(slot, |standing| standing.marked = [true; 2]);
    }

    /// Something may wait for any of them.
    pub(crate) fn mark_all(&mut self) {
        (0..self.slots.len() as Slot).for_each(|slot| self.mark(slot));
    }

    /// Nothing of this priority waits for this peer.
    pub(crate) fn unmark(&mut self, slot: Slot, priority: Priority) {
        self.stand(slot, |standing| standing.marked[priority as usize] = false);
    }

    /// Of the peers with room for which something may wait, the one to ask first.
    pub(crate) fn next_marked(&self, priority: Priority) -> Option<Slot> {
        if self.waited_for[priority as usize] == 0 {
            return None;
        }
        self.ready(priority).find(|&slot| self.standing[slot as usize].marked[priority as usize])
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
        let mut peers = Peers::new(0);
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
        assert_eq!([Reach::All, Reach::Zone].map(|reach| peers.within(reach)), [2, 2]);
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
