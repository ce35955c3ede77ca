//! Who is connected to whom: connections come up, are noticed to be gone, and bring news to those that read.

use shoal_scheduler::Event;

use super::{Happening, Swarm, setup::labels};
use crate::{node::BLOB, scenario::Role, topology::Index};

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
        self.show_interest(a, b);
        self.show_interest(b, a);
    }

    /// A node that reads hears from now on what its neighbour can serve.
    pub(super) fn show_interest(&mut self, at: Index, other: Index) {
        if self.nodes[at as usize].started.is_some() && self.standing[other as usize].listeners.insert(at) {
            let (peer, have) = (self.topology.place(other).id, self.nodes[other as usize].have().clone());
            self.tell(at, |node, now| {
                node.handle(now, Event::PeerHave { peer, blob: BLOB, first: 0, have, full: true });
            });
        }
    }

    pub(super) fn noticed(&mut self, at: Index, gone: Index) {
        let standing = &mut self.standing[at as usize];
        standing.listeners.remove(&gone);
        if standing.neighbours.remove(&gone) {
            let peer = self.topology.place(gone).id;
            self.tell(at, |node, now| node.lost(now, peer, gone));
        }
    }
}
