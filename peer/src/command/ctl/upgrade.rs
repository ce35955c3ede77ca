//! `shoal ctl upgrade`: another version of the daemon in the place of the one that runs.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use shoal_proto::control::{StatusReply, StatusRequest, UpgradeReply, UpgradeRequest};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;

use super::{Failure, absolute, print_json};
use crate::api::{ControlClient, connect, said};

/// How often it is looked whether the new daemon answers.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for one answer: a connection may have been taken by a daemon that ends.
const ANSWER: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub(super) struct Upgrade {
    /// The new program. Default: what is now where the daemon's own program was.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Have the daemon end, and whoever supervises it start the next one. Otherwise its process becomes the new program, with the same
    /// arguments. --binary is examined all the same.
    #[arg(long)]
    exit: bool,
    /// Also if there are mounts that do not outlive the daemon: their readers get errors.
    #[arg(long)]
    force: bool,
    /// How long the new daemon may take until it answers.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = humantime::parse_duration)]
    wait: Duration,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What has come of it, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Upgraded {
    old_version: String,
    new_version: String,
    old_pid: u32,
    new_pid: u32,
    binary: String,
    /// Mounts that the new daemon was left.
    mounts: u32,
}

impl Upgrade {
    pub(super) async fn run(self, mut client: ControlClient<Channel>, socket: &Path) -> Result<(), Failure> {
        let binary = self.binary.as_deref().map(absolute).transpose()?.unwrap_or_default();
        let old_pid = client.status(StatusRequest {}).await.map_err(|s| said(&s))?.into_inner().pid;
        let request = UpgradeRequest { binary, exit: self.exit, force: self.force };
        let reply = client.upgrade(request).await.map_err(|s| said(&s))?.into_inner();
        // The daemon waits for calls that are under way.
        drop(client);
        let UpgradeReply { version: old_version, instance, binary, mounts, .. } = reply;
        let Some(new) = self.wait_for_another(&instance, socket).await? else {
            return Err(self.nobody(old_pid, socket).into());
        };
        if !new.upgrade_failure.is_empty() {
            let StatusReply { version, upgrade_failure, .. } = new;
            return Err(format!("no upgrade, version {version} serves again: {upgrade_failure}").into());
        }
        let upgraded = Upgraded { old_version, new_version: new.version, old_pid, new_pid: new.pid, binary, mounts };
        if self.json {
            return print_json(&upgraded);
        }
        let Upgraded { old_version, new_version, new_pid, mounts, .. } = upgraded;
        println!("{old_version} -> {new_version} (process {new_pid}), {mounts} mounts go on");
        Ok(())
    }

    /// The first status of another daemon than `instance`; none if there is none in time.
    async fn wait_for_another(&self, instance: &str, socket: &Path) -> Result<Option<StatusReply>, Failure> {
        let spinner = ProgressBar::new_spinner()
            .with_style(ProgressStyle::with_template("{spinner} waiting for the new daemon, {elapsed}")?);
        let deadline = Instant::now() + self.wait;
        let found = loop {
            match timeout(ANSWER, ask(socket)).await {
                Ok(Some(status)) if status.instance != instance => break Some(status),
                _ if Instant::now() > deadline => break None,
                _ => {}
            }
            spinner.tick();
            sleep(ASK_EVERY).await;
        };
        spinner.finish_and_clear();
        Ok(found)
    }

    fn nobody(&self, old_pid: u32, socket: &Path) -> String {
        // Of one that has ended and waits for its parent there is a folder, but no program.
        let program = std::fs::read_link(format!("/proc/{old_pid}/exe"));
        let gone = program.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        let process = if gone { "has ended" } else { "runs, see its log" };
        format!(
            "no new daemon answers on {} after {}: process {old_pid} {process}. Mounts stay with the keeper for its patience \
             (mounts.keeper_patience): start the daemon until then, or the version before, and their readers go on",
            socket.display(),
            humantime::format_duration(self.wait),
        )
    }
}

async fn ask(socket: &Path) -> Option<StatusReply> {
    let mut client = connect(socket).await.ok()?;
    Some(client.status(StatusRequest {}).await.ok()?.into_inner())
}
