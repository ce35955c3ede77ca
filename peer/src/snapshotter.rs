//! containerd's snapshotter: lazy images are mounted, ordinary ones lie in directories, containers get an overlay.
//!
//! ```text
//!   containerd ──Prepare(layer)──> Snapshotter ──which kind?── Layers, by marks or manifest
//!                                       │
//!        ordinary layer                 │ data blob layer          bootstrap layer
//!        mounts to unpack into;         │ nothing to do;           Images loads it, Mounts mounts it;
//!        Commit comes later             │ committed at once        committed at once
//!        ──> mounts                     └──> "already exists": containerd does not download it
//!
//!   containerd ──Prepare(container)──> overlay of  own directory / ordinary layers / the lazy image, which is the last
//! ```
//!
//! - **Who decides**: the [`Catalog`], which is pure. This module carries out: it writes down what the catalog decided
//!   before it counts (see `directories.rs`), one decision at a time.
//! - **One mount for each image**, made when the image is pulled and gone when its snapshot is removed. All containers of the
//!   image share it. `Mounts` records mounts and makes them again after a restart, or when they have gone; should one be missing all
//!   the same, it is made when a container needs it. An image that has become complete and decoded since gets a second mount, a native one,
//!   for the containers that come after that.
//! - **Who removes**: containerd's garbage collection, with `Remove` and `Cleanup`. A lazy image that containers still
//!   use when it is removed is detached and serves them until they end.
//! - **What is trusted**: the manifest by its digest, the bootstrap layer by the manifest, and that the layer is what its
//!   chain id names, which for ordinary layers containerd checks when it unpacks. Without that, an image could take the
//!   name of another one's layers on this node. A blob layer has no files that could be wrong, but it would be in the way of an
//!   ordinary layer of the same name; so the manifest must have it as a blob, and the chain id must be made of the blob's own
//!   digest. What remains is a blob that is the tar of an ordinary layer: see docs/containerd.md.
//! - **Unmodified images** with `lazy_oci`: each of their layers is a lazy image that is published next to theirs and holds all
//!   up to there, so that another image may go on from any of them. The last is mounted when it is pulled, the others when
//!   something needs them. Their chain ids name tars that nobody has read: they are taken at their word, which is one of the
//!   reasons why this is not the default.
//! - **Not here**: credentials. Registries are read with the daemon's own and with those that pulls have shown; see
//!   `image_service.rs`.

mod directories;
mod error;
mod labels;
mod layers;
mod overlay;
mod service;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use shoal_proto::ObjectId;
use shoal_rafs::oci::Reference;
use shoal_snapshots::{
    Backing, Catalog, CatalogError, Filter, Kind, LabelUpdate, Labels, Lower, Snapshot, SnapshotId, Usage,
};

pub use self::error::SnapshotError;
use self::{
    directories::{Directories, Loaded, Owner},
    labels::LayerLabels,
    layers::{Layer, Layers},
};
pub(crate) use self::{
    labels::{CRI_LAYER, CRI_MANIFEST, CRI_REFERENCE, TARGET},
    layers::chain_id,
    service::serve,
};
use crate::{
    containerd::types::Mount,
    images::Image,
    mounts::{Mounts, MountsError, blocking},
    node::Node,
};

/// Exists where the kernel knows overlayfs's `index`, which must be off for lower trees that go and come back.
const INDEX_PARAMETER: &str = "/sys/module/overlay/parameters/index";

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Snapshotter {
    shared: Arc<Shared>,
}

/// A lazy image, and where it is mounted for the next container.
struct MountedImage {
    image: Arc<Image>,
    tree: PathBuf,
}

struct Shared {
    directories: Directories,
    mounts: Mounts,
    layers: Layers,
    node: Arc<Node>,
    index_off: bool,
    /// Locked for look-ups only.
    catalog: Mutex<Catalog>,
    /// Directories that are no snapshots, and are to stay.
    aside: BTreeSet<SnapshotId>,
    /// Held, on a blocking thread, from a decision until it is written down and remembered.
    deciding: Mutex<()>,
}

impl Snapshotter {
    /// Opens the snapshots below `data_dir`, and takes away what a crash left of others. A snapshot whose record cannot be read, or
    /// contradicts others, is set aside: nobody is told of it, and its files stay. Mounts of an earlier run are to be back, or being
    /// tried.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub(crate) async fn open(
        data_dir: &Path,
        node: Arc<Node>,
        mounts: Mounts,
        lazy_oci: bool,
    ) -> Result<Self, SnapshotError> {
        let directories = Directories::new(data_dir.join("snapshots"));
        let loaded = {
            let directories = directories.clone();
            blocking(move || directories.load()).await?
        };
        let (catalog, aside) = restored(loaded);
        let shared = Shared {
            directories,
            mounts,
            layers: Layers::new(node.clone(), lazy_oci),
            node,
            index_off: Path::new(INDEX_PARAMETER).exists(),
            catalog: Mutex::new(catalog),
            aside,
            deciding: Mutex::default(),
        };
        let snapshotter = Self { shared: Arc::new(shared) };
        snapshotter.cleanup().await?;
        Ok(snapshotter)
    }

    /// How many directories are no snapshots because of their records.
    pub(crate) fn set_aside(&self) -> usize {
        self.shared.aside.len()
    }

    /// A new active snapshot. For a layer of a lazy image it is committed at once under the name that the labels ask for,
    /// which [`CatalogError::Exists`] says: containerd then does not download it. What was begun is finished even if the
    /// caller goes away.
    pub(crate) async fn prepare(
        &self,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let Some(described) = LayerLabels::parse(&labels) else {
            return self.create(Kind::Active, key, parent, labels).await;
        };
        let target = described.target.clone();
        let there = self.catalog().get(&target).ok().filter(|there| is_layer(there, &parent)).cloned();
        if there.as_ref().is_some_and(|there| there.backing != Backing::Nothing) {
            return Err(CatalogError::Exists(target).into());
        }
        let mut layer = self.shared.layers.classify(&described, self.layers_below(&parent)).await?;
        if let Layer::Unmodified { whole, .. } = &layer
            && let Err(error) = self.shared.node.image(whole).await
        {
            tracing::warn!("what is published next to an image cannot be read: {}", crate::chain(&error));
            layer = Layer::Ordinary;
        }
        if layer == Layer::Ordinary {
            // Also where a blob layer without files has the name: containerd commits it under one of its own.
            return self.create(Kind::Active, key, parent, labels).await;
        }
        if there.is_some() && matches!(layer, Layer::Blob { .. }) {
            return Err(CatalogError::Exists(target).into());
        }
        let (this, name) = (self.clone(), target.clone());
        let task = tokio::spawn(async move { this.prepare_lazily(key, parent, labels, &name, layer).await });
        task.await.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        Err(CatalogError::Exists(target).into())
    }

    /// A new view.
    pub(crate) async fn view(
        &self,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        self.create(Kind::View, key, parent, labels).await
    }

    /// The mounts of an active snapshot or a view.
    pub(crate) async fn mounts(&self, key: &str) -> Result<Vec<Mount>, SnapshotError> {
        let (snapshot, lowers) = {
            let catalog = self.catalog();
            let (snapshot, lowers) = catalog.mounted(key)?;
            (snapshot.clone(), lowers)
        };
        let image = self.mount_image(&lowers).await?;
        Ok(self.overlay(&snapshot, &lowers, image.as_ref()))
    }

    /// Makes an active snapshot one that others can descend from.
    pub(crate) async fn commit(&self, name: String, key: String, labels: Labels) -> Result<(), SnapshotError> {
        let this = self.clone();
        let commit = move || {
            let id = this.catalog().get(&key)?.id;
            let usage = this.shared.directories.usage(id)?;
            this.change(|catalog| catalog.commit(&name, &key, labels, usage, SystemTime::now())).map(drop)
        };
        blocking(commit).await
    }

    /// Removes a snapshot, with its files or its mount.
    pub(crate) async fn remove(&self, name: String) -> Result<(), SnapshotError> {
        let this = self.clone();
        let forget = move || {
            let _deciding = this.deciding();
            let id = this.catalog().remove(&name)?.id;
            this.shared.directories.unrecord(id)?;
            this.catalog().forget(id);
            Ok::<_, SnapshotError>(id)
        };
        let id = blocking(forget).await?;
        // The snapshot is gone; what cannot be taken away now is, by the next cleanup.
        if let Err(error) = self.unmount(id).await {
            tracing::warn!("snapshot {id}: {}", crate::chain(&error));
        }
        let this = self.clone();
        blocking(move || this.shared.directories.delete(id)).await;
        Ok(())
    }

    pub(crate) fn stat(&self, name: &str) -> Result<Snapshot, SnapshotError> {
        Ok(self.catalog().get(name)?.clone())
    }

    /// Changes labels.
    pub(crate) async fn update(
        &self,
        name: String,
        update: LabelUpdate,
        labels: Labels,
    ) -> Result<Snapshot, SnapshotError> {
        let this = self.clone();
        blocking(move || this.change(|catalog| catalog.update(&name, &update, labels, SystemTime::now()))).await
    }

    /// The snapshots that pass one of the filters, by name.
    pub(crate) fn list(&self, filters: &[String]) -> Result<Vec<Snapshot>, SnapshotError> {
        let filter = Filter::parse(filters)?;
        Ok(self.catalog().list(&filter).cloned().collect())
    }

    /// Disk that a snapshot takes by itself. Nothing for layers of lazy images: pieces are in the store, which images
    /// share.
    pub(crate) async fn usage(&self, name: &str) -> Result<Usage, SnapshotError> {
        let snapshot = self.stat(name)?;
        if snapshot.kind == Kind::Committed {
            return Ok(snapshot.usage);
        }
        let this = self.clone();
        blocking(move || this.shared.directories.usage(snapshot.id)).await
    }

    /// Takes away mounts and directories that no snapshot has.
    pub(crate) async fn cleanup(&self) -> Result<(), SnapshotError> {
        let this = self.clone();
        let orphans = move || {
            // A snapshot in the making is none.
            let _deciding = this.deciding();
            let aside = &this.shared.aside;
            this.shared.directories.orphans(|id| aside.contains(&id) || this.catalog().by_id(id).is_some())
        };
        for id in blocking(orphans).await? {
            self.unmount(id).await?;
            let this = self.clone();
            blocking(move || this.shared.directories.delete(id)).await;
        }
        Ok(())
    }

    async fn create(
        &self,
        kind: Kind,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>, SnapshotError> {
        let lowers = self.catalog().lowers(&parent)?;
        let image = self.mount_image(&lowers).await?;
        let root = image.as_ref().map(|mounted| mounted.image.clone());
        let snapshot = self.make(kind, key, parent, labels, move |directories| match (&root, lowers.first()) {
            (_, None) => Ok(None),
            // Not asked of the mount, which this process itself would have to answer.
            (Some(image), Some(Lower { image: Some(_), .. })) => Ok(root_owner(image)),
            (_, Some(lower)) => Directories::owner(&directories.fs(lower.id)).map(Some),
        });
        let snapshot = snapshot.await?;
        let lowers = self.catalog().lowers(&snapshot.parent)?;
        Ok(self.overlay(&snapshot, &lowers, image.as_ref()))
    }

    /// Makes and records an active snapshot or a view, whose directory gets the owner of the tree below it.
    async fn make(
        &self,
        kind: Kind,
        key: String,
        parent: String,
        labels: Labels,
        owner: impl FnOnce(&Directories) -> Result<Option<Owner>, SnapshotError> + Send + 'static,
    ) -> Result<Snapshot, SnapshotError> {
        let this = self.clone();
        let make = move || {
            let owner = owner(&this.shared.directories)?;
            let _deciding = this.deciding();
            let now = SystemTime::now();
            let snapshot = match kind {
                Kind::View => this.catalog().view(&key, &parent, labels, now)?,
                _ => this.catalog().prepare(&key, &parent, labels, now)?,
            };
            this.shared.directories.create(&snapshot, owner)?;
            this.catalog().put(snapshot.clone());
            Ok(snapshot)
        };
        blocking(make).await
    }

    /// How many snapshots `parent` is made of, itself included.
    fn layers_below(&self, parent: &str) -> usize {
        let catalog = self.catalog();
        let above = |name: &str| catalog.get(name).ok().map(|snapshot| snapshot.parent.clone());
        std::iter::successors(above(parent), |name| above(name)).count()
    }

    /// Makes a layer of a lazy image and commits it as `target`.
    async fn prepare_lazily(
        &self,
        key: String,
        parent: String,
        labels: Labels,
        target: &str,
        layer: Layer,
    ) -> Result<(), SnapshotError> {
        let snapshot = self.make(Kind::Active, key, parent, labels.clone(), |_| Ok(None)).await?;
        let backing = match layer {
            Layer::Image { reference, layer } => match self.mount_layer(&snapshot, target, &reference, layer).await {
                Ok(()) => Backing::Lazy { image: reference.to_string() },
                Err(error) => return self.give_up(snapshot.name, error).await,
            },
            Layer::Unmodified { reference, whole } => {
                let fs = self.shared.directories.fs(snapshot.id);
                if reference == whole
                    && let Err(error) = self.shared.mounts.mount(&reference, &fs, None, false).await
                {
                    return self.give_up(snapshot.name, error.into()).await;
                }
                Backing::Lazy { image: reference.to_string() }
            }
            Layer::Blob { reference, layer } => match self.check_chain(&snapshot, target, &reference, layer) {
                Ok(()) => Backing::Nothing,
                Err(error) => return self.give_up(snapshot.name, error).await,
            },
            Layer::Ordinary => Backing::Nothing,
        };
        let (this, key, target) = (self.clone(), snapshot.name.clone(), target.to_owned());
        let commit = move || {
            this.change(|catalog| {
                let committed = catalog.commit(&target, &key, labels, Usage::default(), SystemTime::now())?;
                Ok(Snapshot { backing, ..committed })
            })
        };
        match blocking(commit).await {
            Ok(_) => Ok(()),
            // Another pull of the same image was first.
            Err(SnapshotError::Catalog(CatalogError::Exists(_))) => self.remove(snapshot.name).await,
            Err(error) => self.give_up(snapshot.name, error).await,
        }
    }

    async fn give_up(&self, key: String, error: SnapshotError) -> Result<(), SnapshotError> {
        if let Err(also) = self.remove(key).await {
            tracing::warn!("after a layer that could not be prepared: {}", crate::chain(&also));
        }
        Err(error)
    }

    /// Mounts the image whose bootstrap layer `snapshot` is to be, once it has turned out to be that.
    async fn mount_layer(
        &self,
        snapshot: &Snapshot,
        target: &str,
        reference: &Reference,
        layer: Option<ObjectId>,
    ) -> Result<(), SnapshotError> {
        let image = self.shared.node.image(reference).await?.image;
        if layer.is_some_and(|layer| layer != image.layer) {
            return Err(SnapshotError::OtherLayer { reference: reference.to_string() });
        }
        self.check_chain(snapshot, target, reference, image.diff_id)?;
        self.shared.mounts.mount(reference, &self.shared.directories.fs(snapshot.id), None, false).await?;
        Ok(())
    }

    /// Whether `target` is the name of a layer with this `diff_id` over what the snapshot descends from.
    fn check_chain(
        &self,
        snapshot: &Snapshot,
        target: &str,
        reference: &Reference,
        diff_id: ObjectId,
    ) -> Result<(), SnapshotError> {
        let below = match snapshot.parent.as_str() {
            "" => None,
            parent => Some(self.stat(parent)?.labels.remove(TARGET).unwrap_or_default()),
        };
        if chain_id(below.as_deref(), diff_id) == target {
            return Ok(());
        }
        Err(SnapshotError::WrongChain { reference: reference.to_string(), target: target.to_owned() })
    }

    /// Sees to it that the lazy image among `lowers` is mounted, natively if that is possible by now, and says where.
    async fn mount_image(&self, lowers: &[Lower]) -> Result<Option<MountedImage>, SnapshotError> {
        let Some((id, name)) = lowers.last().and_then(|lower| Some((lower.id, lower.image.as_ref()?))) else {
            return Ok(None);
        };
        let (mounts, mut tree) = (&self.shared.mounts, self.shared.directories.fs(id));
        for mountpoint in [&tree, &self.shared.directories.native(id)] {
            // A container over a folder that only looks like a mount would have none of its files.
            mounts.mend(mountpoint).await;
        }
        if mounts.image(&tree).is_none() {
            let reference: Reference = name.parse().map_err(MountsError::from)?;
            mounts.mount(&reference, &tree, None, false).await?;
        }
        if let Some(native) = self.graduated(id).await {
            tree = native;
        }
        Ok(mounts.image(&tree).map(|image| MountedImage { image, tree }))
    }

    /// Where an image is mounted natively beside its first mount, if it may be.
    async fn graduated(&self, id: SnapshotId) -> Option<PathBuf> {
        let (directories, mounts) = (&self.shared.directories, &self.shared.mounts);
        let (first, native) = (directories.fs(id), directories.native(id));
        if !mounts.may_graduate(&first) {
            return None;
        }
        let graduated = async {
            let directories = directories.clone();
            blocking(move || directories.make_native(id)).await?;
            Ok::<_, SnapshotError>(mounts.graduate(&first, &native).await?)
        };
        match graduated.await {
            Ok(mounted) => mounted.then_some(native),
            Err(error) => {
                tracing::warn!("snapshot {id} stays on FUSE: {}", crate::chain(&error));
                None
            }
        }
    }

    /// Takes away the mounts of a lazy image, if `id` is one.
    async fn unmount(&self, id: SnapshotId) -> Result<(), MountsError> {
        for mountpoint in [self.shared.directories.native(id), self.shared.directories.fs(id)] {
            match self.shared.mounts.unmount(&mountpoint).await {
                Err(MountsError::NotMounted(_)) => {}
                unmounted => drop(unmounted?),
            }
        }
        Ok(())
    }

    fn overlay(&self, snapshot: &Snapshot, lowers: &[Lower], image: Option<&MountedImage>) -> Vec<Mount> {
        let trees = lowers.iter().map(|lower| match image {
            Some(mounted) if lower.image.is_some() => mounted.tree.clone(),
            _ => self.shared.directories.fs(lower.id),
        });
        overlay::mounts(&self.shared.directories, snapshot, lowers, trees.collect(), self.shared.index_off)
    }

    /// Decides on a new state of a snapshot, writes it down, and remembers it. Blocks.
    fn change(
        &self,
        decide: impl FnOnce(&Catalog) -> Result<Snapshot, CatalogError>,
    ) -> Result<Snapshot, SnapshotError> {
        let _deciding = self.deciding();
        let snapshot = decide(&self.catalog())?;
        self.shared.directories.record(&snapshot)?;
        self.catalog().put(snapshot.clone());
        Ok(snapshot)
    }

    fn deciding(&self) -> MutexGuard<'_, ()> {
        self.shared.deciding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.shared.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a snapshot is what a layer over `parent` becomes.
fn is_layer(snapshot: &Snapshot, parent: &str) -> bool {
    snapshot.kind == Kind::Committed && snapshot.parent == parent
}

/// The snapshots, and the numbers of those that cannot be among them.
fn restored(Loaded { snapshots, unreadable }: Loaded) -> (Catalog, BTreeSet<SnapshotId>) {
    let (mut catalog, left_out) = Catalog::restore(snapshots);
    let left_out = left_out.into_iter().map(|one| (one.id, SnapshotError::from(one)));
    let mut aside = BTreeSet::new();
    for (id, error) in unreadable.into_iter().chain(left_out) {
        tracing::error!(
            "snapshot {id} is set aside, with its files, until its record is mended: {}",
            crate::chain(&error)
        );
        catalog.reserve(id);
        aside.insert(id);
    }
    (catalog, aside)
}

/// User and group of an image's root directory.
fn root_owner(image: &Image) -> Option<Owner> {
    let look = image.metadata.look();
    let root = look.inode(image.metadata.root()).ok()?;
    Some((root.uid(), root.gid()))
}
