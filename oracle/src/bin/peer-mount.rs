//! `nydus-rafs` as a program that mounts: see [`shoal_oracle::mount`].

use clap::Parser;
use shoal_oracle::mount::Command;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

fn main() -> anyhow::Result<()> {
    Arguments::parse().command.run()
}
