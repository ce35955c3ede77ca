//! The policies that Shoal is compared with: everyone reads the registry, or whole images go from node to node. Neither
//! needs a scheduler; both share the links as the swarm does.

use std::collections::{BTreeMap, VecDeque};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shoal_scheduler::Time;

use crate::{
    clock::Agenda,
    flows::{Flows, TOLERANCE},
    images::Image,
    report::{Outcome, Reader},
    scenario::{Policy, Role, Scenario},
    starts::{Start, planned},
    tally::Tally,
    topology::{Index, Topology},
};

/// An image on a node.
type Place = (Index, Image);

/// A whole image on its way.
#[derive(Debug, Clone, Copy)]
struct Copy {
    image: Image,
    /// Nobody is the registry.
    from: Option<Index>,
    to: Index,
    since: Time,
}

/// What is known of an image in a zone by a tracker without flaw.
#[derive(Debug, Default)]
struct Zone {
    /// Nodes that have the image and send it to nobody.
    idle: VecDeque<Index>,
    /// Nodes that wait for one of them.
    waiting: VecDeque<Index>,
    /// Whether somebody has read the registry, or is reading it.
    sourced: bool,
}

struct Baseline<'a> {
    scenario: &'a Scenario,
    now: Time,
    agenda: Agenda<Place>,
    flows: Flows<Copy>,
    topology: Topology,
    zones: BTreeMap<(u16, Image), Zone>,
    complete: BTreeMap<Place, Time>,
    bytes: u64,
    tally: Tally,
    events: u64,
}

/// Runs a scenario by one of these policies. Faults and seed peers play no part.
pub(crate) fn run(scenario: &Scenario, seed: u64) -> Outcome {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut flows = Flows::new(TOLERANCE);
    let topology = Topology::new(scenario, &mut flows, || rng.next_u64());
    let readers: Vec<Index> = topology.of_role(Role::Node).collect();
    let mut baseline = Baseline {
        scenario,
        now: Time::ZERO,
        agenda: Agenda::new(),
        flows,
        zones: BTreeMap::new(),
        complete: BTreeMap::new(),
        tally: Tally::new(topology.len()),
        topology,
        bytes: scenario.encoded_bytes(),
        events: 0,
    };
    let plan = planned(&scenario.workload, &readers, &mut rng);
    for start in &plan {
        baseline.agenda.push(Time::ZERO + start.at, (start.node, start.image));
    }
    while baseline.step() {}
    baseline.outcome(plan)
}

impl Baseline<'_> {
    fn step(&mut self) -> bool {
        let transfer = self.flows.next(self.now).filter(|&at| at < Time::MAX);
        let Some(at) = self.agenda.next().into_iter().chain(transfer).min() else { return false };
        self.now = at;
        self.events += 1;
        if transfer == Some(at) {
            if let Some(copy) = self.flows.finish(at) {
                self.copied(copy);
            }
        } else if let Some((to, image)) = self.agenda.pop() {
            self.start(to, image);
        }
        true
    }

    fn start(&mut self, to: Index, image: Image) {
        let at = self.topology.place(to).zone;
        let zone = self.zones.entry((at, image)).or_default();
        match self.scenario.policy {
            Policy::WholeBlob if zone.sourced => {
                zone.waiting.push_back(to);
                self.match_zone(at, image);
            }
            _ => {
                zone.sourced = true;
                self.tally.registry_requests += 1;
                let copy = Copy { image, from: None, to, since: self.now };
                self.flows.start(self.now, self.topology.path_from_registry(to), self.bytes, copy);
            }
        }
    }

    /// Everyone who has the image and is idle sends it to somebody who waits.
    fn match_zone(&mut self, zone: u16, image: Image) {
        let zone = self.zones.entry((zone, image)).or_default();
        while let (Some(&from), Some(&to)) = (zone.idle.front(), zone.waiting.front()) {
            zone.idle.pop_front();
            zone.waiting.pop_front();
            self.tally.requests += 1;
            let copy = Copy { image, from: Some(from), to, since: self.now };
            self.flows.start(self.now, self.topology.path(from, to), self.bytes, copy);
        }
    }

    fn copied(&mut self, copy: Copy) {
        let Copy { image, from, to, since } = copy;
        let latency = match from {
            Some(from) => self.topology.latency(from, to),
            None => self.topology.registry_latency(),
        };
        // The last piece alone is decoded after the last byte: the others were while the transfer went on.
        let last_piece = self.bytes.min(1 << 20);
        let end = self.now + latency + self.scenario.costs.decoding(last_piece);
        self.complete.insert((to, image), end);
        self.tally.add(&self.topology, (from, to), (since, self.now), self.bytes);
        let zone = self.topology.place(to).zone;
        if self.scenario.policy == Policy::WholeBlob {
            self.zones.entry((zone, image)).or_default().idle.extend(from.into_iter().chain([to]));
            self.match_zone(zone, image);
        }
    }

    fn outcome(self, mut plan: Vec<Start>) -> Outcome {
        plan.sort_unstable_by_key(|start| (start.node, start.image));
        let reader = |&Start { node, image, at }: &Start| {
            let end = self.complete.get(&(node, image));
            let complete_s = end.map(|end| end.since(Time::ZERO + at).as_secs_f64());
            Reader {
                node,
                image,
                zone: self.topology.place(node).zone,
                alive: true,
                started_s: Some(at.as_secs_f64()),
                // Nothing of an image is of use before all of it is there, whatever a start reads.
                first_s: complete_s,
                start_s: complete_s,
                complete_s,
                failed_reads: 0,
            }
        };
        let readers = plan.iter().map(reader).collect();
        Outcome::new(&self.topology, readers, self.tally, self.now, self.events)
    }
}
