//! Upstream's daemon, as a process for each mount: `nydusd fuse`, over blobs in a folder, with its cache of decoded chunks in another.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
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
}

/// A mount of it, which ends when this is dropped.
pub(super) struct Mounted {
    process: Child,
    root: PathBuf,
}

impl Peer {
    pub(super) fn new(program: &Path, folder: &Path) -> Self {
        Self { program: program.to_owned(), folder: folder.join("peer") }
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
        fs::write(&config, configuration(&image.files.stored, &cache).to_string())?;
        let before = fs::metadata(&root)?.dev();
        let log = self.folder.join("log");
        let mut command = Command::new(&self.program);
        command.arg("fuse").arg("--config").arg(&config).arg("--bootstrap").arg(&image.files.bootstrap);
        command.arg("--mountpoint").arg(&root).stdin(Stdio::null());
        let process = command.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?).spawn();
        let process = process.map_err(|error| format!("cannot start {}: {error}", self.program.display()))?;
        let mut mounted = Mounted { process, root };
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

/// Blobs in a folder, decoded chunks kept, nothing fetched that nobody asks for beyond what it does by itself.
fn configuration(blobs: &Path, cache: &Path) -> serde_json::Value {
    json!({
        "device": {
            "backend": { "type": "localfs", "config": { "dir": blobs } },
            "cache": { "type": "blobcache", "config": { "work_dir": cache } },
        },
        "mode": "direct",
        "digest_validate": false,
        "iostats_files": false,
        "enable_xattr": true,
        "fs_prefetch": { "enable": false },
    })
}

impl Mounted {
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes that the process has read so far: of blobs, as nothing else is large before its cache is read.
    pub(super) fn bytes_read(&self) -> Result<u64, Failure> {
        let counters = fs::read_to_string(format!("/proc/{}/io", self.process.id()))?;
        let read = counters.lines().find_map(|line| line.strip_prefix("rchar: "));
        Ok(read.ok_or("no rchar in proc")?.parse()?)
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
        let config = configuration(Path::new("/b"), Path::new("/c"));
        assert_eq!(config["device"]["backend"]["config"]["dir"], "/b");
        assert_eq!(config["device"]["cache"]["config"]["work_dir"], "/c");
    }
}
