//! Debian's `docker-registry` with a folder of its own: a registry that is not ours, for measurements.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use super::{ASK_EVERY, PATIENCE, Process, tail};
use crate::command::Failure;

/// A running registry.
#[derive(Debug)]
pub struct DockerRegistryProcess {
    process: Process,
    folder: PathBuf,
    address: SocketAddr,
}

impl DockerRegistryProcess {
    /// Starts one on a free port of the loopback, with everything that it keeps in `folder`.
    ///
    /// # Errors
    /// It is not installed, or does not answer; its last words are in the message.
    pub fn start(folder: &Path) -> Result<Self, Failure> {
        // Should somebody take the port meanwhile, it does not start, and says so.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let (config, log) = (folder.join("registry.yml"), folder.join("registry.log"));
        let storage = storage(folder);
        let text = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {storage:?}}}}}\nhttp:\n  addr: {address}\n"
        );
        fs::write(&config, text)?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        let process = Process::spawn("docker-registry", command, &log, Stdio::null())?;
        let mut registry = Self { process, folder: folder.to_owned(), address };
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            if registry.process.ended() || Instant::now() > deadline {
                return Err(format!("docker-registry did not start: {}", tail(&log)).into());
            }
            std::thread::sleep(ASK_EVERY);
        }
        Ok(registry)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it keeps what was pushed.
    pub fn storage(&self) -> PathBuf {
        storage(&self.folder)
    }
}

fn storage(folder: &Path) -> PathBuf {
    folder.join("storage")
}
