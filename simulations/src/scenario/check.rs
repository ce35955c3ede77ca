//! What a scenario file may say, and where it says something else.

use std::path::{Path, PathBuf};

use toml::{Spanned, de::DeValue};

use super::{Fault, FaultKind, Images, Policy, Read, Role, Scenario, WorkloadKind};

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// Not TOML, or not the keys of a scenario.
    #[error(transparent)]
    Toml(#[from] toml::de::Error),
    /// A value that makes no sense.
    #[error("line {line}: {key} {problem}")]
    Value {
        /// The line, from 1: that of the value, or of what it is missing from.
        line: usize,
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A scenario file that cannot be read.
    #[error("{path}: {error}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A bootstrap that is none.
    #[error("{path}: {reason}", path = path.display())]
    Bootstrap {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A trace of a start that is none, or of another image.
    #[error("{path}: {reason}", path = path.display())]
    Trace {
        /// The file.
        path: PathBuf,
        /// Why, with the line in it.
        reason: String,
    },
    /// Any of these, in a file.
    #[error("{path}: {error}", path = path.display())]
    In {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        error: Box<Self>,
    },
}

impl ScenarioError {
    pub(crate) fn of(self, path: &Path) -> Self {
        Self::In { path: path.to_owned(), error: Box::new(self) }
    }
}

/// Most nodes, and most pieces, of a scenario.
const MAX: u64 = 1 << 20;

/// Most images of a workload, and most uneven popularity: with more the least popular ones would have none.
const MAX_IMAGES: u32 = 1 << 16;
const MAX_ZIPF: f64 = 10.0;

/// A key, from the root, and what is wrong with its value.
type Mistake = (String, String);

pub(super) fn check(scenario: &Scenario, text: &str) -> Result<(), ScenarioError> {
    let checks = [check_image, check_swarm, check_workload, check_costs];
    let mistake = checks.into_iter().find_map(|check| check(scenario).err());
    mistake.map_or(Ok(()), |(key, problem)| Err(ScenarioError::Value { line: line_of(text, &key), key, problem }))
}

fn check_image(scenario: &Scenario) -> Result<(), Mistake> {
    let image = &scenario.image;
    positive("registry.egress_mbit", scenario.registry.egress_mbit)?;
    not_negative("registry.latency_ms", scenario.registry.latency_ms)?;
    positive("image.decoded_ratio", image.decoded_ratio)?;
    if let Some(shares) = &image.shares {
        part("image.shares.fraction", shares.fraction)?;
    }
    if image.bootstrap.is_some() {
        let other = image.encoded_mib != 0.0 || image.piece_kib != 0;
        return if other { wrong("image.bootstrap", "takes the place of encoded_mib and piece_kib") } else { Ok(()) };
    }
    positive("image.encoded_mib", image.encoded_mib)?;
    if image.piece_kib == 0 || scenario.encoded_bytes() / (image.piece_kib << 10) > MAX {
        return wrong("image.piece_kib", format!("= {} makes no piece or too many", image.piece_kib));
    }
    Ok(())
}

fn check_swarm(scenario: &Scenario) -> Result<(), Mistake> {
    for (at, zone) in scenario.zones.iter().enumerate() {
        for (other, latency) in &zone.latency_ms {
            not_negative(&format!("zones[{at}].latency_ms.{other}"), *latency)?;
        }
        for (key, rate) in [("uplink_mbit", zone.uplink_mbit), ("rack_uplink_mbit", zone.rack_uplink_mbit)] {
            rate.map_or(Ok(()), |rate| positive(&format!("zones[{at}].{key}"), rate))?;
        }
    }
    for (at, nodes) in scenario.nodes.iter().enumerate() {
        positive(&format!("nodes[{at}].up_mbit"), nodes.up_mbit)?;
        positive(&format!("nodes[{at}].down_mbit"), nodes.down_mbit)?;
        known_zone(scenario, &format!("nodes[{at}].zone"), &nodes.zone)?;
    }
    let count: u64 = scenario.nodes.iter().map(|nodes| nodes.count as u64).sum();
    if count == 0 || count > MAX {
        return wrong("nodes", format!("are {count}; from 1 to {MAX} can be simulated"));
    }
    if scenario.policy == Policy::Seeds && !scenario.nodes.iter().any(|nodes| nodes.role == Role::Seed) {
        return wrong("policy", "= \"seeds\" needs seed peers");
    }
    Ok(())
}

fn check_workload(scenario: &Scenario) -> Result<(), Mistake> {
    not_negative("workload.over_s", scenario.workload.over_s)?;
    if scenario.workload.kind != WorkloadKind::FlashCrowd && scenario.workload.over_s == 0.0 {
        return wrong("workload.over_s", "is missing: the time over which the nodes start");
    }
    match (scenario.workload.kind, scenario.workload.peak_to_trough) {
        (WorkloadKind::Diurnal, None) => {
            return wrong(
                "workload.peak_to_trough",
                "is missing: how much busier the busiest time is than the quietest",
            );
        }
        (WorkloadKind::Diurnal, Some(ratio)) if !(1.0..=HIGHEST).contains(&ratio) => {
            return wrong("workload.peak_to_trough", format!("= {ratio} is not between 1 and 1e9"));
        }
        (WorkloadKind::Diurnal, Some(_)) | (_, None) => {}
        (_, Some(_)) => return wrong("workload.peak_to_trough", "says nothing unless kind = \"diurnal\""),
    }
    match &scenario.workload.read {
        Read::All => {}
        Read::Trace(_) if scenario.image.bootstrap.is_none() => {
            return wrong("workload.read.trace", "needs image.bootstrap: the image that was started");
        }
        Read::Trace(_) => {}
        Read::Fraction(fraction) => {
            positive("workload.read.fraction", *fraction)?;
            part("workload.read.fraction", *fraction)?;
        }
    }
    let Images { count, zipf, starts_per_node } = scenario.workload.images;
    if !(1..=MAX_IMAGES).contains(&count) {
        return wrong("workload.images.count", format!("= {count} is not between 1 and {MAX_IMAGES}"));
    }
    if !(0.0..=MAX_ZIPF).contains(&zipf) {
        return wrong("workload.images.zipf", format!("= {zipf} is not between 0 and {MAX_ZIPF}"));
    }
    if !(1..=count).contains(&starts_per_node) {
        return wrong(
            "workload.images.starts_per_node",
            format!("= {starts_per_node} is not between 1 and the count"),
        );
    }
    scenario.faults.iter().enumerate().try_for_each(|(at, fault)| check_fault(scenario, at, fault))
}

fn check_fault(scenario: &Scenario, at: usize, fault: &Fault) -> Result<(), Mistake> {
    let key = |name| format!("faults[{at}].{name}");
    not_negative(&key("at_s"), fault.at_s)?;
    not_negative(&key("for_s"), fault.for_s)?;
    part(&key("fraction"), fault.fraction)?;
    part(&key("factor"), fault.factor)?;
    if fault.select.is_none() && fault.kind != FaultKind::Cut {
        return wrong(&key("select"), "is missing: node or seed");
    }
    fault.zone.as_ref().map_or(Ok(()), |zone| known_zone(scenario, &key("zone"), zone))
}

fn check_costs(scenario: &Scenario) -> Result<(), Mistake> {
    let costs = &scenario.costs;
    for (key, value) in [
        ("connect_rtts", costs.connect_rtts),
        ("mount_ms", costs.mount_ms),
        ("request_ms", costs.request_ms),
        ("send_cpu_s_per_gb", costs.send_cpu_s_per_gb),
        ("receive_cpu_s_per_gb", costs.receive_cpu_s_per_gb),
    ] {
        not_negative(&format!("costs.{key}"), value)?;
    }
    for (key, value) in [
        ("decode_mib_s", costs.decode_mib_s),
        ("have_ms", costs.have_ms),
        ("dead_after_s", costs.dead_after_s),
        ("lease_s", costs.lease_s),
    ] {
        positive(&format!("costs.{key}"), value)?;
    }
    Ok(())
}

fn wrong(key: &str, problem: impl Into<String>) -> Result<(), Mistake> {
    Err((key.to_owned(), problem.into()))
}

/// Longest time and highest rate that anything here is about; beyond, arithmetic with times would saturate.
const HIGHEST: f64 = 1e9;

fn positive(key: &str, value: f64) -> Result<(), Mistake> {
    if value > 0.0 && value <= HIGHEST {
        Ok(())
    } else {
        wrong(key, format!("= {value} is not above 0 and at most 1e9"))
    }
}

fn not_negative(key: &str, value: f64) -> Result<(), Mistake> {
    if (0.0..=HIGHEST).contains(&value) { Ok(()) } else { wrong(key, format!("= {value} is not between 0 and 1e9")) }
}

fn part(key: &str, value: f64) -> Result<(), Mistake> {
    if (0.0..=1.0).contains(&value) { Ok(()) } else { wrong(key, format!("= {value} is not between 0 and 1")) }
}

fn known_zone(scenario: &Scenario, key: &str, name: &str) -> Result<(), Mistake> {
    let known = scenario.zones.iter().any(|zone| zone.name == name);
    if known { Ok(()) } else { wrong(key, format!("= {name:?} is not among the zones")) }
}

/// The line of a key in a scenario's text, or of the nearest table around it that is there.
fn line_of(text: &str, key: &str) -> usize {
    let Ok(root) = toml::de::DeTable::parse(text) else { return 1 };
    let mut at = 0;
    let mut table: Option<&Spanned<DeValue<'_>>> = None;
    for (depth, step) in key.split(['.', '[']).enumerate() {
        let step = step.trim_end_matches(']');
        let next = match table.map(Spanned::get_ref) {
            None if depth == 0 => root.get_ref().get(step),
            Some(DeValue::Table(inner)) => inner.get(step),
            Some(DeValue::Array(items)) => step.parse::<usize>().ok().and_then(|index| items.get(index)),
            _ => None,
        };
        let Some(next) = next else { break };
        at = next.span().start;
        table = Some(next);
    }
    text.get(..at).unwrap_or_default().matches('\n').count() + 1
}
