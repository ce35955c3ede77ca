//! What a run has shown. The keys of its JSON are those of the cluster harness, with the same meanings.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::{
    images::Image,
    scenario::{PAYLOAD_SHARE, Policy, Scenario},
    tally::{Series, Tally},
    topology::Index,
};

/// A node that read an image.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    pub(crate) node: Index,
    pub(crate) image: Image,
    pub(crate) zone: u16,
    pub(crate) alive: bool,
    /// When it started; nothing if it never did. The others count from there.
    pub(crate) started_s: Option<f64>,
    pub(crate) first_s: Option<f64>,
    pub(crate) start_s: Option<f64>,
    pub(crate) complete_s: Option<f64>,
    pub(crate) failed_reads: u64,
}

/// What a run leaves.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) readers: Vec<Reader>,
    pub(crate) zones: Vec<String>,
    pub(crate) tally: Tally,
    pub(crate) events: u64,
}

/// The keys are a contract with scripts. Times are in seconds from a node's start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// How the image was distributed.
    pub policy: Policy,
    /// The seed that was used.
    pub seed: u64,
    /// Nodes that read.
    pub nodes: usize,
    /// Those of them that no fault killed.
    pub alive: usize,
    /// Those of them that have everything that they fetch.
    pub complete: usize,
    /// The last is no faster with any schedule; link rates after header costs.
    pub fluid_bound_seconds: f64,
    /// Until a living node had everything that it fetches; as all times here of each image by itself, if it starts several.
    pub complete_seconds: Spread,
    /// Until a living node had its first bytes.
    pub first_seconds: Spread,
    /// Until a living node had all that its start reads.
    pub start_seconds: Spread,
    /// Until a living node had everything, by zone.
    pub complete_seconds_per_zone: BTreeMap<String, Spread>,
    /// Different images that were asked for in each zone.
    pub images_per_zone: BTreeMap<String, usize>,
    /// What the registry sent to each zone.
    pub registry_bytes_per_zone: BTreeMap<String, u64>,
    /// Requests that the registry answered.
    pub registry_requests: u64,
    /// The whole image.
    pub image_encoded_bytes: u64,
    /// From one zone to another, all headers counted.
    pub cross_zone_bytes: u64,
    /// What the reading nodes received, by where it came from.
    pub received_bytes: BTreeMap<String, u64>,
    /// Bytes that arrived for nothing.
    pub wasted_bytes: u64,
    /// Requests between nodes, and those of them answered `busy`.
    pub requests: u64,
    /// See `requests`.
    pub refused_requests: u64,
    /// Reads that ended with an error, and nodes that are not complete.
    pub read_errors: u64,
    /// Bytes that a reader was given and that were wrong; the scheduler's shell lets none through.
    pub wrong_bytes: u64,
    /// Of all daemons, by the costs of the scenario.
    pub cpu_seconds: f64,
    /// Events of the simulation.
    pub events: u64,
    /// What it took to find out. Filled in by whoever runs it: the only keys in which equal runs differ.
    #[serde(flatten)]
    pub effort: Effort,
    /// For plots; not in the JSON.
    #[serde(skip)]
    pub history: History,
}

/// What a simulation cost the machine that it ran on.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Effort {
    /// Seconds of real time.
    pub wall_seconds: f64,
    /// Most memory that the process had, since its start.
    pub peak_rss_bytes: u64,
}

/// How a run went over time.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct History {
    /// Seconds from the start of the run at which a node was complete, in order.
    pub completions_s: Vec<f64>,
    /// Bytes that arrived in equal slices of time, by who sent them; with the length of a slice, seconds.
    pub arrived: BTreeMap<String, (f64, Vec<u64>)>,
    /// Bytes that arrived, by who sent them and by zone: `registry`, or `peer` or `seed` and their zone.
    pub moved: BTreeMap<(String, String), u64>,
}

/// Median, 99th percentile and maximum.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spread {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Maximum.
    pub max: f64,
}

impl Spread {
    /// Of these values; zeros if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let index = (values.len() as f64 * part).ceil() as usize;
            values.get(index.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl Report {
    pub(crate) fn new(scenario: &Scenario, seed: u64, outcome: Outcome) -> Self {
        let Outcome { readers, zones, tally, events } = &outcome;
        let living = || readers.iter().filter(|reader| reader.alive);
        let missing = || living().filter(|reader| reader.complete_s.is_none());
        let alive = nodes_of(living());
        let complete = alive - nodes_of(missing());
        let asked_for = |zone: u16| {
            let asked = readers.iter().filter(|reader| reader.zone == zone && reader.started_s.is_some());
            asked.map(|reader| reader.image).collect::<BTreeSet<Image>>().len()
        };
        let of_zone = |zone: u16| living().filter(move |reader| reader.zone == zone);
        let zones = || (0..).zip(zones);
        let (encoded, bytes) = (scenario.encoded_bytes(), scenario.fetched_bytes());
        let images_per_zone: BTreeMap<_, _> = zones().map(|(at, name)| (name.clone(), asked_for(at))).collect();
        Self {
            scenario: scenario.name.clone(),
            policy: scenario.policy,
            seed,
            nodes: nodes_of(readers.iter()),
            alive,
            complete,
            fluid_bound_seconds: scenario.workload_bound_s(bytes, PAYLOAD_SHARE, images_per_zone.values().sum()),
            complete_seconds: Spread::of(living().filter_map(|reader| reader.complete_s).collect()),
            first_seconds: Spread::of(living().filter_map(|reader| reader.first_s).collect()),
            start_seconds: Spread::of(living().filter_map(|reader| reader.start_s).collect()),
            complete_seconds_per_zone: zones()
                .map(|(at, name)| (name.clone(), Spread::of(of_zone(at).filter_map(|r| r.complete_s).collect())))
                .collect(),
            images_per_zone,
            registry_bytes_per_zone: zones().map(|(at, name)| (name.clone(), tally.sent_by_registry(at))).collect(),
            registry_requests: tally.registry_requests,
            image_encoded_bytes: encoded,
            cross_zone_bytes: (tally.cross_zone() as f64 / PAYLOAD_SHARE) as u64,
            received_bytes: tally.received.iter().map(|(&name, &bytes)| (name.to_owned(), bytes)).collect(),
            wasted_bytes: tally.wasted,
            requests: tally.requests,
            refused_requests: tally.refused,
            read_errors: living().map(|reader| reader.failed_reads).sum::<u64>() + missing().count() as u64,
            wrong_bytes: 0,
            cpu_seconds: scenario.costs.cpu_s(tally.all(), tally.all()),
            events: *events,
            effort: Effort::default(),
            history: History::new(&outcome),
        }
    }

    /// Whether every living node has everything.
    pub fn is_right(&self) -> bool {
        self.read_errors == 0 && self.alive > 0
    }

    /// What the registry sent to a zone, in parts of all images that were asked for there.
    fn copies(&self, zone: &str) -> f64 {
        let of = |images: Option<&usize>| images.copied().unwrap_or_default().max(1) as f64;
        let bytes = self.registry_bytes_per_zone.get(zone).copied().unwrap_or_default();
        bytes as f64 / self.image_encoded_bytes as f64 / of(self.images_per_zone.get(zone))
    }

    /// The same for the zone that cost it most.
    pub fn copies_per_zone(&self) -> f64 {
        self.registry_bytes_per_zone.keys().map(|zone| self.copies(zone)).fold(0.0, f64::max)
    }
}

/// How many nodes these are, whatever each of them reads.
fn nodes_of<'a>(readers: impl Iterator<Item = &'a Reader>) -> usize {
    readers.map(|reader| reader.node).collect::<BTreeSet<Index>>().len()
}

impl History {
    fn new(outcome: &Outcome) -> Self {
        let ends = outcome.readers.iter().filter_map(|reader| Some(reader.started_s? + reader.complete_s?));
        let mut completions_s: Vec<f64> = ends.collect();
        completions_s.sort_by(f64::total_cmp);
        let series = |(&name, series): (&&str, &Series)| (name.to_owned(), (series.slice_s, series.bytes.clone()));
        let mut moved = BTreeMap::new();
        for (&(from, to), &bytes) in &outcome.tally.moved {
            let name = match from {
                crate::tally::Sender::Registry => from.name().to_owned(),
                crate::tally::Sender::Node(_, zone) => {
                    format!("{}s of {}", from.name(), outcome.zones[usize::from(zone)])
                }
            };
            moved.insert((name, outcome.zones[usize::from(to)].clone()), bytes);
        }
        Self { completions_s, arrived: outcome.tally.series.iter().map(series).collect(), moved }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bound, encoded) = (self.fluid_bound_seconds, self.image_encoded_bytes as f64);
        let mb = |bytes: u64| bytes as f64 / 1e6;
        writeln!(
            f,
            "{} (seed {}): {} of {} living nodes complete, {:.1} MB",
            self.scenario,
            self.seed,
            self.complete,
            self.alive,
            encoded / 1e6
        )?;
        for (name, Spread { p50, p99, max }) in
            [("first", self.first_seconds), ("start", self.start_seconds), ("complete", self.complete_seconds)]
        {
            writeln!(f, "{name:<9} p50 {p50:.2} s, p99 {p99:.2} s, last {max:.2} s")?;
        }
        let Spread { p50, max, .. } = self.complete_seconds;
        writeln!(f, "bound     {bound:.2} s: p50 {:.2} x, last {:.2} x", p50 / bound, max / bound)?;
        for (zone, bytes) in &self.registry_bytes_per_zone {
            let images = match self.images_per_zone.get(zone) {
                None | Some(0 | 1) => "the image".to_owned(),
                Some(images) => format!("its {images} images"),
            };
            writeln!(f, "registry  zone {zone} {:.1} MB, {:.3} x {images}", mb(*bytes), self.copies(zone))?;
        }
        for (source, bytes) in &self.received_bytes {
            let images = *bytes as f64 / encoded / self.nodes.max(1) as f64;
            writeln!(f, "received  {images:.3} images a node from {source}")?;
        }
        writeln!(f, "crossed   {:.1} MB between zones", mb(self.cross_zone_bytes))?;
        writeln!(
            f,
            "wasted    {:.1} MB; {} requests, {} of them refused",
            mb(self.wasted_bytes),
            self.requests,
            self.refused_requests
        )?;
        write!(f, "errors    {}; {:.0} CPU s of daemons", self.read_errors, self.cpu_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(Vec::new()), Spread::default());
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { p50: 2.0, p99: 3.0, max: 3.0 });
        assert_eq!(Spread::of((1..=100).map(f64::from).collect()), Spread { p50: 50.0, p99: 99.0, max: 100.0 });
    }
}
