//! The daemon's mounts: made, recorded, made again after a restart, taken away.
//!
//! A mount is recorded once it works, with the manifest that its reference meant, so that it comes back as the same
//! image even if the tag has moved, and without the registry if the store has what it needs. Where a keeper has held it
//! meanwhile, its readers do not notice.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use shoal_proto::{ObjectId, control::MountStatus};
use shoal_rafs::{
    Bootstrap, KeptMount, Mount, MountError, MountOptions, Trace, Unmounted,
    oci::{Reference, ReferenceError},
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    config::OnStop,
    exchange::Exchange,
    images::{Image, ImageError, NamedImage},
    node::Node,
    prefetch,
    reader::Reader,
    store::{Hold, MountRecord, StoreError},
};

/// Time between attempts to bring a mount of an earlier run back.
const RESTORE_INTERVAL: Duration = Duration::from_secs(5);

/// Why a mount was not made or not taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The path is relative; the daemon's working directory is nobody's business.
    #[error("mountpoint {} is not absolute", .0.display())]
    NotAbsolute(PathBuf),
    /// Something is mounted there by this daemon, or about to be.
    #[error("{} is in use by another mount", .0.display())]
    InUse(PathBuf),
    /// Nothing is.
    #[error("nothing is mounted at {} by this daemon", .0.display())]
    NotMounted(PathBuf),
    /// The image could not be loaded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A recorded reference cannot be read.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The kernel refused.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The record could not be written or removed.
    #[error("cannot record the mount")]
    Store(#[from] StoreError),
}

/// All mounts. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Mounts {
    node: Arc<Node>,
    exchange: Option<Exchange>,
    options: MountOptions,
    /// Whether what only one mount needed stays in the store when that goes.
    keep_unmounted: bool,
    /// Locked for look-ups only.
    table: Arc<Mutex<Table>>,
}

/// All mounts by mountpoint. It goes with the daemon and not before, also when that fails to start or is stopped
/// meanwhile: what a keeper has is then left to the next one, the rest unmounted.
#[derive(Default)]
struct Table(BTreeMap<PathBuf, Slot>);

impl Drop for Table {
    fn drop(&mut self) {
        for slot in std::mem::take(&mut self.0).into_values() {
            if let Slot::Mounted(mounted) = slot
                && mounted.session.is_kept()
            {
                mounted.session.leave();
            }
        }
    }
}

enum Slot {
    /// Being mounted, or waiting to be mounted again, for which the store keeps what the record says.
    Pending {
        _hold: Option<Hold>,
    },
    Mounted(Box<Mounted>),
}

struct Mounted {
    reference: String,
    manifest: ObjectId,
    reader: Reader,
    session: Mount,
    hold: Hold,
    /// Fetches what the image lists; ends with the mount.
    _prefetch: AbortOnDropHandle<()>,
}

/// A mount that ends when it is dropped, and is not recorded.
#[derive(Debug)]
pub struct Unrecorded {
    /// The mount.
    pub session: Mount,
    /// What is read from it, if that is to be noted.
    pub trace: Option<Arc<Trace>>,
    _hold: Hold,
    _prefetch: AbortOnDropHandle<()>,
}

impl Mounts {
    pub(crate) fn new(
        node: Arc<Node>,
        exchange: Option<Exchange>,
        options: MountOptions,
        keep_unmounted: bool,
    ) -> Self {
        Self { node, exchange, options, keep_unmounted, table: Arc::default() }
    }

    /// Mounts what `reference` names at present, and records it.
    pub(crate) async fn mount(&self, reference: &Reference, mountpoint: &Path) -> Result<ObjectId, MountsError> {
        if !mountpoint.is_absolute() {
            return Err(MountsError::NotAbsolute(mountpoint.to_owned()));
        }
        let claim = self.claim(mountpoint, None)?;
        let named = self.node.image(reference).await?;
        let manifest = named.manifest;
        let record = MountRecord {
            reference: reference.to_string(),
            mountpoint: mountpoint.to_owned(),
            manifest,
            needs: named.needs.clone(),
            settings: serde_json::Value::Null,
        };
        let mounted = self.session(reference, named, mountpoint, None).await?;
        let store = self.node.store.clone();
        let recorded = blocking(move || store.put_mount(&record)).await;
        room_or_not(recorded, &format!("{} will not be mounted again after a restart", mountpoint.display()))?;
        claim.fill(mounted);
        Ok(manifest)
    }

    /// Unmounts and forgets; true when readers still held it and it was detached.
    pub(crate) async fn unmount(&self, mountpoint: &Path) -> Result<bool, MountsError> {
        let slot = self.lock().0.remove(mountpoint).ok_or_else(|| MountsError::NotMounted(mountpoint.to_owned()))?;
        let (store, path) = (self.node.store.clone(), mountpoint.to_owned());
        let removed = blocking(move || store.remove_mount(&path)).await;
        room_or_not(removed, &format!("{} may be mounted again after a restart", mountpoint.display()))?;
        match slot {
            Slot::Pending { .. } => Ok(false),
            Slot::Mounted(mounted) => {
                let Mounted { session, hold, .. } = *mounted;
                let detached = matches!(blocking(move || session.unmount()).await?, Unmounted::Detached);
                if !detached && !self.keep_unmounted {
                    self.let_go(hold).await;
                }
                Ok(detached)
            }
        }
    }

    /// Evicts what was held and nobody else needs.
    async fn let_go(&self, hold: Hold) {
        let (store, needed) = (self.node.store.clone(), hold.footprint().clone());
        drop(hold);
        match blocking(move || store.evict(&needed)).await {
            Ok(evicted) => tracing::info!(evicted.blobs, evicted.objects, evicted.bytes, "evicted with its mount"),
            Err(error) => tracing::warn!("cannot evict an unmounted image: {}", crate::chain(&error)),
        }
    }

    /// Brings the mounts of an earlier run back, those that were `kept` meanwhile as they were. Those that cannot be made now
    /// are tried again until they can, or are unmounted. Returns once each has been tried.
    pub(crate) async fn restore(&self, kept: Vec<KeptMount>) -> Result<(), MountsError> {
        let mut kept: BTreeMap<_, _> = kept.into_iter().map(|mount| (mount.mountpoint.clone(), mount)).collect();
        let store = self.node.store.clone();
        for record in blocking(move || store.mounts()).await? {
            let hold = self.node.store.hold(record.needs.clone());
            let Ok(claim) = self.claim(&record.mountpoint, Some(hold)) else { continue };
            let mut kept = kept.remove(&record.mountpoint);
            if let Err(error) = self.remount(&record, &claim, &mut kept).await {
                tracing::warn!("{} is not mounted again yet: {}", record.mountpoint.display(), crate::chain(&error));
                let mounts = self.clone();
                tokio::spawn(async move { mounts.keep_trying(record, claim, kept).await });
            }
        }
        for stray in kept.into_values() {
            tracing::warn!("{} is mounted, but should not be", stray.mountpoint.display());
            self.discard(stray).await;
        }
        Ok(())
    }

    /// Whether every mount that should be there is.
    pub(crate) fn ready(&self) -> bool {
        self.lock().0.values().all(|slot| matches!(slot, Slot::Mounted(_)))
    }

    /// The image that is mounted there, if the mount is there and not about to be.
    pub(crate) fn image(&self, mountpoint: &Path) -> Option<Arc<Image>> {
        match self.lock().0.get(mountpoint)? {
            Slot::Pending { .. } => None,
            Slot::Mounted(mounted) => Some(mounted.reader.image().clone()),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.lock().0.len()
    }

    /// How many of them a keeper has.
    pub(crate) fn kept(&self) -> usize {
        let is_kept = |slot: &&Slot| matches!(slot, Slot::Mounted(mounted) if mounted.session.is_kept());
        self.lock().0.values().filter(is_kept).count()
    }

    pub(crate) fn status(&self) -> Vec<MountStatus> {
        let table = self.lock();
        let mounted = table.0.iter().filter_map(|(path, slot)| match slot {
            Slot::Pending { .. } => None,
            Slot::Mounted(mounted) => Some(mounted.status(path)),
        });
        mounted.collect()
    }

    /// Ends all mounts for now: they stay recorded.
    pub(crate) async fn stop(&self, on_stop: OnStop) {
        let slots = std::mem::take(&mut self.lock().0);
        for (path, slot) in slots {
            let Slot::Mounted(mounted) = slot else { continue };
            let leave = match on_stop {
                OnStop::Keep => mounted.session.is_kept(),
                OnStop::Leave => true,
                OnStop::Unmount => false,
            };
            if leave {
                mounted.session.leave();
            } else if let Err(error) = blocking(move || mounted.session.unmount()).await {
                tracing::warn!("{}: {}", path.display(), crate::chain(&error));
            }
        }
    }

    /// Mounts without recording: for a mount that ends with its process.
    /// With `traced`, what is read is noted.
    pub(crate) async fn unrecorded(
        mut self,
        reference: &Reference,
        mountpoint: &Path,
        traced: bool,
    ) -> Result<Unrecorded, MountsError> {
        let named = self.node.image(reference).await?;
        let trace = traced.then(|| Arc::new(Trace::new(named.image.bootstrap.clone())));
        self.options.trace.clone_from(&trace);
        let Mounted { session, hold: _hold, _prefetch, .. } =
            self.session(reference, named, mountpoint, None).await?;
        Ok(Unrecorded { session, trace, _hold, _prefetch })
    }

    async fn session(
        &self,
        reference: &Reference,
        NamedImage { manifest, image, needs }: NamedImage,
        mountpoint: &Path,
        kept: Option<KeptMount>,
    ) -> Result<Mounted, MountsError> {
        let hold = self.node.store.hold(needs);
        if let Some(exchange) = &self.exchange {
            exchange.interested_in(&image);
        }
        let reader = Reader::new(self.node.clone(), image.clone(), tokio::runtime::Handle::current());
        let (source, path) = (Arc::new(reader.clone()), mountpoint.to_owned());
        let options = MountOptions { fs_name: reference.to_string(), ..self.options.clone() };
        let bootstrap = image.bootstrap.clone();
        let session = blocking(move || open(bootstrap, source, &path, options, kept)).await?;
        let prefetch = tokio::spawn(prefetch::run_listed(self.node.clone(), image));
        let _prefetch = AbortOnDropHandle::new(prefetch);
        Ok(Mounted { reference: reference.to_string(), manifest, reader, session, hold, _prefetch })
    }

    /// Takes `kept` when the image is there.
    async fn remount(
        &self,
        record: &MountRecord,
        claim: &Claim,
        kept: &mut Option<KeptMount>,
    ) -> Result<(), MountsError> {
        let reference: Reference = record.reference.parse()?;
        let named = self.node.images.by_manifest(reference.source(), record.manifest).await?;
        let mounted = self.session(&reference, named, &record.mountpoint, kept.take()).await?;
        claim.fill(mounted);
        Ok(())
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
            match self.remount(&record, &claim, &mut kept).await {
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
        let (keeper, path) = (self.options.keeper.clone(), kept.mountpoint.clone());
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

    fn claim(&self, mountpoint: &Path, hold: Option<Hold>) -> Result<Claim, MountsError> {
        let mut table = self.lock();
        if table.0.contains_key(mountpoint) {
            return Err(MountsError::InUse(mountpoint.to_owned()));
        }
        table.0.insert(mountpoint.to_owned(), Slot::Pending { _hold: hold });
        Ok(Claim { mounts: self.clone(), mountpoint: mountpoint.to_owned() })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mounted {
    fn status(&self, mountpoint: &Path) -> MountStatus {
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
        }
    }
}

/// A place in the table while its mount is being made; given back when that fails.
struct Claim {
    mounts: Mounts,
    mountpoint: PathBuf,
}

impl Claim {
    /// Puts the mount there. When it was unmounted meanwhile, the session goes again.
    fn fill(&self, mounted: Mounted) {
        if let Some(slot @ Slot::Pending { .. }) = self.mounts.lock().0.get_mut(&self.mountpoint) {
            *slot = Slot::Mounted(Box::new(mounted));
        }
    }

    /// Whether nobody has unmounted it meanwhile.
    fn stands(&self) -> bool {
        matches!(self.mounts.lock().0.get(&self.mountpoint), Some(Slot::Pending { .. }))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.mounts.lock();
        if matches!(table.0.get(&self.mountpoint), Some(Slot::Pending { .. })) {
            table.0.remove(&self.mountpoint);
        }
    }
}

/// Goes on with the mount that an earlier daemon has served or, where there is none or it cannot go on, mounts anew.
fn open(
    bootstrap: Bootstrap,
    source: Arc<Reader>,
    mountpoint: &Path,
    options: MountOptions,
    kept: Option<KeptMount>,
) -> Result<Mount, MountError> {
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

/// A mount is made, and taken away, although a full disk has no room to write that down: who waits for the files, or for
/// their end, is not helped by a refusal.
fn room_or_not(recorded: Result<(), StoreError>, consequence: &str) -> Result<(), StoreError> {
    match recorded {
        Err(error @ StoreError::Full { .. }) => {
            tracing::warn!("{consequence}: {error}");
            Ok(())
        }
        recorded => recorded,
    }
}

/// Runs what blocks on the disk or the kernel where that is allowed.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}
