//! Registries, daemons and containerd as child processes, each with a folder of its own: those of the demo, of the harnesses
//! that measure, and of tests. Whatever happens, none outlives whoever started it: they stop with SIGTERM, are killed when they don't, and
//! get a SIGTERM should their parent be killed itself.
//!
//! Start them from a thread that lives as long as they should: the kernel takes its end for the end of the parent.

mod containerd;
mod docker_registry;

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use shoal_proto::control::{PeersRequest, StatusReply, StatusRequest};
use tonic::transport::Channel;

use crate::{
    api::{self, ControlClient},
    command::Failure,
    layout_server::RegistryFigures,
};

pub use self::{
    containerd::{ContainerdProcess, SANDBOX_IMAGE, socket as containerd_socket},
    docker_registry::DockerRegistryProcess,
};

/// How long a process may take to start, and to stop before it is killed. Many of them on few cores need their time.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often a daemon is asked for something that has not happened yet.
const ASK_EVERY: Duration = Duration::from_millis(50);

/// A child process that does not outlive this value.
#[derive(Debug)]
struct Process {
    name: String,
    child: Child,
}

impl Process {
    fn spawn(name: &str, mut command: Command, log: &Path, stdout: Stdio) -> Result<Self, Failure> {
        command
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create(log)?)
            // Ctrl-C on the terminal reaches the parent alone, which then stops its children in order.
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

    fn signal(&mut self, signal: Signal) {
        if !self.ended()
            && let Some(pid) = Pid::from_raw(self.child.id() as i32)
        {
            // It may end between the two calls; then there is nobody to signal.
            let _ = kill_process(pid, signal);
        }
    }

    /// Asks it to stop, waits, and kills it if it does not.
    fn stop(&mut self) {
        self.signal(Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        while !self.ended() {
            if Instant::now() > deadline {
                eprintln!("{} does not stop, killing it", self.name);
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The registry: `shoal serve-layout` as a process.
#[derive(Debug)]
pub struct RegistryProcess {
    process: Process,
    stdout: BufReader<ChildStdout>,
    address: SocketAddr,
}

impl RegistryProcess {
    /// Serves `layout` on `listen`. `shoal` is the command to which arguments are added; the log goes to `folder`.
    ///
    /// # Errors
    /// It does not start; its last words are in the message.
    pub fn start(mut shoal: Command, layout: &Path, listen: SocketAddr, folder: &Path) -> Result<Self, Failure> {
        shoal.args(["serve-layout", "--by-client", "--listen", &listen.to_string()]).arg(layout);
        let log = folder.join("registry.log");
        let mut process = Process::spawn("registry", shoal, &log, Stdio::piped())?;
        let mut line = String::new();
        let mut stdout = BufReader::new(process.child.stdout.take().ok_or("the registry has no standard output")?);
        stdout.read_line(&mut line)?;
        let address = line.trim().strip_prefix("listening on ").and_then(|text| text.parse().ok());
        let address = address.ok_or_else(|| format!("the registry did not start: {}", tail(&log)))?;
        Ok(Self { process, stdout, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.child.id()
    }

    /// Stops it; its last words are what it sent.
    ///
    /// # Errors
    /// It ended without a word.
    pub fn stop(mut self) -> Result<RegistryFigures, Failure> {
        self.process.signal(Signal::TERM);
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// One node daemon, with data directory, socket, log and mount point in a folder of its own.
#[derive(Debug)]
pub struct NodeProcess {
    process: Process,
    folder: PathBuf,
}

impl NodeProcess {
    /// Starts a daemon in `folder/name`. `shoal` is the command to which arguments are added.
    ///
    /// # Errors
    /// The folder cannot be made, or the command not be run.
    pub fn start(
        name: &str,
        folder: &Path,
        mut shoal: Command,
        settings: &[(&str, toml::Value)],
    ) -> Result<Self, Failure> {
        let folder = folder.join(name);
        std::fs::create_dir_all(folder.join("mnt"))?;
        shoal.arg("daemon").arg("--data-dir").arg(folder.join("data")).arg("--socket").arg(folder.join("shoal.sock"));
        for (key, value) in settings {
            shoal.arg("--set").arg(format!("{key}={value}"));
        }
        let process = Process::spawn(name, shoal, &folder.join("log"), Stdio::null())?;
        Ok(Self { process, folder })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.process.name
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.child.id()
    }

    /// Where this node mounts the image.
    pub fn mountpoint(&self) -> PathBuf {
        self.folder.join("mnt")
    }

    /// The most memory that was resident at a time so far, in bytes.
    ///
    /// # Errors
    /// The daemon has ended.
    pub fn peak_rss_bytes(&self) -> Result<u64, Failure> {
        self.process.peak_rss_bytes()
    }

    /// A connection to the daemon's control socket.
    ///
    /// # Errors
    /// Nobody answers there.
    pub async fn client(&self) -> Result<ControlClient<Channel>, Failure> {
        api::connect(&self.folder.join("shoal.sock")).await
    }

    /// Waits until the daemon answers, and gives its first status.
    ///
    /// # Errors
    /// It ends, or does not answer in time; its last words are in the message.
    pub async fn ready(&mut self) -> Result<StatusReply, Failure> {
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
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// Waits until the node is connected to as many seed peers of its zone as `seeds` and has heard of their leases:
    /// the first reads of a node that is alone go to the registry.
    ///
    /// # Errors
    /// It takes too long.
    pub async fn knows_seeds(&self, zone: &str, seeds: usize) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut client = self.client().await?;
        while Instant::now() < deadline {
            let peers = client.peers(PeersRequest {}).await.map_err(|s| api::said(&s))?.into_inner().peers;
            if peers.iter().filter(|peer| peer.lease && peer.connected && peer.zone == zone).count() >= seeds {
                return Ok(());
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
        Err(format!("{} found no seed peer", self.name()).into())
    }

    /// Asks the daemon to stop; `drop` waits for it. Several are asked first and waited for afterwards.
    pub fn terminate(&mut self) {
        self.process.signal(Signal::TERM);
    }

    /// Kills the daemon, as a power cut would.
    pub fn kill(&mut self) {
        self.process.signal(Signal::KILL);
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // The daemon unmounts when it stops. Should it have been killed, the dead mount is taken away here.
        self.process.signal(Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        while !self.process.ended() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = rustix::mount::unmount(self.mountpoint(), rustix::mount::UnmountFlags::DETACH);
    }
}

/// This program, to be started again.
///
/// # Errors
/// The system does not say where it is.
pub fn this_program() -> io::Result<Command> {
    std::env::current_exe().map(Command::new)
}

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(5)..].join("\n")
}
