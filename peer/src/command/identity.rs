//! `shoal identity`: who this node is, for whoever issues its certificate of membership.

use std::{path::PathBuf, process::ExitCode};

use super::Failure;
use crate::identity;

/// Prints the node's peer id. The key behind it lies in the data directory and is made if it is not there.
#[derive(Debug, clap::Args)]
pub(super) struct Identity {
    /// The daemon's data directory.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/shoal")]
    data_dir: PathBuf,
}

impl Identity {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        std::fs::create_dir_all(&self.data_dir)
            .map_err(|error| format!("cannot make {}: {error}", self.data_dir.display()))?;
        println!("{}", identity::to_text(&identity::Identity::load_or_create(&self.data_dir)?.peer()));
        Ok(ExitCode::SUCCESS)
    }
}
