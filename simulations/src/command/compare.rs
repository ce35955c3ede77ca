//! `compare`: two runs side by side.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::Args;
use serde::Serialize;
use shoal_sim::{Report, Scenario};

use super::{Failure, output, read};

/// `compare`.
#[derive(Debug, Args)]
pub(crate) struct Compare {
    /// A scenario, which is run, or a report in a file that ends in `.json`, of a run or of the cluster harness.
    a: PathBuf,
    /// The same for what it is compared with.
    b: PathBuf,
    /// Writes both reports there, with what was compared.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What is written.
#[derive(Debug, Serialize)]
struct Comparison<'a> {
    a: &'a Report,
    b: &'a Report,
    /// By their names.
    figures: BTreeMap<&'static str, Compared>,
}

/// A figure of both.
#[derive(Debug, Serialize)]
struct Compared {
    a: f64,
    b: f64,
    /// The second by the first; nothing where that is 0.
    ratio: Option<f64>,
}

impl Compare {
    pub(super) fn run(self) -> Result<(), Failure> {
        let (a, b) = (report(&self.a)?, report(&self.b)?);
        println!("{:<22} {:>14} {:>14} {:>8}", "", a.scenario, b.scenario, "ratio");
        let mut figures = BTreeMap::new();
        for (name, figure) in FIGURES {
            let (of_a, of_b) = (figure(&a), figure(&b));
            let ratio = (of_a != 0.0).then(|| of_b / of_a);
            let says = ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.3}"));
            println!("{name:<22} {of_a:>14.3} {of_b:>14.3} {says:>8}");
            figures.insert(name, Compared { a: of_a, b: of_b, ratio });
        }
        match &self.json {
            Some(path) => output::write(path, &output::to_json(&Comparison { a: &a, b: &b, figures })),
            None => Ok(()),
        }
    }
}

/// Takes a figure out of a report.
type Figure = fn(&Report) -> f64;

/// What is compared.
const FIGURES: [(&str, Figure); 17] = [
    ("nodes", |report| report.nodes as f64),
    ("bound s", |report| report.fluid_bound_seconds),
    ("first p50 s", |report| report.first_seconds.p50),
    ("first last s", |report| report.first_seconds.max),
    ("start p50 s", |report| report.start_seconds.p50),
    ("complete p50 s", |report| report.complete_seconds.p50),
    ("complete p90 s", |report| report.complete_seconds.p90),
    ("complete p99 s", |report| report.complete_seconds.p99),
    ("complete last s", |report| report.complete_seconds.max),
    ("last by bound", |report| report.complete_seconds.max / report.fluid_bound_seconds),
    ("Jain's index", |report| report.fairness.jain_index),
    ("registry copies a zone", Report::copies_per_zone),
    ("cross-zone MB", |report| report.cross_zone_bytes as f64 / 1e6),
    ("most by a seed MB", |report| report.seed_load.most_bytes as f64 / 1e6),
    ("wasted MB", |report| report.wasted_bytes as f64 / 1e6),
    ("hedged requests", |report| report.hedged_requests as f64),
    ("CPU s", |report| report.cpu_seconds),
];

fn report(path: &Path) -> Result<Report, Failure> {
    if path.extension().is_some_and(|extension| extension == "json") {
        return serde_json::from_str(&read(path)?).map_err(|error| Failure::Report { path: path.to_owned(), error });
    }
    let scenario = Scenario::load(path)?;
    Ok(output::simulate(&scenario, scenario.seed))
}
