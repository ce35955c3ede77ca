//! Who is connected to whom: connections come up, are noticed to be gone, and bring news to those that read.

use shoal_scheduler::Event;

use super::{Happening, Swarm, setup::labels};
use crate::{
    images::{Image, key},
    scenario::Role,
    topology::Index,
};

impl Swarm<'_> {
    pub(super) fn connect(&mut self, a: Index, b: Index) {
        let known = self.standing[a as usize].neighbours.contains(&b);
        if a != b && !known && self.cut_until(a, b).is_none() && self.connecting.insert((a.min(b), a.max(b))) {
            let delay = self.topology.latency(a, b).mul_f64(2.0 * self.scenario.costs.connect_rtts);
            self.after(delay, Happening::Connected(a, b));
        }
    }

    pub(super) fn connected(&mut self, a: Index, b: Index) {
        self.connecting.remove(&(a.min(b), a.max(b)));
        if !self.nodes[a as usize].alive || !self.nodes[b as usize].alive {
            return;
        }
        for (at, other) in [(a, b), (b, a)] {
            self.standing[at as usize].neighbours.insert(other);
            let place = self.topology.place(other);
            let role = match place.role {
                Role::Node => shoal_proto::Role::Node,
                Role::Seed => shoal_proto::Role::Seed,
            };
            let (peer, zone) = (place.id, self.topology.zones[usize::from(place.zone)].clone());
            let labels = labels(place);
            self.tell(at, |node, now| node.handle(now, Event::PeerUp { peer, role, zone, labels }));
        }
        for (at, other) in [(a, b), (b, a)] {
            let started = self.nodes[at as usize].mounts.iter().filter(|mount| mount.started.is_some());
            let images: Vec<Image> = started.map(|mount| mount.image).collect();
            images.into_iter().for_each(|image| self.show_interest(at, other, image));
        }
    }

    /// A node that reads an image hears from now on what its neighbour can serve of it, and what that can serve already.
    pub(super) fn show_interest(&mut self, at: Index, other: Index, image: Image) {
        let place = self.topology.place(other);
        let (peer, serves_all) = (place.id, place.role == Role::Seed);
        let Some(mount) = self.node(other).mount_mut(image) else { return };
        let is_new = mount.audience.listeners.insert(at);
        // Who has not started it yet does not know of it.
        let speaks = serves_all || mount.started.is_some();
        if is_new
            && speaks
            && let Some(have) = self.nodes[other as usize].have(image).cloned()
        {
            let blob = key(image);
            self.tell(at, |node, now| node.handle(now, Event::PeerHave { peer, blob, first: 0, have, full: true }));
        }
    }

    pub(super) fn noticed(&mut self, at: Index, gone: Index) {
        for mount in &mut self.nodes[at as usize].mounts {
            mount.audience.listeners.remove(&gone);
        }
        if self.standing[at as usize].neighbours.remove(&gone) {
            let peer = self.topology.place(gone).id;
            self.tell(at, |node, now| node.lost(now, peer, gone));
        }
    }
}
