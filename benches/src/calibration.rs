//! How far the simulator is off: the same scenarios with real daemons and in virtual time, side by side.
//!
//! A scenario is run with each number of nodes, dealt evenly to its groups of nodes that read. The simulator is given the
//! size that the real image turned out to have; apart from that both get the same file.

use std::{fmt, path::Path};

use serde::Serialize;
use shoal::command::Failure;
use shoal_sim::{Role, Scenario};

use crate::cluster;

/// What one of the two said.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Figures {
    /// Until half of the living nodes had everything.
    pub p50_seconds: f64,
    /// Until the last of them had.
    pub last_seconds: f64,
    /// What the registry sent, in images.
    pub registry_images: f64,
}

impl Figures {
    /// What these are in parts of others.
    fn ratio(self, other: Self) -> Self {
        Self {
            p50_seconds: self.p50_seconds / other.p50_seconds,
            last_seconds: self.last_seconds / other.last_seconds,
            registry_images: self.registry_images / other.registry_images,
        }
    }
}

/// One scenario with one number of nodes.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name of the scenario.
    pub scenario: String,
    /// Nodes that read.
    pub nodes: usize,
    /// Of real daemons.
    pub measured: Figures,
    /// In virtual time.
    pub simulated: Figures,
    /// Simulated in parts of measured.
    pub ratio: Figures,
    /// Part of the machine's CPU time that was used.
    pub busy_fraction: f64,
    /// False if the machine was the bottleneck.
    pub counts: bool,
}

/// All of them; as JSON and as a table.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Calibration {
    /// In the order in which they ran.
    pub rows: Vec<Row>,
}

impl Calibration {
    /// Runs a scenario with so many nodes in both ways, and takes note.
    ///
    /// # Errors
    /// The number is not a multiple of the scenario's groups, the machine cannot run it, or a node did not get everything.
    pub fn add(&mut self, mut scenario: Scenario, nodes: usize, shoal: &Path) -> Result<(), Failure> {
        let readers = || scenario.nodes.iter().filter(|group| group.role == Role::Node);
        let groups = readers().count();
        if groups == 0 || !nodes.is_multiple_of(groups) {
            return Err(format!("{}: {nodes} nodes cannot be dealt to {groups} groups", scenario.name).into());
        }
        scenario
            .nodes
            .iter_mut()
            .filter(|group| group.role == Role::Node)
            .for_each(|group| group.count = nodes / groups);
        let real = cluster::run_interruptibly(&scenario, shoal)?;
        if !real.is_right() {
            return Err(format!("{real}").into());
        }
        scenario.image.encoded_mib = real.image_encoded_bytes as f64 / f64::from(1 << 20);
        let virtual_ = shoal_sim::run(&scenario, scenario.seed, &());
        let images = |bytes: u64| bytes as f64 / real.image_encoded_bytes as f64;
        let measured = Figures {
            p50_seconds: real.complete_seconds.p50,
            last_seconds: real.complete_seconds.max,
            registry_images: images(real.registry_bytes_per_zone.values().sum()),
        };
        let simulated = Figures {
            p50_seconds: virtual_.complete_seconds.p50,
            last_seconds: virtual_.complete_seconds.max,
            registry_images: images(virtual_.registry_bytes_per_zone.values().sum()),
        };
        let (ratio, busy_fraction, counts) = (simulated.ratio(measured), real.busy_fraction, real.counts);
        self.rows.push(Row { scenario: scenario.name, nodes, measured, simulated, ratio, busy_fraction, counts });
        Ok(())
    }
}

impl fmt::Display for Calibration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<22} {:>5}  {:>24}  {:>24}  {:>26}  {:>5}",
            "", "nodes", "p50 s: real, sim, ratio", "last s: real, sim, ratio", "registry: real, sim, ratio", "busy"
        )?;
        for Row { scenario, nodes, measured, simulated, ratio, busy_fraction, counts } in &self.rows {
            let triple =
                |of: fn(&Figures) -> f64| format!("{:.2} {:.2} {:.2}", of(measured), of(simulated), of(ratio));
            let times = [triple(|of| of.p50_seconds), triple(|of| of.last_seconds)];
            let (registry, busy) = (triple(|of| of.registry_images), busy_fraction * 100.0);
            let mark = if *counts { "" } else { ", too busy to count" };
            writeln!(
                f,
                "{scenario:<22} {nodes:>5}  {:>24}  {:>24}  {registry:>26}  {busy:>4.0}%{mark}",
                times[0], times[1]
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_how_far_the_simulator_is_off() {
        let of = |p50_seconds, last_seconds, registry_images| Figures { p50_seconds, last_seconds, registry_images };
        let (measured, simulated) = (of(10.0, 20.0, 1.0), of(9.0, 22.0, 1.02));
        let ratio = simulated.ratio(measured);
        let row =
            Row { scenario: "x".into(), nodes: 8, measured, simulated, ratio, busy_fraction: 0.5, counts: false };
        let table = Calibration { rows: vec![row] }.to_string();
        for part in ["10.00 9.00 0.90", "20.00 22.00 1.10", "1.00 1.02 1.02", "50%, too busy"] {
            assert!(table.contains(part), "{part} in {table}");
        }
    }

    #[test]
    fn nodes_are_dealt_evenly_or_not_at_all() {
        let text = include_str!("../../simulations/scenarios/calibrate-thin-link.toml");
        let scenario = Scenario::parse(text).unwrap();
        let error = Calibration::default().add(scenario, 9, Path::new("/nowhere")).unwrap_err();
        assert!(error.to_string().contains("9 nodes cannot be dealt to 2 groups"), "{error}");
    }
}
