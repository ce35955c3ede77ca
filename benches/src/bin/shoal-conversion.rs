//! `shoal-conversion`: what it takes to convert an image in a registry, next to its parts; `make bench-convert`.

use std::process::ExitCode;

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    conversion,
    run::{RunArguments, block_on, ended},
};

/// Converts an image from a registry to it, in full and with --oci-ref, and does alone what that is made of: download of the
/// layers, build of their blobs, upload. Needs root, docker-registry, and in the folder for temporary files several times the
/// image.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// An image for one platform, as `shoal image copy` takes it: `host[:port]/repo:tag`, `oci:DIR[:tag]`, `oci-archive:FILE`.
    source: String,
    /// How often everything is done.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-conversion", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let report = block_on(conversion::run(&shoal, &arguments.source, arguments.rounds))?;
    arguments.run.publish(&report.table(), &report.medians())
}
