//! The demo's processes: a registry, and daemons each with a folder of its own. Whatever happens, none outlives the
//! demo: they stop with SIGTERM, are killed when they don't, and die with this process should it be killed itself.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use shoal_proto::control::{StatusReply, StatusRequest};
use tonic::transport::Channel;

use crate::{
    api::ControlClient,
    command::{Failure, ctl, serve_layout::RegistryFigures},
};

/// How long a process may take to start, and to stop before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);

/// A child process that does not outlive this value.
#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
}

impl Process {
    fn spawn(name: &str, arguments: &[String], log: &Path, stdout: Stdio) -> Result<Self, Failure> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(std::fs::File::create(log)?)
            // Ctrl-C on the terminal reaches the demo alone, which then stops its children in order.
            .process_group(0);
        // SAFETY: only an async-signal-safe system call runs between fork and exec.
        unsafe { command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::TERM))?)) };
        let child = command.spawn().map_err(|e| format!("cannot start {name}: {e}"))?;
        Ok(Self { name: name.to_owned(), child })
    }

    fn ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// The most memory that was resident at a time, in bytes (`VmHWM` of proc(5)).
    fn peak_rss_bytes(&self) -> Result<u64, Failure> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        Ok(kib.ok_or_else(|| format!("no peak memory of {} in proc", self.name))?.parse::<u64>()? << 10)
    }

    fn terminate(&mut self) {
        if !self.ended()
            && let Some(pid) = Pid::from_raw(self.child.id() as i32)
        {
            // It may end between the two calls; then there is nobody to signal.
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.terminate();
        let deadline = Instant::now() + PATIENCE;
        while !self.ended() {
            if Instant::now() > deadline {
                eprintln!("demo: {} does not stop, killing it", self.name);
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The registry: `shoal serve-layout` as a process.
#[derive(Debug)]
pub(super) struct RegistryProcess {
    process: Process,
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl RegistryProcess {
    pub(super) fn start(layout: &Path, folder: &Path) -> Result<Self, Failure> {
        let arguments = ["serve-layout", "--listen", "127.0.0.1:0"].map(str::to_owned);
        let arguments = [&arguments[..], &[layout.display().to_string()]].concat();
        let log = folder.join("registry.log");
        let mut process = Process::spawn("registry", &arguments, &log, Stdio::piped())?;
        let mut line = String::new();
        let mut stdout = BufReader::new(process.child.stdout.take().ok_or("the registry has no standard output")?);
        stdout.read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ").and_then(|text| text.parse().ok());
        let address = address.ok_or_else(|| format!("the registry did not start: {}", tail(&log)))?;
        Ok(Self { process, stdout, address })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops it; its last words are what it sent.
    pub(super) fn stop(mut self) -> Result<RegistryFigures, Failure> {
        self.process.terminate();
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// One node daemon.
#[derive(Debug)]
pub(super) struct NodeProcess {
    process: Process,
    folder: PathBuf,
}

impl NodeProcess {
    /// Starts a daemon on free loopback ports; `bootstrap_peers` are the others to join through.
    pub(super) fn start(name: &str, role: &str, folder: &Path, bootstrap_peers: &[String]) -> Result<Self, Failure> {
        let folder = folder.join(name);
        std::fs::create_dir_all(folder.join("mnt"))?;
        let set = |key: &str, value: toml::Value| ["--set".to_owned(), format!("{key}={value}")];
        let mut arguments = vec!["daemon".to_owned()];
        arguments.extend(set("data_dir", folder.join("data").display().to_string().into()));
        arguments.extend(set("socket", folder.join("shoal.sock").display().to_string().into()));
        arguments.extend(set("role", role.into()));
        arguments.extend(set("control.listen", vec!["/ip4/127.0.0.1/tcp/0"].into()));
        arguments.extend(set("control.bootstrap_peers", bootstrap_peers.to_vec().into()));
        arguments.extend(set("data.listen", "127.0.0.1:0".into()));
        arguments.extend(set("http.listen", "127.0.0.1:0".into()));
        let process = Process::spawn(name, &arguments, &folder.join("log"), Stdio::null())?;
        Ok(Self { process, folder })
    }

    pub(super) fn name(&self) -> &str {
        &self.process.name
    }

    /// Where this node mounts the image.
    pub(super) fn mountpoint(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    /// The most memory that was resident at a time so far, in bytes.
    pub(super) fn peak_rss_bytes(&self) -> Result<u64, Failure> {
        self.process.peak_rss_bytes()
    }

    /// A connection to the daemon's control socket.
    pub(super) async fn client(&self) -> Result<ControlClient<Channel>, Failure> {
        ctl::connect(&self.folder.join("shoal.sock")).await
    }

    /// Waits until the daemon answers, and gives its first status.
    pub(super) async fn ready(&mut self) -> Result<StatusReply, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Ok(mut client) = self.client().await
                && let Ok(status) = client.status(StatusRequest {}).await
            {
                return Ok(status.into_inner());
            }
            if self.process.ended() || Instant::now() > deadline {
                return Err(format!("{} did not start: {}", self.name(), tail(&self.folder.join("log"))).into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks the daemon to stop; `drop` waits for it. Several are asked first and waited for afterwards.
    pub(super) fn terminate(&mut self) {
        self.process.terminate();
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // The daemon unmounts when it stops. Should it have been killed, the dead mount is taken away here.
        self.process.terminate();
        let deadline = Instant::now() + PATIENCE;
        while !self.process.ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = rustix::mount::unmount(self.mountpoint(), rustix::mount::UnmountFlags::DETACH);
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
