//! What the end-to-end tests share: a tree, an image of it in a registry, and daemons as real processes.

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use shoal::layout_server::LayoutServer;
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// False, with a line that says why, on a machine that cannot run FUSE.
pub(crate) fn can_mount(test: &str) -> bool {
    let reason = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !Path::new("/dev/fuse").exists() {
        "needs /dev/fuse"
    } else {
        return true;
    };
    println!("skipped: {test} ({reason})");
    false
}

/// Bytes that do not compress, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).collect();
    bytes.truncate(len);
    bytes
}

/// A tree of `files` files of `len` bytes of noise, in folders of ten, and a few other kinds.
pub(crate) fn tree(seed: u64, files: usize, len: usize) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for n in 0..files {
        let folder = dir.path().join(format!("d{}", n / 10));
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(format!("f{n}")), noise(seed ^ n as u64, len)).expect("a file");
    }
    fs::write(dir.path().join("empty"), "").expect("a file");
    std::os::unix::fs::symlink("d0/f0", dir.path().join("link")).expect("a link");
    fs::hard_link(dir.path().join("empty"), dir.path().join("empty2")).expect("a hard link");
    dir
}

/// An image of `source` in the OCI layout `layout` under `tag`; gives the encoded bytes (blobs and bootstrap layer).
pub(crate) fn publish(source: &Path, layout: &Path, tag: &str) -> u64 {
    let built = Built::new(source, "zstd");
    built.push(layout, tag)
}

/// An image on disk.
pub(crate) struct Built {
    folder: TempDir,
}

impl Built {
    pub(crate) fn new(source: &Path, compressor: &str) -> Self {
        Self::with(source, &["--compressor", compressor])
    }

    /// Built with these options of `shoal image build`.
    pub(crate) fn with(source: &Path, options: &[&str]) -> Self {
        let built = Self { folder: tempfile::tempdir().expect("a temporary folder") };
        let arguments = [&["image", "build"], options, &["--source"]].concat();
        let (bootstrap, blobs) = (built.bootstrap(), built.blobs());
        shoal(&arguments, &[source, Path::new("--bootstrap"), &bootstrap, Path::new("--blob-dir"), &blobs]);
        built
    }

    pub(crate) fn bootstrap(&self) -> PathBuf {
        self.folder.path().join("bootstrap")
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.folder.path().join("blobs")
    }

    /// The name, which is the id, of the only blob.
    pub(crate) fn blob(&self) -> String {
        let names = fs::read_dir(self.blobs()).expect("the blobs");
        let names: Vec<_> = names.map(|entry| entry.expect("a blob").file_name()).collect();
        assert_eq!(names.len(), 1);
        names[0].to_str().expect("a hexadecimal name").to_owned()
    }

    /// Pushes it into a layout; gives the encoded bytes.
    pub(crate) fn push(&self, layout: &Path, tag: &str) -> u64 {
        let reference = format!("oci:{}:{tag}", layout.display());
        let (bootstrap, blobs) = (self.bootstrap(), self.blobs());
        let pushed = shoal(
            &["image", "push", "--json", "--bootstrap"],
            &[&bootstrap, Path::new("--blob-dir"), &blobs, Path::new(&reference)],
        );
        json(&pushed)["encoded_bytes"].as_u64().expect("encoded_bytes")
    }
}

/// Runs `shoal` and expects success.
pub(crate) fn shoal(arguments: &[&str], paths: &[&Path]) -> Output {
    let output = Command::new(env!("CARGO_BIN_EXE_shoal")).args(arguments).args(paths).output().expect("shoal runs");
    assert!(output.status.success(), "shoal {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

pub(crate) fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON on standard output")
}

/// A registry over a layout, in this process, that can be switched off and on again at the same address.
pub(crate) struct Registry {
    runtime: Runtime,
    layout: PathBuf,
    /// Where the layout is, if it goes with the registry.
    _folder: Option<TempDir>,
    server: Option<LayoutServer>,
    address: SocketAddr,
}

impl Registry {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let layout = folder.path().join("layout");
        fs::create_dir_all(&layout).expect("a folder");
        Self { _folder: Some(folder), ..Self::over(&layout) }
    }

    /// Over a layout that outlives it.
    pub(crate) fn over(layout: &Path) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        Self { runtime, layout: layout.to_owned(), _folder: None, server: None, address }
    }

    pub(crate) fn layout(&self) -> PathBuf {
        self.layout.clone()
    }

    /// Publishes an image and gives its encoded bytes.
    pub(crate) fn publish(&self, source: &Path, tag: &str) -> u64 {
        publish(source, &self.layout(), tag)
    }

    pub(crate) fn switch_on(&mut self) {
        let server = self.runtime.block_on(LayoutServer::start(&self.layout(), self.address)).expect("a registry");
        self.address = server.addr();
        self.server = Some(server);
    }

    pub(crate) fn switch_off(&mut self) {
        if let Some(server) = self.server.take() {
            let _ = self.runtime.block_on(server.stop());
        }
    }

    pub(crate) fn reference(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.address)
    }

    /// Requests answered since it was switched on.
    pub(crate) fn requests(&self) -> u64 {
        self.server.as_ref().map_or(0, |server| server.stats().requests)
    }

    /// Bytes sent since it was switched on.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.server.as_ref().map_or(0, |server| server.stats().sent_bytes)
    }
}

/// Whether this is how variables of the environment are called.
fn is_variable(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
}

/// A node daemon as a process, in a folder that outlives its restarts.
pub(crate) struct Daemon {
    name: String,
    folder: PathBuf,
    settings: Vec<String>,
    child: Child,
}

impl Daemon {
    /// Starts and waits until it answers. `settings` are `KEY=VALUE`; those in capitals, such as `SHOAL_LOG`, are its
    /// environment.
    pub(crate) fn start(name: &str, folder: &Path, settings: &[String]) -> Self {
        let folder = folder.join(name);
        fs::create_dir_all(folder.join("mnt")).expect("a folder");
        let child = Self::spawn(&folder, settings);
        let mut daemon = Self { name: name.into(), folder, settings: settings.to_vec(), child };
        daemon.wait_until_ready();
        daemon
    }

    fn spawn(folder: &Path, settings: &[String]) -> Child {
        let log = fs::File::options().create(true).append(true).open(folder.join("log")).expect("a log");
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.arg("daemon").arg("--data-dir").arg(folder.join("data")).arg("--socket").arg(folder.join("sock"));
        let ports =
            ["control.listen=[\"/ip4/127.0.0.1/tcp/0\"]", "data.listen=127.0.0.1:0", "http.listen=127.0.0.1:0"];
        for setting in ports.iter().map(ToString::to_string).chain(settings.iter().cloned()) {
            match setting.split_once('=').filter(|(name, _)| is_variable(name)) {
                Some((name, value)) => command.env(name, value),
                None => command.arg("--set").arg(setting),
            };
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        // SAFETY: only an async-signal-safe system call runs between fork and exec.
        unsafe {
            command.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
            });
        }
        command.spawn().expect("the daemon starts")
    }

    fn wait_until_ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.try_ctl(&["status", "--json"]).status.success() {
            assert!(self.child.try_wait().expect("its state").is_none(), "{} ended: {}", self.name, self.log());
            assert!(Instant::now() < deadline, "{} does not answer: {}", self.name, self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn try_ctl(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.arg("ctl").arg("--socket").arg(self.folder.join("sock")).args(arguments);
        command.output().expect("shoal ctl runs")
    }

    pub(crate) fn ctl(&self, arguments: &[&str]) -> Output {
        let output = self.try_ctl(arguments);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{}: ctl {arguments:?}: {error}\n{}", self.name, self.log());
        output
    }

    /// Runs `shoal store` through the daemon.
    pub(crate) fn store(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.arg("store").args(arguments).arg("--socket").arg(self.folder.join("sock"));
        command.output().expect("shoal store runs")
    }

    pub(crate) fn store_usage(&self) -> Value {
        json(&self.store(&["usage", "--json"]))
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("sock")
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.folder.join("data")
    }

    pub(crate) fn umount(&self, mountpoint: &Path) {
        self.ctl(&["umount", mountpoint.to_str().expect("UTF-8")]);
    }

    pub(crate) fn status(&self) -> Value {
        json(&self.ctl(&["status", "--json"]))
    }

    pub(crate) fn peers(&self) -> Vec<Value> {
        json(&self.ctl(&["peers", "--json"]))["peers"].as_array().expect("a list").clone()
    }

    /// Multiaddresses for others to join through, as a setting.
    pub(crate) fn join(&self) -> String {
        format!("control.bootstrap_peers={}", self.status()["control_addresses"])
    }

    /// Waits until a seed peer is connected and its lease is heard of.
    pub(crate) fn wait_for_home(&self) {
        wait(&format!("{} finds a home", self.name), || {
            self.peers().iter().any(|peer| peer["connected"] == true && peer["lease"] == true)
        });
    }

    /// Waits until a seed peer has heard of its own lease, and is a home.
    pub(crate) fn wait_for_own_lease(&self) {
        let me = self.status()["peer"].clone();
        wait("it has a lease", || self.peers().iter().any(|peer| peer["peer"] == me && peer["lease"] == true));
    }

    pub(crate) fn mountpoint(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    pub(crate) fn mount(&self, reference: &str) {
        self.mount_at(reference, &self.mountpoint());
    }

    pub(crate) fn try_mount(&self, reference: &str) -> Output {
        self.try_ctl(&["mount", reference, self.mountpoint().to_str().expect("UTF-8")])
    }

    pub(crate) fn mount_at(&self, reference: &str, mountpoint: &Path) {
        self.ctl(&["mount", reference, mountpoint.to_str().expect("UTF-8")]);
    }

    /// Where its keeper listens, if it has one.
    pub(crate) fn keeper_socket(&self) -> PathBuf {
        self.folder.join("data/keeper.sock")
    }

    /// Has its keeper let go of everything and end.
    fn end_keeper(&self) -> Result<(), shoal_keeper::ClientError> {
        let mut keeper = shoal_keeper::Client::connect(&self.keeper_socket())?;
        for (mount, _) in keeper.kept()? {
            keeper.forget(&mount.device)?;
        }
        keeper.release()?;
        keeper.stop()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends SIGKILL. [`start_again`](Self::start_again) waits for the end.
    pub(crate) fn kill(&self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it can be killed");
    }

    /// Asks it to stop and waits for a clean end.
    pub(crate) fn stop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it can be signalled");
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{} ended with {status}: {}", self.name, self.log());
    }

    /// Starts it again with more settings, with which it fails.
    pub(crate) fn fail_to_start(&mut self, settings: &[String]) {
        self.child.wait().expect("it has ended");
        let settings = [self.settings.as_slice(), settings].concat();
        let status = Self::spawn(&self.folder, &settings).wait().expect("it ends");
        assert_eq!(status.code(), Some(1), "{} starts: {}", self.name, self.log());
    }

    /// From the next start on there is one more setting.
    pub(crate) fn set(&mut self, setting: &str) {
        self.settings.push(setting.to_owned());
    }

    /// Starts it again with the same folder and settings.
    pub(crate) fn start_again(&mut self) {
        self.child.wait().expect("it has ended");
        self.child = Self::spawn(&self.folder, &self.settings);
        self.wait_until_ready();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = rustix::mount::unmount(self.mountpoint(), rustix::mount::UnmountFlags::DETACH);
        // Most have none.
        let _ = self.end_keeper();
    }
}

/// Empties the kernel's caches, so that the next reads reach the daemon.
pub(crate) fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root drops caches");
}

/// Waits until `holds`, for at most half a minute.
pub(crate) fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Every regular file below `root`, with its path relative to it.
pub(crate) fn files(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a readable folder") {
            let entry = entry.expect("an entry");
            let kind = entry.file_type().expect("its type");
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                found.push(entry.path().strip_prefix(root).expect("below the root").to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Asserts that `mount` holds the same files with the same bytes as `source`.
pub(crate) fn assert_same(source: &Path, mount: &Path) {
    let names = files(source);
    assert_eq!(names, files(mount));
    for name in names {
        let (a, b) = (fs::read(source.join(&name)), fs::read(mount.join(&name)));
        assert!(a.expect("the source") == b.expect("the mount"), "{} differs", name.display());
    }
}

/// The value of one of the daemon's metrics; 0 while it has none.
pub(crate) fn metric(daemon: &Daemon, name: &str) -> f64 {
    let address = daemon.status()["http_address"].as_str().expect("an address").to_owned();
    let mut connection = TcpStream::connect(address).expect("the metrics endpoint");
    write!(connection, "GET /metrics HTTP/1.1\r\nHost: shoal\r\nConnection: close\r\n\r\n").expect("a request");
    let mut page = String::new();
    connection.read_to_string(&mut page).expect("an answer");
    let values = page.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<f64>().ok());
    values.sum()
}

/// Bytes of a status' `total` of pieces from `origin`.
pub(crate) fn total_bytes(status: &Value, origin: &str) -> u64 {
    status["total"]["bytes"][origin].as_u64().expect("a figure")
}

/// Peak of the memory of a daemon, in bytes.
pub(crate) fn peak(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a figure");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
}
