//! What a run has shown. The keys of its JSON are those of the cluster harness, with the same meanings.

mod figures;
mod history;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};
use shoal_scheduler::Time;

pub use self::{
    figures::{Fairness, SeedLoad, Spread},
    history::{History, LinkUse, Moved, NodeHistory, StartHistory},
};
use crate::{
    images::Image,
    links::Class,
    scenario::{PAYLOAD_SHARE, Policy, Role, Scenario},
    series::Series,
    tally::{SOURCES, Tally},
    topology::{Index, Topology},
};

/// A node that read an image. Those of one node follow each other.
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
    /// Those of them that have everything that they fetch.
    #[serde(default)]
    pub complete: usize,
    /// Images that the nodes start, all together: one for each of them, or several.
    #[serde(default)]
    pub starts: usize,
    /// How long it all took, from the start of the run to the end of its last node.
    #[serde(default)]
    pub run_seconds: f64,
    /// The last is no faster with any schedule; link rates after header costs.
    pub fluid_bound_seconds: f64,
    /// Until a living node had everything that it fetches; as all times here of each image by itself, if it starts several.
    pub complete_seconds: Spread,
    /// Until a living node had its first bytes.
    pub first_seconds: Spread,
    /// Until a living node had all that its start reads.
    #[serde(default)]
    pub start_seconds: Spread,
    /// Until a living node had everything, by zone.
    #[serde(default)]
    pub complete_seconds_per_zone: BTreeMap<String, Spread>,
    /// Until a living node had its first bytes, by zone.
    #[serde(default)]
    pub first_seconds_per_zone: BTreeMap<String, Spread>,
    /// Until a living node had all that its start reads, by zone.
    #[serde(default)]
    pub start_seconds_per_zone: BTreeMap<String, Spread>,
    /// How evenly the starts of living nodes were served.
    #[serde(default)]
    pub fairness: Fairness,
    /// Different images that were asked for in each zone.
    #[serde(default)]
    pub images_per_zone: BTreeMap<String, usize>,
    /// What the registry sent to each zone.
    pub registry_bytes_per_zone: BTreeMap<String, u64>,
    /// The same in parts of all images that were asked for there, each of which the zone has to be sent once.
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
    /// What a start fetches of it.
    #[serde(default)]
    pub image_fetched_bytes: u64,
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
    /// Reads that ended with an error, and starts that are not complete.
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
        let missing = || living().filter(|reader| reader.complete_s.is_none());
        let alive = nodes_of(living());
        let complete = alive - nodes_of(missing());
        let zones = || (0..).zip(zones);
        let asked_for = |zone: u16| {
            let asked = readers.iter().filter(|reader| reader.zone == zone && reader.started_s.is_some());
            asked.map(|reader| reader.image).collect::<BTreeSet<Image>>().len()
        };
        let images_per_zone: BTreeMap<_, _> = zones().map(|(at, name)| (name.clone(), asked_for(at))).collect();
        let (encoded, fetched) = (scenario.encoded_bytes(), scenario.fetched_bytes());
        let spread = |time: fn(&Reader) -> Option<f64>| Spread::of(living().filter_map(time).collect());
        let of_zone = |time: fn(&Reader) -> Option<f64>| {
            let spread = |zone: u16| Spread::of(living().filter(|r| r.zone == zone).filter_map(time).collect());
            zones().map(|(at, name)| (name.clone(), spread(at))).collect()
        };
        let nodes = |zone: u16| nodes_of(readers.iter().filter(|reader| reader.zone == zone));
        let complete_s: Vec<f64> = living().filter_map(|reader| reader.complete_s).collect();
        let received = SOURCES.iter().zip(tally.received).filter(|(_, bytes)| *bytes > 0);
        let possible: Vec<_> = seeds.iter().map(|&(sent, bytes_per_s)| (sent, bytes_per_s * end_s)).collect();
        let sent: BTreeMap<_, _> = zones().map(|(at, name)| (name.clone(), tally.sent_by_registry(at))).collect();
        Self {
            scenario: scenario.name.clone(),
            policy: scenario.policy,
            seed,
            nodes: nodes_of(readers.iter()),
            nodes_per_zone: zones().map(|(at, name)| (name.clone(), nodes(at))).collect(),
            alive,
            complete,
            starts: readers.len(),
            run_seconds: *end_s,
            fluid_bound_seconds: scenario.workload_bound_s(fetched, PAYLOAD_SHARE, images_per_zone.values().sum()),
            fairness: Fairness::of(&complete_s),
            complete_seconds: Spread::of(complete_s),
            first_seconds: spread(|reader| reader.first_s),
            start_seconds: spread(|reader| reader.start_s),
            complete_seconds_per_zone: of_zone(|reader| reader.complete_s),
            first_seconds_per_zone: of_zone(|reader| reader.first_s),
            start_seconds_per_zone: of_zone(|reader| reader.start_s),
            registry_images_per_zone: in_images(&sent, encoded, &images_per_zone),
            registry_bytes_per_zone: sent,
            images_per_zone,
            registry_bytes_over_time: tally.links.get(&Class::Registry).cloned().unwrap_or_default(),
            registry_requests: tally.registry_requests,
            image_encoded_bytes: encoded,
            image_fetched_bytes: fetched,
            cross_zone_bytes: (tally.cross_zone() as f64 / PAYLOAD_SHARE) as u64,
            received_bytes: received.map(|(&name, bytes)| (name.to_owned(), bytes)).collect(),
            seed_load: SeedLoad::of(&possible),
            link_use: history.links.iter().map(|link| (link.name.clone(), link.mean(*end_s))).collect(),
            wasted_bytes: tally.wasted,
            requests: tally.requests,
            refused_requests: tally.refused,
            hedged_requests: tally.hedged,
            read_errors: living().map(|reader| reader.failed_reads).sum::<u64>() + missing().count() as u64,
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

    /// What the registry sent to the zone that cost it most, in images that were asked for there.
    pub fn copies_per_zone(&self) -> f64 {
        self.copies().into_values().fold(0.0, f64::max)
    }

    /// [`Self::registry_images_per_zone`], which not all reports have that are read.
    fn copies(&self) -> BTreeMap<String, f64> {
        in_images(&self.registry_bytes_per_zone, self.image_encoded_bytes, &self.images_per_zone)
    }
}

/// Bytes by zone, in parts of the images that were asked for in each; of one image where nothing is said of that.
fn in_images(
    bytes: &BTreeMap<String, u64>,
    encoded: u64,
    images_per_zone: &BTreeMap<String, usize>,
) -> BTreeMap<String, f64> {
    let images = |zone: &String| images_per_zone.get(zone).copied().unwrap_or_default().max(1) as f64;
    bytes.iter().map(|(zone, &bytes)| (zone.clone(), bytes as f64 / encoded as f64 / images(zone))).collect()
}

/// How many nodes these are, whatever each of them reads.
fn nodes_of<'a>(readers: impl Iterator<Item = &'a Reader>) -> usize {
    readers.map(|reader| reader.node).collect::<BTreeSet<Index>>().len()
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
        for (name, spread) in
            [("first", self.first_seconds), ("start", self.start_seconds), ("complete", self.complete_seconds)]
        {
            let Spread { p50, p90, p99, max } = spread;
            writeln!(f, "{name:<9} p50 {p50:.2} s, p90 {p90:.2} s, p99 {p99:.2} s, last {max:.2} s")?;
        }
        let Spread { p50, max, .. } = self.complete_seconds;
        writeln!(f, "bound     {bound:.2} s: p50 {:.2} x, last {:.2} x", p50 / bound, max / bound)?;
        let Fairness { jain_index, last_by_median } = self.fairness;
        writeln!(f, "fairness  {jain_index:.3} by Jain's index, last {last_by_median:.2} x the median")?;
        for ((zone, bytes), copies) in self.registry_bytes_per_zone.iter().zip(self.copies().into_values()) {
            let images = match self.images_per_zone.get(zone) {
                None | Some(0 | 1) => "the image".to_owned(),
                Some(images) => format!("its {images} images"),
            };
            writeln!(f, "registry  zone {zone} {:.1} MB, {copies:.3} x {images}", mb(*bytes))?;
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
        let several = text.replacen('{', r#"{"images_per_zone": {"a": 4},"#, 1);
        assert_eq!(serde_json::from_str::<Report>(&several).unwrap().copies_per_zone(), 0.25, "of four images");
        let without = text.replacen("\"nodes\": 4, ", "", 1);
        assert!(serde_json::from_str::<Report>(&without).unwrap_err().to_string().contains("nodes"));
    }
}
