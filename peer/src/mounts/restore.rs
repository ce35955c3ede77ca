//! Records of mounts, and what is made of them by the next daemon.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use shoal_rafs::{KeptMount, MountError, NativeMount, oci::Reference};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    Effort, Mounts, MountsError, blocking,
    session::{LazyMount, Session},
    table::{Claim, Mounted},
};
use crate::{
    config::MountMode,
    filler,
    images::NamedImage,
    reader::Reader,
    store::{Hold, MountRecord, StoreError},
};

/// Time between attempts to bring a mount of an earlier run back.
const RESTORE_INTERVAL: Duration = Duration::from_secs(5);
/// How long others wait until each has been tried once.
const RESTORE_PATIENCE: Duration = Duration::from_secs(10);
/// Most mounts that are brought back at a time. As a rule each takes milliseconds; one that waits for a registry, the deadline of reads.
const MAX_RESTORING: usize = 32;

/// What a mount's record says beside what the store needs to know.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Recorded {
    mode: MountMode,
}

impl Recorded {
    /// Of a record that says nothing, or something that this version does not know, the default.
    fn of(record: &MountRecord) -> Self {
        serde_json::from_value(record.settings.clone()).unwrap_or_default()
    }
}

/// A mount that is to be there.
pub(super) struct Waiting {
    pub(super) record: MountRecord,
    pub(super) claim: Claim,
    /// As an earlier daemon has left it.
    pub(super) kept: Option<KeptMount>,
}

impl Mounted {
    /// For the next daemon, or for when it is to be made again.
    pub(super) fn record(&self, mountpoint: &Path) -> MountRecord {
        MountRecord {
            reference: self.reference.clone(),
            mountpoint: mountpoint.to_owned(),
            manifest: self.manifest,
            needs: self.hold.footprint().clone(),
            settings: serde_json::to_value(Recorded { mode: self.mode }).unwrap_or_default(),
        }
    }
}

impl Mounts {
    /// Brings the mounts of an earlier run back, those that were `kept` meanwhile first, and as they were. Those that cannot be made
    /// now are tried again until they can, or are unmounted. Returns once each has been tried, or it has taken too long to wait for
    /// those whose registry does not answer.
    pub(crate) async fn restore(&self, kept: Vec<KeptMount>) -> Result<(), MountsError> {
        let mut kept: BTreeMap<_, _> = kept.into_iter().map(|mount| (mount.mountpoint.clone(), mount)).collect();
        let store = self.node.store.clone();
        let mut waiting = Vec::new();
        for record in blocking(move || store.mounts()).await? {
            let hold = self.node.store.hold(record.needs.clone());
            let Ok(claim) = self.table.claim(&record.mountpoint, Some(hold)) else { continue };
            let kept = kept.remove(&record.mountpoint);
            waiting.push(Waiting { record, claim, kept });
        }
        // Their readers wait.
        waiting.sort_by_key(|one| one.kept.is_none());
        for stray in kept.into_values() {
            tracing::warn!("{} is mounted, but should not be", stray.mountpoint.display());
            self.discard(stray).await;
        }
        let tried = tokio::spawn(self.clone().try_each(waiting));
        if tokio::time::timeout(RESTORE_PATIENCE, tried).await.is_err() {
            tracing::warn!("some mounts of the last run are still being tried, others are served meanwhile");
        }
        Ok(())
    }

    async fn try_each(self, waiting: Vec<Waiting>) {
        let turns = Arc::new(Semaphore::new(MAX_RESTORING));
        let mut tries = JoinSet::new();
        for one in waiting {
            // The semaphore is never closed.
            let turn = turns.clone().acquire_owned().await;
            let mounts = self.clone();
            tries.spawn(async move {
                mounts.bring_back(one).await;
                drop(turn);
            });
        }
        tries.join_all().await;
        let store = self.node.store.clone();
        if let Err(error) = blocking(move || store.give_up_fillings()).await {
            tracing::warn!("{}", crate::chain(&error));
        }
    }

    /// Makes a mount that is recorded. If that fails it is tried again and again, after this has returned.
    pub(super) async fn bring_back(&self, Waiting { record, claim, mut kept }: Waiting) {
        if let Err(error) = self.remount(&record, &claim, &mut kept, self.effort(Effort::Decode)).await {
            tracing::warn!("{} is not mounted again yet: {}", record.mountpoint.display(), crate::chain(&error));
            let mounts = self.clone();
            tokio::spawn(async move { mounts.keep_trying(record, claim, kept).await });
        }
    }

    /// Has the next daemon mount it again.
    pub(super) async fn record(&self, mountpoint: &Path, mounted: &Mounted) -> Result<(), MountsError> {
        let record = mounted.record(mountpoint);
        let store = self.node.store.clone();
        let recorded = blocking(move || store.put_mount(&record)).await;
        room_or_not(recorded, &format!("{} will not be mounted again after a restart", mountpoint.display()))
            .map_err(MountsError::from)
    }

    /// Takes `kept` when the image is there. A native mount is made with `effort`.
    async fn remount(
        &self,
        record: &MountRecord,
        claim: &Claim,
        kept: &mut Option<KeptMount>,
        effort: Effort,
    ) -> Result<(), MountsError> {
        let reference: Reference = record.reference.parse()?;
        let named = self.node.images.by_manifest(reference.source(), record.manifest).await?;
        let (mode, mountpoint) = (Recorded::of(record).mode, &record.mountpoint);
        let reader = self.reader(&named.image);
        if kept.is_none()
            && let Some(found) = self.existing(&named, &reader, mountpoint).await?
        {
            claim.fill(self.mounted(&reference, named, mode, reader, found));
            return Ok(());
        }
        let native = match (kept.is_some(), mode) {
            // It goes on as it was.
            (true, _) => None,
            (false, MountMode::Native) => self.native_files(&named, mode, effort).await?,
            (false, _) => self.native_files(&named, mode, Effort::None).await?,
        };
        claim.fill(self.open(&reference, named, mountpoint, mode, native, kept.take()).await?);
        Ok(())
    }

    /// The native mount of an image that is there, and a hold on what it needs; the store may have less of it than the kernel,
    /// if the daemon was killed before everything was durable. One with files that were being filled while nobody had the group
    /// of events may have shown zeros: it is replaced by another one.
    async fn existing(
        &self,
        named: &NamedImage,
        reader: &Reader,
        mountpoint: &Path,
    ) -> Result<Option<(Session, Hold)>, MountsError> {
        let (store, path) = (self.node.store.clone(), mountpoint.to_owned());
        let unreadable = |source| MountError::Mountpoint { path: mountpoint.to_owned(), source };
        let finding = named.clone();
        let found = blocking(move || {
            let names = finding.image.native_names();
            let found = NativeMount::existing(&names.bootstrap_path(&store), &path)?;
            Ok(found.map(|mount| (mount, store.hold(names.needs(&finding)))))
        });
        let Some((mount, hold)) = found.await.map_err(unreadable)? else { return Ok(None) };
        let Some(filler) = self.settings.filler.clone() else {
            return Ok(match filler::is_filling(&self.node, named) {
                false => Some((Session::Native(mount), hold)),
                true => {
                    tracing::error!("{} may have shown zeros, it is mounted anew", mountpoint.display());
                    blocking(move || mount.unmount()).await?;
                    None
                }
            });
        };
        let (reader, path) = (reader.clone(), mountpoint.to_owned());
        let adopted = blocking(move || -> Result<Option<Session>, MountsError> {
            let guarded = filler.has_guarded(reader.image())?;
            if !guarded {
                tracing::error!("{} may have shown zeros, it is mounted anew", path.display());
                mount.unmount()?;
            }
            let fills = filler.adopt(&reader)?;
            if !guarded {
                // Whoever has files of it open is served from now on; what the kernel has cached for them may be wrong. The next mount
                // gets files of its own, so these are nobody's.
                fills.give_up();
                return Ok(None);
            }
            if !fills.is_any() {
                fills.mounted();
                return Ok(Some(Session::Native(mount)));
            }
            Ok(Some(Session::Lazy(LazyMount::new(mount, fills))))
        });
        Ok(adopted.await?.map(|session| (session, hold)))
    }

    async fn keep_trying(&self, record: MountRecord, claim: Claim, mut kept: Option<KeptMount>) {
        let patience = Instant::now() + self.node.deadline;
        loop {
            tokio::time::sleep(RESTORE_INTERVAL).await;
            // Readers of a kept mount wait, but not for ever.
            if let Some(kept) = kept.take_if(|_| !claim.stands() || Instant::now() > patience) {
                tracing::error!("{} cannot be served, its readers get errors", kept.mountpoint.display());
                self.discard(kept).await;
            }
            if !claim.stands() {
                return;
            }
            match self.remount(&record, &claim, &mut kept, self.effort(Effort::Complete)).await {
                Ok(()) => {
                    tracing::info!("{} is mounted again", record.mountpoint.display());
                    return;
                }
                Err(error) => tracing::debug!("{}: {}", record.mountpoint.display(), crate::chain(&error)),
            }
        }
    }

    /// Ends a mount that nobody will serve.
    async fn discard(&self, kept: KeptMount) {
        let (keeper, path) = (self.settings.options.keeper.clone(), kept.mountpoint.clone());
        let discarded = blocking(move || {
            if let Some(keeper) = keeper {
                keeper.forget(&kept.device);
            }
            kept.discard()
        });
        if let Err(error) = discarded.await {
            tracing::warn!("{}: {error}", path.display());
        }
    }
}

/// A mount is made, and taken away, although a full disk has no room to write that down: who waits for the files, or for
/// their end, is not helped by a refusal.
pub(super) fn room_or_not(recorded: Result<(), StoreError>, consequence: &str) -> Result<(), StoreError> {
    match recorded {
        Err(error @ StoreError::Full { .. }) => {
            tracing::warn!("{consequence}: {error}");
            Ok(())
        }
        recorded => recorded,
    }
}
