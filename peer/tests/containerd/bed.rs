//! A containerd of the test's own, with the daemon as its snapshotter.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use shoal::processes::{ContainerdProcess, containerd_socket};
use tempfile::{NamedTempFile, TempDir};
use tonic::{codegen::http, transport::Endpoint};
use tonic_prost::ProstCodec;

use crate::support::{Daemon, Registry, can_mount, wait};

/// Programs that the tests run, and where Debian has them.
const PROGRAMS: [&str; 4] = ["/usr/bin/containerd", "/usr/bin/ctr", "/usr/sbin/runc", "/bin/busybox"];

/// A registry, a containerd and a daemon that are connected. Everything goes with it.
pub(crate) struct Bed {
    containerd: ContainerdProcess,
    pub(crate) registry: Registry,
    pub(crate) daemon: Daemon,
    folder: TempDir,
}

impl Bed {
    /// None, with a line that says why, where containers cannot be run.
    pub(crate) fn start(test: &str) -> Option<Self> {
        Self::start_with(test, &[])
    }

    /// With more settings of the daemon.
    pub(crate) fn start_with(test: &str, settings: &[String]) -> Option<Self> {
        if !can_run_containers(test) {
            return None;
        }
        let registry = Registry::start();
        shoal_rafs::oci::Layout::new(registry.layout()).create().expect("a layout");
        Some(Self::behind(registry, settings))
    }

    /// In front of a registry that has its images. For who has asked whether containers can be run.
    pub(crate) fn behind(mut registry: Registry, settings: &[String]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let setting = |key: &str, path: PathBuf| format!("snapshotter.{key}={path:?}");
        let snapshots = folder.path().join("snapshots.sock");
        let own = [setting("socket", snapshots.clone()), setting("containerd", containerd_socket(folder.path()))];
        let settings = [&own, settings].concat();
        registry.switch_on();
        let daemon = Daemon::start("node", folder.path(), &settings);
        let containerd = ContainerdProcess::start(folder.path(), &snapshots).expect("containerd starts");
        Self { containerd, registry, daemon, folder }
    }

    /// Where containerd serves its API, the CRI among it.
    pub(crate) fn socket(&self) -> PathBuf {
        self.containerd.socket()
    }

    /// Where the daemon serves snapshots to containerd.
    pub(crate) fn snapshotter(&self) -> PathBuf {
        self.folder.path().join("snapshots.sock")
    }

    pub(crate) fn try_ctr(&self, arguments: &[&str]) -> Output {
        self.containerd.ctr().args(arguments).output().expect("ctr runs")
    }

    /// What `ctr` says; it must succeed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> String {
        self.said(arguments, self.try_ctr(arguments))
    }

    /// What a process in a container prints; it must succeed. See [`in_container`].
    pub(crate) fn printed(&self, command: &[&str], arguments: &[&str]) -> String {
        self.said(arguments, in_container(&self.socket(), command, arguments))
    }

    fn said(&self, arguments: &[&str], output: Output) -> String {
        let said = String::from_utf8(output.stdout).expect("text");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {arguments:?}: {error}{said}\n{}\n{}", self.daemon.log(), self.log());
        said
    }

    /// What `ctr` says on standard error; it must fail.
    pub(crate) fn ctr_fails(&self, arguments: &[&str]) -> String {
        let output = self.try_ctr(arguments);
        assert!(!output.status.success(), "ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).expect("text")
    }

    /// Runs a shell command in a new container, which goes with it.
    pub(crate) fn run(&self, image: &str, id: &str, script: &str) -> String {
        self.printed(&["run"], &["--rm", "--snapshotter", "shoal", image, id, "/bin/sh", "-c", script])
    }

    /// Starts a container that waits.
    pub(crate) fn start_waiting(&self, image: &str, id: &str) {
        self.ctr(&["run", "--detach", "--snapshotter", "shoal", image, id, "/bin/sleep", "600"]);
    }

    /// Runs a shell command in a container that runs.
    pub(crate) fn exec(&self, id: &str, script: &str) -> String {
        self.printed(&["tasks", "exec"], &["--exec-id", "once", id, "/bin/sh", "-c", script])
    }

    pub(crate) fn end(&self, id: &str) {
        self.end_task(id);
        self.ctr(&["containers", "rm", id]);
    }

    /// Ends what runs in a container, which stays with what was written to it.
    pub(crate) fn end_task(&self, id: &str) {
        self.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
        let runs = |line: &str| line.starts_with(&format!("{id} ")) && line.contains("RUNNING");
        wait("the task ends", || !self.ctr(&["tasks", "ls"]).lines().any(runs));
        self.ctr(&["tasks", "rm", id]);
    }

    /// Keys of all snapshots that containerd knows of.
    pub(crate) fn snapshots(&self) -> Vec<String> {
        let list = self.ctr(&["snapshots", "--snapshotter", "shoal", "ls"]);
        list.lines().skip(1).filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
    }

    /// Directories of snapshots on the disk.
    pub(crate) fn directories(&self) -> Vec<PathBuf> {
        let root = self.folder.path().join("node/data/snapshots");
        fs::read_dir(root).expect("the snapshots").map(|entry| entry.expect("an entry").path()).collect()
    }

    /// Mount points of lazy images.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let status = self.daemon.status();
        let mounts = status["mounts"].as_array().expect("a list").iter();
        mounts.map(|mount| mount["mountpoint"].as_str().expect("a path").to_owned()).collect()
    }

    /// Removes an image and waits until containerd's garbage collection has taken away what was only its.
    pub(crate) fn remove_image(&self, image: &str) {
        self.ctr(&["images", "rm", "--sync", image]);
    }

    /// Waits until containerd has noticed that the daemon is there again: it tries every few seconds.
    pub(crate) fn wait_for_snapshotter(&self) {
        let list = ["snapshots", "--snapshotter", "shoal", "ls"];
        wait("containerd has its snapshotter", || self.try_ctr(&list).status.success());
    }

    /// Has containerd take away what nothing refers to.
    pub(crate) fn collect_garbage(&self) {
        // Something must have gone from the snapshotter, or containerd does not look into it.
        self.ctr(&["snapshots", "--snapshotter", "shoal", "prepare", "garbage", ""]);
        self.ctr(&["snapshots", "--snapshotter", "shoal", "rm", "garbage"]);
        self.ctr(&["leases", "create", "--id", "garbage"]);
        self.ctr(&["leases", "rm", "--sync", "garbage"]);
    }

    fn log(&self) -> String {
        fs::read_to_string(self.containerd.log()).unwrap_or_default()
    }
}

/// Runs a process in a container by a command of `ctr` (`run`, `tasks exec`) with more arguments. What the process prints,
/// on standard error too, is the result's `stdout`: the shim writes it into a file, since `ctr` loses what comes through
/// its own pipes at times on a busy machine.
pub(crate) fn in_container(containerd: &Path, command: &[&str], arguments: &[&str]) -> Output {
    let printed = NamedTempFile::new().expect("a temporary file");
    let uri = format!("file://{}", printed.path().display());
    let mut ctr = Command::new("ctr");
    ctr.arg("-a").arg(containerd).args(command).args(["--log-uri", &uri]).args(arguments);
    let mut output = ctr.stdin(Stdio::null()).output().expect("ctr runs");
    output.stdout = fs::read(printed.path()).expect("what was printed");
    output
}

/// False, with a line that says why, on a machine that cannot run containers over lazy images.
pub(crate) fn can_run_containers(test: &str) -> bool {
    if !can_mount(test) {
        return false;
    }
    let missing = PROGRAMS.iter().find(|program| !Path::new(program).exists());
    if let Some(missing) = missing {
        println!("skipped: {test} (needs {missing})");
    }
    missing.is_none()
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}\n{}", self.daemon.log(), self.log());
        }
    }
}

/// Calls a method whose messages are `Q` and `A` on a Unix socket.
pub(crate) fn call<Q: prost::Message + 'static, A: prost::Message + Default + 'static>(
    socket: &Path,
    method: &'static str,
    message: Q,
) -> Result<A, tonic::Status> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).expect("an address");
        let mut client = tonic::client::Grpc::new(endpoint.connect().await.expect("somebody answers"));
        client.ready().await.expect("a connection");
        let method = http::uri::PathAndQuery::from_static(method);
        let answer = client.unary(tonic::Request::new(message), method, ProstCodec::<Q, A>::default()).await;
        answer.map(tonic::Response::into_inner)
    })
}
