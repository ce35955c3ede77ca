//! `shoal-many-files`: what it costs to mount an image of very many files; `make bench-many-files`.

use std::process::ExitCode;

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    many_files,
    run::{RunArguments, block_on, ended},
};

/// Mounts an image of very many small files from its files, by a daemon that has it, and natively, and prints how long that takes
/// and how much memory. Needs root, FUSE, EROFS, and a gigabyte for a temporary folder.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Files of the image.
    #[arg(default_value_t = 1_000_000)]
    files: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-many-files", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let report = block_on(many_files::run(&shoal, arguments.files))?;
    arguments.run.publish(&report.table(), &report)
}
