//! Mounting an image, and taking the mount away again.
//!
//! Threads of the session take requests from the kernel, each over its own descriptor, and hand reads to the
//! [`ChunkSource`]; answers come from the source's threads. mount(2) does it all, which takes root, or at least
//! CAP_SYS_ADMIN in a user namespace that owns the mount namespace; no setuid helper is started. fuser is given the
//! open device and never mounts or unmounts: when a session ends, its version 0.18 unmounts whatever it finds at the
//! path. Mounts are read-only, nosuid and nodev: a container sees set-user-id bits and devices through the overlayfs
//! above.
//!
//! What happens to readers when the mount or the daemon stops:
//!
//! - **Unmounted while nobody uses it**: the session ends at once.
//! - **Unmounted while files are open**: the name goes at once, which needs no cooperation of the readers; open
//!   files, mappings and working directories go on to work as long as this process and the source live, and the
//!   session ends with the last of them. A reader that waits for a chunk waits until the source answers, which it
//!   does by its deadline.
//! - **The process ends**, in whatever way: the kernel ends the session. Waiting reads fail with ECONNABORTED or
//!   ENOTCONN, as does everything later that the kernel has not kept; touching a mapped page that is not in memory is
//!   a SIGBUS. The mountpoint stays, dead, until [`Mount::new`] is called for it (it detaches dead mounts first) or
//!   somebody calls `umount`.
//!
//! A process should not read its own mounts: until it has answered, the reading thread cannot be killed, so neither
//! can the process.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{getegid, geteuid};

use crate::bootstrap::Bootstrap;
use crate::fs::{Counters, ImageFs};
use crate::source::ChunkSource;
use crate::trace::Trace;

mod table;

/// Most dead mounts, one over another, that are detached from a mountpoint.
const MAX_DEAD: usize = 16;
/// How long the session may take to notice that its mount has gone. Longer means that somebody still holds it.
const END_GRACE: Duration = Duration::from_secs(3);

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Threads that take requests from the kernel; at least 1. Default: 4. They only look into memory, so more than
    /// there are cores help little.
    pub threads: usize,
    /// How far the kernel reads ahead, and with it the size of its requests. Default: 1024 KiB, the most that fits
    /// one request. The kernel's own 128 KiB stay where sysfs cannot be written.
    pub read_ahead_kib: u32,
    /// Whether other users may look inside, as far as modes and owners in the image permit. Default: only for root.
    pub allow_other: bool,
    /// The source column of the mount table, and the image's name in log lines. Default: `shoal`.
    pub fs_name: String,
    /// Where reads are noted, if anywhere. Default: nowhere.
    pub trace: Option<Arc<Trace>>,
}

impl Default for MountOptions {
    fn default() -> Self {
        let (allow_other, fs_name) = (geteuid().is_root(), "shoal".into());
        Self { threads: 4, read_ahead_kib: 1024, allow_other, fs_name, trace: None }
    }
}

/// Why an image was not mounted or unmounted.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mountpoint is missing or cannot be looked at.
    #[error("mountpoint {} cannot be used", path.display())]
    Mountpoint {
        /// The mountpoint.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The mountpoint is a file.
    #[error("mountpoint {} is not a directory", path.display())]
    NotADirectory {
        /// The mountpoint.
        path: PathBuf,
    },
    /// A FUSE file system is mounted there, and alive.
    #[error("something is mounted at {} already", path.display())]
    Occupied {
        /// The mountpoint.
        path: PathBuf,
    },
    /// The kernel has no FUSE, or this container may not use it.
    #[error("/dev/fuse cannot be opened")]
    NoFuse {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The kernel refused.
    #[error("cannot mount at {}", path.display())]
    Mount {
        /// The mountpoint.
        path: PathBuf,
        /// What the system said; EPERM without root.
        #[source]
        source: io::Error,
    },
    /// The mount, or a dead one in its place, could not be taken away.
    #[error("cannot unmount {}", path.display())]
    Unmount {
        /// The mountpoint.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// How an unmount ended. Either way nothing is at the mountpoint any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmounted {
    /// Nobody used the mount; the session has ended.
    Gone,
    /// Files were open, or another mount namespace has the mount too. It serves those until they are done.
    Detached,
}

/// What a mount has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MountStats {
    /// Read requests; what the kernel answers from its cache is not among them.
    pub reads: u64,
    /// Bytes given to the kernel.
    pub bytes: u64,
    /// Reads that ended with EIO.
    pub errors: u64,
}

/// A mounted image. Dropping it unmounts.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    device: String,
    counters: Arc<Counters>,
    end: Arc<End>,
}

impl Mount {
    /// Mounts an image at an existing directory. Returns when it can be used. A dead mount in that place, left behind
    /// by a process that was killed, is taken away first.
    pub fn new(
        bootstrap: Bootstrap,
        source: Arc<dyn ChunkSource>,
        mountpoint: &Path,
        options: MountOptions,
    ) -> Result<Self, MountError> {
        let mountpoint = prepare(mountpoint)?;
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|source| MountError::NoFuse { source })?;
        let failed = |source| MountError::Mount { path: mountpoint.clone(), source };
        mount(&device, &mountpoint, &options).map_err(failed)?;
        let started = Self::start(bootstrap, source, device, &mountpoint, &options);
        started.map_err(|error| {
            let _ = detach(&mountpoint);
            failed(error)
        })
    }

    fn start(
        bootstrap: Bootstrap,
        source: Arc<dyn ChunkSource>,
        device: File,
        mountpoint: &Path,
        options: &MountOptions,
    ) -> io::Result<Self> {
        let entry = table::top(mountpoint)?.ok_or_else(|| io::Error::other("the mount went away at once"))?;
        let counters = Arc::new(Counters::default());
        let name = Arc::from(options.fs_name.as_str());
        let fs =
            ImageFs::new(bootstrap, source, name, Arc::clone(&counters), options.trace.clone(), options.allow_other);
        let config = config(options);
        let session = Session::from_fd(fs, device.into(), config.acl, config)?;
        let end = Arc::new(End::default());
        let (ended, path) = (Arc::clone(&end), mountpoint.to_owned());
        let run = move || {
            if let Err(error) = session.run() {
                tracing::error!(mountpoint = %path.display(), "session ended: {error}");
            }
            ended.set();
        };
        thread::Builder::new().name("shoal-mount".into()).spawn(run)?;
        set_read_ahead(&entry.device, options.read_ahead_kib);
        Ok(Self { mountpoint: mountpoint.to_owned(), device: entry.device, counters, end })
    }

    /// Where it is mounted: absolute, without links.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// What it has done so far.
    pub fn stats(&self) -> MountStats {
        let Counters { reads, bytes, errors } = &*self.counters;
        MountStats { reads: reads.load(Relaxed), bytes: bytes.load(Relaxed), errors: errors.load(Relaxed) }
    }

    /// Waits until the session has ended: it was unmounted, here or from outside, and nobody holds it any more.
    pub fn wait(&self) {
        self.end.wait();
    }

    /// Unmounts; when it is in use, detaches it from its name and lets the users finish. Does not wait for them. May
    /// be called again, and does nothing to another mount that has taken its place.
    pub fn unmount(&self) -> Result<Unmounted, MountError> {
        let failed = |source| MountError::Unmount { path: self.mountpoint.clone(), source };
        if !self.is_mounted().map_err(failed)? {
            return Ok(if self.end.is_set() { Unmounted::Gone } else { Unmounted::Detached });
        }
        let detached = match rustix::mount::unmount(&self.mountpoint, UnmountFlags::NOFOLLOW) {
            Ok(()) => !self.end.wait_for(END_GRACE),
            Err(Errno::BUSY) => {
                detach(&self.mountpoint).map_err(failed)?;
                !self.end.is_set()
            }
            Err(errno) => return Err(failed(errno.into())),
        };
        if !detached {
            return Ok(Unmounted::Gone);
        }
        tracing::info!(mountpoint = %self.mountpoint.display(), "unmounted while in use, readers may finish");
        Ok(Unmounted::Detached)
    }

    /// Lets the mount be: it serves until the process ends, and then stays dead in its place, so that whoever looks
    /// gets an error and not an empty directory, until the next [`Mount::new`] there.
    pub fn leave(self) {
        std::mem::forget(self);
    }

    /// Whether what is seen at the mountpoint is this mount.
    fn is_mounted(&self) -> io::Result<bool> {
        let seen = table::top(&self.mountpoint)?.is_some_and(|entry| entry.device == self.device);
        // Once the session has ended, the device number may belong to a successor. Ours is dead then.
        Ok(seen && (!self.end.is_set() || is_dead(&self.mountpoint)))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!(
                "{error}: {}",
                std::error::Error::source(&error).map_or(String::new(), |e| e.to_string())
            );
        }
    }
}

/// Whether the session has ended.
#[derive(Debug, Default)]
struct End {
    /// Locked for a look only.
    ended: Mutex<bool>,
    changed: Condvar,
}

impl End {
    fn set(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn is_set(&self) -> bool {
        *self.lock()
    }

    fn wait(&self) {
        drop(self.changed.wait_while(self.lock(), |ended| !*ended));
    }

    /// False when it took longer.
    fn wait_for(&self, limit: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), limit, |ended| !*ended);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn config(options: &MountOptions) -> Config {
    let threads = options.threads.max(1);
    let mut config = Config::default();
    config.acl = if options.allow_other { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(threads);
    config.clone_fd = threads > 1;
    config
}

/// Connects an open /dev/fuse with a new mount.
fn mount(device: &File, mountpoint: &Path, options: &MountOptions) -> io::Result<()> {
    let (fd, user, group) = (device.as_raw_fd(), geteuid(), getegid());
    let mut data = format!("fd={fd},rootmode=40000,user_id={user},group_id={group},default_permissions");
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    let data = CString::new(data)?;
    Ok(rustix::mount::mount(options.fs_name.as_str(), mountpoint, "fuse.shoal", flags, data.as_c_str())?)
}

/// The mountpoint as an absolute path without links, free of dead mounts.
fn prepare(mountpoint: &Path) -> Result<PathBuf, MountError> {
    let unusable = |source| MountError::Mountpoint { path: mountpoint.to_owned(), source };
    let path = resolve(mountpoint).map_err(unusable)?;
    for _ in 0..MAX_DEAD {
        match table::top(&path).map_err(unusable)? {
            Some(entry) if entry.is_fuse() && !is_dead(&path) => return Err(MountError::Occupied { path }),
            Some(entry) if entry.is_fuse() => {
                tracing::warn!(mountpoint = %path.display(), "detaching a dead mount");
                detach(&path).map_err(|source| MountError::Unmount { path: path.clone(), source })?;
            }
            _ => break,
        }
    }
    let is_dir = std::fs::metadata(&path).map_err(unusable)?.is_dir();
    if is_dir { Ok(path) } else { Err(MountError::NotADirectory { path }) }
}

/// Like `canonicalize`, also when the last part is a mount that does not answer.
fn resolve(path: &Path) -> io::Result<PathBuf> {
    match (path.canonicalize(), path.parent(), path.file_name()) {
        (Err(error), Some(parent), Some(name)) if error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(parent.canonicalize()?.join(name))
        }
        (resolved, ..) => resolved,
    }
}

/// Whether the process behind a FUSE mount is gone. statfs(2) always asks it; stat(2) may be answered by the kernel.
fn is_dead(path: &Path) -> bool {
    matches!(rustix::fs::statfs(path), Err(Errno::NOTCONN | Errno::CONNABORTED))
}

fn detach(path: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)?)
}

/// The kernel offers 128 KiB when a session starts and takes more only here. Best effort: it needs root and sysfs.
fn set_read_ahead(device: &str, kib: u32) {
    let path = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&path, kib.to_string()) {
        tracing::debug!("cannot write {path}, reads stay small: {error}");
    }
}
