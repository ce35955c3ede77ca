//! What goes wrong in a swarm, and what the others come to know of it.

use std::time::Duration;

use shoal_scheduler::Time;

use super::{Happening, Swarm};
use crate::{
    flows::LinkId,
    mount::Mount,
    scenario::{FaultKind, Role},
    starts::shuffle,
    topology::{Index, cuts_zone},
};

/// Links that carry less than they should for a while, or nothing.
#[derive(Debug)]
pub(super) struct Cut {
    until: Time,
    links: Vec<LinkId>,
    /// Part of their rates that is left.
    factor: f64,
    /// The nodes inside: between one of them and one outside nothing passes, nor between two of them unless the cut is
    /// around a zone.
    nodes: Vec<Index>,
    around_zone: bool,
    /// Connections that died of it.
    lost: Vec<(Index, Index)>,
}

impl Swarm<'_> {
    pub(super) fn fault(&mut self, at: usize) {
        let fault = self.scenario.faults[at].clone();
        for zone in 0..self.topology.zones.len() as u16 {
            if cuts_zone(&fault, &self.topology.zones[usize::from(zone)]) {
                self.cut_zone(zone, fault.for_s);
                continue;
            }
            let fits = |&node: &Index| {
                let place = self.topology.place(node);
                let name = &self.topology.zones[usize::from(zone)];
                place.zone == zone && self.nodes[node as usize].alive && fault.fits(name, place.role)
            };
            let mut chosen: Vec<Index> = (0..self.topology.len()).filter(fits).collect();
            shuffle(&mut chosen, &mut self.rng);
            chosen.truncate(fault.concerned(chosen.len()));
            match fault.kind {
                FaultKind::Kill => chosen.into_iter().for_each(|node| self.kill(node)),
                FaultKind::Cut => self.cut_nodes(chosen, 0.0, Some(fault.for_s)),
                FaultKind::Slow => self.cut_nodes(chosen, fault.factor, (fault.for_s > 0.0).then_some(fault.for_s)),
                FaultKind::Poison => chosen.into_iter().for_each(|node| self.node(node).poisonous = true),
            }
        }
    }

    /// A node vanishes without a word: its transfers stop, and its neighbours notice when it has been silent for long.
    fn kill(&mut self, gone: Index) {
        let node = self.node(gone);
        node.alive = false;
        let finished = |mount: &Mount| mount.started.is_some() && mount.last.is_some();
        let unfinished = node.mounts.iter().filter(|mount| !finished(mount)).count();
        if self.topology.place(gone).role == Role::Node {
            self.unfinished -= unfinished;
        }
        for flow in self.nodes[gone as usize].serving.flows() {
            self.stop(flow);
        }
        let reads: Vec<_> = self.reads.keys().filter(|(to, _)| *to == gone).copied().collect();
        for read in reads {
            if let Some(flow) = self.reads.remove(&read).and_then(|read| read.flow) {
                self.stop(flow);
            }
        }
        let patience = Duration::from_secs_f64(self.scenario.costs.dead_after_s);
        for other in self.standing[gone as usize].neighbours.clone() {
            for ticket in self.nodes[other as usize].serving.to(gone) {
                let flow = self.node(other).serving.strand(ticket);
                flow.into_iter().for_each(|flow| self.stop(flow));
            }
            self.after(patience, Happening::Noticed { at: other, gone });
        }
    }

    fn cut_zone(&mut self, zone: u16, for_s: f64) {
        let gateway = self.topology.gateways[usize::from(zone)];
        let nodes = (0..self.topology.len()).filter(|&node| self.topology.place(node).zone == zone).collect();
        let links = gateway.out.into_iter().chain(gateway.into).collect();
        let cut = Cut { until: Time::MAX, links, factor: 0.0, nodes, around_zone: true, lost: Vec::new() };
        self.cut(cut, Some(for_s));
    }

    fn cut_nodes(&mut self, nodes: Vec<Index>, factor: f64, for_s: Option<f64>) {
        let links = nodes.iter().map(|&node| self.topology.place(node)).flat_map(|place| [place.up, place.down]);
        let links = links.collect();
        let nodes = if factor == 0.0 { nodes } else { Vec::new() };
        let cut = Cut { until: Time::MAX, links, factor, nodes, around_zone: false, lost: Vec::new() };
        self.cut(cut, for_s);
    }

    fn cut(&mut self, mut cut: Cut, for_s: Option<f64>) {
        let at = self.cuts.len();
        cut.nodes.iter().for_each(|&node| self.standing[node as usize].cut.push(at));
        let silent = Duration::from_secs_f64(self.scenario.costs.dead_after_s);
        let length = for_s.map(Duration::from_secs_f64);
        if let Some(length) = length {
            cut.until = self.now + length;
            self.after(length, Happening::Heal(at));
        }
        if length.is_none_or(|length| length > silent) {
            self.after(silent, Happening::Silence(at));
        }
        let links = cut.links.clone();
        self.cuts.push(cut);
        self.set_rates(links);
    }

    /// Gives links the least of what the cuts that are not healed leave of their rates.
    fn set_rates(&mut self, links: Vec<LinkId>) {
        for link in links {
            let over = self.cuts.iter().filter(|cut| cut.links.contains(&link));
            let left = over.map(|cut| cut.factor).fold(1.0, f64::min);
            let full = *self.full_rates.entry(link).or_insert_with(|| self.flows.rate(link));
            self.flows.set_rate(link, full * left);
        }
    }

    /// Until when nothing passes between two nodes, if so.
    pub(super) fn cut_until(&self, a: Index, b: Index) -> Option<Time> {
        let (of_a, of_b) = (&self.standing[a as usize].cut, &self.standing[b as usize].cut);
        let separates = |at: &&usize| !(self.cuts[**at].around_zone && of_a.contains(at) && of_b.contains(at));
        of_a.iter().chain(of_b).filter(separates).map(|&at| self.cuts[at].until).max()
    }

    /// A cut has lasted until connections across it count as dead.
    pub(super) fn silence(&mut self, at: usize) {
        let mut lost = Vec::new();
        for &node in &self.cuts[at].nodes {
            let across = self.standing[node as usize].neighbours.iter().map(|&other| (node, other));
            lost.extend(across.filter(|&(node, other)| self.cut_until(node, other).is_some()));
        }
        for &(node, other) in &lost {
            self.noticed(node, other);
            self.noticed(other, node);
        }
        self.cuts[at].lost = lost;
    }

    pub(super) fn heal(&mut self, at: usize) {
        let links = std::mem::take(&mut self.cuts[at].links);
        self.set_rates(links);
        for node in self.cuts[at].nodes.clone() {
            self.standing[node as usize].cut.retain(|&cut| cut != at);
        }
        for (a, b) in std::mem::take(&mut self.cuts[at].lost) {
            self.connect(a, b);
        }
    }
}
