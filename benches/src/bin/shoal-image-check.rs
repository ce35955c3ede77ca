//! `shoal-image-check`: how fast an image is checked, next to the disk and to decoding; `make bench-check`.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    image_check::{self, Content},
    run::{RunArguments, ended},
};
use shoal_rafs::Compressor;

/// Checks an image with an empty page cache, reads its blob alone, and decodes and verifies its pieces alone. Needs root, and in
/// the folder for temporary files half of the image.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Size of the image's content in MiB, which is made up.
    #[arg(default_value_t = 5120, value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    mib: u64,
    /// A folder of this machine that is the image instead.
    #[arg(long, value_name = "DIR", conflicts_with = "mib")]
    source: Option<PathBuf>,
    /// How its chunks are compressed: none, lz4 or zstd.
    #[arg(long, default_value = "zstd")]
    compressor: Compressor,
    /// How often everything is done.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-image-check", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let content = arguments.source.as_deref().map_or(Content::MadeUp { mib: arguments.mib }, Content::Folder);
    let report = image_check::run(&shoal, content, arguments.compressor, arguments.rounds)?;
    arguments.run.publish(&report.table(), &report)
}
