//! `shoal-sim`: what a rollout costs, before it is rolled out.

mod command;

use std::process::ExitCode;

use clap::Parser;

use self::command::Command;

/// Runs swarms in virtual time around Shoal's own scheduler.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

fn main() -> ExitCode {
    match Arguments::parse().command.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("shoal-sim: {failure}");
            ExitCode::FAILURE
        }
    }
}
