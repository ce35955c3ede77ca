//! Links by class: what a report tells of the links of a swarm without naming each. Links of racks and what seed peers take in
//! are left out.

use smallvec::SmallVec;

use crate::{
    scenario::{Nodes, Role, Scenario},
    topology::{Index, Topology, bytes_per_s},
};

/// A class of links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// What the registry sends.
    Registry,
    /// What seed peers send.
    SeedUp,
    /// What nodes send.
    NodeUp,
    /// What nodes take in.
    NodeDown,
    /// Into a zone.
    Into(u16),
    /// Out of a zone.
    OutOf(u16),
}

impl Class {
    /// All that there are with so many zones.
    pub(crate) fn all(zones: u16) -> impl Iterator<Item = Self> {
        let of_zones = (0..zones).flat_map(|zone| [Self::Into(zone), Self::OutOf(zone)]);
        [Self::Registry, Self::SeedUp, Self::NodeUp, Self::NodeDown].into_iter().chain(of_zones)
    }

    /// The classes of links between two nodes; nobody is the registry.
    pub(crate) fn crossed(topology: &Topology, from: Option<Index>, to: Index) -> SmallVec<[Self; 4]> {
        let (from, to) = (from.map(|from| topology.place(from)), topology.place(to));
        let mut crossed = SmallVec::new();
        crossed.push(match from.map(|from| from.role) {
            None => Self::Registry,
            Some(Role::Seed) => Self::SeedUp,
            Some(Role::Node) => Self::NodeUp,
        });
        if to.role == Role::Node {
            crossed.push(Self::NodeDown);
        }
        if from.is_none_or(|from| from.zone != to.zone) {
            crossed.push(Self::Into(to.zone));
            crossed.extend(from.map(|from| Self::OutOf(from.zone)));
        }
        crossed
    }

    /// What all links of the class carry, payload bytes per second; nothing where they have no limit. Zones are numbered as in
    /// the scenario.
    pub(crate) fn bytes_per_s(self, scenario: &Scenario) -> Option<f64> {
        let all = |role: Role, rate: fn(&Nodes) -> f64| -> f64 {
            let groups = scenario.nodes.iter().filter(|group| group.role == role);
            groups.map(|group| group.count as f64 * rate(group)).sum()
        };
        let mbit: f64 = match self {
            Self::Registry => scenario.registry.egress_mbit,
            Self::SeedUp => all(Role::Seed, |group| group.up_mbit),
            Self::NodeUp => all(Role::Node, |group| group.up_mbit),
            Self::NodeDown => all(Role::Node, |group| group.down_mbit),
            Self::Into(zone) | Self::OutOf(zone) => scenario.zones[usize::from(zone)].uplink_mbit?,
        };
        Some(bytes_per_s(mbit))
    }

    /// How reports call it.
    pub(crate) fn name(self, zones: &[String]) -> String {
        match self {
            Self::Registry => "registry egress".to_owned(),
            Self::SeedUp => "seed uplinks".to_owned(),
            Self::NodeUp => "node uplinks".to_owned(),
            Self::NodeDown => "node downlinks".to_owned(),
            Self::Into(zone) => format!("into zone {}", zones[usize::from(zone)]),
            Self::OutOf(zone) => format!("out of zone {}", zones[usize::from(zone)]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flows::Flows;

    #[test]
    fn classes_between_two_nodes() {
        let text = include_str!("../scenarios/calibrate-thin-link.toml");
        let scenario = Scenario::parse(text).unwrap().in_order();
        let topology = Topology::new(&scenario, &mut Flows::<()>::new(0.01), || 1);
        let places = |role, zone| topology.of_role(role).find(|&at| topology.place(at).zone == zone).unwrap();
        let (seed, node, far) = (places(Role::Seed, 0), places(Role::Node, 0), places(Role::Node, 1));
        let crossed = |from, to| Class::crossed(&topology, from, to).to_vec();
        assert_eq!(crossed(None, seed), [Class::Registry, Class::Into(0)]);
        assert_eq!(crossed(Some(seed), node), [Class::SeedUp, Class::NodeDown]);
        assert_eq!(crossed(Some(node), far), [Class::NodeUp, Class::NodeDown, Class::Into(1), Class::OutOf(0)]);
        let rate = |class: Class| class.bytes_per_s(&scenario).map(|rate| rate / bytes_per_s(1.0));
        assert_eq!(rate(Class::SeedUp), Some(100.0), "two seed peers");
        assert_eq!((rate(Class::NodeDown), rate(Class::OutOf(1))), (Some(80.0), Some(20.0)));
    }
}
