//! What a run adds up while it lasts: bytes by who sent them and where they went, and how that went over time.

use std::collections::BTreeMap;

use shoal_scheduler::Time;

use crate::{
    links::Class,
    scenario::Role,
    series::Series,
    topology::{Index, Topology},
};

/// Slices of time at most: of a class of links, of one node.
const SLICES: usize = 256;
const NODE_SLICES: usize = 128;

/// Whence a node can have something, as reports call it.
pub const SOURCES: [&str; 3] = ["registry", "seed", "peer"];

/// Who sent something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sender {
    /// The registry.
    Registry,
    /// A node of a role, in a zone.
    Node(Role, u16),
}

impl Sender {
    /// Where it stands among the [`SOURCES`].
    pub(crate) fn source(self) -> usize {
        match self {
            Self::Registry => 0,
            Self::Node(Role::Seed, _) => 1,
            Self::Node(Role::Node, _) => 2,
        }
    }
}

/// What a node took in over time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Trace {
    /// Bytes, by their [`SOURCES`].
    pub received: [Series; 3],
    /// Pieces that it wanted and did not have, of all its images: the most in each slice. One that a reader waits for and that is
    /// prefetched, too, counts twice.
    pub wants: Series,
    /// The last of these.
    wanted: u64,
}

/// The sums of a run.
#[derive(Debug)]
pub(crate) struct Tally {
    /// Bytes that arrived, by who sent them and the zone that they went to.
    pub(crate) moved: BTreeMap<(Sender, u16), u64>,
    /// Of these, what reading nodes took in, by their [`SOURCES`].
    pub(crate) received: [u64; 3],
    /// What the links of each class carried over time.
    pub(crate) links: BTreeMap<Class, Series>,
    /// Bytes that each node sent, by its place.
    pub(crate) sent: Vec<u64>,
    /// Of each node, by its place; empty for seed peers.
    pub(crate) traces: Vec<Trace>,
    /// Bytes that arrived for nothing: stopped on the way, wrong, or there already.
    pub(crate) wasted: u64,
    /// Requests to the registry.
    pub(crate) registry_requests: u64,
    /// Requests to nodes, and those answered busy.
    pub(crate) requests: u64,
    pub(crate) refused: u64,
    /// Requests for a piece that was under way already, made known at the end.
    pub(crate) hedged: u64,
}

impl Tally {
    /// Nothing yet, for so many nodes.
    pub(crate) fn new(nodes: Index) -> Self {
        Self {
            moved: BTreeMap::new(),
            received: [0; 3],
            links: BTreeMap::new(),
            sent: vec![0; nodes as usize],
            traces: vec![Trace::default(); nodes as usize],
            wasted: 0,
            registry_requests: 0,
            requests: 0,
            refused: 0,
            hedged: 0,
        }
    }

    /// So many bytes came through between two times; from nobody, from the registry.
    pub(crate) fn add(
        &mut self,
        topology: &Topology,
        (from, to): (Option<Index>, Index),
        (since, until): (Time, Time),
        bytes: u64,
    ) {
        let sender = from.map_or(Sender::Registry, |from| {
            let place = topology.place(from);
            Sender::Node(place.role, place.zone)
        });
        let place = topology.place(to);
        *self.moved.entry((sender, place.zone)).or_default() += bytes;
        if let Some(from) = from {
            self.sent[from as usize] += bytes;
        }
        if place.role == Role::Node {
            self.received[sender.source()] += bytes;
            self.traces[to as usize].received[sender.source()].add(NODE_SLICES, since, until, bytes);
        }
        for class in Class::crossed(topology, from, to) {
            self.links.entry(class).or_default().add(SLICES, since, until, bytes);
        }
    }

    /// A node wants so many pieces now.
    pub(crate) fn wants(&mut self, now: Time, at: Index, wanted: usize) {
        let trace = &mut self.traces[at as usize];
        let before = std::mem::replace(&mut trace.wanted, wanted as u64);
        trace.wants.change(NODE_SLICES, now, before, wanted as u64);
    }

    /// Bytes from the registry to a zone.
    pub(crate) fn sent_by_registry(&self, zone: u16) -> u64 {
        self.moved.get(&(Sender::Registry, zone)).copied().unwrap_or(0)
    }

    /// Bytes from one zone to another.
    pub(crate) fn cross_zone(&self) -> u64 {
        let crosses = |&(from, to): &(Sender, u16)| matches!(from, Sender::Node(_, zone) if zone != to);
        self.moved.iter().filter(|(key, _)| crosses(key)).map(|(_, bytes)| bytes).sum()
    }

    /// All bytes that arrived.
    pub(crate) fn all(&self) -> u64 {
        self.moved.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{flows::Flows, scenario::Scenario};

    #[test]
    fn what_crosses_zones_is_told_apart() {
        let text = include_str!("../scenarios/calibrate-thin-link.toml");
        let scenario = Scenario::parse(text).unwrap().in_order();
        let topology = Topology::new(&scenario, &mut Flows::<()>::new(0.01), || 1);
        let of_zone = |role, zone| topology.of_role(role).find(|&at| topology.place(at).zone == zone).unwrap();
        let (seed, near, far) = (of_zone(Role::Seed, 1), of_zone(Role::Node, 1), of_zone(Role::Node, 0));
        let mut tally = Tally::new(topology.len());
        let second = (Time::ZERO, Time::from_nanos(1_000_000_000));
        for (from, to) in [(None, seed), (None, near), (Some(seed), near), (Some(far), near)] {
            tally.add(&topology, (from, to), second, 10);
        }
        assert_eq!((tally.cross_zone(), tally.sent_by_registry(1), tally.all()), (10, 20, 40));
        assert_eq!(tally.received, [10, 10, 10], "what seed peers take in does not count");
        assert_eq!((tally.sent[seed as usize], tally.sent[far as usize]), (10, 10));
        let sums = |trace: &Trace| trace.received.each_ref().map(Series::sum);
        assert_eq!((sums(&tally.traces[near as usize]), sums(&tally.traces[seed as usize])), ([10; 3], [0; 3]));
        let carried = |class| tally.links.get(&class).map(Series::sum);
        assert_eq!((carried(Class::Registry), carried(Class::NodeDown)), (Some(20), Some(30)));
        assert_eq!((carried(Class::Into(1)), carried(Class::OutOf(0))), (Some(30), Some(10)));
    }
}
