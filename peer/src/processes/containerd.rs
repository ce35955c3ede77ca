//! A containerd with folders and sockets of its own, whose snapshotter is a daemon: that of the tests and of the measurement of
//! cold starts.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use rustix::mount::{UnmountFlags, unmount};

use super::{ASK_EVERY, PATIENCE, Process, tail};
use crate::command::Failure;

/// What the CRI runs in the sandbox of a pod. No registry has it: who runs pods makes it known to containerd before.
pub const SANDBOX_IMAGE: &str = "localhost/sandbox:1";

/// A running containerd. Dropping it ends its containers, and detaches whatever is still mounted below its folder.
#[derive(Debug)]
pub struct ContainerdProcess {
    process: Process,
    folder: PathBuf,
}

impl ContainerdProcess {
    /// Starts containerd with everything that it keeps in `folder`, and `snapshotter`, a socket, as its plugin `shoal` and as
    /// the CRI's snapshotter.
    ///
    /// # Errors
    /// It cannot be started, or does not answer; its last words are in the message.
    pub fn start(folder: &Path, snapshotter: &Path) -> Result<Self, Failure> {
        Self::start_by(Command::new("containerd"), folder, snapshotter)
    }

    /// The same by a command to which arguments are added: for instance on another host.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub fn start_by(mut command: Command, folder: &Path, snapshotter: &Path) -> Result<Self, Failure> {
        let config = folder.join("containerd.toml");
        fs::write(&config, configuration(folder, snapshotter))?;
        command.arg("--config").arg(config);
        let process = Process::spawn("containerd", command, &folder.join("containerd.log"), Stdio::null())?;
        let mut containerd = Self { process, folder: folder.to_owned() };
        let deadline = Instant::now() + PATIENCE;
        while !containerd.ctr().arg("version").output()?.status.success() {
            if containerd.process.ended() || Instant::now() > deadline {
                return Err(format!("containerd did not start: {}", tail(&containerd.log())).into());
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok(containerd)
    }

    /// Where it serves its API, the CRI among it.
    pub fn socket(&self) -> PathBuf {
        socket(&self.folder)
    }

    /// Where its log is.
    pub fn log(&self) -> PathBuf {
        self.folder.join("containerd.log")
    }

    /// Its command line client, to which arguments are added.
    pub fn ctr(&self) -> Command {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.socket()).stdin(Stdio::null());
        command
    }
}

impl Drop for ContainerdProcess {
    fn drop(&mut self) {
        let listed = self.ctr().args(["tasks", "ls", "-q"]).output().map(|output| output.stdout).unwrap_or_default();
        for id in String::from_utf8_lossy(&listed).lines() {
            // Its shim would outlive containerd.
            let _ = self.ctr().args(["tasks", "rm", "--force", id]).output();
        }
        self.process.stop();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        // The innermost first.
        let points = table.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
        for point in points.filter(|point| point.starts_with(&self.folder)) {
            let _ = unmount(point, UnmountFlags::DETACH);
        }
    }
}

/// Where the containerd of a folder serves its API: for the daemon, which starts first.
pub fn socket(folder: &Path) -> PathBuf {
    folder.join("containerd.sock")
}

fn configuration(folder: &Path, snapshotter: &Path) -> String {
    let at = |name: &str| folder.join(name);
    format!(
        r#"
version = 2
root = {root:?}
state = {state:?}
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs"]
[grpc]
address = {socket:?}
[ttrpc]
address = {ttrpc:?}
[proxy_plugins.shoal]
type = "snapshot"
address = {snapshotter:?}
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{SANDBOX_IMAGE}"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "shoal"
disable_snapshot_annotations = false
"#,
        root = at("root"),
        state = at("state"),
        socket = socket(folder),
        ttrpc = at("containerd.sock.ttrpc"),
    )
}
