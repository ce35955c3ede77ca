//! `shoal-mounts`: how fast images are read in each way of mounting them; `make bench-mount`.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{cluster::built_shoal, mounts};

/// Reads images over FUSE, from native mounts, from the kernel's EROFS driver alone, and from the disk, and prints how fast each
/// was. Needs root, FUSE, EROFS, and 6 GB for a temporary folder.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// A folder of this machine whose files are copied into the image: 220 MB of them.
    #[arg(default_value = "/usr/lib")]
    source: PathBuf,
    /// Writes the medians there as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How often everything is done.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// The shoal binary. Default: the one beside this program.
    #[arg(long, value_name = "FILE")]
    shoal: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shoal-mounts: {}", shoal::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return Err("mounts need root and /dev/fuse".into());
    }
    let shoal = arguments.shoal.clone().map_or_else(built_shoal, Ok)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(mounts::run(&shoal, &arguments.source, arguments.rounds))?;
    println!("{}", report.table());
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&report.json())?)?;
    }
    Ok(())
}
