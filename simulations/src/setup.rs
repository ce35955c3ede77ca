//! How a world begins: identities, nodes, who knows whom, who starts when.

use std::{collections::BTreeSet, ops::Range, sync::Arc, time::Duration};

use rand::Rng;
use shoal_proto::{Bitfield, PeerId};
use shoal_scheduler::{Config, Event, Scheduler, Time};

use crate::{
    node::{Index, Node},
    scenario::{Nodes, Role, WorkloadKind},
    world::{BLOB, Happening, World},
};

/// Neighbours that a node looks for in its zone, and elsewhere.
const NEIGHBOURS: (usize, usize) = (12, 2);

impl World<'_> {
    pub(crate) fn set_up(&mut self) {
        let identities: Vec<Vec<PeerId>> =
            self.scenario.nodes.iter().map(|group| self.identities(group.count)).collect();
        let groups = || self.scenario.nodes.iter().zip(&identities);
        let seeds =
            groups().filter(|(group, _)| group.role == Role::Seed).flat_map(|(_, ids)| ids).copied().collect();
        let extents = self.extents();
        for (group, ids) in groups() {
            for &id in ids {
                self.add(group, id, &seeds, &extents);
            }
        }
        self.happen(Happening::Leases);
        self.connect_all();
        let over = match self.scenario.workload.kind {
            WorkloadKind::FlashCrowd => 0.0,
            WorkloadKind::Rolling => self.scenario.workload.over_s,
        };
        let readers: Vec<Index> = self.readers().collect();
        for (turn, &node) in readers.iter().enumerate() {
            let delay = over * turn as f64 / readers.len() as f64;
            self.after(Duration::from_secs_f64(delay) + Duration::from_millis(10), Happening::Start(node));
        }
        for (at, fault) in self.scenario.faults.iter().enumerate() {
            self.after(Duration::from_secs_f64(fault.at_s), Happening::Fault(at));
        }
    }

    fn identities(&mut self, count: usize) -> Vec<PeerId> {
        let mut identity = || {
            let mut bytes = [0; 32];
            self.rng.fill_bytes(&mut bytes);
            PeerId::new(bytes)
        };
        (0..count).map(|_| identity()).collect()
    }

    fn extents(&self) -> Arc<[Range<u64>]> {
        let ends = self.pieces.iter().scan(0, |end, bytes| {
            *end += bytes;
            Some(*end)
        });
        ends.zip(&self.pieces).map(|(end, bytes)| end - bytes..end).collect()
    }

    fn add(&mut self, group: &Nodes, id: PeerId, seeds: &BTreeSet<PeerId>, extents: &Arc<[Range<u64>]>) {
        let mut seed = [0; 32];
        self.rng.fill_bytes(&mut seed);
        let mut scheduler = Scheduler::new(Config::new(id, group.zone.clone()), Time::ZERO, seed);
        let present = Bitfield::new(self.pieces.len() as u32);
        scheduler.handle_event(Time::ZERO, Event::BlobAdded { blob: BLOB, extents: extents.clone(), present });
        let rates = (group.up_mbit, group.down_mbit);
        let node =
            Node::new(id, group.zone.clone(), group.role, scheduler, rates, BLOB, self.pieces.clone(), seeds.clone());
        self.index.insert(id, self.nodes.len());
        self.nodes.push(node);
    }

    /// Every node knows the seed peers of its zone, and some others.
    fn connect_all(&mut self) {
        for at in 0..self.nodes.len() {
            let same = |other: &Index| self.nodes[*other].zone == self.nodes[at].zone;
            let (mut near, mut far): (Vec<Index>, Vec<Index>) =
                (0..self.nodes.len()).filter(|&other| other != at).partition(same);
            let seeds: Vec<_> = near.extract_if(.., |other| self.nodes[*other].role == Role::Seed).collect();
            self.shuffle(&mut near);
            self.shuffle(&mut far);
            let chosen = near.into_iter().take(NEIGHBOURS.0).chain(far.into_iter().take(NEIGHBOURS.1));
            for other in seeds.into_iter().chain(chosen).collect::<Vec<_>>() {
                self.connect(at, other);
            }
        }
    }

    pub(crate) fn shuffle(&mut self, items: &mut [Index]) {
        for at in (1..items.len()).rev() {
            items.swap(at, (self.rng.next_u64() % (at as u64 + 1)) as usize);
        }
    }
}
