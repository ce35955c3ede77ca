//! `compare`: two runs side by side.

use std::path::{Path, PathBuf};

use clap::Args;
use shoal_sim::{Report, Scenario};

use super::{Failure, output, read};

/// `compare`.
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// A scenario, which is run, or a report in a file that ends in `.json`.
    a: PathBuf,
    /// The same for what it is compared with.
    b: PathBuf,
}

impl Compare {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (a, b) = (report(&self.a)?, report(&self.b)?);
        println!("{:<22} {:>14} {:>14} {:>8}", "", a.scenario, b.scenario, "ratio");
        for (name, figure) in FIGURES {
            let (of_a, of_b) = (figure(&a), figure(&b));
            let ratio = if of_a == 0.0 { "-".to_owned() } else { format!("{:.3}", of_b / of_a) };
            println!("{name:<22} {of_a:>14.3} {of_b:>14.3} {ratio:>8}");
        }
        Ok(())
    }
}

/// Takes a figure out of a report.
type Figure = fn(&Report) -> f64;

/// What is compared.
const FIGURES: [(&str, Figure); 10] = [
    ("nodes", |report| report.nodes as f64),
    ("bound s", |report| report.fluid_bound_seconds),
    ("first p50 s", |report| report.first_seconds.p50),
    ("start p50 s", |report| report.start_seconds.p50),
    ("complete p50 s", |report| report.complete_seconds.p50),
    ("complete p99 s", |report| report.complete_seconds.p99),
    ("complete last s", |report| report.complete_seconds.max),
    ("registry copies a zone", Report::copies_per_zone),
    ("cross-zone MB", |report| report.cross_zone_bytes as f64 / 1e6),
    ("CPU s", |report| report.cpu_seconds),
];

fn report(path: &Path) -> Result<Report, Failure> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return serde_json::from_str(&read(path)?).map_err(|error| Failure::Report { path: path.to_owned(), error });
    }
    let scenario = Scenario::load(path)?;
    Ok(output::simulate(&scenario, scenario.seed))
}
