//! The table of mounts: what is mounted where, and what is about to be.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
};

use shoal_proto::{ObjectId, control::MountStatus};
use shoal_rafs::MountPresence;
use tokio_util::{sync::DropGuard, task::AbortOnDropHandle};

use super::{MountsError, session::Session};
use crate::{
    config::MountMode,
    reader::Reader,
    store::{Footprint, Hold},
};

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
        /// Number of the claim, of which an earlier one may have been withdrawn.
        claim: u64,
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

/// The table, shared.
#[derive(Clone, Default)]
pub(super) struct SharedTable(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Locked for look-ups only.
    table: Mutex<Table>,
    claims: AtomicU64,
    stopped: AtomicBool,
    /// Held while a mount becomes, or is no more, what the next daemon mounts again: its record and its place go together.
    recording: tokio::sync::Mutex<()>,
}

impl SharedTable {
    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be held while a record is written or removed.
    pub(super) async fn recording(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.0.recording.lock().await
    }

    /// Takes a place in the table.
    ///
    /// # Errors
    /// [`MountsError::InUse`].
    pub(super) fn claim(&self, mountpoint: &Path, hold: Option<Hold>) -> Result<Claim, MountsError> {
        let claim = self.new_claim(mountpoint);
        let mut table = self.lock();
        if table.0.contains_key(mountpoint) {
            return Err(MountsError::InUse(mountpoint.to_owned()));
        }
        table.0.insert(mountpoint.to_owned(), Slot::Pending { claim: claim.number, _hold: hold });
        drop(table);
        Ok(claim)
    }

    /// Takes everything out, for the end of the daemon. What is made from now on is left to the next one, if it can be.
    pub(super) fn take_all(&self) -> BTreeMap<PathBuf, Slot> {
        self.0.stopped.store(true, Relaxed);
        std::mem::take(&mut self.lock().0)
    }

    /// Where to look for each mount.
    pub(super) fn presences(&self) -> Vec<(PathBuf, MountPresence)> {
        let table = self.lock();
        let mounted = table.0.iter().filter_map(|(path, slot)| match slot {
            Slot::Pending { .. } => None,
            Slot::Mounted(mounted) => Some((path.clone(), mounted.session.presence())),
        });
        mounted.collect()
    }

    /// Where to look for the mount there, and what it needs.
    pub(super) fn presence(&self, mountpoint: &Path) -> Option<(MountPresence, Footprint)> {
        match self.lock().0.get(mountpoint)? {
            Slot::Pending { .. } => None,
            Slot::Mounted(mounted) => Some((mounted.session.presence(), mounted.hold.footprint().clone())),
        }
    }

    /// Takes a mount out of its place, if it is still this one, and the place for another one.
    pub(super) fn replace(
        &self,
        mountpoint: &Path,
        presence: &MountPresence,
        hold: Hold,
    ) -> Option<(Claim, Box<Mounted>)> {
        let claim = self.new_claim(mountpoint);
        let mut table = self.lock();
        let slot = table.0.get_mut(mountpoint)?;
        if !matches!(slot, Slot::Mounted(mounted) if mounted.session.presence().is_of(presence)) {
            return None;
        }
        match std::mem::replace(slot, Slot::Pending { claim: claim.number, _hold: Some(hold) }) {
            Slot::Mounted(mounted) => {
                drop(table);
                Some((claim, mounted))
            }
            Slot::Pending { .. } => None,
        }
    }

    fn new_claim(&self, mountpoint: &Path) -> Claim {
        let number = self.0.claims.fetch_add(1, Relaxed);
        Claim { table: self.clone(), mountpoint: mountpoint.to_owned(), number }
    }
}

/// A place in the table while its mount is being made; given back when that fails.
pub(super) struct Claim {
    table: SharedTable,
    mountpoint: PathBuf,
    number: u64,
}

impl Claim {
    /// Puts the mount there. When it was unmounted meanwhile, the session goes again.
    pub(super) fn fill(&self, mounted: Mounted) {
        let mut table = self.table.lock();
        if let Some(slot) = table.0.get_mut(&self.mountpoint).filter(|slot| self.is_of(slot)) {
            *slot = Slot::Mounted(Box::new(mounted));
            return;
        }
        drop(table);
        if self.table.0.stopped.load(Relaxed) && mounted.session.outlives() {
            mounted.session.leave();
        }
    }

    /// Whether nobody has unmounted it meanwhile.
    pub(super) fn stands(&self) -> bool {
        self.table.lock().0.get(&self.mountpoint).is_some_and(|slot| self.is_of(slot))
    }

    fn is_of(&self, slot: &Slot) -> bool {
        matches!(slot, Slot::Pending { claim, .. } if *claim == self.number)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        if table.0.get(&self.mountpoint).is_some_and(|slot| self.is_of(slot)) {
            table.0.remove(&self.mountpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_that_was_withdrawn_has_no_say_in_the_next() {
        let (table, path) = (SharedTable::default(), Path::new("/mnt"));
        let first = table.claim(path, None).unwrap();
        assert!(first.stands() && matches!(table.claim(path, None), Err(MountsError::InUse(_))));
        assert!(first.stands(), "a claim that was refused takes nothing along");
        table.lock().0.remove(path);
        let second = table.claim(path, None).unwrap();
        assert!(!first.stands() && second.stands());
        drop(first);
        assert!(second.stands());
        drop(second);
        assert_eq!(table.lock().0.len(), 0);
    }
}
