//! `nydus-builder` as a program: see [`shoal_oracle::build`].

use clap::Parser;
use shoal_oracle::build::Command;

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

fn main() -> anyhow::Result<()> {
    Arguments::parse().command.run()
}
