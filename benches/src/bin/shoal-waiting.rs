//! `shoal-waiting`: what a read that waits costs beside a prefetch at full rate; `make bench-waiting`.

use std::process::ExitCode;

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    cluster,
    run::{RunArguments, block_on, ended},
};

/// Reads pages that are not here yet, one at a time, with nothing else to do and while another image is prefetched, behind a link of a
/// certain rate, and prints how long they take. Needs root, FUSE, ip, tc and nsenter, and ten times an image in memory.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Rate of the node's link, in Mbit/s.
    #[arg(long, default_value_t = 20.0)]
    mbit: f64,
    /// Encoded size of each of the two images, in MiB.
    #[arg(long, default_value_t = 110.0)]
    mib: f64,
    /// Encoded size of a piece, in KiB.
    #[arg(long, default_value_t = 512)]
    piece_kib: u64,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-waiting", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let Arguments { mbit, mib, piece_kib, .. } = *arguments;
    let waiting = block_on(cluster::waiting(&shoal, mbit, mib, piece_kib))?;
    arguments.run.publish(&waiting.table(), &waiting)
}
