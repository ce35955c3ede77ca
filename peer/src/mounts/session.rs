//! A mount as the kernel has it: over FUSE, which this daemon serves, or native, which the kernel serves by itself, from files
//! that this daemon may have to fill first.

use std::{path::Path, sync::Arc};

use shoal_rafs::{KeptMount, Mount, MountError, MountOptions, MountPresence, MountStats, NativeMount, Unmounted};

use crate::{filler::Fills, native::NativeFiles, reader::Reader};

/// Dropping it unmounts.
#[derive(Debug)]
pub(super) enum Session {
    /// Over FUSE.
    Fuse(Mount),
    /// By the kernel's EROFS driver.
    Native(NativeMount),
    /// By the same, and something is missing of its files.
    Lazy(LazyMount),
}

/// Dropping it unmounts.
#[derive(Debug)]
pub(super) struct LazyMount {
    mount: NativeMount,
    fills: Arc<Fills>,
}

impl LazyMount {
    /// The driver has these files.
    pub(super) fn new(mount: NativeMount, fills: Fills) -> Self {
        fills.mounted();
        Self { mount, fills: Arc::new(fills) }
    }

    pub(super) fn fills(&self) -> &Arc<Fills> {
        &self.fills
    }

    fn unmount(&self) -> Result<Unmounted, MountError> {
        let unmounted = self.mount.unmount()?;
        self.fills.give_up();
        Ok(unmounted)
    }
}

impl Drop for LazyMount {
    fn drop(&mut self) {
        if let Err(error) = self.unmount() {
            tracing::error!("{}", crate::chain(&error));
        }
    }
}

impl Session {
    pub(super) fn is_native(&self) -> bool {
        matches!(self, Self::Native(_) | Self::Lazy(_))
    }

    /// Whether it outlives this process.
    pub(super) fn outlives(&self) -> bool {
        match self {
            Self::Fuse(mount) => mount.is_kept(),
            // What is missing of a lazy one the keeper guards, or is made to when this process ends.
            Self::Native(_) | Self::Lazy(_) => true,
        }
    }

    /// Whether files of it are filled as they are read.
    pub(super) fn is_lazy(&self) -> bool {
        matches!(self, Self::Lazy(mount) if mount.fills.is_any())
    }

    /// What this process has done for it. Of a native mount it is what the kernel had to ask for, a complete one needs nothing.
    pub(super) fn stats(&self) -> MountStats {
        match self {
            Self::Fuse(mount) => mount.stats(),
            Self::Native(_) => MountStats::default(),
            Self::Lazy(mount) => {
                let asked = mount.fills.figures();
                MountStats { reads: asked.events, bytes: asked.bytes, errors: asked.denied, times: asked.times }
            }
        }
    }

    /// How to find out whether it is still there.
    pub(super) fn presence(&self) -> MountPresence {
        match self {
            Self::Fuse(mount) => mount.presence(),
            Self::Native(mount) => mount.presence(),
            Self::Lazy(lazy) => lazy.mount.presence(),
        }
    }

    /// Unmounts, or detaches what is in use. Blocks.
    pub(super) fn unmount(&self) -> Result<Unmounted, MountError> {
        match self {
            Self::Fuse(mount) => mount.unmount(),
            Self::Native(mount) => mount.unmount(),
            Self::Lazy(mount) => mount.unmount(),
        }
    }

    /// Lets the mount be when this process ends.
    pub(super) fn leave(self) {
        match self {
            Self::Fuse(mount) => mount.leave(),
            Self::Native(mount) => mount.leave(),
            // Neither unmounted nor given up.
            Self::Lazy(mount) => std::mem::forget(mount),
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
    let (metadata, source) = (reader.image().metadata.clone(), Arc::new(reader));
    if let Some(kept) = kept {
        let device = kept.device.clone();
        match Mount::resume(metadata.clone(), source.clone(), kept, options.clone()) {
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
    Mount::new(metadata, source, mountpoint, options)
}

/// Mounts natively, unless an earlier daemon has and that mount is still there. Blocks.
pub(super) fn native(files: &NativeFiles, mountpoint: &Path) -> Result<NativeMount, MountError> {
    let unreadable = |source| MountError::Mountpoint { path: mountpoint.to_owned(), source };
    match NativeMount::existing(&files.bootstrap, mountpoint).map_err(unreadable)? {
        Some(mount) => Ok(mount),
        None => NativeMount::new(&files.bootstrap, &files.blobs, mountpoint),
    }
}

/// The same with files that are filled as they are read. Blocks.
pub(super) fn lazy(files: &NativeFiles, mountpoint: &Path, fills: Fills) -> Result<Session, MountError> {
    // One that is there already has other files.
    let mount = NativeMount::new(&files.bootstrap, &files.blobs, mountpoint)?;
    Ok(Session::Lazy(LazyMount::new(mount, fills)))
}
