//! The policies that Shoal is compared with: everyone reads the registry, or whole images go from node to node. Neither
//! needs a scheduler; both share the links as the swarm does.

use std::{collections::VecDeque, time::Duration};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shoal_scheduler::Time;

use crate::{
    clock::Agenda,
    flows::{Flows, TOLERANCE},
    report::{Outcome, Reader},
    scenario::{Policy, Role, Scenario},
    starts::starts,
    tally::Tally,
    topology::{Index, Topology},
};

/// A whole image on its way.
#[derive(Debug, Clone, Copy)]
struct Copy {
    /// Nobody is the registry.
    from: Option<Index>,
    to: Index,
    since: Time,
}

/// What is known of a zone by a tracker without flaw.
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
    agenda: Agenda<Index>,
    flows: Flows<Copy>,
    topology: Topology,
    zones: Vec<Zone>,
    started: Vec<Time>,
    complete: Vec<Option<Time>>,
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
        zones: topology.zones.iter().map(|_| Zone::default()).collect(),
        started: vec![Time::ZERO; topology.places.len()],
        complete: vec![None; topology.places.len()],
        tally: Tally::new(topology.len()),
        topology,
        bytes: scenario.encoded_bytes(),
        events: 0,
    };
    for (&at, start) in readers.iter().zip(starts(&scenario.workload, readers.len(), &mut rng)) {
        baseline.started[at as usize] = Time::ZERO + start;
        baseline.agenda.push(Time::ZERO + start, at);
    }
    while baseline.step() {}
    baseline.outcome(&readers)
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
        } else if let Some(to) = self.agenda.pop() {
            self.start(to);
        }
        true
    }

    fn start(&mut self, to: Index) {
        let zone = &mut self.zones[usize::from(self.topology.place(to).zone)];
        match self.scenario.policy {
            Policy::WholeBlob if zone.sourced => {
                zone.waiting.push_back(to);
                self.match_zone(self.topology.place(to).zone);
            }
            _ => {
                zone.sourced = true;
                self.tally.registry_requests += 1;
                let copy = Copy { from: None, to, since: self.now };
                self.flows.start(self.now, self.topology.path_from_registry(to), self.bytes, copy);
            }
        }
    }

    /// Everyone who has the image and is idle sends it to somebody who waits.
    fn match_zone(&mut self, zone: u16) {
        let zone = &mut self.zones[usize::from(zone)];
        while let (Some(&from), Some(&to)) = (zone.idle.front(), zone.waiting.front()) {
            zone.idle.pop_front();
            zone.waiting.pop_front();
            self.tally.requests += 1;
            let copy = Copy { from: Some(from), to, since: self.now };
            self.flows.start(self.now, self.topology.path(from, to), self.bytes, copy);
        }
    }

    fn copied(&mut self, copy: Copy) {
        let Copy { from, to, since } = copy;
        let latency = match from {
            Some(from) => self.topology.latency(from, to),
            None => self.topology.registry_latency(),
        };
        // The last piece alone is decoded after the last byte: the others were while the transfer went on.
        let last_piece = self.bytes.min(1 << 20);
        let end = self.now + latency + self.scenario.costs.decoding(last_piece);
        self.complete[to as usize] = Some(end);
        self.tally.add(&self.topology, (from, to), (since, self.now), self.bytes);
        let zone = self.topology.place(to).zone;
        if self.scenario.policy == Policy::WholeBlob {
            self.zones[usize::from(zone)].idle.extend(from.into_iter().chain([to]));
            self.match_zone(zone);
        }
    }

    fn outcome(self, readers: &[Index]) -> Outcome {
        let reader = |&at: &Index| {
            let started = self.started[at as usize];
            let complete = self.complete[at as usize].map(|end| end.since(started));
            Reader {
                place: at,
                zone: self.topology.place(at).zone,
                alive: true,
                started_s: Some(started.as_secs_f64()),
                // Nothing of an image is of use before all of it is there.
                first_s: complete.as_ref().map(Duration::as_secs_f64),
                complete_s: complete.as_ref().map(Duration::as_secs_f64),
                failed_reads: 0,
            }
        };
        let readers = readers.iter().map(reader).collect();
        Outcome::new(&self.topology, readers, self.tally, self.now, self.events)
    }
}
