//! `shoal keeper`: holds the connections of mounts while the daemon is away.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use humantime_serde::re::humantime;
use sd_notify::NotifyState;
use shoal_keeper::{Ended, Holder, Keeper as Process};

use super::{Failure, tell_systemd};

/// Shortest patience of a holder. A daemon answers what a dead keeper had taken for five seconds, by numbers that mean something else to
/// who reads the group next.
const HOLDER_PATIENCE: Duration = Duration::from_secs(20);

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
    /// Hold what a keeper gives, and do nothing with it while that lives: a keeper starts one itself, on its socket's name with
    /// `.holder` behind, for the case that it is killed together with the daemon.
    #[arg(long)]
    hold: bool,
}

impl Keeper {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        // Away from the terminal and the process group of a daemon that has started it. A leader of a group, such as systemd
        // makes, has a session already.
        let _ = rustix::process::setsid();
        rustix::thread::set_name(if self.hold { c"shoal-holder" } else { c"shoal-keeper" })?;
        let keeper = Process::bind(&self.socket, self.patience)?;
        let keeper = if self.hold {
            stand_apart();
            keeper.holding()
        } else {
            let patience = self.patience;
            keeper.with_holder(Holder::new(&self.socket, move |socket| start_holder(socket, patience)))
        };
        tell_systemd(&[NotifyState::Ready]);
        tracing::info!(socket = %self.socket.display(), "keeping mounts");
        match keeper.run()? {
            Ended::Stopped => tracing::info!("stopped"),
            Ended::Alone { mounts } => tracing::warn!("no daemon has come back, {mounts} mounts are let go"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// This program once more. What it says goes where the keeper's words go.
fn start_holder(socket: &Path, patience: Duration) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.args(["keeper", "--hold", "--socket"]).arg(socket);
    command.arg("--patience").arg(format!("{}ms", patience.max(HOLDER_PATIENCE).as_millis()));
    // The notifications of a service manager are the keeper's.
    command.env_remove("NOTIFY_SOCKET").current_dir("/").stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn()?;
    let wait = move || match child.wait() {
        Ok(status) => tracing::debug!("the holder has ended with {status}"),
        Err(error) => tracing::debug!("the holder cannot be waited for: {error}"),
    };
    std::thread::Builder::new().name("shoal-holder".into()).spawn(wait).map(drop)
}

/// Leaves the cgroup that the keeper, or the daemon that has started it, may be killed with, and is the last to be chosen when memory is
/// short. Where the system does not let it, it stays where it is.
fn stand_apart() {
    let id = std::process::id().to_string();
    for root in ["/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd"] {
        if let Err(error) = fs::write(Path::new(root).join("cgroup.procs"), &id) {
            tracing::debug!(root, "it stays in its cgroup: {error}");
        }
    }
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!("it may be killed when memory is short: {error}");
    }
}
