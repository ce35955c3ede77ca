//! The commands: each reads scenarios, runs them, and shows what came of it.

mod compare;
mod output;
mod plan;
mod sweep;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use shoal_sim::{Report, Scenario, ScenarioError, html};

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Runs a scenario and prints its report. Fails if a node that was not killed does not get everything.
    Run(Run),
    /// Runs a scenario with all combinations of some values, on all cores.
    Sweep(sweep::Sweep),
    /// Looks for the fewest seed peers, and the slowest registry, with which a crowd is served in time.
    Plan(plan::Plan),
    /// Puts two runs side by side.
    Compare(compare::Compare),
}

/// `run`.
#[derive(Debug, Args)]
pub(crate) struct Run {
    /// The scenario, a TOML file.
    scenario: PathBuf,
    /// Another seed than the scenario's.
    #[arg(long)]
    seed: Option<u64>,
    /// Writes the report there as well.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Writes a page with plots there.
    #[arg(long)]
    html: Option<PathBuf>,
    /// The node that the page's last plot is of, numbered from 0 by zone and group. Default: the last to have everything.
    #[arg(long, value_name = "N", requires = "html")]
    node: Option<usize>,
}

/// Why there is no good report.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    #[error("{path}: {error}", path = path.display())]
    File { path: PathBuf, error: std::io::Error },
    #[error("{path}: not a report: {error}", path = path.display())]
    Report { path: PathBuf, error: serde_json::Error },
    #[error("{setting}: {why}")]
    Setting { setting: String, why: String },
    #[error("cannot plot: {0}")]
    Plot(#[from] html::PlotError),
    #[error("{0}")]
    Impossible(String),
    #[error("{complete} of {alive} living nodes are complete, {errors} errors")]
    Incomplete { complete: usize, alive: usize, errors: u64 },
}

impl Command {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self {
            Self::Run(run) => run.run(),
            Self::Sweep(sweep) => sweep.run(),
            Self::Plan(plan) => plan.run(),
            Self::Compare(compare) => compare.run(),
        }
    }
}

impl Run {
    fn run(self) -> Result<(), Failure> {
        let scenario = Scenario::load(&self.scenario)?;
        if let Some(node) = self.node.filter(|&node| node >= scenario.readers()) {
            let why = format!("{} nodes read, numbered from 0", scenario.readers());
            return Err(Failure::Setting { setting: format!("--node {node}"), why });
        }
        let report = output::simulate(&scenario, self.seed.unwrap_or(scenario.seed));
        println!("{report}");
        println!(
            "simulated {} events in {:.1} s, {:.0} MB of memory at most",
            report.events,
            report.effort.wall_seconds,
            report.effort.peak_rss_bytes as f64 / 1e6
        );
        if let Some(path) = &self.json {
            output::write(path, &output::to_json(&report))?;
        }
        if let Some(path) = &self.html {
            output::write(path, &html::page(&report, self.node)?)?;
        }
        right(&report)
    }
}

/// Fails for a run in which somebody did not get everything.
fn right(report: &Report) -> Result<(), Failure> {
    let &Report { complete, alive, read_errors: errors, .. } = report;
    if report.is_right() { Ok(()) } else { Err(Failure::Incomplete { complete, alive, errors }) }
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path).map_err(|error| Failure::File { path: path.to_owned(), error })
}
