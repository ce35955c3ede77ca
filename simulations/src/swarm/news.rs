//! Who hears when of what is new: pieces, by those that read the image, and leases, by everyone.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use shoal_proto::Bitfield;
use shoal_scheduler::{Event, PROMPT, Time, announce_interval};

use super::{Happening, Swarm};
use crate::{
    images::Image,
    scenario::{Role, millis},
    topology::Index,
};

/// What neighbours tell waits for the next event of a node, but not longer: next to the interval of announcements it is
/// nothing, and much less work where there are many.
const TAKE_IN: Duration = Duration::from_millis(10);

impl Swarm<'_> {
    /// Something of an image is new at a node: it takes the next of the turns to tell that come every interval, or tells soon what
    /// presses.
    pub(super) fn expect_tick(&mut self, at: Index, image: Image) {
        let (interval, phase) = (self.scenario.costs.have_ms / 1e3, self.standing[at as usize].phase);
        let turns = (self.now.as_secs_f64() - phase.as_secs_f64()) / interval;
        let turn = Time::ZERO + phase + Duration::from_secs_f64((turns.floor() + 1.0).max(0.0) * interval);
        let Some(mount) = self.nodes[at as usize].mount_mut(image) else { return };
        let next = if mount.has_pressing_news { turn.min(self.now + PROMPT) } else { turn };
        self.tick_at(next.max(self.now), at, image);
    }

    fn tick_at(&mut self, next: Time, at: Index, image: Image) {
        let Some(mount) = self.nodes[at as usize].mount_mut(image) else { return };
        if mount.audience.tick.is_none_or(|tick| next < tick) {
            mount.audience.tick = Some(next);
            self.agenda.push(next, Happening::Tick(at, image));
        }
    }

    /// A node tells what is new of an image, unless it has told so much of late.
    pub(super) fn tick(&mut self, at: Index, image: Image) {
        let node = &mut self.nodes[at as usize];
        let alive = node.alive;
        let Some(mount) = node.mount_mut(image).filter(|mount| mount.audience.tick == Some(self.now)) else { return };
        mount.audience.tick = None;
        if !alive {
            return;
        }
        let (listeners, pressing) = (mount.audience.listeners.len(), mount.has_pressing_news);
        let pause = announce_interval(mount.news.count(), mount.news.len(), pressing, listeners);
        let due = mount.audience.told + pause;
        if self.now < due {
            let next = if pressing { due } else { self.now + millis(self.scenario.costs.have_ms) };
            return self.tick_at(next, at, image);
        }
        mount.audience.told = self.now;
        mount.has_pressing_news = false;
        let empty = Bitfield::new(mount.news.len());
        let news = Arc::new(std::mem::replace(&mut mount.news, empty));
        let zones: BTreeSet<u16> = mount.audience.listeners.iter().map(|&to| self.topology.place(to).zone).collect();
        for zone in zones {
            let delay = self.topology.zone_latency(self.topology.place(at).zone, zone);
            self.after(delay, Happening::Have { from: at, image, zone, news: news.clone() });
        }
    }

    pub(super) fn have(&mut self, from: Index, image: Image, zone: u16, news: &Arc<Bitfield>) {
        let peer = self.topology.place(from).id;
        let Some(mount) = self.node(from).mount_mut(image) else { return };
        let listeners = std::mem::take(&mut mount.audience.listeners);
        for &to in &listeners {
            let reached = self.topology.place(to).zone == zone;
            // Who has everything asks nobody; a message that a cut holds back tells nothing that the next would not.
            let listens = self.nodes[to as usize].alive && self.is_read(to, image);
            if reached
                && listens
                && self.cut_until(from, to).is_none()
                && self.node(to).overhear(peer, image, news.clone())
            {
                self.after(TAKE_IN, Happening::TakeIn(to));
            }
        }
        if let Some(mount) = self.node(from).mount_mut(image) {
            mount.audience.listeners = listeners;
        }
    }

    pub(super) fn leases(&mut self) {
        let life = Duration::from_secs_f64(self.scenario.costs.lease_s);
        let until = self.now + life;
        let seeds: Vec<Index> =
            self.topology.of_role(Role::Seed).filter(|&at| self.nodes[at as usize].alive).collect();
        for at in 0..self.topology.len() {
            for &seed in &seeds {
                let place = self.topology.place(seed);
                let (peer, zone) = (place.id, self.topology.zones[usize::from(place.zone)].clone());
                if self.cut_until(seed, at).is_none() {
                    self.tell(at, |node, now| node.handle(now, Event::Lease { peer, zone, capacity: 100, until }));
                }
            }
        }
        if !seeds.is_empty() {
            self.after(life / 3, Happening::Leases);
        }
    }
}
