//! `shoal keeper`: holds the connections of mounts while the daemon is away.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use humantime_serde::re::humantime;
use sd_notify::NotifyState;
use shoal_keeper::{Ended, Keeper as Process};

use super::{Failure, tell_systemd};

/// Holds the connections of the daemon's mounts, so that they outlive it: readers wait until a new daemon serves them. The
/// daemon starts one itself with `mounts.keeper = "on"`; systemd has a unit of its own for it. Ends when no daemon is there
/// for longer than its patience, or when the daemon stops and has left nothing.
#[derive(Debug, clap::Args)]
pub(super) struct Keeper {
    /// Unix socket to listen on: `mounts.keeper_socket` of the daemon's configuration.
    #[arg(long, value_name = "PATH", default_value = "/var/lib/shoal/keeper.sock")]
    socket: PathBuf,
    /// How long mounts are kept without a daemon, for instance `10m`. Then their readers get errors.
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = humantime::parse_duration)]
    patience: Duration,
}

impl Keeper {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        // Away from the terminal and the process group of a daemon that has started it. A leader of a group, such as systemd
        // makes, has a session already.
        let _ = rustix::process::setsid();
        rustix::thread::set_name(c"shoal-keeper")?;
        let keeper = Process::bind(&self.socket, self.patience)?;
        tell_systemd(&[NotifyState::Ready]);
        tracing::info!(socket = %self.socket.display(), "keeping mounts");
        match keeper.run()? {
            Ended::Stopped => tracing::info!("stopped"),
            Ended::Alone { mounts } => tracing::warn!("no daemon has come back, {mounts} mounts are let go"),
        }
        Ok(ExitCode::SUCCESS)
    }
}
