//! `shoal-cold-start`: how long a container takes to start, lazily and the ordinary way; `make bench-cold-start`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{cluster::built_shoal, cold_start};

/// Starts containers from an image, lazily and the ordinary way, and prints how long it took until the first command had run.
/// Needs root, FUSE, containerd and runc.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// An OCI layout with the image under the tag `1`, and one four times as large under `4x`.
    images: PathBuf,
    /// Writes the medians there as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often everything is done.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// The shoal binary. Default: the one beside this program.
    #[arg(long, value_name = "FILE")]
    shoal: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal-cold-start: {}", shoal::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return Err("containers and mounts need root and /dev/fuse".into());
    }
    let shoal = arguments.shoal.clone().map_or_else(built_shoal, Ok)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(cold_start::run(&shoal, &arguments.images, arguments.rounds))?;
    println!("{}", report.table());
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report.medians())?)?;
    }
    Ok(())
}
