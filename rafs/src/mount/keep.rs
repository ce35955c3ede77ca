//! What outlives the process that serves a mount: the connection to the kernel, and a record of what is served over it.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::init::Agreement;
use super::{detach, table};
use crate::bootstrap::Metadata;

/// Version of [`SessionRecord`], and of all that a kernel may have been told by who wrote it: how nodes are numbered, what
/// positions in a directory mean.
pub const SESSION_VERSION: u32 = 1;

/// Whoever keeps connections while nobody serves them, as seen by those who do. Nothing here may take long or wait for a
/// reader of the mounts.
pub trait MountKeeper: fmt::Debug + Send + Sync {
    /// Takes a copy of a mount's connection, before the first request over it is served. If it cannot be passed on now, it
    /// may be later.
    fn keep(&self, mount: KeptMount);

    /// Whether the connection of the mount with this [device number](KeptMount::device) would outlive this process.
    fn holds(&self, device: &str) -> bool;

    /// Gives the copy up: the session has ended.
    fn forget(&self, device: &str);
}

/// A mount without anybody who serves it.
#[derive(Debug)]
pub struct KeptMount {
    /// `MAJOR:MINOR` of its device number; unique as long as it lives.
    pub device: String,
    /// Where it was mounted: absolute, without links.
    pub mountpoint: PathBuf,
    /// The connection to the kernel. With its last copy the mount dies.
    pub connection: OwnedFd,
    /// What was served.
    pub session: SessionRecord,
}

impl KeptMount {
    /// Whether it is what is seen at its mountpoint. Asks nobody who serves it.
    ///
    /// # Errors
    /// The table of mounts cannot be read.
    pub fn is_mounted(&self) -> io::Result<bool> {
        let top = table::top(&self.mountpoint)?;
        Ok(top.is_some_and(|entry| entry.is_fuse() && entry.device == self.device))
    }

    /// Takes the mount away; who uses it gets errors once the last copy of the connection is closed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn discard(self) -> io::Result<()> {
        if self.is_mounted()? { detach(&self.mountpoint) } else { Ok(()) }
    }
}

/// What the next process needs to know of a session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    version: u32,
    /// BLAKE3 of the bootstrap, in hexadecimal: all answers but the bytes of files follow from it, and by their digests
    /// those do, too.
    bootstrap: String,
    pub(super) agreement: Agreement,
}

impl SessionRecord {
    /// # Errors
    /// The bootstrap cannot be read.
    pub(super) fn new(metadata: &Metadata, agreement: Agreement) -> io::Result<Self> {
        let bootstrap = hex::encode(metadata.hash()?);
        Ok(Self { version: SESSION_VERSION, bootstrap, agreement })
    }

    /// Whether answers from this bootstrap continue those that were given.
    ///
    /// # Errors
    /// It cannot be read.
    pub(super) fn fits(&self, metadata: &Metadata) -> io::Result<bool> {
        Ok(*self == Self::new(metadata, self.agreement)?)
    }
}
