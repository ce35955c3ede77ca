//! What a run showed, as one JSON object and for people.

use std::{collections::BTreeMap, fmt, time::Duration};

use serde::Serialize;
use shoal::layout_server::RegistryFigures;
use shoal_sim::{PAYLOAD_SHARE, Scenario, Spread};

use super::{
    image::Image,
    meter::Usage,
    network::{Links, Network},
    nodes::Traffic,
    readers::Outcome,
};

/// A machine that was busier than this was the bottleneck itself.
const MOST_BUSY: f64 = 0.75;

/// What was measured.
pub(super) struct Figures {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) elapsed: Duration,
    pub(super) usage: Usage,
    pub(super) links: Links,
    pub(super) traffic: Traffic,
    /// Which of the nodes that read are alive.
    pub(super) alive: Vec<bool>,
}

/// The keys are a contract with scripts. Times are in seconds from the start of all nodes.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// Nodes that read.
    pub nodes: usize,
    /// Those of them that no fault killed.
    pub alive: usize,
    /// No schedule is faster; link rates after header costs.
    pub fluid_bound_seconds: f64,
    /// Until a living node had read everything.
    pub complete_seconds: Spread,
    /// Until a living node had read its first bytes.
    pub first_seconds: Spread,
    /// What the registry sent to each zone, everything above TCP counted.
    pub registry_bytes_per_zone: BTreeMap<String, u64>,
    /// Blobs and bootstrap layer.
    pub image_encoded_bytes: u64,
    /// From one zone to another, all headers counted.
    pub cross_zone_bytes: u64,
    /// What the living nodes received, by where it came from.
    pub received_bytes: BTreeMap<&'static str, u64>,
    /// Files that a living node could not read to their end.
    pub read_errors: u64,
    /// Bytes that a living node read and that were wrong.
    pub wrong_bytes: u64,
    /// Of all daemons and the registry.
    pub cpu_seconds: f64,
    /// Of the harness, which reads and compares.
    pub harness_cpu_seconds: f64,
    /// Part of the machine's CPU time that was used, by whomever.
    pub busy_fraction: f64,
    /// False if the machine was the bottleneck: then the times say nothing about the swarm.
    pub counts: bool,
}

impl Report {
    pub(super) fn new(
        scenario: &Scenario,
        image: &Image,
        network: &Network,
        figures: &Figures,
        registry: &RegistryFigures,
    ) -> Self {
        let living: Vec<_> =
            figures.outcomes.iter().zip(&figures.alive).filter(|(_, alive)| **alive).map(|(o, _)| o).collect();
        for error in living.iter().filter_map(|outcome| outcome.error.as_ref()) {
            eprintln!("cluster: {error}");
        }
        let spread = |of: fn(&Outcome) -> f64| Spread::of(living.iter().map(|outcome| of(outcome)).collect());
        let mut per_zone: BTreeMap<_, _> = scenario.zones.iter().map(|zone| (zone.name.clone(), 0)).collect();
        for (client, bytes) in &registry.clients {
            *per_zone.entry(network.zone_of(client).unwrap_or("elsewhere").to_owned()).or_default() += bytes;
        }
        let Traffic { peer, seed, registry } = figures.traffic;
        let failed_starts = living.iter().filter(|outcome| outcome.error.is_some()).count() as u64;
        Self {
            scenario: scenario.name.clone(),
            nodes: figures.outcomes.len(),
            alive: living.len(),
            fluid_bound_seconds: scenario.bound_s(image.encoded_bytes, PAYLOAD_SHARE),
            complete_seconds: spread(|outcome| outcome.seconds),
            first_seconds: spread(|outcome| outcome.first_seconds),
            registry_bytes_per_zone: per_zone,
            image_encoded_bytes: image.encoded_bytes,
            cross_zone_bytes: figures.links.cross_zone,
            received_bytes: [("peer", peer), ("seed", seed), ("registry", registry)].into(),
            read_errors: living.iter().map(|outcome| outcome.read_errors).sum::<u64>() + failed_starts,
            wrong_bytes: living.iter().map(|outcome| outcome.wrong_bytes).sum(),
            cpu_seconds: figures.usage.cpu_seconds,
            harness_cpu_seconds: figures.usage.harness_cpu_seconds,
            busy_fraction: figures.usage.busy,
            counts: figures.usage.busy <= MOST_BUSY && figures.elapsed > Duration::ZERO,
        }
    }

    /// Whether every living node read everything, and it was right.
    pub fn is_right(&self) -> bool {
        self.read_errors == 0 && self.wrong_bytes == 0 && self.alive > 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spread { p50, p90, p99, max } = self.complete_seconds;
        let (bound, encoded) = (self.fluid_bound_seconds, self.image_encoded_bytes as f64);
        let mb = |bytes: u64| bytes as f64 / 1e6;
        writeln!(
            f,
            "{}: {} nodes, {} alive at the end, {:.1} MB",
            self.scenario,
            self.nodes,
            self.alive,
            encoded / 1e6
        )?;
        writeln!(
            f,
            "complete  p50 {p50:.1} s, p90 {p90:.1} s, p99 {p99:.1} s, last {max:.1} s; first bytes {:.1} s",
            self.first_seconds.p50
        )?;
        writeln!(f, "bound     {bound:.1} s: p50 {:.2} x, last {:.2} x", p50 / bound, max / bound)?;
        for (zone, bytes) in &self.registry_bytes_per_zone {
            writeln!(f, "registry  zone {zone} {:.1} MB, {:.3} x the image", mb(*bytes), *bytes as f64 / encoded)?;
        }
        for (source, bytes) in &self.received_bytes {
            writeln!(
                f,
                "received  {:.3} images a node from {source}",
                *bytes as f64 / encoded / self.alive.max(1) as f64
            )?;
        }
        writeln!(f, "crossed   {:.1} MB between zones", mb(self.cross_zone_bytes))?;
        writeln!(f, "wrong     {} bytes, {} read errors", self.wrong_bytes, self.read_errors)?;
        write!(
            f,
            "machine   {:.0}% busy, {:.1} CPU s of daemons, {:.1} of the harness{}",
            self.busy_fraction * 100.0,
            self.cpu_seconds,
            self.harness_cpu_seconds,
            if self.counts { "" } else { ": too busy, this run does not count" }
        )
    }
}
