//! The table of mounts: what is mounted where, and what is about to be.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shoal_proto::{ObjectId, control::MountStatus};
use tokio_util::{sync::DropGuard, task::AbortOnDropHandle};

use super::{MountsError, session::Session};
use crate::{config::MountMode, reader::Reader, store::Hold};

/// All mounts by mountpoint. It goes with the daemon and not before, also when that fails to start or is stopped
/// meanwhile: what outlives the daemon is then left to the next one, the rest unmounted.
#[derive(Default)]
pub(super) struct Table(pub(super) BTreeMap<PathBuf, Slot>);

impl Drop for Table {
    fn drop(&mut self) {
        for slot in std::mem::take(&mut self.0).into_values() {
            if let Slot::Mounted(mounted) = slot
                && mounted.session.outlives()
            {
                mounted.session.leave();
            }
        }
    }
}

pub(super) enum Slot {
    /// Being mounted, or waiting to be mounted again, for which the store keeps what the record says.
    Pending {
        _hold: Option<Hold>,
    },
    Mounted(Box<Mounted>),
}

pub(super) struct Mounted {
    pub(super) reference: String,
    pub(super) manifest: ObjectId,
    /// As it was asked for.
    pub(super) mode: MountMode,
    pub(super) reader: Reader,
    pub(super) session: Session,
    pub(super) hold: Hold,
    /// Ends the noting of its start.
    pub(super) _start: Option<DropGuard>,
    /// What is done for the image as long as it is mounted.
    pub(super) _tasks: Vec<AbortOnDropHandle<()>>,
}

impl Mounted {
    /// Whether its image may be mounted natively some day, beside this mount.
    pub(super) fn may_graduate(&self) -> bool {
        self.mode == MountMode::Auto && !self.session.is_native() && !self.reader.image().metadata.is_encrypted()
    }

    pub(super) fn status(&self, mountpoint: &Path) -> MountStatus {
        let blobs = &self.reader.image().blobs;
        let pieces = || blobs.iter().flat_map(|blob| blob.pieces().map(move |piece| (blob, piece)));
        let stats = self.session.stats();
        MountStatus {
            reference: self.reference.clone(),
            mountpoint: mountpoint.display().to_string(),
            manifest: format!("sha256:{}", self.manifest),
            traffic: Some(self.reader.traffic().snapshot()),
            pieces: pieces().count() as u64,
            present_pieces: pieces().filter(|(blob, piece)| blob.handle.is_present(*piece)).count() as u64,
            read_errors: self.reader.errors(),
            reads: stats.reads,
            read_bytes: stats.bytes,
            native: self.session.is_native(),
        }
    }
}

/// The table, shared. Locked for look-ups only.
#[derive(Clone, Default)]
pub(super) struct SharedTable(Arc<Mutex<Table>>);

impl SharedTable {
    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place in the table.
    ///
    /// # Errors
    /// [`MountsError::InUse`].
    pub(super) fn claim(&self, mountpoint: &Path, hold: Option<Hold>) -> Result<Claim, MountsError> {
        let mut table = self.lock();
        if table.0.contains_key(mountpoint) {
            return Err(MountsError::InUse(mountpoint.to_owned()));
        }
        table.0.insert(mountpoint.to_owned(), Slot::Pending { _hold: hold });
        Ok(Claim { table: self.clone(), mountpoint: mountpoint.to_owned() })
    }
}

/// A place in the table while its mount is being made; given back when that fails.
pub(super) struct Claim {
    table: SharedTable,
    mountpoint: PathBuf,
}

impl Claim {
    /// Puts the mount there. When it was unmounted meanwhile, the session goes again.
    pub(super) fn fill(&self, mounted: Mounted) {
        if let Some(slot @ Slot::Pending { .. }) = self.table.lock().0.get_mut(&self.mountpoint) {
            *slot = Slot::Mounted(Box::new(mounted));
        }
    }

    /// Whether nobody has unmounted it meanwhile.
    pub(super) fn stands(&self) -> bool {
        matches!(self.table.lock().0.get(&self.mountpoint), Some(Slot::Pending { .. }))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        if matches!(table.0.get(&self.mountpoint), Some(Slot::Pending { .. })) {
            table.0.remove(&self.mountpoint);
        }
    }
}
