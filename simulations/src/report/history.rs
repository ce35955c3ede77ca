//! How a run went over time, for plots.

use super::{Outcome, Reader};
use crate::{
    links::Class,
    scenario::Scenario,
    series::Series,
    tally::{Sender, Trace},
};

/// How a run went over time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct History {
    /// How long the run was, seconds.
    pub end_s: f64,
    /// What links carried, by class.
    pub links: Vec<LinkUse>,
    /// What went where.
    pub moved: Vec<Moved>,
    /// The nodes that read, by their numbers.
    pub nodes: Vec<NodeHistory>,
}

/// What the links of a class carried.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkUse {
    pub(crate) class: Class,
    /// Of the class.
    pub name: String,
    /// What all of them carry at most, payload.
    pub bytes_per_s: f64,
    /// Bytes over time.
    pub carried: Series,
}

/// Bytes from one place to another.
#[derive(Debug, Clone, PartialEq)]
pub struct Moved {
    /// One of the [`SOURCES`](crate::SOURCES).
    pub source: usize,
    /// Zone of the sender, unless it is the registry.
    pub from: Option<String>,
    /// Zone that they went to.
    pub to: String,
    /// How many.
    pub bytes: u64,
}

/// A node that reads.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeHistory {
    /// Its zone.
    pub zone: String,
    /// Whether no fault killed it.
    pub alive: bool,
    /// When it started, seconds from the start of the run.
    pub started_s: Option<f64>,
    /// When it had its first bytes, from there.
    pub first_s: Option<f64>,
    /// When it had everything, from there.
    pub complete_s: Option<f64>,
    /// What it took in.
    pub trace: Trace,
}

impl LinkUse {
    /// Part of what they can carry that was used until the end of the run.
    pub fn mean(&self, end_s: f64) -> f64 {
        if end_s > 0.0 { self.carried.sum() as f64 / (self.bytes_per_s * end_s) } else { 0.0 }
    }
}

impl History {
    pub(super) fn new(scenario: &Scenario, outcome: &mut Outcome) -> Self {
        let zone = |zone: u16| outcome.zones[usize::from(zone)].clone();
        let moved = outcome.tally.moved.iter().map(|(&(from, to), &bytes)| Moved {
            source: from.source(),
            from: match from {
                Sender::Registry => None,
                Sender::Node(_, from) => Some(zone(from)),
            },
            to: zone(to),
            bytes,
        });
        let carried = |class: Class| {
            let bytes_per_s = class.bytes_per_s(scenario).filter(|rate| *rate > 0.0)?;
            let carried = outcome.tally.links.get(&class).cloned().unwrap_or_default();
            Some(LinkUse { class, name: class.name(&outcome.zones), bytes_per_s, carried })
        };
        let links = Class::all(outcome.zones.len() as u16).filter_map(carried).collect();
        let moved = moved.collect();
        let node = |reader: &Reader| NodeHistory {
            zone: outcome.zones[usize::from(reader.zone)].clone(),
            alive: reader.alive,
            started_s: reader.started_s,
            first_s: reader.first_s,
            complete_s: reader.complete_s,
            trace: std::mem::take(&mut outcome.tally.traces[reader.place as usize]),
        };
        let nodes = outcome.readers.iter().map(node).collect();
        Self { end_s: outcome.end_s, links, moved, nodes }
    }

    /// The node that was last to have everything; one that never had it goes before, and one that a fault killed does not count.
    /// Nothing if no node is left.
    pub fn last(&self) -> Option<usize> {
        let end = |node: &NodeHistory| node.started_s.unwrap_or(0.0) + node.complete_s.unwrap_or(f64::INFINITY);
        let living = self.nodes.iter().enumerate().filter(|(_, node)| node.alive);
        // Of equals the first.
        living.rev().max_by(|(_, a), (_, b)| end(a).total_cmp(&end(b))).map(|(at, _)| at)
    }

    /// Seconds from the start of the run at which nodes had what `since_start` says, in order.
    pub fn times(&self, since_start: fn(&NodeHistory) -> Option<f64>) -> Vec<f64> {
        let at = |node: &NodeHistory| Some(node.started_s? + since_start(node)?);
        let mut times: Vec<f64> = self.nodes.iter().filter_map(at).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}
