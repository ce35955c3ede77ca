//! `shoal-calibrate`: the simulator next to real daemons, scenario by scenario; `make calibrate`.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    calibration::Calibration,
    run::{RunArguments, ended},
};
use shoal_sim::Scenario;

/// Runs scenarios with real daemons in network namespaces and in the simulator, and prints how far the two are apart. Needs what
/// shoal-cluster needs.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The scenarios, TOML files.
    #[arg(required = true)]
    scenarios: Vec<PathBuf>,
    /// With how many nodes each is run.
    #[arg(long, value_delimiter = ',', default_values_t = [8, 16, 32])]
    nodes: Vec<usize>,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-calibrate", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let scenarios = arguments.scenarios.iter().map(|path| Scenario::load(path)).collect::<Result<Vec<_>, _>>()?;
    if let Some((scenario, what)) = scenarios.iter().find_map(|scenario| Some((scenario, scenario.only_simulated()?)))
    {
        return Err(format!("{}: {what}: only the simulator can do that", scenario.name).into());
    }
    let mut calibration = Calibration::default();
    for (scenario, nodes) in scenarios.iter().flat_map(|scenario| arguments.nodes.iter().map(move |&n| (scenario, n)))
    {
        eprintln!("calibrate: {} with {nodes} nodes", scenario.name);
        calibration.add(scenario.clone(), nodes, &shoal)?;
    }
    arguments.run.publish(&calibration.to_string(), &calibration)
}
