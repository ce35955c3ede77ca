//! `shoal-sim`: what a rollout costs, before it is rolled out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use shoal_sim::{Report, Scenario, ScenarioError, run};

/// Runs a swarm in virtual time around Shoal's own scheduler.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs a scenario and prints its report. Fails if a node that was not killed does not get everything.
    Run {
        /// The scenario, a TOML file.
        scenario: PathBuf,
        /// Another seed than the scenario's.
        #[arg(long)]
        seed: Option<u64>,
        /// Writes the report there as well.
        #[arg(long)]
        json: Option<PathBuf>,
    },
}

/// Why there is no good report.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{path}: {error}")]
    File { path: String, error: std::io::Error },
    #[error("{path}: {error}")]
    Scenario { path: String, error: ScenarioError },
    #[error("{path}: {what}; `make cluster` can run it")]
    NotSimulated { path: String, what: &'static str },
    #[error("{complete} of {nodes} nodes are complete")]
    Incomplete { complete: usize, nodes: usize },
}

fn main() -> ExitCode {
    let Command::Run { scenario, seed, json } = Arguments::parse().command;
    match simulate(&scenario, seed, json.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("shoal-sim: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn simulate(path: &Path, seed: Option<u64>, json: Option<&Path>) -> Result<(), Failure> {
    let file = |path: &Path| {
        let path = path.display().to_string();
        |error| Failure::File { path, error }
    };
    let text = fs::read_to_string(path).map_err(file(path))?;
    let scenario =
        Scenario::parse(&text).map_err(|error| Failure::Scenario { path: path.display().to_string(), error })?;
    if let Some(what) = scenario.not_simulated() {
        return Err(Failure::NotSimulated { path: path.display().to_string(), what });
    }
    let report = run(&scenario, seed.unwrap_or(scenario.seed));
    println!("{report}");
    if let Some(json) = json {
        fs::write(json, to_json(&report)).map_err(file(json))?;
    }
    let Report { complete, nodes, .. } = report;
    if complete == nodes { Ok(()) } else { Err(Failure::Incomplete { complete, nodes }) }
}

fn to_json(report: &Report) -> String {
    let mut text = serde_json::to_string_pretty(report).expect("a report has only text keys");
    text.push('\n');
    text
}
