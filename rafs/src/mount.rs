//! Mounting an image, and taking the mount away again.
//!
//! Threads of the session take requests from the kernel, each over its own descriptor, and hand reads to the
//! [`ChunkSource`]; answers come from the source's threads. mount(2) does it all, which takes root, or at least
//! CAP_SYS_ADMIN in a user namespace that owns the mount namespace; no setuid helper is started. fuser is given the
//! open device and never mounts or unmounts: when a session ends, its version 0.18 unmounts whatever it finds at the
//! path; see `mount/session.rs` for how it comes to serve one. Mounts are read-only, nosuid and nodev: a container sees
//! set-user-id bits and devices through the overlayfs above.
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
//! - **The process ends and a [`MountKeeper`] has the connection**: readers wait, until [`Mount::resume`] or until the
//!   keeper lets go, which is the end as above.
//!
//! A process should not read its own mounts: until it has answered, the reading thread cannot be killed, so neither
//! can the process.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{getegid, geteuid};

use crate::bootstrap::Metadata;
use crate::fs::{ImageFs, MountState};
use crate::latency::ReadTimes;
use crate::source::ChunkSource;
use crate::trace::Trace;

mod init;
mod keep;
mod native;
mod presence;
mod session;
mod table;

pub use keep::{KeptMount, MountKeeper, SESSION_VERSION, SessionRecord};
pub use native::NativeMount;
pub use presence::{MountPresence, MountTable};

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
    /// Who keeps the mount alive when this process ends. Default: nobody.
    pub keeper: Option<Arc<dyn MountKeeper>>,
}

impl Default for MountOptions {
    fn default() -> Self {
        let (allow_other, fs_name) = (geteuid().is_root(), "shoal".into());
        Self { threads: 4, read_ahead_kib: 1024, allow_other, fs_name, trace: None, keeper: None }
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
    /// An image is mounted there, and alive.
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
    /// The kernel cannot mount EROFS from files, or this container may not.
    #[error("the kernel does not mount EROFS from files")]
    NoErofs {
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
    /// A mount that an earlier process served cannot go on.
    #[error("the mount at {} cannot be taken over", path.display())]
    Resume {
        /// The mountpoint.
        path: PathBuf,
        /// What the system said, or what is different now.
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
    /// What the other reads took.
    pub times: ReadTimes,
}

/// A mounted image. Dropping it unmounts, whether a keeper has it or not.
#[derive(Debug)]
pub struct Mount {
    mountpoint: PathBuf,
    device: String,
    state: Arc<MountState>,
    keeper: Option<Arc<dyn MountKeeper>>,
    end: Arc<End>,
}

impl Mount {
    /// Mounts an image at an existing directory. Returns when it can be used. A dead mount in that place, left behind
    /// by a process that was killed, is taken away first.
    pub fn new(
        image: impl Into<Metadata>,
        source: Arc<dyn ChunkSource>,
        mountpoint: &Path,
        options: MountOptions,
    ) -> Result<Self, MountError> {
        let mountpoint = prepare(mountpoint)?;
        let device = File::options().read(true).write(true).open("/dev/fuse");
        let device = device.map_err(|source| MountError::NoFuse { source })?.into();
        let failed = |source| MountError::Mount { path: mountpoint.clone(), source };
        mount(&device, &mountpoint, &options).map_err(failed)?;
        let started = Self::start(image.into(), source, device, &mountpoint, &options);
        started.map_err(|error| {
            let _ = detach(&mountpoint);
            failed(error)
        })
    }

    /// Goes on with a mount that another process has served, which must have ended. Readers notice nothing: what they
    /// wait for is answered here.
    ///
    /// # Errors
    /// [`MountError::Resume`]: it is not at its mountpoint any more, or what was served is not what `image` says. Its
    /// connection is closed then.
    pub fn resume(
        image: impl Into<Metadata>,
        source: Arc<dyn ChunkSource>,
        kept: KeptMount,
        options: MountOptions,
    ) -> Result<Self, MountError> {
        let path = kept.mountpoint.clone();
        Self::take_over(image.into(), source, kept, &options).map_err(|source| MountError::Resume { path, source })
    }

    fn start(
        metadata: Metadata,
        source: Arc<dyn ChunkSource>,
        connection: OwnedFd,
        mountpoint: &Path,
        options: &MountOptions,
    ) -> io::Result<Self> {
        let entry = table::top(mountpoint)?.ok_or_else(|| io::Error::other("the mount went away at once"))?;
        let state = Arc::new(MountState::default());
        let fs = file_system(metadata.clone(), source, &state, options);
        let (session, agreement) = session::open(fs, &connection, config(options))?;
        let (device, mountpoint) = (entry.device, mountpoint.to_owned());
        set_read_ahead(&device, options.read_ahead_kib);
        if options.keeper.is_none() {
            // Nobody needs a record, for which all of the bootstrap may have to be read.
            return Self::run(session, state, (device, mountpoint), None, options);
        }
        let record = SessionRecord::new(&metadata, agreement)?;
        let place = (device.clone(), mountpoint.clone());
        Self::run(session, state, place, Some(KeptMount { device, mountpoint, connection, session: record }), options)
    }

    fn take_over(
        metadata: Metadata,
        source: Arc<dyn ChunkSource>,
        kept: KeptMount,
        options: &MountOptions,
    ) -> io::Result<Self> {
        if !kept.is_mounted()? {
            return Err(io::Error::other("it is not mounted any more"));
        }
        if !kept.session.fits(&metadata)? {
            return Err(io::Error::other(
                "another image was mounted there, or by a version that numbers inodes differently",
            ));
        }
        let state = Arc::new(MountState::default());
        let fs = file_system(metadata, source, &state, options);
        let session = session::resume(fs, &kept.connection, kept.session.agreement, config(options))?;
        let place = (kept.device.clone(), kept.mountpoint.clone());
        Self::run(session, state, place, Some(kept), options)
    }

    /// Serves, in threads of its own.
    fn run(
        session: Session<ImageFs>,
        state: Arc<MountState>,
        (device, mountpoint): (String, PathBuf),
        kept: Option<KeptMount>,
        options: &MountOptions,
    ) -> io::Result<Self> {
        let keeper = options.keeper.clone();
        if let (Some(keeper), Some(kept)) = (&keeper, kept) {
            keeper.keep(kept);
        }
        let end = Arc::new(End::default());
        let mount = Self { mountpoint, device, state, keeper, end: Arc::clone(&end) };
        let (device, path, keeper) = (mount.device.clone(), mount.mountpoint.clone(), mount.keeper.clone());
        let run = move || {
            if let Err(error) = session.run() {
                tracing::error!(mountpoint = %path.display(), "session ended: {error}");
            }
            if let Some(keeper) = keeper {
                keeper.forget(&device);
            }
            end.set();
        };
        thread::Builder::new().name("shoal-mount".into()).spawn(run)?;
        Ok(mount)
    }

    /// Where it is mounted: absolute, without links.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// How to find out whether it is still there.
    pub fn presence(&self) -> MountPresence {
        let (mountpoint, device) = (self.mountpoint.clone(), self.device.clone());
        MountPresence { mountpoint, device, end: Some(Arc::clone(&self.end)) }
    }

    /// What it has done so far.
    pub fn stats(&self) -> MountStats {
        let MountState { reads, bytes, errors, latencies, .. } = &*self.state;
        let [reads, bytes, errors] = [reads, bytes, errors].map(|count| count.load(Relaxed));
        MountStats { reads, bytes, errors, times: latencies.times() }
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
        if let Some(keeper) = &self.keeper {
            // Without a name nobody finds it: it ends with this process at the latest.
            keeper.forget(&self.device);
        }
        tracing::info!(mountpoint = %self.mountpoint.display(), "unmounted while in use, readers may finish");
        Ok(Unmounted::Detached)
    }

    /// Lets the mount be: it serves until the process ends. Then, if its keeper has it, readers wait for whoever
    /// [resumes](Self::resume) it, and what cannot be read from now on is left to that one, too. Otherwise it stays dead in
    /// its place, so that whoever looks gets an error and not an empty directory, until the next [`Mount::new`] there.
    pub fn leave(self) {
        if self.is_kept() {
            self.state.leaving.store(true, Relaxed);
        }
        std::mem::forget(self);
    }

    /// Whether it outlives this process.
    pub fn is_kept(&self) -> bool {
        self.keeper.as_ref().is_some_and(|keeper| keeper.holds(&self.device))
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

fn file_system(
    metadata: Metadata,
    source: Arc<dyn ChunkSource>,
    state: &Arc<MountState>,
    options: &MountOptions,
) -> ImageFs {
    let name = Arc::from(options.fs_name.as_str());
    ImageFs::new(metadata, source, name, Arc::clone(state), options.trace.clone(), options.allow_other)
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
    // What a thread reads from an open file of its own ends with the process, so with a keeper they share one.
    config.clone_fd = threads > 1 && options.keeper.is_none();
    config
}

/// Connects an open /dev/fuse with a new mount.
fn mount(device: &OwnedFd, mountpoint: &Path, options: &MountOptions) -> io::Result<()> {
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
            Some(entry) if entry.is_erofs() || (entry.is_fuse() && !is_dead(&path)) => {
                return Err(MountError::Occupied { path });
            }
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
