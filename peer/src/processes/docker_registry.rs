//! Debian's `docker-registry`, with its storage in a folder of its own: that of the tests and of measurements.

use std::{
    fs,
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use super::{ASK_EVERY, PATIENCE, Process, tail};
use crate::command::Failure;

const PROGRAM: &str = "docker-registry";

/// A running registry.
#[derive(Debug)]
pub struct DockerRegistryProcess {
    // Held for its end.
    _process: Process,
    storage: PathBuf,
    address: SocketAddr,
}

impl DockerRegistryProcess {
    /// Whether it can be started at all.
    pub fn is_installed() -> bool {
        Command::new(PROGRAM).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    }

    /// Starts one on loopback, with everything that it keeps in `folder`. `settings` are further lines of its configuration.
    ///
    /// # Errors
    /// It cannot be started, or does not listen; its last words are in the message.
    pub fn start(folder: &Path, settings: &str) -> Result<Self, Failure> {
        // Free now; a race for it is lost by one of us, and then it is said.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let (config, storage, log) =
            (folder.join("config.yml"), folder.join("storage"), folder.join("docker-registry.log"));
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n{settings}",
            storage.display(),
        );
        fs::write(&config, text)?;
        let mut command = Command::new(PROGRAM);
        command.arg("serve").arg(&config);
        let mut process = Process::spawn(PROGRAM, command, &log, Stdio::null())?;
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            if process.ended() || Instant::now() > deadline {
                return Err(format!("{PROGRAM} did not start: {}", tail(&log)).into());
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok(Self { _process: process, storage, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it keeps what was pushed.
    pub fn storage(&self) -> &Path {
        &self.storage
    }
}
