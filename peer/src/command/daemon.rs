//! `shoal daemon`: the node daemon in the foreground.

use std::{path::PathBuf, process::ExitCode};

use sd_notify::NotifyState;

use super::{Failure, runtime, stop_signal, tell_systemd};
use crate::{config::Config, daemon};

/// Runs until SIGTERM or SIGINT, then withdraws what it announced, unmounts (or leaves the mounts, as configured) and
/// closes the store. With a keeper, the next daemon goes on with the mounts. `docs/shoal.toml` documents every option with its unit and default.
#[derive(Debug, clap::Args)]
pub(super) struct Daemon {
    /// Configuration file (TOML). Without it every option has its default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets one option over the file, for instance `--set zone=b` or `--set data.listen=127.0.0.1:0`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Shorthand for `--set data_dir=DIR`.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Shorthand for `--set socket=PATH`.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Shorthand for `--set role=ROLE`.
    #[arg(long, value_name = "node|seed")]
    role: Option<String>,
    /// Shorthand for `--set zone=ZONE`.
    #[arg(long)]
    zone: Option<String>,
    /// Prints the configuration that would be used, as TOML, and exits.
    #[arg(long)]
    print_config: bool,
}

impl Daemon {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        let config = self.config()?;
        if self.print_config {
            print!("{}", toml::to_string(&config)?);
            return Ok(ExitCode::SUCCESS);
        }
        runtime()?.block_on(async {
            // Before anything else, so that a signal during the start is not lost.
            let stop = stop_signal();
            tokio::pin!(stop);
            let daemon = tokio::select! {
                daemon = daemon::Daemon::start(config) => daemon?,
                stop = &mut stop => {
                    stop?;
                    return Ok(ExitCode::SUCCESS);
                }
            };
            tell_systemd(NotifyState::Ready);
            stop.await?;
            tell_systemd(NotifyState::Stopping);
            daemon.stop().await;
            Ok(ExitCode::SUCCESS)
        })
    }

    fn config(&self) -> Result<Config, Failure> {
        let quoted = |key: &str, value: &str| format!("{key}={}", toml::Value::String(value.to_owned()));
        let path = |path: &PathBuf| path.display().to_string();
        let mut overrides = self.overrides.clone();
        overrides.extend(self.data_dir.as_ref().map(|dir| quoted("data_dir", &path(dir))));
        overrides.extend(self.socket.as_ref().map(|socket| quoted("socket", &path(socket))));
        overrides.extend(self.role.as_ref().map(|role| quoted("role", role)));
        overrides.extend(self.zone.as_ref().map(|zone| quoted("zone", zone)));
        Ok(Config::load(self.config.as_deref(), &overrides)?)
    }
}
