//! Scenario files: a swarm, an image, a workload and what goes wrong. The keys are those of the design's scenario
//! page; unknown keys are refused, so that a typing error does not silently simulate something else, and a value that
//! makes no sense is named with its line.

mod bound;
mod check;
mod costs;
mod files;
mod workload;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub(crate) use self::costs::millis;
pub use self::{
    bound::PAYLOAD_SHARE,
    check::ScenarioError,
    costs::Costs,
    workload::{Images, Prefetch, Read, Workload, WorkloadKind},
};

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
    /// How the image is distributed; the cluster harness knows `shoal` only. Default `shoal`.
    #[serde(default)]
    pub policy: Policy,
    /// What things cost in the simulator.
    #[serde(default)]
    pub costs: Costs,
}

/// How an image is distributed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Policy {
    /// By Shoal: the daemon's scheduler on every node.
    #[default]
    Shoal,
    /// Every node reads the registry.
    Registry,
    /// Shoal without exchange between nodes: they ask the seed peers alone.
    Seeds,
    /// A swarm that forwards whole images only: a node serves others once it has everything, one of them at a time, and
    /// one node of each zone reads the registry. No such swarm can do better.
    WholeBlob,
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

/// The image: one blob of equal pieces, or of those of a real image.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Encoded size, MiB.
    #[serde(default)]
    pub encoded_mib: f64,
    /// Encoded size of a piece, KiB.
    #[serde(default)]
    pub piece_kib: u64,
    /// A bootstrap file whose pieces are simulated, in place of the two keys before; relative to the scenario file.
    #[serde(default)]
    pub bootstrap: Option<PathBuf>,
    /// Encoded sizes of the pieces of that bootstrap, filled in by [`Scenario::load`].
    #[serde(skip)]
    pub pieces: Vec<u64>,
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
    /// What it sends to and receives from the rest of the world, registry included, at most; each way, megabit per
    /// second. Default without limit.
    #[serde(default)]
    pub uplink_mbit: Option<f64>,
    /// The same for each of its racks and what is outside of the rack. Default without limit.
    #[serde(default)]
    pub rack_uplink_mbit: Option<f64>,
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
    /// Racks that they are dealt to in turn, numbered in each zone from 0; groups of a zone share them. Default 0: none.
    #[serde(default)]
    pub racks: usize,
}

/// What a node does for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Reads the image.
    Node,
    /// Reads the registry for the others.
    Seed,
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
    /// How long a cut lasts, and a slow node is slow, seconds; a node that is slow for 0 stays so.
    #[serde(default)]
    pub for_s: f64,
    /// What is left of the rates of a slow node. Default 0.1.
    #[serde(default = "tenth")]
    pub factor: f64,
}

fn tenth() -> f64 {
    0.1
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
    /// They are cut off for `for_s`.
    Cut,
    /// Their links have `factor` of their rates; only the simulator can do that so far.
    Slow,
    /// They serve wrong bytes; only the simulator can do that so far.
    Poison,
}

impl Scenario {
    /// Reads a scenario file, and the files that it names.
    ///
    /// # Errors
    /// [`ScenarioError`], with file, line and key.
    pub fn load(path: &Path) -> Result<Self, ScenarioError> {
        let text =
            std::fs::read_to_string(path).map_err(|error| ScenarioError::File { path: path.to_owned(), error })?;
        let mut scenario = Self::parse(&text).map_err(|error| error.of(path))?;
        scenario.load_files(path)?;
        Ok(scenario)
    }

    /// Reads the bootstrap and the trace that a scenario names, if it names them; `path` is that of the scenario.
    ///
    /// # Errors
    /// [`ScenarioError::Bootstrap`], [`ScenarioError::Trace`].
    pub fn load_files(&mut self, path: &Path) -> Result<(), ScenarioError> {
        let Some(bootstrap) = &self.image.bootstrap else { return Ok(()) };
        let pieces = files::Pieces::open(&files::beside(path, bootstrap))?;
        if let Read::Trace(trace) = &self.workload.read {
            self.workload.traced = pieces.traced(&files::beside(path, trace))?;
        }
        self.image.pieces = pieces.sizes;
        Ok(())
    }

    /// What of this scenario only the simulator can do, if anything.
    pub fn only_simulated(&self) -> Option<&'static str> {
        let racks = |zone: &Zone| zone.rack_uplink_mbit.is_some();
        let faults = |fault: &Fault| matches!(fault.kind, FaultKind::Slow | FaultKind::Poison);
        [
            (self.policy != Policy::Shoal, "policies other than \"shoal\""),
            (self.image.bootstrap.is_some(), "image.bootstrap"),
            (self.zones.iter().any(racks), "links of racks"),
            (self.workload.kind != WorkloadKind::FlashCrowd, "workloads other than \"flash-crowd\""),
            (self.workload.read != Read::All, "reads of a part of the image"),
            (self.workload.prefetched() != Prefetch::All, "workloads without prefetch"),
            (self.workload.images.count != 1, "several images"),
            (self.faults.iter().any(faults), "faults of the kinds \"slow\" and \"poison\""),
        ]
        .into_iter()
        .find_map(|(found, what)| found.then_some(what))
    }

    /// Nodes that read the image.
    pub fn readers(&self) -> usize {
        self.nodes.iter().filter(|group| group.role == Role::Node).map(|group| group.count).sum()
    }

    /// Images that these start, all together.
    pub fn starts(&self) -> usize {
        self.readers() * self.workload.images.starts_per_node as usize
    }

    /// Parses and checks the text of a scenario file.
    ///
    /// # Errors
    /// [`ScenarioError`], with line and key.
    pub fn parse(text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text)?;
        check::check(&scenario, text)?;
        Ok(scenario)
    }

    /// The same swarm with zones and groups in an order that does not depend on that of the file.
    pub(crate) fn in_order(&self) -> Self {
        let mut scenario = self.clone();
        scenario.zones.sort_by(|a, b| a.name.cmp(&b.name));
        let key = |group: &Nodes| {
            let rates = (group.up_mbit.to_bits(), group.down_mbit.to_bits());
            (group.zone.clone(), group.role, rates, group.count, group.racks)
        };
        scenario.nodes.sort_by_key(key);
        scenario.faults.sort_by(|a, b| a.at_s.total_cmp(&b.at_s));
        scenario
    }

    /// Encoded bytes of the image.
    pub fn encoded_bytes(&self) -> u64 {
        if self.image.bootstrap.is_some() {
            return self.image.pieces.iter().sum();
        }
        (self.image.encoded_mib * f64::from(1 << 20)) as u64
    }

    /// Encoded sizes of the image's pieces.
    pub(crate) fn piece_bytes(&self) -> Vec<u64> {
        if self.image.bootstrap.is_some() {
            return self.image.pieces.clone();
        }
        let (total, piece) = (self.encoded_bytes().max(1), self.image.piece_kib << 10);
        (0..total.div_ceil(piece)).map(|at| piece.min(total - at * piece)).collect()
    }

    /// Encoded bytes that a node fetches. Policies that know whole images only fetch nothing less.
    pub fn fetched_bytes(&self) -> u64 {
        let whole = matches!(self.policy, Policy::Registry | Policy::WholeBlob) || self.workload.fetches_all();
        if whole {
            return self.encoded_bytes();
        }
        let pieces = self.piece_bytes();
        self.workload.start(pieces.len() as u32).iter().map(|&piece| pieces[piece as usize]).sum()
    }

    /// One-way latency between two zones, milliseconds: 0.25 within one.
    pub fn latency_ms(&self, from: &str, to: &str) -> f64 {
        let said =
            |from: &str, to: &str| self.zones.iter().find(|zone| zone.name == from)?.latency_ms.get(to).copied();
        if from == to { 0.25 } else { said(from, to).or_else(|| said(to, from)).unwrap_or(10.0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = include_str!("../scenarios/flash-crowd.toml");

    #[test]
    fn shipped_scenarios_parse() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            Scenario::load(&entry.unwrap().path()).unwrap_or_else(|error| panic!("{error}"));
            count += 1;
        }
        assert!(count >= 9);
    }

    #[test]
    fn mistakes_are_named_with_line_and_key() {
        for (from, to, line, says) in [
            ("egress_mbit", "egres_mbit", 6, "egres_mbit"),
            ("egress_mbit = 100", "egress_mbit = -1", 6, "registry.egress_mbit"),
            ("piece_kib = 512", "piece_kib = 0", 11, "image.piece_kib"),
            ("role = \"seed\"", "role = \"sed\"", 26, "sed"),
            ("name = \"a\"", "name = \"b\"", 18, "nodes[0].zone"),
            ("up_mbit = 100\ndown_mbit = 100", "up_mbit = 100\ndown_mbit = 0", 29, "nodes[1].down_mbit"),
            ("kind = \"flash-crowd\"", "kind = \"poison\"", 32, "poison"),
            ("kind = \"flash-crowd\"", "kind = \"rolling\"", 31, "workload.over_s"),
            ("kind = \"flash-crowd\"", "kind = \"diurnal\"\nover_s = 9", 31, "workload.peak_to_trough"),
            ("kind = \"flash-crowd\"", "kind = \"diurnal\"\nover_s = 9\npeak_to_trough = 0.5", 34, "= 0.5 is not"),
            ("kind = \"flash-crowd\"", "kind = \"flash-crowd\"\npeak_to_trough = 2", 33, "diurnal"),
            ("[workload]", "[costs]\nlease_s = 0\n[workload]", 32, "costs.lease_s"),
            ("read = \"all\"", "read = \"some\"", 33, "some"),
            ("read = \"all\"", "read = { fraction = 1.5 }", 33, "workload.read.fraction"),
            ("read = \"all\"", "read = { fraction = 0 }", 33, "workload.read.fraction"),
            ("read = \"all\"", "read = { trace = \"t\" }", 33, "image.bootstrap"),
            ("read = \"all\"", "read = \"all\"\nprefetch = \"some\"", 34, "some"),
            ("read = \"all\"", "read = \"all\"\nimages = { count = 0 }", 34, "workload.images.count"),
            ("read = \"all\"", "read = \"all\"\nimages = { count = 2, zipf = -1 }", 34, "workload.images.zipf"),
            ("read = \"all\"", "read = \"all\"\nimages = { count = 2, starts_per_node = 3 }", 34, "starts_per_node"),
        ] {
            let error = Scenario::parse(&GOOD.replacen(from, to, 1)).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(&format!("line {line}")), "{to}: {error}");
        }
    }

    #[test]
    fn what_real_daemons_cannot_be_asked_for_is_named() {
        assert_eq!(Scenario::parse(GOOD).unwrap().only_simulated(), None);
        for (from, to, says) in [
            ("kind = \"flash-crowd\"", "kind = \"rolling\"\nover_s = 1", "flash-crowd"),
            ("\"all\"", "{ fraction = 0.5 }\nprefetch = \"all\"", "part of the image"),
            ("\"all\"", "\"all\"\nprefetch = \"nothing\"", "prefetch"),
            ("\"all\"", "\"all\"\nimages = { count = 2 }", "several images"),
        ] {
            let scenario = Scenario::parse(&GOOD.replacen(from, to, 1)).unwrap();
            assert!(scenario.only_simulated().is_some_and(|what| what.contains(says)), "{to}");
        }
    }

    #[test]
    fn groups_and_zones_have_an_order_of_their_own() {
        let scenario = Scenario::parse(GOOD).unwrap();
        let mut turned = scenario.clone();
        turned.nodes.reverse();
        let rates = |scenario: Scenario| scenario.nodes.iter().map(|group| group.up_mbit).collect::<Vec<_>>();
        assert_eq!(rates(scenario.in_order()), rates(turned.in_order()));
    }
}
