//! Where nodes stand, and which links lie between two of them.
//!
//! ```text
//!   node -up-> [rack -out->] [zone -out->] ... [zone -into->] [rack -into->] -down-> node
//!   registry -egress-> [zone -into->] [rack -into->] -down-> node
//! ```
//!
//! A rack or zone without a rate in the scenario has no link. What stays in a rack crosses neither.

use std::time::Duration;

use shoal_proto::PeerId;

use crate::{
    flows::{Flows, LinkId, Path},
    scenario::{Fault, FaultKind, Nodes, PAYLOAD_SHARE, Role, Scenario, millis},
};

/// Position of a node.
pub(crate) type Index = u32;

/// Rate of a link that nobody limits but that has to be there to be cut, bytes per second.
const UNLIMITED: f64 = 1e15;

/// Where a node stands.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) id: PeerId,
    pub(crate) role: Role,
    pub(crate) zone: u16,
    /// Numbered over all zones.
    pub(crate) rack: Option<u32>,
    pub(crate) up: LinkId,
    pub(crate) down: LinkId,
    /// What its uplink carries while nothing is wrong with it.
    pub(crate) up_bytes_per_s: f64,
}

/// Both ways between a rack or zone and what is outside.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Gateway {
    pub(crate) out: Option<LinkId>,
    pub(crate) into: Option<LinkId>,
}

/// All places, and the links between them.
#[derive(Debug)]
pub(crate) struct Topology {
    pub(crate) places: Vec<Place>,
    pub(crate) zones: Vec<String>,
    pub(crate) gateways: Vec<Gateway>,
    racks: Vec<Gateway>,
    registry: LinkId,
    latencies: Vec<Duration>,
    registry_latency: Duration,
}

impl Topology {
    /// The places of a scenario, seed peers and nodes; `random` gives each its identity.
    pub(crate) fn new<T>(scenario: &Scenario, flows: &mut Flows<T>, mut random: impl FnMut() -> u64) -> Self {
        let registry = flows.add_link(bytes_per_s(scenario.registry.egress_mbit));
        let zones: Vec<String> = scenario.zones.iter().map(|zone| zone.name.clone()).collect();
        let is_cut = |name: &str| scenario.faults.iter().any(|fault| cuts_zone(fault, name));
        let gateways = scenario.zones.iter().map(|zone| {
            let rate = zone.uplink_mbit.map(bytes_per_s).or(is_cut(&zone.name).then_some(UNLIMITED));
            gateway(flows, rate)
        });
        let gateways = gateways.collect();
        let latency = |from: &String, to: &String| millis(scenario.latency_ms(from, to));
        let latencies = zones.iter().flat_map(|from| zones.iter().map(move |to| latency(from, to))).collect();
        let registry_latency = millis(scenario.registry.latency_ms);
        let (places, racks) = (Vec::new(), Vec::new());
        let mut topology = Self { places, zones, gateways, racks, registry, latencies, registry_latency };
        for zone in 0..topology.zones.len() {
            let rack_rate = scenario.zones[zone].rack_uplink_mbit.map(bytes_per_s);
            let name = topology.zones[zone].clone();
            let groups = scenario.nodes.iter().filter(|group| group.zone == name);
            topology.add_zone(zone as u16, groups, rack_rate, flows, &mut random);
        }
        topology
    }

    fn add_zone<'a, T>(
        &mut self,
        zone: u16,
        groups: impl Iterator<Item = &'a Nodes>,
        rack_rate: Option<f64>,
        flows: &mut Flows<T>,
        random: &mut impl FnMut() -> u64,
    ) {
        let first_rack = self.racks.len();
        for group in groups {
            while self.racks.len() < first_rack + group.racks {
                self.racks.push(gateway(flows, rack_rate));
            }
            for turn in 0..group.count {
                let rack = (group.racks > 0).then(|| (first_rack + turn % group.racks) as u32);
                let id = identity(self.places.len() as Index, random);
                let (up_bytes_per_s, down) = (bytes_per_s(group.up_mbit), bytes_per_s(group.down_mbit));
                let (up, down) = (flows.add_link(up_bytes_per_s), flows.add_link(down));
                self.places.push(Place { id, role: group.role, zone, rack, up, down, up_bytes_per_s });
            }
        }
    }

    pub(crate) fn place(&self, at: Index) -> &Place {
        &self.places[at as usize]
    }

    pub(crate) fn len(&self) -> Index {
        self.places.len() as Index
    }

    /// The node of an identity; nothing for an identity that is of no node here.
    pub(crate) fn find(&self, id: PeerId) -> Option<Index> {
        let index = Index::from_le_bytes(*id.as_bytes().last_chunk()?);
        self.places.get(index as usize).filter(|place| place.id == id).map(|_| index)
    }

    /// The links from one node to another.
    pub(crate) fn path(&self, from: Index, to: Index) -> Path {
        let (from, to) = (self.place(from), self.place(to));
        let mut path = Path::EMPTY;
        path.push(Some(from.up));
        if from.rack.is_none() || from.rack != to.rack {
            path.push(self.rack(from).out);
            if from.zone != to.zone {
                path.push(self.gateways[usize::from(from.zone)].out);
                path.push(self.gateways[usize::from(to.zone)].into);
            }
            path.push(self.rack(to).into);
        }
        path.push(Some(to.down));
        path
    }

    /// The links from the registry to a node.
    pub(crate) fn path_from_registry(&self, to: Index) -> Path {
        let to = self.place(to);
        let mut path = Path::EMPTY;
        path.push(Some(self.registry));
        path.push(self.gateways[usize::from(to.zone)].into);
        path.push(self.rack(to).into);
        path.push(Some(to.down));
        path
    }

    fn rack(&self, place: &Place) -> Gateway {
        place.rack.map_or(Gateway::default(), |rack| self.racks[rack as usize])
    }

    /// One way.
    pub(crate) fn latency(&self, from: Index, to: Index) -> Duration {
        self.zone_latency(self.place(from).zone, self.place(to).zone)
    }

    /// One way between two zones, or within one.
    pub(crate) fn zone_latency(&self, from: u16, to: u16) -> Duration {
        self.latencies[usize::from(from) * self.zones.len() + usize::from(to)]
    }

    /// From asking the registry to its first byte.
    pub(crate) fn registry_latency(&self) -> Duration {
        self.registry_latency
    }

    /// The nodes of a role, in the order of their places.
    pub(crate) fn of_role(&self, role: Role) -> impl Iterator<Item = Index> + '_ {
        (0..).zip(&self.places).filter(move |(_, place)| place.role == role).map(|(at, _)| at)
    }
}

/// Whether a fault cuts off this zone as a whole.
pub(crate) fn cuts_zone(fault: &Fault, zone: &str) -> bool {
    fault.kind == FaultKind::Cut && fault.select.is_none() && fault.zone.as_deref().is_none_or(|only| only == zone)
}

/// Payload of a link's rate.
pub(crate) fn bytes_per_s(mbit: f64) -> f64 {
    mbit * 125_000.0 * PAYLOAD_SHARE
}

fn gateway<T>(flows: &mut Flows<T>, bytes_per_s: Option<f64>) -> Gateway {
    let mut link = || bytes_per_s.map(|rate| flows.add_link(rate));
    Gateway { out: link(), into: link() }
}

/// Random but for its last bytes, which say which node it is.
fn identity(at: Index, random: &mut impl FnMut() -> u64) -> PeerId {
    let mut bytes = [0; 32];
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random().to_le_bytes());
    }
    bytes[28..].copy_from_slice(&at.to_le_bytes());
    PeerId::new(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RACKS: &str = r#"
        name = "racks"
        registry = { egress_mbit = 800 }
        image = { encoded_mib = 1, piece_kib = 64 }
        workload = { kind = "flash-crowd", read = "all" }
        zones = [{ name = "b", uplink_mbit = 100 }, { name = "a", rack_uplink_mbit = 50, latency_ms = { b = 3 } }]
        nodes = [
            { zone = "a", role = "node", count = 4, up_mbit = 8, down_mbit = 8, racks = 2 },
            { zone = "b", role = "node", count = 2, up_mbit = 8, down_mbit = 8 },
        ]
    "#;

    #[test]
    fn paths_cross_what_lies_between() {
        let scenario = Scenario::parse(RACKS).unwrap().in_order();
        let mut flows = Flows::<()>::new(0.01);
        let mut seed = 0;
        let topology = Topology::new(&scenario, &mut flows, || {
            seed += 1;
            seed
        });
        let rates = |path: Path| path.links().iter().map(|&link| flows.rate(link) / 118_750.0).collect::<Vec<_>>();
        assert_eq!(rates(topology.path(0, 2)), [8.0, 8.0], "one rack");
        assert_eq!(rates(topology.path(0, 1)), [8.0, 50.0, 50.0, 8.0], "two racks");
        assert_eq!(rates(topology.path(0, 4)), [8.0, 50.0, 100.0, 8.0], "two zones, one of them without a limit");
        assert_eq!(rates(topology.path_from_registry(5)), [800.0, 100.0, 8.0]);
        assert_eq!(topology.latency(0, 5), Duration::from_millis(3));
        assert_eq!(topology.find(topology.place(5).id), Some(5));
        assert_eq!(topology.find(PeerId::new([9; 32])), None);
    }
}
