//! The `shoal` binary: arguments, logging, one exit point. Bad usage exits 2, failure exits 1.

use std::{io::IsTerminal, process::ExitCode};

use clap::Parser;
use shoal::command::Cli;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("SHOAL_LOG").unwrap_or_else(|_| EnvFilter::new(cli.default_log()));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("shoal: {}", shoal::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
