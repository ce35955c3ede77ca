//! Which neighbours are of other zones, and which zones have a seed peer: a zone that has one asks nobody outside
//! ([`shoal_scheduler`]), so it need not hear at once what there is, nor be told of everybody.

use std::collections::BTreeMap;

use shoal_proto::PeerId;

/// Neighbours of other zones that are looked for while this one has a seed peer. They are there for when it has none any more.
pub(super) const FEW_OTHERS: usize = 4;

/// See the module.
#[derive(Debug)]
pub(super) struct Zones {
    own: String,
    /// Neighbours of other zones, with theirs.
    others: BTreeMap<PeerId, String>,
    /// Seed peers whose lease is current, with their zones.
    seeds: BTreeMap<PeerId, String>,
}

impl Zones {
    pub(super) fn new(own: String) -> Self {
        Self { own, others: BTreeMap::new(), seeds: BTreeMap::new() }
    }

    pub(super) fn connected(&mut self, peer: PeerId, zone: &str) {
        if zone == self.own {
            self.others.remove(&peer);
        } else {
            self.others.insert(peer, zone.to_owned());
        }
    }

    pub(super) fn gone(&mut self, peer: PeerId) {
        self.others.remove(&peer);
    }

    /// Leases are as many as the control plane lets in.
    pub(super) fn lease(&mut self, peer: PeerId, zone: &str) {
        self.seeds.insert(peer, zone.to_owned());
    }

    pub(super) fn lease_ended(&mut self, peer: PeerId) {
        self.seeds.remove(&peer);
    }

    /// Whether a neighbour is of another zone.
    pub(super) fn is_other(&self, peer: PeerId) -> bool {
        self.others.contains_key(&peer)
    }

    /// Whether two neighbours are of the same zone.
    pub(super) fn are_together(&self, a: PeerId, b: PeerId) -> bool {
        self.others.get(&a) == self.others.get(&b)
    }

    /// Whether a neighbour's zone has a seed peer.
    pub(super) fn is_provided_for(&self, neighbour: PeerId) -> bool {
        self.has_seed(self.others.get(&neighbour).unwrap_or(&self.own))
    }

    /// Whether nobody of this other zone need be looked for.
    pub(super) fn has_enough_of(&self, zone: &str) -> bool {
        !zone.is_empty() && zone != self.own && self.others.len() >= FEW_OTHERS && self.has_seed(&self.own)
    }

    fn has_seed(&self, zone: &str) -> bool {
        self.seeds.values().any(|seed| seed == zone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::new([n; 32])
    }

    #[test]
    fn others_are_few_as_long_as_the_zone_has_a_seed_peer() {
        let mut zones = Zones::new("a".into());
        (1..=4).for_each(|n| zones.connected(peer(n), "b"));
        assert!(!zones.has_enough_of("b"));
        zones.lease(peer(9), "a");
        assert!(zones.has_enough_of("b") && zones.has_enough_of("c"));
        assert!(!zones.has_enough_of("a") && !zones.has_enough_of(""), "the own zone, and one that is not known");
        zones.gone(peer(1));
        assert!(!zones.has_enough_of("b"));
        zones.connected(peer(1), "c");
        assert!(zones.has_enough_of("b"));
        zones.lease_ended(peer(9));
        assert!(!zones.has_enough_of("b"));
    }

    #[test]
    fn a_zone_is_provided_for_by_its_own_seed_peers() {
        let mut zones = Zones::new("a".into());
        zones.connected(peer(1), "a");
        zones.connected(peer(2), "b");
        zones.connected(peer(3), "b");
        zones.lease(peer(3), "b");
        assert!(zones.is_other(peer(2)) && !zones.is_other(peer(1)));
        assert!(zones.is_provided_for(peer(2)) && !zones.is_provided_for(peer(1)));
        assert!(zones.are_together(peer(2), peer(3)) && zones.are_together(peer(1), peer(7)));
        assert!(!zones.are_together(peer(1), peer(2)));
        zones.lease(peer(9), "a");
        assert!(zones.is_provided_for(peer(1)));
    }
}
