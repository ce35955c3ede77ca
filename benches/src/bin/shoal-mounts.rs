//! `shoal-mounts`: how fast images are read in each way of mounting them; `make bench-mount`.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    mounts,
    run::{RunArguments, ended},
};

/// Reads images over FUSE, from native mounts, from the kernel's EROFS driver alone, and from the disk, and prints how fast each
/// was. Needs root, FUSE, EROFS, and 6 GB for a temporary folder.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// A folder of this machine whose files are copied into the image: 220 MB of them.
    #[arg(default_value = "/usr/lib")]
    source: PathBuf,
    /// Upstream's daemon, to be measured as well: a `nydusd` that knows `nydusd fuse`.
    #[arg(long, env = "PEER_DAEMON", value_name = "FILE")]
    peer: Option<PathBuf>,
    /// How often everything is done.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-mounts", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let peer = arguments.peer.as_deref().filter(|path| !path.as_os_str().is_empty());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let report = runtime.block_on(mounts::run(&shoal, &arguments.source, peer, arguments.rounds))?;
    arguments.run.publish(&report.table(), &report.json())
}
