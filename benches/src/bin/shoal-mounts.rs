//! `shoal-mounts`: how fast images are read in each way of mounting them; `make bench-mount`.

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use shoal::command::Failure;
use shoal_benches::{
    mounts::{self, Options},
    run::{RunArguments, block_on, ended},
};

/// Reads images over FUSE, from native mounts, from the kernel's EROFS driver alone, and from the disk, and prints how fast each
/// was, and whether that is what it has to be. Needs root, FUSE, EROFS, and 6 GB for a temporary folder.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// A folder of this machine whose files are copied into the image: 220 MB of them.
    #[arg(default_value = "/usr/lib")]
    source: PathBuf,
    /// Upstream's daemon, to be measured as well: a `nydusd` that knows `nydusd fuse`, or the `peer-mount` of `scripts/oracle`.
    #[arg(long, env = "PEER_DAEMON", value_name = "FILE")]
    peer: Option<PathBuf>,
    /// How often everything is done.
    #[arg(long, default_value_t = 10)]
    rounds: usize,
    /// Size of the large file, in MiB.
    #[arg(long, default_value_t = 1024)]
    large_mib: usize,
    #[command(flatten)]
    run: RunArguments,
}

fn main() -> ExitCode {
    ended("shoal-mounts", run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let shoal = arguments.run.shoal()?;
    let peer = arguments.peer.as_deref().filter(|path| !path.as_os_str().is_empty());
    let large = arguments.large_mib.max(1) << 20;
    let options = Options { shoal: &shoal, source: &arguments.source, peer, large, rounds: arguments.rounds.max(1) };
    let report = block_on(mounts::run(options))?;
    arguments.run.publish(&report.table(), &report.json())
}
