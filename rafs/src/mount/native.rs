//! Native mounts: a complete image in the hands of the kernel's EROFS driver, with no daemon in the path of a read.
//!
//! The driver mounts the bootstrap as a file, with the decoded form of each blob as a further device (Linux 6.12 and
//! later, with `CONFIG_EROFS_FS_BACKED_BY_FILE`). It holds those files open, so the mount outlives whoever made it, and
//! the names of the files. A file that changes under it would change what readers see: whoever keeps the files must not.
//!
//! What the driver is given must have been verified: it checks nothing itself but the structure of what it reads.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags};

use super::{MountError, MountPresence, Unmounted, detach, prepare, table};

/// Longest path of a bootstrap: what fsconfig(2) takes, with its end.
const MAX_PATH: usize = 256;

/// An image that the kernel's EROFS driver has mounted. Dropping it unmounts.
#[derive(Debug)]
pub struct NativeMount {
    mountpoint: PathBuf,
    device: String,
}

impl NativeMount {
    /// Mounts an image at an existing directory. `bootstrap` is the file with its bootstrap, by a path that tells images
    /// apart and at most 255 bytes long; `blobs` the decoded forms of its blobs in the order of its blob table.
    ///
    /// # Errors
    /// [`MountError::NoErofs`] where the kernel cannot do it; otherwise as for [`Mount::new`](super::Mount::new).
    pub fn new(bootstrap: &Path, blobs: &[PathBuf], mountpoint: &Path) -> Result<Self, MountError> {
        let mountpoint = prepare(mountpoint)?;
        let failed = |source| MountError::Mount { path: mountpoint.clone(), source };
        if bootstrap.as_os_str().len() >= MAX_PATH {
            return Err(failed(io::Error::other("the path of the bootstrap is too long for the kernel")));
        }
        let blobs = blobs.iter().map(File::open).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let mount = super_block(bootstrap, &blobs).map_err(|errno| match errno {
            // No driver; no driver for files; a kernel that takes every source for a block device.
            Errno::NODEV | Errno::OPNOTSUPP | Errno::NOTBLK => MountError::NoErofs { source: errno.into() },
            errno => failed(errno.into()),
        })?;
        let place =
            || rustix::mount::move_mount(&mount, "", CWD, &mountpoint, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH);
        place().map_err(|errno| failed(errno.into()))?;
        let placed = table::top(&mountpoint).map_err(failed)?;
        let device = placed.ok_or_else(|| failed(io::Error::other("the mount went away at once")))?.device;
        Ok(Self { mountpoint, device })
    }

    /// The mount that an earlier process has made of this very bootstrap file, if it is what is seen at `mountpoint`.
    ///
    /// # Errors
    /// The table of mounts cannot be read.
    pub fn existing(bootstrap: &Path, mountpoint: &Path) -> io::Result<Option<Self>> {
        let top = table::top(mountpoint)?;
        let ours = top.filter(|entry| entry.is_erofs() && entry.source == bootstrap);
        Ok(ours.map(|entry| Self { mountpoint: mountpoint.to_owned(), device: entry.device }))
    }

    /// Where it is mounted: absolute, without links.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// How to find out whether it is still there.
    pub fn presence(&self) -> MountPresence {
        MountPresence { mountpoint: self.mountpoint.clone(), device: self.device.clone(), end: None }
    }

    /// Unmounts; when it is in use, detaches it from its name, and the kernel goes on to serve its users. May be called
    /// again, and does nothing to another mount that has taken its place.
    ///
    /// # Errors
    /// [`MountError::Unmount`].
    pub fn unmount(&self) -> Result<Unmounted, MountError> {
        let failed = |source| MountError::Unmount { path: self.mountpoint.clone(), source };
        let seen = table::top(&self.mountpoint).map_err(failed)?;
        if !seen.is_some_and(|entry| entry.is_erofs() && entry.device == self.device) {
            return Ok(Unmounted::Gone);
        }
        match rustix::mount::unmount(&self.mountpoint, UnmountFlags::NOFOLLOW) {
            Ok(()) => Ok(Unmounted::Gone),
            Err(Errno::BUSY) => detach(&self.mountpoint).map(|()| Unmounted::Detached).map_err(failed),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// Lets the mount be. It needs no process.
    pub fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for NativeMount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!("{}", crate::chain(&error));
        }
    }
}

/// The file system, mounted nowhere yet. Devices are named by descriptors, which keeps their paths out of what fsconfig(2)
/// can carry, and makes them the files that were opened.
fn super_block(bootstrap: &Path, blobs: &[File]) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = |key: &str, value: &Path| rustix::mount::fsconfig_set_string(context.as_fd(), key, value);
    set("source", bootstrap)?;
    for blob in blobs {
        set("device", Path::new(&format!("/proc/self/fd/{}", blob.as_raw_fd())))?;
    }
    rustix::mount::fsconfig_set_flag(context.as_fd(), "ro")?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOATIME;
    rustix::mount::fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}
