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
    images::{Image, key},
    mount::Mount,
    node::Node,
    reading::Reading,
    scenario::{Policy, Role, Scenario, millis},
    starts::{Start, planned},
    tally::Tally,
    topology::{Index, Place, Topology},
};

/// Draws for a neighbour that is not one already.
const DRAWS: usize = 4;

/// What all images have in common.
struct Blob {
    extents: Arc<[Range<u64>]>,
    /// What everyone has.
    present: Bitfield,
    reading: Arc<Reading>,
}

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
            circles: Vec::new(),
            tally: Tally::new(topology.len()),
            rng,
            cuts: Vec::new(),
            full_rates: BTreeMap::new(),
            last_arrival: Time::ZERO,
            unfinished: 0,
            topology,
            events: 0,
        }
    }

    pub(super) fn set_up(&mut self) {
        let readers: Vec<Index> = self.topology.of_role(Role::Node).collect();
        let plan = planned(&self.scenario.workload, &readers, &mut self.rng);
        let (blob, images) = (self.blob(), self.images(&plan));
        for (at, images) in (0..).zip(images) {
            self.add(at, &blob, &images);
        }
        self.happen(Happening::Leases);
        self.connect_seeds();
        self.unfinished = plan.len();
        self.last_arrival = Time::ZERO + plan.iter().map(|start| start.at).max().unwrap_or_default();
        for Start { node, image, at } in plan {
            self.after(at, Happening::Start(node, image));
        }
        for (at, fault) in self.scenario.faults.iter().enumerate() {
            self.after(Duration::from_secs_f64(fault.at_s), Happening::Fault(at));
        }
    }

    /// The images of each node and when it starts them; seed peers have to do with all.
    fn images(&mut self, plan: &[Start]) -> Vec<Vec<(Image, Duration)>> {
        let all = || (0..self.scenario.workload.images.count).map(|image| (image as Image, Duration::ZERO));
        let of = |place: &Place| if place.role == Role::Seed { all().collect() } else { Vec::new() };
        let mut images: Vec<Vec<_>> = self.topology.places.iter().map(of).collect();
        plan.iter().for_each(|start| images[start.node as usize].push((start.image, start.at)));
        let mut circles = vec![Vec::new(); self.scenario.workload.images.count as usize];
        for (at, images) in (0..).zip(&mut images) {
            images.sort_unstable();
            images.iter().for_each(|&(image, _)| circles[usize::from(image)].push(at));
        }
        self.circles = circles;
        images
    }

    fn blob(&mut self) -> Blob {
        let ends = self.piece_bytes.iter().scan(0, |end, bytes| {
            *end += bytes;
            Some(*end)
        });
        let extents = ends.zip(self.piece_bytes.iter()).map(|(end, bytes)| end - bytes..end).collect();
        let reading = Reading::new(self.scenario, self.piece_bytes.len() as u32);
        Blob { extents, present: self.shared(), reading: Arc::new(reading) }
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

    fn add(&mut self, at: Index, blob: &Blob, images: &[(Image, Duration)]) {
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let place = self.topology.place(at);
        let zone = self.topology.zones[usize::from(place.zone)].clone();
        let config = Config { labels: labels(place), ..Config::new(place.id, zone) };
        let mut scheduler = Scheduler::new(config, Time::ZERO, seed);
        let Blob { extents, present, reading } = blob;
        let mount = |&(image, starts): &(Image, Duration)| {
            let (extents, all) = (extents.clone(), present.clone());
            scheduler.handle_event(Time::ZERO, Event::BlobAdded { blob: key(image), extents, present: all });
            Mount::new(image, Time::ZERO + starts, reading.clone(), present)
        };
        let mounts = images.iter().map(mount).collect();
        let mut tracker = TrackerConfig::default();
        if self.scenario.policy == Policy::Seeds {
            tracker.alternates = 0;
        }
        let tracker = Tracker::new(tracker);
        self.nodes.push(Node::new(scheduler, tracker, self.piece_bytes.clone(), mounts));
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

    /// Nodes that a node finds when it starts an image: at random among those that have started it, or start it now.
    pub(super) fn neighbours_for(&mut self, at: Index, image: Image) -> Vec<Index> {
        if self.scenario.policy == Policy::Seeds {
            return Vec::new();
        }
        let circle = &self.circles[usize::from(image)];
        let zone = self.topology.place(at).zone;
        let own = |border: fn(&u16, &u16) -> bool| {
            circle.partition_point(|&other| border(&self.topology.place(other).zone, &zone))
        };
        let own = own(u16::lt)..own(u16::le);
        let (near, far) = (self.scenario.costs.neighbours, self.scenario.costs.far_neighbours);
        let mut found = Vec::new();
        for (count, is_own) in [(near, true), (far, false)] {
            let wanted = found.len() + count;
            for _ in 0..count * DRAWS {
                let any = ((u64::from(self.rng.next_u32()) * circle.len() as u64) >> 32) as usize;
                let other = circle[if is_own { own.start + any * own.len() / circle.len() } else { any }];
                if found.len() < wanted && self.may_meet(at, other, image, is_own) && !found.contains(&other) {
                    found.push(other);
                }
            }
        }
        found
    }

    fn may_meet(&self, at: Index, other: Index, image: Image, own: bool) -> bool {
        let (node, place) = (&self.nodes[other as usize], self.topology.place(other));
        let same = place.zone == self.topology.place(at).zone;
        let started = node.mount(image).is_some_and(|mount| mount.starts <= self.now);
        other != at && place.role == Role::Node && same == own && node.alive && started
    }
}

/// What the scheduler is told of where a node stands.
pub(super) fn labels(place: &Place) -> BTreeMap<String, String> {
    place.rack.map(|rack| ("rack".to_owned(), rack.to_string())).into_iter().collect()
}
