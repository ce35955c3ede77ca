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
    /// Its images, in order; most nodes have one.
    pub starts: Vec<StartHistory>,
    /// What it took in, of all of them.
    pub trace: Trace,
}

/// An image on a node that reads it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StartHistory {
    /// Which image, from 0, the most popular first.
    pub image: u16,
    /// When it started, seconds from the start of the run.
    pub started_s: Option<f64>,
    /// When the node had its first bytes, from there.
    pub first_s: Option<f64>,
    /// When it had all that a start reads, from there.
    pub start_s: Option<f64>,
    /// When it had everything that it fetches, from there.
    pub complete_s: Option<f64>,
}

impl StartHistory {
    /// Seconds from the start of the run at which it had what `since_start` says.
    pub fn at(&self, since_start: fn(&Self) -> Option<f64>) -> Option<f64> {
        Some(self.started_s? + since_start(self)?)
    }
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
        let start = |reader: &Reader| StartHistory {
            image: reader.image,
            started_s: reader.started_s,
            first_s: reader.first_s,
            start_s: reader.start_s,
            complete_s: reader.complete_s,
        };
        let node = |readers: &[Reader]| NodeHistory {
            zone: outcome.zones[usize::from(readers[0].zone)].clone(),
            alive: readers[0].alive,
            starts: readers.iter().map(start).collect(),
            trace: std::mem::take(&mut outcome.tally.traces[readers[0].node as usize]),
        };
        let nodes = outcome.readers.chunk_by(|a, b| a.node == b.node).map(node).collect();
        Self { end_s: outcome.end_s, links, moved, nodes }
    }

    /// The node that was last to have everything; one that never had it goes before, and one that a fault killed does not count.
    /// Nothing if no node is left.
    pub fn last(&self) -> Option<usize> {
        let start_end = |start: &StartHistory| start.at(|start| start.complete_s).unwrap_or(f64::INFINITY);
        let end = |node: &NodeHistory| node.starts.iter().map(start_end).fold(0.0, f64::max);
        let living = self.nodes.iter().enumerate().filter(|(_, node)| node.alive);
        // Of equals the first.
        living.rev().max_by(|(_, a), (_, b)| end(a).total_cmp(&end(b))).map(|(at, _)| at)
    }

    /// Seconds from the start of the run at which starts had what `since_start` says, in order.
    pub fn times(&self, since_start: fn(&StartHistory) -> Option<f64>) -> Vec<f64> {
        let starts = self.nodes.iter().flat_map(|node| &node.starts);
        let mut times: Vec<f64> = starts.filter_map(|start| start.at(since_start)).collect();
        times.sort_by(f64::total_cmp);
        times
    }
}
