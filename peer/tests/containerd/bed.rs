//! A containerd of the test's own, with the daemon as its snapshotter.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use rustix::process::{Signal, kill_process, set_parent_process_death_signal};
use tempfile::TempDir;
use tonic::{codegen::http, transport::Endpoint};
use tonic_prost::ProstCodec;

use crate::support::{Daemon, Registry, can_mount, wait};

/// Programs that the tests run, and where Debian has them.
const PROGRAMS: [&str; 4] = ["/usr/bin/containerd", "/usr/bin/ctr", "/usr/sbin/runc", "/bin/busybox"];

/// A registry, a containerd and a daemon that are connected. Everything goes with it.
pub(crate) struct Bed {
    pub(crate) registry: Registry,
    pub(crate) daemon: Daemon,
    containerd: Child,
    folder: TempDir,
}

impl Bed {
    /// None, with a line that says why, where containers cannot be run.
    pub(crate) fn start(test: &str) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        if let Some(missing) = PROGRAMS.iter().find(|program| !Path::new(program).exists()) {
            println!("skipped: {test} (needs {missing})");
            return None;
        }
        let folder = tempfile::tempdir().expect("a temporary folder");
        let setting = |key: &str, name: &str| format!("snapshotter.{key}={:?}", folder.path().join(name));
        let settings = [setting("socket", "snapshots.sock"), setting("containerd", "containerd.sock")];
        let mut registry = Registry::start();
        shoal_rafs::oci::Layout::new(registry.layout()).create().expect("a layout");
        registry.switch_on();
        let daemon = Daemon::start("node", folder.path(), &settings);
        let containerd = containerd(folder.path());
        let bed = Self { registry, daemon, containerd, folder };
        wait("containerd answers", || bed.try_ctr(&["version"]).status.success());
        Some(bed)
    }

    /// Where containerd serves its API, the CRI among it.
    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("containerd.sock")
    }

    /// Where the daemon serves snapshots to containerd.
    pub(crate) fn snapshotter(&self) -> PathBuf {
        self.folder.path().join("snapshots.sock")
    }

    pub(crate) fn try_ctr(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("ctr");
        command.arg("-a").arg(self.socket()).args(arguments);
        command.stdin(Stdio::null()).output().expect("ctr runs")
    }

    /// What `ctr` says; it must succeed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> String {
        let output = self.try_ctr(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "ctr {arguments:?}: {error}\n{}\n{}", self.daemon.log(), self.log());
        String::from_utf8(output.stdout).expect("text")
    }

    /// What `ctr` says on standard error; it must fail.
    pub(crate) fn ctr_fails(&self, arguments: &[&str]) -> String {
        let output = self.try_ctr(arguments);
        assert!(!output.status.success(), "ctr {arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).expect("text")
    }

    /// Runs a shell command in a new container, which goes with it.
    pub(crate) fn run(&self, image: &str, id: &str, script: &str) -> String {
        self.ctr(&["run", "--rm", "--snapshotter", "shoal", image, id, "/bin/sh", "-c", script])
    }

    /// Starts a container that waits.
    pub(crate) fn start_waiting(&self, image: &str, id: &str) {
        self.ctr(&["run", "--detach", "--snapshotter", "shoal", image, id, "/bin/sleep", "600"]);
    }

    /// Runs a shell command in a container that runs.
    pub(crate) fn exec(&self, id: &str, script: &str) -> String {
        self.ctr(&["tasks", "exec", "--exec-id", "once", id, "/bin/sh", "-c", script])
    }

    pub(crate) fn end(&self, id: &str) {
        self.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
        let runs = |line: &str| line.starts_with(&format!("{id} ")) && line.contains("RUNNING");
        wait("the task ends", || !self.ctr(&["tasks", "ls"]).lines().any(runs));
        self.ctr(&["tasks", "rm", id]);
        self.ctr(&["containers", "rm", id]);
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
        fs::read_to_string(self.folder.path().join("containerd.log")).unwrap_or_default()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}\n{}", self.daemon.log(), self.log());
        }
        let listed = self.try_ctr(&["tasks", "ls", "-q"]).stdout;
        for id in String::from_utf8_lossy(&listed).lines() {
            self.try_ctr(&["tasks", "rm", "--force", id]);
        }
        // Asked first, so that shims and mounts are gone; it may have ended.
        let _ = kill_process(rustix::process::Pid::from_child(&self.containerd), Signal::TERM);
        let _ = self.containerd.wait();
        unmount_below(self.folder.path());
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

fn containerd(folder: &Path) -> Child {
    let at = |name: &str| folder.join(name).display().to_string();
    let config = format!(
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
address = {snapshots:?}
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "shoal"
disable_snapshot_annotations = false
"#,
        root = at("root"),
        state = at("state"),
        socket = at("containerd.sock"),
        ttrpc = at("containerd.sock.ttrpc"),
        snapshots = at("snapshots.sock"),
    );
    fs::write(folder.join("containerd.toml"), config).expect("a configuration");
    let log = fs::File::create(folder.join("containerd.log")).expect("a log");
    let mut command = Command::new("containerd");
    command.arg("--config").arg(folder.join("containerd.toml"));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    // SAFETY: only an async-signal-safe system call runs between fork and exec.
    unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?)) };
    command.spawn().expect("containerd starts")
}

/// Detaches what a test that failed has left mounted, the innermost first.
fn unmount_below(folder: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = table.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new);
    for point in points.filter(|point| point.starts_with(folder)) {
        let _ = rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH);
    }
}
