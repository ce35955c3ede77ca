//! Mounts by the other daemon: `peer-mount`, or `PEER_DAEMON` in its place.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{UnmountFlags, unmount};
use shoal_oracle::read::configuration;

use super::support;

/// How long it may take to mount, and to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A mount, which ends when this is dropped.
pub struct Mounted {
    process: Child,
    root: PathBuf,
    // Configuration, cache, log and mount point.
    _folder: tempfile::TempDir,
}

impl Mounted {
    /// Mounts an image whose blobs lie in `blobs`; none where nothing can be mounted, which it says.
    pub fn new(bootstrap: &Path, blobs: &Path) -> Option<Self> {
        if !support::is_root() || !Path::new("/dev/fuse").exists() {
            println!("skipped: mounts by their daemon (need root and /dev/fuse)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let (root, cache) = (folder.path().join("mnt"), folder.path().join("cache"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&cache).unwrap();
        let config = folder.path().join("config.json");
        fs::write(&config, configuration(bootstrap, blobs, &cache).unwrap().to_string()).unwrap();
        let log = folder.path().join("log");
        let output = File::create(&log).unwrap();
        let before = fs::metadata(&root).unwrap().dev();
        let program = std::env::var_os("PEER_DAEMON").unwrap_or_else(|| env!("CARGO_BIN_EXE_peer-mount").into());
        // The original wants a million open files unless told otherwise, and ends where it may not have them.
        let process = Command::new(&program)
            .args(["fuse", "--rlimit-nofile", "0", "--config"])
            .arg(&config)
            .arg("--bootstrap")
            .arg(bootstrap)
            .arg("--mountpoint")
            .arg(&root)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let mut mounted = Self { process, root, _folder: folder };
        let deadline = Instant::now() + PATIENCE;
        while fs::metadata(&mounted.root).unwrap().dev() == before {
            let ended = mounted.process.try_wait().unwrap().is_some() || Instant::now() > deadline;
            assert!(!ended, "not mounted: {}", fs::read_to_string(&log).unwrap());
            std::thread::sleep(Duration::from_millis(2));
        }
        Some(mounted)
    }

    pub fn root(&self) -> &Path {
        &self.root
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
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
