//! Scenario files: a swarm, an image, a workload and what goes wrong. The keys are those of the design's scenario
//! page; unknown keys are refused, so that a typing error does not silently simulate something else.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

/// A scenario as its file says it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// What the report calls it.
    pub name: String,
    /// Seed of everything random, unless the command line names another. Default 1.
    #[serde(default = "one")]
    pub seed: u64,
    /// The registry.
    pub registry: Registry,
    /// What is fetched.
    pub image: Image,
    /// The zones.
    pub zones: Vec<Zone>,
    /// The nodes, in groups.
    pub nodes: Vec<Nodes>,
    /// Who reads what when.
    pub workload: Workload,
    /// What goes wrong.
    #[serde(default)]
    pub faults: Vec<Fault>,
}

fn one() -> u64 {
    1
}

/// The registry, shared by all zones.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registry {
    /// What it sends at most, megabit per second.
    pub egress_mbit: f64,
    /// Time to the first byte of an answer, milliseconds. Default 5.
    #[serde(default = "five")]
    pub latency_ms: f64,
}

fn five() -> f64 {
    5.0
}

/// The image: one blob of equal pieces.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Encoded size, MiB.
    pub encoded_mib: f64,
    /// Encoded size of a piece, KiB.
    pub piece_kib: u64,
    /// Decoded by encoded bytes; in the simulator it scales nothing but the report. Default 1.
    #[serde(default = "ratio")]
    pub decoded_ratio: f64,
    /// Another image that all nodes have read before, and how much of this one it has.
    #[serde(default)]
    pub shares: Option<Shares>,
}

/// What an image has in common with an earlier one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shares {
    /// Tag of the earlier image.
    pub with: String,
    /// Part of the chunks that both have, between 0 and 1.
    pub fraction: f64,
}

fn ratio() -> f64 {
    1.0
}

/// A zone.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Zone {
    /// Its name.
    pub name: String,
    /// One-way latency to other zones, milliseconds; 10 where neither says.
    #[serde(default)]
    pub latency_ms: BTreeMap<String, f64>,
}

/// A group of equal nodes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nodes {
    /// Their zone.
    pub zone: String,
    /// Their role.
    pub role: Role,
    /// How many.
    pub count: usize,
    /// What each sends at most, megabit per second.
    pub up_mbit: f64,
    /// What each receives at most, megabit per second.
    pub down_mbit: f64,
}

/// What a node does for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Reads the image.
    Node,
    /// Reads the registry for the others.
    Seed,
}

/// Who reads what when.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The kind.
    pub kind: WorkloadKind,
    /// How much of the image.
    pub read: Read,
    /// For `rolling`: the nodes start one after the other over this time, seconds.
    #[serde(default)]
    pub over_s: f64,
    /// Pieces that a reader waits for at a time, in order, beside the prefetch of all. Default 0.
    #[serde(default)]
    pub on_demand: usize,
}

/// When nodes start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadKind {
    /// All at once.
    FlashCrowd,
    /// Evenly over `over_s`.
    Rolling,
}

/// What a node reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Read {
    /// Every piece.
    All,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// When, seconds.
    pub at_s: f64,
    /// What.
    pub kind: FaultKind,
    /// To whom. Without it, and for `cut` only, to the zone's link to the rest of the world.
    #[serde(default)]
    pub select: Option<Role>,
    /// In which zone. Default: in each.
    #[serde(default)]
    pub zone: Option<String>,
    /// To which part of them, rounded up. Default all.
    #[serde(default = "ratio")]
    pub fraction: f64,
    /// How long a cut lasts, seconds.
    #[serde(default)]
    pub for_s: f64,
}

impl Fault {
    /// How many of `count` nodes that fit it concerns.
    pub fn concerned(&self, count: usize) -> usize {
        (count as f64 * self.fraction).ceil() as usize
    }

    /// Whether it concerns nodes of this zone and role.
    pub fn fits(&self, zone: &str, role: Role) -> bool {
        self.select == Some(role) && self.zone.as_deref().is_none_or(|only| only == zone)
    }
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// They vanish without a word.
    Kill,
    /// They are cut off for `for_s`; only the cluster harness can do that so far.
    Cut,
}

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML, or not the keys of a scenario.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A value that makes no sense.
    #[error("{0}")]
    Value(String),
}

/// Most nodes, and most pieces, of a scenario.
const MAX: u64 = 1 << 20;

impl Scenario {
    /// Parses and checks a scenario file.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text)?;
        scenario.check().map_err(ScenarioError::Value)?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        positive("registry.egress_mbit", self.registry.egress_mbit)?;
        not_negative("registry.latency_ms", self.registry.latency_ms)?;
        positive("image.encoded_mib", self.image.encoded_mib)?;
        positive("image.decoded_ratio", self.image.decoded_ratio)?;
        not_negative("workload.over_s", self.workload.over_s)?;
        if self.image.piece_kib == 0 || self.encoded_bytes() / (self.image.piece_kib << 10) > MAX {
            return Err(format!("image.piece_kib = {} makes no piece or too many", self.image.piece_kib));
        }
        for nodes in &self.nodes {
            positive("nodes.up_mbit", nodes.up_mbit)?;
            positive("nodes.down_mbit", nodes.down_mbit)?;
            if !self.zones.iter().any(|zone| zone.name == nodes.zone) {
                return Err(format!("nodes.zone = {:?} is not among the zones", nodes.zone));
            }
        }
        for latency in self.zones.iter().flat_map(|zone| zone.latency_ms.values()) {
            not_negative("zones.latency_ms", *latency)?;
        }
        let count: u64 = self.nodes.iter().map(|nodes| nodes.count as u64).sum();
        if count == 0 || count > MAX {
            return Err(format!("{count} nodes; from 1 to {MAX} can be simulated"));
        }
        for fault in &self.faults {
            not_negative("faults.at_s", fault.at_s)?;
            not_negative("faults.for_s", fault.for_s)?;
            part("faults.fraction", fault.fraction)?;
            if fault.select.is_none() && fault.kind == FaultKind::Kill {
                return Err("faults.select is missing: kill node or seed".to_owned());
            }
            if let Some(zone) = fault.zone.as_ref().filter(|name| !self.zones.iter().any(|zone| zone.name == **name))
            {
                return Err(format!("faults.zone = {zone:?} is not among the zones"));
            }
        }
        if let Some(shares) = &self.image.shares {
            part("image.shares.fraction", shares.fraction)?;
        }
        Ok(())
    }

    /// What of this scenario the simulator cannot do, if anything.
    pub fn not_simulated(&self) -> Option<&'static str> {
        if self.faults.iter().any(|fault| fault.kind == FaultKind::Cut) {
            return Some("faults of kind \"cut\" are not simulated");
        }
        self.image.shares.is_some().then_some("image.shares is not simulated")
    }

    /// Seconds before which nobody can be done: the registry sends `bytes` once to each zone, the slowest node takes
    /// them in, and all that is received is sent by somebody. `share` is the part of a link's rate that is payload.
    pub fn bound_s(&self, bytes: u64, share: f64) -> f64 {
        let bytes = bytes as f64;
        let rate = |mbit: f64| mbit * 125_000.0 * share;
        let groups = || self.nodes.iter().filter(|group| group.count > 0);
        let zones: BTreeSet<_> = groups().map(|group| &group.zone).collect();
        let registry = rate(self.registry.egress_mbit);
        let slowest = groups().map(|group| rate(group.down_mbit)).fold(f64::INFINITY, f64::min);
        let up: f64 = groups().map(|group| group.count as f64 * rate(group.up_mbit)).sum();
        let count: usize = groups().map(|group| group.count).sum();
        let all = count as f64 * bytes / (registry + up);
        (zones.len() as f64 * bytes / registry).max(bytes / slowest).max(all)
    }

    /// Encoded bytes of the image.
    pub fn encoded_bytes(&self) -> u64 {
        (self.image.encoded_mib * f64::from(1 << 20)) as u64
    }

    /// One-way latency between two zones, milliseconds: 0.25 within one.
    pub fn latency_ms(&self, from: &str, to: &str) -> f64 {
        let said =
            |from: &str, to: &str| self.zones.iter().find(|zone| zone.name == from)?.latency_ms.get(to).copied();
        if from == to { 0.25 } else { said(from, to).or_else(|| said(to, from)).unwrap_or(10.0) }
    }
}

fn positive(key: &str, value: f64) -> Result<(), String> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err(format!("{key} = {value} is not positive")) }
}

fn part(key: &str, value: f64) -> Result<(), String> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { Err(format!("{key} = {value} is not between 0 and 1")) }
}

fn not_negative(key: &str, value: f64) -> Result<(), String> {
    if value.is_finite() && value >= 0.0 { Ok(()) } else { Err(format!("{key} = {value} is negative")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../scenarios/flash-crowd.toml");
    const CLUSTER: [&str; 4] = [
        include_str!("../scenarios/cluster-small.toml"),
        include_str!("../scenarios/cluster-32-seeds.toml"),
        include_str!("../scenarios/cluster-32-faults.toml"),
        include_str!("../scenarios/cluster-v2.toml"),
    ];

    #[test]
    fn scenarios_of_the_cluster_harness_parse() {
        let parsed = CLUSTER.map(|text| Scenario::parse(text).unwrap());
        assert_eq!(parsed.each_ref().map(|s| s.not_simulated().is_some()), [false, false, true, true]);
        let text = CLUSTER[2].replace("zone = \"b\"\nfor_s", "zone = \"c\"\nfor_s");
        assert!(Scenario::parse(&text).unwrap_err().to_string().contains("faults.zone"));
    }

    #[test]
    fn the_bound_is_the_narrowest_place() {
        let scenario = Scenario::parse(CLUSTER[1]).unwrap();
        let bytes = scenario.encoded_bytes();
        assert!((scenario.bound_s(bytes, 1.0) - bytes as f64 / 2.5e6).abs() < 1e-6, "a node's own link");
        assert!(scenario.bound_s(bytes, 0.5) > 1.9 * scenario.bound_s(bytes, 1.0));
    }

    #[test]
    fn shipped_scenario_parses_and_mistakes_are_named() {
        assert_eq!(Scenario::parse(GOOD).unwrap().name, "flash-crowd");
        for (from, to, says) in [
            ("egress_mbit", "egres_mbit", "egres_mbit"),
            ("egress_mbit = 100", "egress_mbit = -1", "egress_mbit"),
            ("piece_kib = 512", "piece_kib = 0", "piece_kib"),
            ("role = \"seed\"", "role = \"sed\"", "sed"),
            ("name = \"a\"", "name = \"b\"", "zone"),
            ("kind = \"flash-crowd\"", "kind = \"poisson\"", "poisson"),
        ] {
            let error = Scenario::parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(says), "{to}: {error}");
        }
    }
}
