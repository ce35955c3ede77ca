//! What a run has shown. The keys of its JSON are those of the cluster harness, with the same meanings.

mod figures;
mod history;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use shoal_scheduler::Time;

pub use self::{
    figures::{Fairness, SeedLoad, Spread},
    history::{History, LinkUse, Moved, NodeHistory},
};
use crate::{
    links::Class,
    scenario::{PAYLOAD_SHARE, Policy, Role, Scenario},
    series::Series,
    tally::{SOURCES, Tally},
    topology::{Index, Topology},
};

/// A node that read.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    pub(crate) place: Index,
    pub(crate) zone: u16,
    pub(crate) alive: bool,
    /// When it started; nothing if it never did. The others count from there.
    pub(crate) started_s: Option<f64>,
    pub(crate) first_s: Option<f64>,
    pub(crate) complete_s: Option<f64>,
    pub(crate) failed_reads: u64,
}

/// What a run leaves.
#[derive(Debug)]
pub(crate) struct Outcome {
    readers: Vec<Reader>,
    zones: Vec<String>,
    /// Of each seed peer: bytes that it sent, and what its uplink carries in a second.
    seeds: Vec<(u64, f64)>,
    tally: Tally,
    end_s: f64,
    events: u64,
}

impl Outcome {
    pub(crate) fn new(topology: &Topology, readers: Vec<Reader>, tally: Tally, end: Time, events: u64) -> Self {
        let sent = |at: Index| (tally.sent[at as usize], topology.place(at).up_bytes_per_s);
        let seeds = topology.of_role(Role::Seed).map(sent).collect();
        // What came last may still have to be decoded.
        let ends = readers.iter().filter_map(|reader| Some(reader.started_s? + reader.complete_s?));
        let end_s = ends.fold(end.as_secs_f64(), f64::max);
        Self { readers, zones: topology.zones.clone(), seeds, tally, end_s, events }
    }
}

/// The keys are a contract with scripts. Times are in seconds from a node's start. What the cluster harness does not measure
/// may be missing from a file that is read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// How the image was distributed.
    #[serde(default)]
    pub policy: Policy,
    /// The seed that was used.
    #[serde(default)]
    pub seed: u64,
    /// Nodes that read.
    pub nodes: usize,
    /// The same by zone.
    #[serde(default)]
    pub nodes_per_zone: BTreeMap<String, usize>,
    /// Those of them that no fault killed.
    pub alive: usize,
    /// Those of them that have everything.
    #[serde(default)]
    pub complete: usize,
    /// How long it all took, from the start of the run to the end of its last node.
    #[serde(default)]
    pub run_seconds: f64,
    /// No schedule is faster; link rates after header costs.
    pub fluid_bound_seconds: f64,
    /// Until a living node had everything.
    pub complete_seconds: Spread,
    /// Until a living node had its first bytes.
    pub first_seconds: Spread,
    /// Until a living node had everything, by zone.
    #[serde(default)]
    pub complete_seconds_per_zone: BTreeMap<String, Spread>,
    /// Until a living node had its first bytes, by zone.
    #[serde(default)]
    pub first_seconds_per_zone: BTreeMap<String, Spread>,
    /// How evenly living nodes were served.
    #[serde(default)]
    pub fairness: Fairness,
    /// What the registry sent to each zone.
    pub registry_bytes_per_zone: BTreeMap<String, u64>,
    /// The same in parts of the image, which each zone has to be sent once.
    #[serde(default)]
    pub registry_images_per_zone: BTreeMap<String, f64>,
    /// What the registry sent over time, to all zones.
    #[serde(default)]
    pub registry_bytes_over_time: Series,
    /// Requests that the registry answered.
    #[serde(default)]
    pub registry_requests: u64,
    /// The whole image.
    pub image_encoded_bytes: u64,
    /// From one zone to another, all headers counted.
    pub cross_zone_bytes: u64,
    /// What the reading nodes received, by where it came from.
    pub received_bytes: BTreeMap<String, u64>,
    /// What seed peers sent.
    #[serde(default)]
    pub seed_load: SeedLoad,
    /// Part of what links can carry that was used until the end of the run, by class of links.
    #[serde(default)]
    pub link_use: BTreeMap<String, f64>,
    /// Bytes that arrived for nothing.
    #[serde(default)]
    pub wasted_bytes: u64,
    /// Requests between nodes, and those of them answered `busy`.
    #[serde(default)]
    pub requests: u64,
    /// See `requests`.
    #[serde(default)]
    pub refused_requests: u64,
    /// Requests, of nodes or of the registry, for a piece that another request of the same node was about to bring.
    #[serde(default)]
    pub hedged_requests: u64,
    /// Reads that ended with an error, and nodes that are not complete.
    pub read_errors: u64,
    /// Bytes that a reader was given and that were wrong; the scheduler's shell lets none through.
    pub wrong_bytes: u64,
    /// Of all daemons, by the costs of the scenario.
    pub cpu_seconds: f64,
    /// Events of the simulation.
    #[serde(default)]
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
#[serde(default)]
pub struct Effort {
    /// Seconds of real time.
    pub wall_seconds: f64,
    /// Most memory that the process had, since its start.
    pub peak_rss_bytes: u64,
}

impl Report {
    pub(crate) fn new(scenario: &Scenario, seed: u64, mut outcome: Outcome) -> Self {
        let history = History::new(scenario, &mut outcome);
        let Outcome { readers, zones, seeds, tally, end_s, events } = &outcome;
        let living = || readers.iter().filter(|reader| reader.alive);
        let complete_s: Vec<f64> = living().filter_map(|reader| reader.complete_s).collect();
        let (alive, complete) = (living().count(), complete_s.len());
        let encoded = scenario.encoded_bytes();
        let zones = || (0..).zip(zones);
        let of_zone = |time: fn(&Reader) -> Option<f64>| {
            let spread = |zone: u16| Spread::of(living().filter(|r| r.zone == zone).filter_map(time).collect());
            zones().map(|(at, name)| (name.clone(), spread(at))).collect()
        };
        let nodes = |zone: u16| readers.iter().filter(|reader| reader.zone == zone).count();
        let registry = || zones().map(|(at, name)| (name.clone(), tally.sent_by_registry(at)));
        let received = SOURCES.iter().zip(tally.received).filter(|(_, bytes)| *bytes > 0);
        let possible: Vec<_> = seeds.iter().map(|&(sent, bytes_per_s)| (sent, bytes_per_s * end_s)).collect();
        Self {
            scenario: scenario.name.clone(),
            policy: scenario.policy,
            seed,
            nodes: readers.len(),
            nodes_per_zone: zones().map(|(at, name)| (name.clone(), nodes(at))).collect(),
            alive,
            complete,
            run_seconds: *end_s,
            fluid_bound_seconds: scenario.bound_s(encoded, PAYLOAD_SHARE),
            fairness: Fairness::of(&complete_s),
            complete_seconds: Spread::of(complete_s),
            first_seconds: Spread::of(living().filter_map(|reader| reader.first_s).collect()),
            complete_seconds_per_zone: of_zone(|reader| reader.complete_s),
            first_seconds_per_zone: of_zone(|reader| reader.first_s),
            registry_bytes_per_zone: registry().collect(),
            registry_images_per_zone: registry().map(|(zone, bytes)| (zone, bytes as f64 / encoded as f64)).collect(),
            registry_bytes_over_time: tally.links.get(&Class::Registry).cloned().unwrap_or_default(),
            registry_requests: tally.registry_requests,
            image_encoded_bytes: encoded,
            cross_zone_bytes: (tally.cross_zone() as f64 / PAYLOAD_SHARE) as u64,
            received_bytes: received.map(|(&name, bytes)| (name.to_owned(), bytes)).collect(),
            seed_load: SeedLoad::of(&possible),
            link_use: history.links.iter().map(|link| (link.name.clone(), link.mean(*end_s))).collect(),
            wasted_bytes: tally.wasted,
            requests: tally.requests,
            refused_requests: tally.refused,
            hedged_requests: tally.hedged,
            read_errors: living().map(|reader| reader.failed_reads).sum::<u64>() + (alive - complete) as u64,
            wrong_bytes: 0,
            cpu_seconds: scenario.costs.cpu_s(tally.all(), tally.all()),
            events: *events,
            effort: Effort::default(),
            history,
        }
    }

    /// Whether every living node has everything.
    pub fn is_right(&self) -> bool {
        self.read_errors == 0 && self.alive > 0
    }

    /// The bytes that the registry sent to the zone that cost it most, by those of the image.
    pub fn copies_per_zone(&self) -> f64 {
        let most = self.registry_bytes_per_zone.values().max().copied().unwrap_or(0);
        most as f64 / self.image_encoded_bytes as f64
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
        for (name, spread) in [("first", self.first_seconds), ("complete", self.complete_seconds)] {
            let Spread { p50, p90, p99, max } = spread;
            writeln!(f, "{name:<9} p50 {p50:.2} s, p90 {p90:.2} s, p99 {p99:.2} s, last {max:.2} s")?;
        }
        let Spread { p50, max, .. } = self.complete_seconds;
        writeln!(f, "bound     {bound:.2} s: p50 {:.2} x, last {:.2} x", p50 / bound, max / bound)?;
        let Fairness { jain_index, last_by_median } = self.fairness;
        writeln!(f, "fairness  {jain_index:.3} by Jain's index, last {last_by_median:.2} x the median")?;
        for (zone, bytes) in &self.registry_bytes_per_zone {
            writeln!(f, "registry  zone {zone} {:.1} MB, {:.3} x the image", mb(*bytes), *bytes as f64 / encoded)?;
        }
        for (source, bytes) in &self.received_bytes {
            let images = *bytes as f64 / encoded / self.nodes.max(1) as f64;
            writeln!(f, "received  {images:.3} images a node from {source}")?;
        }
        let SeedLoad { peers, mean_bytes, most_by_mean, mean_use, most_use, .. } = self.seed_load;
        if peers > 0 {
            writeln!(
                f,
                "seeds     {peers}, {:.1} MB each, the most {most_by_mean:.2} x that; uplinks {:.0}% used, {:.0}% at most",
                mean_bytes / 1e6,
                mean_use * 100.0,
                most_use * 100.0
            )?;
        }
        writeln!(f, "crossed   {:.1} MB between zones", mb(self.cross_zone_bytes))?;
        writeln!(
            f,
            "wasted    {:.1} MB; {} requests, {} of them refused; {} hedges",
            mb(self.wasted_bytes),
            self.requests,
            self.refused_requests,
            self.hedged_requests
        )?;
        write!(f, "errors    {}; {:.0} CPU s of daemons", self.read_errors, self.cpu_seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_the_cluster_harness_is_read() {
        let text = r#"{"scenario": "s", "nodes": 4, "alive": 4, "fluid_bound_seconds": 2.0,
            "complete_seconds": {"p50": 2.5, "p99": 3.0, "max": 3.0}, "first_seconds": {"p50": 0.1, "p99": 0.2, "max": 0.2},
            "registry_bytes_per_zone": {"a": 10}, "image_encoded_bytes": 10, "cross_zone_bytes": 0,
            "received_bytes": {"peer": 40}, "read_errors": 0, "wrong_bytes": 0, "cpu_seconds": 1.5, "counts": true}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        assert!(report.is_right() && report.copies_per_zone() == 1.0, "{report}");
        let without = text.replacen("\"nodes\": 4, ", "", 1);
        assert!(serde_json::from_str::<Report>(&without).unwrap_err().to_string().contains("nodes"));
    }
}
