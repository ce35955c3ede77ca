//! `shoal-sim`: what a rollout costs, before it is rolled out.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

use clap::{Parser, Subcommand};
use shoal_sim::{Report, Scenario, run};

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

fn main() -> ExitCode {
    let Command::Run { scenario, seed, json } = Arguments::parse().command;
    let scenario = Scenario::load(&scenario).unwrap();
    let started = Instant::now();
    let report = run(&scenario, seed.unwrap_or(scenario.seed), &());
    println!("{report}");
    println!("{} events, {:.2} s", report.events, started.elapsed().as_secs_f64());
    ExitCode::SUCCESS
}
