//! `shoal-cold-start`: how long a container takes to start, lazily and the ordinary way; `make bench-cold-start`.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    cold_start,
    run::{RunArguments, block_on, ended},
};

/// Starts containers from an image, lazily and the ordinary way, and prints how long it took until the first command had run.
/// Needs root, FUSE, containerd and runc.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// An OCI layout with the image under the tag `1`, and one four times as large under `4x`.
    images: PathBuf,
    /// How often everything is done.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-cold-start", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let report = block_on(cold_start::run(&shoal, &arguments.images, arguments.rounds))?;
    arguments.run.publish(&report.table(), &report.medians())
}
