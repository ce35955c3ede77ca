//! How a swarm begins: identities, nodes, who starts when, who knows whom.

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shoal_proto::Bitfield;
use shoal_scheduler::{Config, Event, Scheduler, Time, Tracker, TrackerConfig};

use super::{Happening, Standing, Swarm};
use crate::{
    clock::Agenda,
    flows::{Flows, TOLERANCE},
    node::{BLOB, Node},
    scenario::{Policy, Role, Scenario, millis},
    starts::starts,
    tally::Tally,
    topology::{Index, Place, Topology},
};

/// Draws for a neighbour that is not one already.
const DRAWS: usize = 4;

impl<'a> Swarm<'a> {
    pub(super) fn new(scenario: &'a Scenario, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut flows = Flows::new(TOLERANCE);
        let topology = Topology::new(scenario, &mut flows, || rng.next_u64());
        let piece_bytes: Arc<[u64]> = scenario.piece_bytes().into();
        Self {
            scenario,
            now: Time::ZERO,
            agenda: Agenda::new(),
            flows,
            nodes: Vec::new(),
            standing: Vec::new(),
            connecting: Default::default(),
            reads: BTreeMap::new(),
            piece_bytes,
            tally: Tally::new(topology.len()),
            rng,
            cuts: Vec::new(),
            full_rates: BTreeMap::new(),
            last_arrival: Time::ZERO,
            unfinished: topology.of_role(Role::Node).count(),
            topology,
            events: 0,
        }
    }

    pub(super) fn set_up(&mut self) {
        let (extents, present) = (self.extents(), self.shared());
        for at in 0..self.topology.len() {
            self.add(at, &extents, &present);
        }
        self.happen(Happening::Leases);
        self.connect_seeds();
        let readers: Vec<Index> = self.topology.of_role(Role::Node).collect();
        let starts = starts(&self.scenario.workload, readers.len(), &mut self.rng);
        self.last_arrival = Time::ZERO + starts.last().copied().unwrap_or_default();
        for (at, start) in readers.into_iter().zip(starts) {
            self.nodes[at as usize].starts = Time::ZERO + start;
            self.after(start, Happening::Start(at));
        }
        for (at, fault) in self.scenario.faults.iter().enumerate() {
            self.after(Duration::from_secs_f64(fault.at_s), Happening::Fault(at));
        }
    }

    fn extents(&self) -> Arc<[Range<u64>]> {
        let ends = self.piece_bytes.iter().scan(0, |end, bytes| {
            *end += bytes;
            Some(*end)
        });
        ends.zip(self.piece_bytes.iter()).map(|(end, bytes)| end - bytes..end).collect()
    }

    /// The pieces that everyone has from an earlier image.
    fn shared(&mut self) -> Bitfield {
        let pieces = self.piece_bytes.len() as u32;
        let mut present = Bitfield::new(pieces);
        if let Some(shares) = &self.scenario.image.shares {
            let below = (shares.fraction * f64::from(u32::MAX)) as u32;
            for piece in 0..pieces {
                if self.rng.next_u32() < below {
                    present.insert(piece);
                }
            }
        }
        present
    }

    fn add(&mut self, at: Index, extents: &Arc<[Range<u64>]>, present: &Bitfield) {
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let place = self.topology.place(at);
        let zone = self.topology.zones[usize::from(place.zone)].clone();
        let config = Config { labels: labels(place), ..Config::new(place.id, zone) };
        let mut scheduler = Scheduler::new(config, Time::ZERO, seed);
        let (extents, present) = (extents.clone(), present.clone());
        scheduler.handle_event(Time::ZERO, Event::BlobAdded { blob: BLOB, extents, present });
        let mut tracker = TrackerConfig::default();
        if self.scenario.policy == Policy::Seeds {
            tracker.alternates = 0;
        }
        self.nodes.push(Node::new(scheduler, Tracker::new(tracker), self.piece_bytes.clone()));
        let phase = millis(self.scenario.costs.have_ms).mul_f64(f64::from(self.rng.next_u32()) / 2f64.powi(32));
        self.standing.push(Standing { phase, ..Standing::default() });
    }

    /// Every node is connected to the seed peers of its zone before it starts.
    fn connect_seeds(&mut self) {
        let seeds: Vec<Index> = self.topology.of_role(Role::Seed).collect();
        for at in 0..self.topology.len() {
            for &seed in &seeds {
                if self.topology.place(at).zone == self.topology.place(seed).zone {
                    self.connect(at, seed);
                }
            }
        }
    }

    /// Nodes that a node finds when it starts: at random among those that have started, or start with it.
    pub(super) fn neighbours_for(&mut self, at: Index) -> Vec<Index> {
        if self.scenario.policy == Policy::Seeds {
            return Vec::new();
        }
        let zone = self.topology.place(at).zone;
        let (near, far) = (self.scenario.costs.neighbours, self.scenario.costs.far_neighbours);
        let mut found = Vec::new();
        for (count, own) in [(near, true), (far, false)] {
            let wanted = found.len() + count;
            for _ in 0..count * DRAWS {
                let other = ((u64::from(self.rng.next_u32()) * u64::from(self.topology.len())) >> 32) as Index;
                let other = if own { self.in_zone(zone, other) } else { other };
                if found.len() < wanted && self.may_meet(at, other, own) && !found.contains(&other) {
                    found.push(other);
                }
            }
        }
        found
    }

    /// A node of a zone for any node, evenly.
    fn in_zone(&self, zone: u16, any: Index) -> Index {
        let first = self.topology.places.partition_point(|place| place.zone < zone) as Index;
        let end = self.topology.places.partition_point(|place| place.zone <= zone) as Index;
        first + (u64::from(any) * u64::from(end - first) / u64::from(self.topology.len())) as Index
    }

    fn may_meet(&self, at: Index, other: Index, own: bool) -> bool {
        let (node, place) = (&self.nodes[other as usize], self.topology.place(other));
        let same = place.zone == self.topology.place(at).zone;
        other != at && place.role == Role::Node && same == own && node.alive && node.starts <= self.now
    }

    pub(super) fn shuffle(&mut self, items: &mut [Index]) {
        for at in (1..items.len()).rev() {
            items.swap(at, (self.rng.next_u64() % (at as u64 + 1)) as usize);
        }
    }
}

/// What the scheduler is told of where a node stands.
pub(super) fn labels(place: &Place) -> BTreeMap<String, String> {
    place.rack.map(|rack| ("rack".to_owned(), rack.to_string())).into_iter().collect()
}
