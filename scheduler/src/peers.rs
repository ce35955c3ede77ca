//! The connected peers, and which of them can be asked next.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use foldhash::fast::FixedState;
use shoal_proto::{PeerId, Priority};

use crate::{Config, Item, Time, blobs::Reach, peer::Peer};

/// A connected peer's place in the table; used again after it has gone.
pub(crate) type Slot = u32;

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
        self.slots[slot as usize] = Some(Peer::new(now, config, id, tier, own_zone, salt));
        self.index.insert(id, slot);
        self.own_zone += u32::from(own_zone);
        self.modify(now, config, slot, |peer| peer.limit(now, config.limits.download_per_peer));
        slot
    }

    /// The peer has these pieces after all. Its place does not depend on it.
    pub(crate) fn announced(&mut self, slot: Slot, pieces: impl Iterator<Item = Item>) {
        let peer = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        if let Some(peer) = peer {
            peer.announced(pieces);
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
        let (tier, cost, salt) = peer.order();
        let place = (tier, cost, salt, slot);
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
    use std::time::Duration;

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
