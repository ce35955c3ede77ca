//! A bed for tests that mount with FUSE: a source tree, an image of it, a mountpoint.

#![allow(dead_code, unreachable_pub, missing_docs)] // each test program uses its part

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use shoal_rafs::{BlobDir, BuildOptions, ChunkId, ChunkSource, Compressor, Mount, MountError, MountOptions};

use crate::scripted_source::{Answer, ScriptedSource};
use crate::support::{
    self,
    image::{Built, build},
};

/// More than any step here can take; whoever waits longer hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A folder with a source tree, an image of it and a mountpoint.
pub struct Bed {
    dir: tempfile::TempDir,
    built: Option<Built>,
}

impl Bed {
    /// None where mounting is impossible.
    pub fn new() -> Option<Self> {
        if !support::is_root() || File::open("/dev/fuse").is_err() {
            println!("skipped: mounting with FUSE needs root and /dev/fuse");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        // Others may look inside.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        for name in ["source", "mnt"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        Some(Self { dir, built: None })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn source(&self, name: &str) -> PathBuf {
        self.path("source").join(name)
    }

    pub fn mounted(&self, name: &str) -> PathBuf {
        self.path("mnt").join(name)
    }

    pub fn build(&mut self, chunk_size: u32) -> &Built {
        self.build_with(BuildOptions { chunk_size, compressor: Compressor::Zstd, ..BuildOptions::default() })
    }

    pub fn build_with(&mut self, options: BuildOptions) -> &Built {
        let work = self.path(&format!("image-{}", options.chunk_size));
        self.built.insert(build(&self.path("source"), &work, options))
    }

    pub fn built(&self) -> &Built {
        self.built.as_ref().unwrap()
    }

    pub fn mount(&self, source: Arc<dyn ChunkSource>) -> Result<Mount, MountError> {
        Mount::new(self.built().image.clone(), source, &self.path("mnt"), MountOptions::default())
    }

    pub fn mount_blobs(&self) -> Mount {
        let built = self.built();
        self.mount(Arc::new(BlobDir::open(built.image.clone(), &built.blobs, 2).unwrap())).unwrap()
    }

    pub fn scripted(&self, script: impl Fn(ChunkId) -> Answer + Send + Sync + 'static) -> Arc<ScriptedSource> {
        ScriptedSource::new(&self.built().image, &self.built().reader, 8, script)
    }
}

pub fn errno(error: &io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

/// The outcome of `work` in a thread, or a failure when it hangs.
pub fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = channel();
    thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(LIMIT).expect("hangs")
}
