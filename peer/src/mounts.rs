//! The daemon's mounts: made, recorded, made again after a restart, taken away.
//!
//! A mount is recorded once it works, with the manifest that its reference meant, so that it comes back as the same
//! image even if the tag has moved, and without the registry if the store has what it needs. Where a keeper has held it
//! meanwhile, its readers do not notice.
//!
//! An image is mounted over FUSE while it is incomplete. One that is complete, and decoded, is mounted natively: by the
//! kernel, without this daemon. In the mode `auto` an image that becomes complete under a FUSE mount is decoded some
//! time later, for the next mount of it; see [`graduation`]. Where that is switched on, an incomplete image is mounted natively,
//! too, and its files are filled as they are read; see [`Filler`].

mod error;
mod figures;
mod graduation;
mod restore;
mod session;
mod start;
mod table;
mod watch;

use std::{path::Path, sync::Arc, time::Duration};

use shoal_proto::{ObjectId, control::MountStatus};
use shoal_rafs::{KeptMount, Mount, MountError, MountOptions, Trace, Unmounted, oci::Reference};
use tokio_util::task::AbortOnDropHandle;

pub(crate) use self::error::MountsError;
use self::{
    session::Session,
    table::{Claim, Mounted, SharedTable, Slot},
};
use crate::{
    config::{MountMode, OnStop, PrefetchConfig},
    exchange::Exchange,
    filler::{self, Filler, Fills},
    images::{Image, NamedImage},
    native::{self, NativeError, NativeFiles},
    node::Node,
    prefetch,
    reader::Reader,
    store::Hold,
};

/// All mounts. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Mounts {
    node: Arc<Node>,
    exchange: Option<Exchange>,
    settings: MountsSettings,
    table: SharedTable,
    past: Arc<figures::Past>,
}

/// How the daemon mounts.
#[derive(Debug, Clone)]
pub(crate) struct MountsSettings {
    /// Over FUSE.
    pub(crate) options: MountOptions,
    /// What a mount is where nobody says otherwise.
    pub(crate) mode: MountMode,
    /// Fills the files of native mounts as they are read, where that is possible.
    pub(crate) filler: Option<Filler>,
    /// Whether it is used for new mounts.
    pub(crate) native_lazy: bool,
    /// How long an image has to be complete under a FUSE mount before it is decoded; zero for never.
    pub(crate) graduate_after: Duration,
    /// What is fetched before it is read.
    pub(crate) prefetch: PrefetchConfig,
    /// Whether what only one mount needed stays in the store when that goes.
    pub(crate) keep_unmounted: bool,
}

/// The files for a native mount, and what goes with them.
struct Native {
    hold: Hold,
    files: NativeFiles,
    /// What is filled as it is read, and what it is read through.
    fills: Option<(Fills, Reader)>,
}

/// What is done to mount an image natively.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effort {
    /// Nothing: if its files are there.
    None,
    /// Its files are made, if it is complete.
    Decode,
    /// It is completed first.
    Complete,
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
    pub(crate) fn new(node: Arc<Node>, exchange: Option<Exchange>, settings: MountsSettings) -> Self {
        Self { node, exchange, settings, table: SharedTable::default(), past: Arc::default() }
    }

    /// Mounts what `reference` names at present, and records it. `mode` as configured if it is not given. With `decode`, and
    /// always in the mode `native`, a complete image is decoded if it is not.
    pub(crate) async fn mount(
        &self,
        reference: &Reference,
        mountpoint: &Path,
        mode: Option<MountMode>,
        decode: bool,
    ) -> Result<ObjectId, MountsError> {
        if !mountpoint.is_absolute() {
            return Err(MountsError::NotAbsolute(mountpoint.to_owned()));
        }
        let claim = self.table.claim(mountpoint, None)?;
        let named = self.node.image(reference).await?;
        let manifest = named.manifest;
        let mode = mode.unwrap_or(self.settings.mode);
        let effort = match mode {
            _ if decode => Effort::Decode,
            MountMode::Native => self.effort(Effort::Decode),
            MountMode::Auto | MountMode::Fuse => Effort::None,
        };
        let native = self.native_files(&named, mode, effort).await?;
        let mut mounted = self.open(reference, named, mountpoint, mode, native, None).await?;
        self.note_start(&mut mounted);
        self.settle(mountpoint, &claim, mounted).await?;
        Ok(manifest)
    }

    /// Records a new mount and gives it its place.
    async fn settle(&self, mountpoint: &Path, claim: &Claim, mounted: Mounted) -> Result<(), MountsError> {
        let _recording = self.table.recording().await;
        if !claim.stands() {
            // Nor may its record stay behind.
            return Err(MountsError::Withdrawn(mountpoint.to_owned()));
        }
        self.record(mountpoint, &mounted).await?;
        claim.fill(mounted);
        Ok(())
    }

    /// What is done for a native mount that is wanted at once: nothing where its files can be filled as they are read.
    fn effort(&self, otherwise: Effort) -> Effort {
        let lazy = self.settings.native_lazy && self.settings.filler.is_some();
        if lazy { Effort::None } else { otherwise }
    }

    /// Whether the image at `from` is mounted over FUSE, may be mounted natively, and is complete.
    pub(crate) fn may_graduate(&self, from: &Path) -> bool {
        match self.lock().0.get(from) {
            Some(Slot::Mounted(mounted)) => mounted.may_graduate() && mounted.reader.image().is_complete(),
            _ => false,
        }
    }

    /// Mounts the image that is mounted over FUSE at `from` also natively at `to`, if it may be and its files are there; says
    /// whether it is mounted there now.
    pub(crate) async fn graduate(&self, from: &Path, to: &Path) -> Result<bool, MountsError> {
        let (reference, manifest) = {
            let table = self.lock();
            match (table.0.get(from), table.0.get(to)) {
                (_, Some(Slot::Mounted(_))) => return Ok(true),
                (Some(Slot::Mounted(mounted)), None) if mounted.may_graduate() => {
                    (mounted.reference.clone(), mounted.manifest)
                }
                _ => return Ok(false),
            }
        };
        let reference: Reference = reference.parse()?;
        let named = self.node.images.by_manifest(reference.source(), manifest).await?;
        let Some(native) = self.native_files(&named, MountMode::Auto, Effort::None).await? else { return Ok(false) };
        let Ok(claim) = self.table.claim(to, None) else { return Ok(false) };
        let mounted = self.open(&reference, named, to, MountMode::Native, Some(native), None).await?;
        self.settle(to, &claim, mounted).await?;
        Ok(true)
    }

    /// Unmounts and forgets; true when readers still held it and it was detached.
    pub(crate) async fn unmount(&self, mountpoint: &Path) -> Result<bool, MountsError> {
        let recording = self.table.recording().await;
        let slot = self.lock().0.remove(mountpoint).ok_or_else(|| MountsError::NotMounted(mountpoint.to_owned()))?;
        let (store, path) = (self.node.store.clone(), mountpoint.to_owned());
        let removed = blocking(move || store.remove_mount(&path)).await;
        drop(recording);
        restore::room_or_not(removed, &format!("{} may be mounted again after a restart", mountpoint.display()))?;
        match slot {
            Slot::Pending { .. } => Ok(false),
            Slot::Mounted(mounted) => {
                self.remember(&mounted);
                let Mounted { session, hold, .. } = *mounted;
                let detached = matches!(blocking(move || session.unmount()).await?, Unmounted::Detached);
                if !detached && !self.settings.keep_unmounted {
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
            Ok(evicted) => tracing::info!(?evicted, "evicted with its mount"),
            Err(error) => tracing::warn!("cannot evict an unmounted image: {}", crate::chain(&error)),
        }
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

    /// How many of them would outlive this process: native ones, and what a keeper has.
    pub(crate) fn kept(&self) -> usize {
        self.count_sessions(Session::outlives)
    }

    /// How many of them would not.
    pub(crate) fn unkept(&self) -> usize {
        self.count_sessions(|session| !session.outlives())
    }

    /// How many of them are native.
    pub(crate) fn native(&self) -> usize {
        self.count_sessions(Session::is_native)
    }

    /// How many of these have files that are filled as they are read.
    pub(crate) fn lazy(&self) -> usize {
        self.count_sessions(Session::is_lazy)
    }

    fn count_sessions(&self, is_one: fn(&Session) -> bool) -> usize {
        let counts = |slot: &&Slot| matches!(slot, Slot::Mounted(mounted) if is_one(&mounted.session));
        self.lock().0.values().filter(counts).count()
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
        for (path, slot) in self.table.take_all() {
            let Slot::Mounted(mounted) = slot else { continue };
            let leave = match on_stop {
                OnStop::Keep => mounted.session.outlives(),
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
        let trace = traced.then(|| Arc::new(Trace::new(named.image.metadata.clone())));
        self.settings.options.trace.clone_from(&trace);
        let _hold = self.node.store.hold(named.needs.clone());
        let session = self.serve(reference, mountpoint, self.reader(&named.image), None).await?;
        let prefetch =
            prefetch::run_mounted(self.node.clone(), named.image, self.exchange.clone(), self.settings.prefetch);
        let prefetch = tokio::spawn(prefetch);
        Ok(Unrecorded { session, trace, _hold, _prefetch: AbortOnDropHandle::new(prefetch) })
    }

    /// The files for a native mount, and a hold on all that it needs; none if the image is to be mounted over FUSE.
    async fn native_files(
        &self,
        named: &NamedImage,
        mode: MountMode,
        effort: Effort,
    ) -> Result<Option<Native>, MountsError> {
        let lazy = self.settings.native_lazy;
        if named.image.metadata.is_encrypted() {
            if mode == MountMode::Native {
                return Err(MountsError::Encrypted);
            }
            if effort == Effort::Complete {
                prefetch::complete(&self.node, named).await?;
            }
            return Ok(None);
        }
        // Of an image that is not complete there is nothing to be found, and its names need not be computed.
        if mode == MountMode::Fuse || (effort == Effort::None && !lazy && !named.image.is_complete()) {
            return Ok(None);
        }
        let (store, finding) = (self.node.store.clone(), named.clone());
        let found = move || {
            let names = finding.image.native_names();
            let hold = store.hold(names.needs(&finding));
            (hold, names.find(&store))
        };
        let hold = match blocking(found).await {
            (hold, Some(files)) => return Ok(Some(Native { hold, files, fills: None })),
            (hold, None) if lazy && effort != Effort::Decode => match self.begin_filling(named, mode).await? {
                Some((files, fills)) => return Ok(Some(Native { hold, files, fills: Some(fills) })),
                None => hold,
            },
            (hold, None) => hold,
        };
        if effort == Effort::None {
            return Ok(None);
        }
        if effort == Effort::Complete {
            prefetch::complete(&self.node, named).await?;
        }
        match native::make(&self.node, &named.image).await {
            Ok(files) => Ok(Some(Native { hold, files, fills: None })),
            Err(error @ (NativeError::Incomplete { .. } | NativeError::Damaged { .. }))
                if mode == MountMode::Native =>
            {
                Err(MountsError::Incomplete(error))
            }
            Err(error) if mode == MountMode::Native => Err(MountsError::Native(error)),
            Err(error) => {
                tracing::warn!(layer = %named.image.layer, "mounted over FUSE: {}", crate::chain(&error));
                Ok(None)
            }
        }
    }

    /// Files that are filled as they are read; none if that is not possible and need not be.
    async fn begin_filling(
        &self,
        named: &NamedImage,
        mode: MountMode,
    ) -> Result<Option<(NativeFiles, (Fills, Reader))>, MountsError> {
        let Some(filler) = self.settings.filler.clone() else { return Ok(None) };
        let reader = self.reader(&named.image);
        let begin = move || filler.begin(&reader).map(|(files, fills)| (files, (fills, reader)));
        match blocking(begin).await {
            Ok(begun) => Ok(Some(begun)),
            Err(error) if mode == MountMode::Native => Err(error.into()),
            Err(error) => {
                tracing::warn!(layer = %named.image.layer, "mounted over FUSE: {}", crate::chain(&error));
                Ok(None)
            }
        }
    }

    /// Natively with the files for that, if the kernel can. Over FUSE where it cannot and need not, and without them; `kept` is
    /// then gone on with.
    async fn open(
        &self,
        reference: &Reference,
        named: NamedImage,
        mountpoint: &Path,
        mode: MountMode,
        native: Option<Native>,
        kept: Option<KeptMount>,
    ) -> Result<Mounted, MountsError> {
        if let Some(Native { hold, files, fills }) = native {
            let path = mountpoint.to_owned();
            let (fills, reader) = fills.unzip();
            let session = move || match fills {
                Some(fills) => session::lazy(&files, &path, fills),
                None => session::native(&files, &path).map(Session::Native),
            };
            let reader = reader.unwrap_or_else(|| self.reader(&named.image));
            match blocking(session).await {
                Ok(session) => return Ok(self.mounted(reference, named, mode, reader, (session, hold))),
                // Whatever the kernel has against it, FUSE does without.
                Err(error @ MountError::NoErofs { .. }) if mode == MountMode::Auto => {
                    tracing::debug!("{}", crate::chain(&error));
                }
                Err(error) if mode == MountMode::Auto => {
                    tracing::warn!("{} is mounted over FUSE: {}", mountpoint.display(), crate::chain(&error));
                }
                Err(error) => return Err(error.into()),
            }
        }
        let (hold, reader) = (self.node.store.hold(named.needs.clone()), self.reader(&named.image));
        let mount = self.serve(reference, mountpoint, reader.clone(), kept).await?;
        Ok(self.mounted(reference, named, mode, reader, (Session::Fuse(mount), hold)))
    }

    /// Over FUSE.
    async fn serve(
        &self,
        reference: &Reference,
        mountpoint: &Path,
        reader: Reader,
        kept: Option<KeptMount>,
    ) -> Result<Mount, MountError> {
        let path = mountpoint.to_owned();
        let options = MountOptions { fs_name: reference.to_string(), ..self.settings.options.clone() };
        blocking(move || session::serve(reader, &path, options, kept)).await
    }

    fn reader(&self, image: &Arc<Image>) -> Reader {
        if let Some(exchange) = &self.exchange {
            exchange.interested_in(image);
        }
        Reader::new(self.node.clone(), image.clone(), tokio::runtime::Handle::current())
    }

    /// A mount for the table, and what is done as long as it is there.
    fn mounted(
        &self,
        reference: &Reference,
        named: NamedImage,
        mode: MountMode,
        reader: Reader,
        (session, hold): (Session, Hold),
    ) -> Mounted {
        let (image, exchange, config) = (named.image.clone(), self.exchange.clone(), self.settings.prefetch);
        let mut tasks = vec![tokio::spawn(prefetch::run_mounted(self.node.clone(), image, exchange, config))];
        let after = self.settings.graduate_after;
        match &session {
            Session::Lazy(mount) if !after.is_zero() => {
                tasks.push(tokio::spawn(filler::complete(named.image.clone(), mount.fills().clone(), after)));
            }
            Session::Fuse(_)
                if mode == MountMode::Auto && !after.is_zero() && !named.image.metadata.is_encrypted() =>
            {
                tasks.push(tokio::spawn(graduation::run(self.node.clone(), named.clone(), reader.clone(), after)));
            }
            _ => {}
        }
        Mounted {
            reference: reference.to_string(),
            manifest: named.manifest,
            mode,
            reader,
            session,
            hold,
            _start: None,
            _tasks: tasks.into_iter().map(AbortOnDropHandle::new).collect(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, table::Table> {
        self.table.lock()
    }
}

/// Runs what blocks on the disk or the kernel where that is allowed.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
}
