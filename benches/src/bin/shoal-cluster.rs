//! `shoal-cluster`: runs a scenario with real daemons in network namespaces of this machine; `make cluster`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::cluster;
use shoal_sim::Scenario;

/// Runs a scenario with real daemons in network namespaces, and prints what it showed. Fails if a living node read a
/// wrong byte or could not read. Needs root, FUSE, ip, tc and nsenter.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The scenario, a TOML file.
    scenario: PathBuf,
    /// Writes the report there as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The shoal binary. Default: the one beside this program.
    #[arg(long, value_name = "FILE")]
    shoal: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("shoal-cluster: {}", shoal::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool, Failure> {
    let name = |path: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let path = &arguments.scenario;
    let text = fs::read_to_string(path).map_err(|error| name(path, &error))?;
    let scenario = Scenario::parse(&text).map_err(|error| name(path, &error))?;
    let shoal = arguments.shoal.clone().map_or_else(cluster::built_shoal, Ok)?;
    let report = cluster::run_interruptibly(&scenario, &shoal)?;
    println!("{report}");
    if let Some(json) = &arguments.json {
        let text = serde_json::to_string_pretty(&report)? + "\n";
        fs::write(json, text).map_err(|error| name(json, &error))?;
    }
    Ok(report.is_right())
}
