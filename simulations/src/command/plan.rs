//! `plan`: how many seed peers, and how fast a registry, a target needs.
//!
//! A faster registry and more seed peers never make a crowd slower, as far as this search is concerned: it takes the
//! slowest registry of a list with which the target can be met, and halves its way to the fewest seed peers there.

use std::{fmt::Write, path::PathBuf, time::Duration};

use clap::Args;
use serde::Serialize;
use shoal_sim::{PAYLOAD_SHARE, Report, Scenario};

use super::{Failure, output};

/// Rates that links have, megabit per second.
const RATES: [f64; 10] = [500.0, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 4e4, 1e5, 2e5, 4e5];
/// Most seed peers in a zone.
const MOST_SEEDS: usize = 64;
/// Pieces that an image is cut into at most: finer ones would only take longer to simulate.
const PIECES: f64 = 512.0;

/// `plan`.
#[derive(Debug, Args)]
pub(crate) struct Plan {
    /// Nodes that start at once.
    #[arg(long)]
    nodes: usize,
    /// Encoded size of the image, MiB.
    #[arg(long, value_name = "MIB")]
    image: f64,
    /// Until when the last node has everything, such as `30s` or `2m`.
    #[arg(long, value_parser = seconds)]
    target: Duration,
    /// Zones that the nodes are in, evenly.
    #[arg(long, default_value_t = 1)]
    zones: usize,
    /// Link of a node, each way, Mbit/s.
    #[arg(long, default_value_t = 10_000.0)]
    node_mbit: f64,
    /// Link of a seed peer, each way, Mbit/s.
    #[arg(long, default_value_t = 25_000.0)]
    seed_mbit: f64,
    /// Egress of the registry, Mbit/s. Default: the least that does.
    #[arg(long)]
    registry_mbit: Option<f64>,
    /// Writes what was found there, with the report of its run.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What meets the target, and what it costs.
#[derive(Debug, Serialize)]
struct Found<'a> {
    seed_peers_per_zone: usize,
    registry_mbit: f64,
    registry_bytes: u64,
    /// What each seed peer sent on average.
    bytes_per_seed_peer: f64,
    cross_zone_bytes: u64,
    report: &'a Report,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let (number, unit) = match text.strip_suffix('s') {
        Some(number) => (number, 1.0),
        None => (text.strip_suffix('m').ok_or("not a number followed by s or m")?, 60.0),
    };
    let number: f64 = number.parse().map_err(|_| "not a number followed by s or m".to_owned())?;
    if number > 0.0 && number < 1e6 {
        Ok(Duration::from_secs_f64(number * unit))
    } else {
        Err("not above zero, or out of reach".to_owned())
    }
}

impl Plan {
    pub(super) fn run(self) -> Result<(), Failure> {
        let target = self.target.as_secs_f64();
        let own = self.image * f64::from(1 << 20) / (self.node_mbit * 125_000.0 * PAYLOAD_SHARE);
        if own > target {
            return Err(Failure::Impossible(format!("a node's own link takes {own:.1} s for the image")));
        }
        let rates = self.registry_mbit.map_or(RATES.to_vec(), |rate| vec![rate]);
        for rate in rates {
            if let Some((seeds, report)) = self.fewest(rate)? {
                let found = Found {
                    seed_peers_per_zone: seeds,
                    registry_mbit: rate,
                    registry_bytes: report.registry_bytes_per_zone.values().sum(),
                    bytes_per_seed_peer: report.seed_load.mean_bytes,
                    cross_zone_bytes: report.cross_zone_bytes,
                    report: &report,
                };
                self.print(&found);
                return self.json.as_ref().map_or(Ok(()), |path| output::write(path, &output::to_json(&found)));
            }
        }
        Err(Failure::Impossible(format!("not within {target} s, with {MOST_SEEDS} seed peers in each zone")))
    }

    /// The fewest seed peers in each zone that meet the target with this registry, if any number does.
    fn fewest(&self, registry_mbit: f64) -> Result<Option<(usize, Report)>, Failure> {
        let meets = |seeds| self.attempt(registry_mbit, seeds);
        let (mut too_few, mut enough) = (0, 1);
        let mut found = loop {
            match meets(enough)? {
                Some(report) => break report,
                None if enough >= MOST_SEEDS => return Ok(None),
                None => (too_few, enough) = (enough, enough * 2),
            }
        };
        while enough - too_few > 1 {
            let middle = too_few.midpoint(enough);
            match meets(middle)? {
                Some(report) => (enough, found) = (middle, report),
                None => too_few = middle,
            }
        }
        Ok(Some((enough, found)))
    }

    /// Runs one choice; gives its report if it meets the target.
    fn attempt(&self, registry_mbit: f64, seeds: usize) -> Result<Option<Report>, Failure> {
        let scenario = Scenario::parse(&self.scenario(registry_mbit, seeds))?;
        let target = self.target.as_secs_f64();
        let bound = scenario.bound_s(scenario.encoded_bytes(), PAYLOAD_SHARE);
        if bound > target {
            eprintln!(
                "shoal-sim: registry {registry_mbit} Mbit/s, {seeds} seed peers a zone: not below {bound:.1} s"
            );
            return Ok(None);
        }
        let report = output::simulate(&scenario, scenario.seed);
        let last = report.complete_seconds.max;
        eprintln!("shoal-sim: registry {registry_mbit} Mbit/s, {seeds} seed peers a zone: {last:.1} s");
        Ok((report.is_right() && last <= target).then_some(report))
    }

    fn scenario(&self, registry_mbit: f64, seeds: usize) -> String {
        let (image, zones) = (self.image, self.zones.max(1));
        let piece_kib = (image * 1024.0 / PIECES).max(1024.0) as u64;
        let mut text = format!(
            "name = \"plan\"\nregistry = {{ egress_mbit = {registry_mbit:?} }}\n\
             image = {{ encoded_mib = {image:?}, piece_kib = {piece_kib} }}\n\
             workload = {{ kind = \"flash-crowd\", read = \"all\" }}\n"
        );
        for zone in 0..zones {
            let count = self.nodes / zones + usize::from(zone < self.nodes % zones);
            let groups = [("seed", seeds, self.seed_mbit), ("node", count, self.node_mbit)];
            // Writing to a string cannot fail.
            let _ = write!(text, "[[zones]]\nname = \"zone-{zone}\"\n");
            for (role, count, mbit) in groups {
                let _ = write!(
                    text,
                    "[[nodes]]\nzone = \"zone-{zone}\"\nrole = \"{role}\"\ncount = {count}\n\
                     up_mbit = {mbit:?}\ndown_mbit = {mbit:?}\n"
                );
            }
        }
        text
    }

    fn print(&self, found: &Found<'_>) {
        let Found { seed_peers_per_zone: seeds, registry_mbit, .. } = found;
        println!("{}", found.report);
        println!();
        println!(
            "{} nodes have {} MiB within {} s with {seeds} seed peers in each of {} zones, and a registry of \
             {registry_mbit} Mbit/s",
            self.nodes,
            self.image,
            self.target.as_secs_f64(),
            self.zones.max(1)
        );
        println!(
            "it costs {:.2} GB from the registry, {:.2} GB from each seed peer, {:.2} GB between zones",
            found.registry_bytes as f64 / 1e9,
            found.bytes_per_seed_peer / 1e9,
            found.cross_zone_bytes as f64 / 1e9
        );
    }
}
