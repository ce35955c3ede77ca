//! What the programs that measure something have in common: arguments, what they need, where the figures go.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use serde::Serialize;
use shoal::command::Failure;

use crate::cluster::built_shoal;

/// Arguments of such a program, beside its own.
#[derive(Debug, clap::Args)]
pub struct RunArguments {
    /// Writes the medians there as well.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The shoal binary. Default: the one beside this program.
    #[arg(long, value_name = "FILE")]
    shoal: Option<PathBuf>,
}

impl RunArguments {
    /// The shoal binary, on a machine on which it can mount.
    ///
    /// # Errors
    /// There is none, or no root or FUSE.
    pub fn shoal(&self) -> Result<PathBuf, Failure> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            return Err("mounts need root and /dev/fuse".into());
        }
        self.shoal.clone().map_or_else(built_shoal, Ok)
    }

    /// Prints the figures for people, and writes them for scripts if that was asked for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn publish(&self, table: &str, figures: &impl Serialize) -> Result<(), Failure> {
        println!("{table}");
        match &self.json {
            Some(file) => Ok(std::fs::write(file, serde_json::to_string_pretty(figures)?)?),
            None => Ok(()),
        }
    }
}

/// Runs what such a program does, with as many threads as there are processors.
///
/// # Errors
/// Those of `work`, or a thread cannot be started.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(work)
}

/// How the program `name` ends; says why if it failed.
pub fn ended(name: &str, outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{name}: {}", shoal::chain(&*error));
            ExitCode::FAILURE
        }
    }
}
