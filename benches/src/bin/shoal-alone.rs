//! `shoal-alone`: a node without peers next to a plain lazy mount; `make bench-alone`.

use std::process::ExitCode;

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    alone,
    run::{RunArguments, block_on, ended},
};

/// Reads an image from a docker-registry, each time from nothing, by `shoal mount` and by a daemon that has no peers, in turns, and
/// prints how long that takes. Needs root, FUSE and docker-registry.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Files of the image.
    #[arg(long, default_value_t = 2000)]
    files: usize,
    /// Bytes of a file.
    #[arg(long, default_value_t = 65_536)]
    len: usize,
    /// How often everything is done.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-alone", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let Arguments { files, len, rounds, .. } = *arguments;
    let report = block_on(alone::run(&shoal, files, len, rounds))?;
    arguments.run.publish(&report.table(), &report.medians())
}
