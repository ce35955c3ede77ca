//! A mount as the kernel has it: over FUSE, which this daemon serves, or native, which the kernel serves by itself.

use std::{path::Path, sync::Arc};

use shoal_rafs::{KeptMount, Mount, MountError, MountOptions, MountStats, NativeMount, Unmounted};

use crate::{native::NativeFiles, reader::Reader};

/// Dropping it unmounts.
#[derive(Debug)]
pub(super) enum Session {
    /// Over FUSE.
    Fuse(Mount),
    /// By the kernel's EROFS driver.
    Native(NativeMount),
}

impl Session {
    pub(super) fn is_native(&self) -> bool {
        matches!(self, Self::Native(_))
    }

    /// Whether it outlives this process.
    pub(super) fn outlives(&self) -> bool {
        match self {
            Self::Fuse(mount) => mount.is_kept(),
            Self::Native(_) => true,
        }
    }

    /// What this process has done for it; a native mount needs nothing.
    pub(super) fn stats(&self) -> MountStats {
        match self {
            Self::Fuse(mount) => mount.stats(),
            Self::Native(_) => MountStats::default(),
        }
    }

    /// Unmounts, or detaches what is in use. Blocks.
    pub(super) fn unmount(&self) -> Result<Unmounted, MountError> {
        match self {
            Self::Fuse(mount) => mount.unmount(),
            Self::Native(mount) => mount.unmount(),
        }
    }

    /// Lets the mount be when this process ends.
    pub(super) fn leave(self) {
        match self {
            Self::Fuse(mount) => mount.leave(),
            Self::Native(mount) => mount.leave(),
        }
    }
}

/// Mounts over FUSE: goes on with the mount that an earlier daemon has served or, where there is none or it cannot go on,
/// mounts anew. Blocks.
pub(super) fn serve(
    reader: Reader,
    mountpoint: &Path,
    options: MountOptions,
    kept: Option<KeptMount>,
) -> Result<Mount, MountError> {
    let (bootstrap, source) = (reader.image().bootstrap.clone(), Arc::new(reader));
    if let Some(kept) = kept {
        let device = kept.device.clone();
        match Mount::resume(bootstrap.clone(), source.clone(), kept, options.clone()) {
            Ok(mount) => {
                tracing::info!("{} goes on", mountpoint.display());
                return Ok(mount);
            }
            Err(error) => tracing::error!("{}; its readers get errors", crate::chain(&error)),
        }
        if let Some(keeper) = &options.keeper {
            keeper.forget(&device);
        }
    }
    Mount::new(bootstrap, source, mountpoint, options)
}

/// Mounts natively, unless an earlier daemon has and that mount is still there. Blocks.
pub(super) fn native(files: &NativeFiles, mountpoint: &Path) -> Result<NativeMount, MountError> {
    let unreadable = |source| MountError::Mountpoint { path: mountpoint.to_owned(), source };
    match NativeMount::existing(&files.bootstrap, mountpoint).map_err(unreadable)? {
        Some(mount) => Ok(mount),
        None => NativeMount::new(&files.bootstrap, &files.blobs, mountpoint),
    }
}
