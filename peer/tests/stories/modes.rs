//! The ways in which an image is mounted, for stories that must end alike in each.

use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

use crate::{
    lazy_mounts::raises_events,
    native_mounts::kind,
    support::{Daemon, can_mount},
};

/// A way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Over FUSE.
    Fuse,
    /// Natively, filled as it is read.
    Lazy,
    /// Natively, complete.
    Native,
}

impl Mode {
    /// False, with a line that says why, on a machine that cannot mount so.
    pub(crate) fn is_possible(self, test: &str) -> bool {
        if !can_mount(test) {
            return false;
        }
        let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        if self != Self::Fuse && !known.lines().any(|line| line.trim() == "erofs") {
            println!("skipped: {test} (needs EROFS in the kernel)");
            return false;
        }
        if let (Self::Lazy, Err(error)) = (self, raises_events()) {
            println!("skipped: {test} (needs pre-content events: {error})");
            return false;
        }
        true
    }

    /// Settings of a daemon that mounts so, with a keeper.
    pub(crate) fn settings(self) -> Vec<String> {
        let lazy = format!("mounts.native_lazy={}", self == Self::Lazy);
        vec![lazy, "mounts.keeper=on".into(), "mounts.keeper_patience=30s".into()]
    }

    /// The same for one that fetches what is read and no more.
    pub(crate) fn settings_without_ahead(self) -> Vec<String> {
        [self.settings(), vec!["read.ahead_bytes=0".into()]].concat()
    }

    /// Mounts an image at the daemon's mountpoint. Of one that is mounted natively and not lazily everything is fetched first.
    pub(crate) fn mount(self, daemon: &Daemon, reference: &str) -> PathBuf {
        self.mount_at(daemon, reference, &daemon.mountpoint());
        daemon.mountpoint()
    }

    /// The same elsewhere.
    pub(crate) fn mount_at(self, daemon: &Daemon, reference: &str, mountpoint: &Path) {
        let path = mountpoint.to_str().expect("UTF-8");
        let (options, expected): (&[&str], _) = match self {
            Self::Fuse => (&["--mode", "fuse"], "fuse.shoal"),
            Self::Lazy => (&["--mode", "native"], "erofs"),
            Self::Native => (&["--mode", "native", "--wait-complete"], "erofs"),
        };
        daemon.ctl(&[&["mount"], options, &[reference, path]].concat());
        assert_eq!(kind(mountpoint), expected, "{}", daemon.log());
    }
}

/// Takes away what is mounted below a folder, once its daemon is gone.
pub(crate) fn unmount_below(folder: &Path) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let below = folder.to_str().expect("UTF-8");
    let mountpoints = mounts.lines().rev().filter_map(|line| line.split(' ').nth(1));
    for mountpoint in mountpoints.filter(|at| at.starts_with(below)) {
        let _ = unmount(mountpoint, UnmountFlags::DETACH);
    }
}
