//! Upstream's daemon, as a process for each mount: `nydusd fuse`, over blobs in a registry, with its cache of decoded chunks in a
//! folder. Or a program that has what is used of its command line, such as `peer-mount` of the workspace `oracle`, which is
//! made of its packages.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    net::SocketAddr,
    os::unix::{fs::MetadataExt, net::UnixStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::mount::{UnmountFlags, unmount};
use serde_json::json;
use shoal::command::Failure;

use super::Image;

/// How long it may take to mount, and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// The program, and where it works.
pub(super) struct Peer {
    program: PathBuf,
    folder: PathBuf,
    registry: SocketAddr,
}

/// A mount of it, which ends when this is dropped.
pub(super) struct Mounted {
    process: Child,
    root: PathBuf,
    /// Where it says what it has done.
    socket: PathBuf,
}

impl Peer {
    pub(super) fn new(program: &Path, folder: &Path, registry: SocketAddr) -> Self {
        Self { program: program.to_owned(), folder: folder.join("peer"), registry }
    }

    fn cache(&self, image: &Image) -> PathBuf {
        self.folder.join(format!("{}-cache", image.tag))
    }

    /// Empties the cache of an image, which is not mounted.
    pub(super) fn forget(&self, image: &Image) -> Result<(), Failure> {
        match fs::remove_dir_all(self.cache(image)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Mounts an image, and returns once it can be used.
    pub(super) fn mount(&self, image: &Image) -> Result<Mounted, Failure> {
        let (root, cache) = (self.folder.join("mnt"), self.cache(image));
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&cache)?;
        let config = self.folder.join("config.json");
        fs::write(&config, configuration(self.registry, &cache).to_string())?;
        let before = fs::metadata(&root)?.dev();
        let socket = self.folder.join("api");
        // The one of the last mount; it would be taken for a daemon to go on for.
        let _ = fs::remove_file(&socket);
        let log = self.folder.join("log");
        let mut command = Command::new(&self.program);
        // Unless told otherwise it wants a million open files, and ends where it may not have them.
        command
            .args(["fuse", "--rlimit-nofile", "0"])
            .arg("--config")
            .arg(&config)
            .arg("--bootstrap")
            .arg(&image.files.bootstrap);
        command.arg("--mountpoint").arg(&root).arg("--apisock").arg(&socket).stdin(Stdio::null());
        let process = command.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?).spawn();
        let process = process.map_err(|error| format!("cannot start {}: {error}", self.program.display()))?;
        let mut mounted = Mounted { process, root, socket };
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(&mounted.root)?.dev() == before {
            if mounted.process.try_wait()?.is_some() || Instant::now() > deadline {
                let said = fs::read_to_string(&log).unwrap_or_default();
                let words = said.lines().rev().take(5).collect::<Vec<_>>().join("; ");
                return Err(format!("{} does not mount: {words}", self.program.display()).into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(mounted)
    }
}

/// Blobs in the registry that the others read, too, decoded chunks kept, and otherwise its defaults (`nydus-api`, `RafsConfig`): reads from the backend are made
/// up to 1 MiB (`amplify_io`), and nothing is fetched that nobody has asked for (`fs_prefetch.enable`). It has to be told a mode;
/// `direct` is what it has elsewhere where nobody says.
fn configuration(registry: SocketAddr, cache: &Path) -> serde_json::Value {
    json!({
        "device": {
            "backend": { "type": "registry", "config": { "scheme": "http", "host": registry.to_string(), "repo": "app" } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
        "enable_xattr": true,
    })
}

impl Mounted {
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes that it has read from where the blobs lie so far, by its own count: chunks as they are in blobs, and their tables.
    pub(super) fn bytes_fetched(&self) -> Result<u64, Failure> {
        let mut api = UnixStream::connect(&self.socket)?;
        api.set_read_timeout(Some(PATIENCE))?;
        api.write_all(b"GET /api/v1/metrics/backend HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut said = String::new();
        // It may leave the connection open; what it says is one object.
        while !said.ends_with('}') {
            let mut part = [0; 4096];
            match api.read(&mut part)? {
                0 => break,
                len => said.push_str(std::str::from_utf8(&part[..len])?),
            }
        }
        let figures: serde_json::Value = serde_json::from_str(&said[said.find('{').ok_or("it has no figures")?..])?;
        Ok(figures["read_amount_total"].as_u64().ok_or("it does not say what it has read")?)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.root, UnmountFlags::DETACH);
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.process.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                let _ = self.process.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_where_blobs_and_cache_are() {
        let config = configuration(([127, 0, 0, 1], 5000).into(), Path::new("/c"));
        assert_eq!(config["device"]["backend"]["config"]["host"], "127.0.0.1:5000");
        assert_eq!(config["device"]["cache"]["config"]["work_dir"], "/c");
    }
}
