//! `[mounts]`: how images are mounted, and what becomes of that when the daemon ends.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// `[mounts]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct MountsConfig {
    pub mode: MountMode,
    pub native_lazy: bool,
    #[serde(with = "humantime_serde")]
    pub graduate_after: Duration,
    pub threads: u32,
    pub read_ahead_kib: u32,
    pub on_stop: OnStop,
    pub keeper: KeeperMode,
    pub keeper_socket: PathBuf,
    #[serde(with = "humantime_serde")]
    pub keeper_patience: Duration,
}

impl Default for MountsConfig {
    fn default() -> Self {
        Self {
            mode: MountMode::Auto,
            native_lazy: false,
            graduate_after: Duration::from_secs(30),
            threads: 4,
            read_ahead_kib: 1024,
            on_stop: OnStop::Keep,
            keeper: KeeperMode::Auto,
            keeper_socket: PathBuf::new(),
            keeper_patience: shoal_keeper::DEFAULT_PATIENCE,
        }
    }
}

/// What happens to the mounts when the daemon stops on SIGTERM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// What a keeper has goes on: readers wait for the next daemon. The rest is unmounted.
    Keep,
    /// Unmount; readers get an error, a mount that is busy is detached.
    Unmount,
    /// Leave the mount point behind. Without a daemon its reads fail with ENOTCONN until the next start mounts again.
    Leave,
}

/// Whether mounts outlive the daemon in the hands of a keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KeeperMode {
    /// If there is a keeper.
    Auto,
    /// Yes; where there is none, one is started.
    On,
    /// No.
    Off,
}

/// How images are mounted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountMode {
    /// Natively if the image is complete, decoded, and the kernel can; otherwise over FUSE.
    #[default]
    Auto,
    /// By the kernel's EROFS driver, or not at all.
    Native,
    /// Over FUSE.
    Fuse,
}
