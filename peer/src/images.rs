//! From a reference to an image that can be read: manifest, bootstrap layer, bootstrap, and its blobs in the store.
//!
//! Everything below the tag goes by digest and through the swarm, so that a thousand nodes that mount one image cost the
//! registry one manifest and one bootstrap. An image is loaded once and shared by all that use it.
//!
//! Of an image whose layers are gzip as registries have them, the index over each layer is an object of its own, the *meta
//! blob*, unless the bootstrap layer has a copy. Images that share a layer share it.

mod error;
mod image;
mod unpacked;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use shoal_proto::{BlobId, Fingerprint, ObjectId, ObjectKind, Priority};
use shoal_rafs::oci::{
    ImageManifest, LayerIndex, LayerSeal, Manifest, Ordinary, OrdinaryManifest, Platform, Reference, Registry,
    SealError, Source,
};
use shoal_scheduler::{BlobKey, Event, Item, Origin as WantOrigin};
use tokio::sync::OnceCell;

pub(crate) use self::image::scheduled;
pub(crate) use self::unpacked::Unpacked;
pub use self::{
    error::ImageError,
    image::{Image, ImageBlob},
};
use self::{image::open, unpacked::Metas};
use crate::{
    driver::{DriverHandle, Fetched, Stake, WantFailed},
    fetch::{BlobTarget, MAX_OBJECT, ObjectTarget, Target},
    mounts::blocking,
    origin::Origin,
    plain::{self, PlainBlobs},
    store::{Footprint, ObjectFile, Store},
    traffic::{Provenance, Traffic},
};

/// Most bytes of a manifest or an index, as registries limit them.
pub(crate) const MAX_MANIFEST: u64 = 4 << 20;
/// How a bootstrap layer begins that is not encrypted.
const GZIP: [u8; 2] = [0x1F, 0x8B];
/// Most images in memory beside those in use.
const MAX_IDLE_IMAGES: usize = 16;
/// Meta blobs of an image that are fetched at the same time.
const METAS_AT_ONCE: usize = 4;

/// An image as a manifest names it.
#[derive(Debug, Clone)]
pub struct NamedImage {
    /// The manifest, or the index that leads to it.
    pub manifest: ObjectId,
    /// The image.
    pub image: Arc<Image>,
    /// What the store must keep for it to be read again with no help from anybody.
    pub needs: Footprint,
}

/// The manifest of a lazy image, as it was found.
#[derive(Debug)]
pub(crate) struct FoundManifest {
    /// Its digest.
    pub(crate) id: ObjectId,
    /// All its bytes.
    pub(crate) bytes: Bytes,
    /// What they say.
    pub(crate) manifest: ImageManifest,
}

/// What the manifest of an image says of its encrypted bootstrap layer.
struct Sealed {
    manifest: ObjectId,
    seal: LayerSeal,
}

type Slot = Arc<OnceCell<Arc<Image>>>;

/// Loads images and keeps them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Images {
    store: Store,
    origin: Origin,
    driver: DriverHandle,
    traffic: Arc<Traffic>,
    patience: std::time::Duration,
    plain: PlainBlobs,
    /// By bootstrap layer. A slot is empty while its image is being loaded. Locked for look-ups only.
    loaded: Arc<Mutex<HashMap<ObjectId, Slot>>>,
}

impl Images {
    pub(crate) fn new(
        store: Store,
        origin: Origin,
        driver: DriverHandle,
        traffic: Arc<Traffic>,
        patience: std::time::Duration,
    ) -> Self {
        let plain = PlainBlobs::new(store.clone(), driver.clone());
        Self { store, origin, driver, traffic, patience, plain, loaded: Arc::default() }
    }

    /// The blobs that no image describes.
    pub(crate) fn plain(&self) -> &PlainBlobs {
        &self.plain
    }

    /// A blob as the image with this bootstrap layer names its pieces, if the image is loaded; or a plain blob, whose list
    /// is known.
    pub(crate) fn described(&self, layer: ObjectId, id: BlobId) -> Option<ImageBlob> {
        if plain::is_plain(layer, id) {
            return self.plain.known(id).map(|plain| plain.blob.clone());
        }
        self.loaded(layer)?.blob(id).cloned()
    }

    /// All blobs that [`described`](Self::described) gives, with what they are described by.
    pub(crate) fn all_described(&self) -> Vec<((ObjectId, BlobId), ImageBlob)> {
        let plain = self.plain.all().into_iter();
        let plain = plain.map(|plain| ((plain::as_bootstrap(plain.id()), plain.id()), plain.blob.clone()));
        let images = self.all();
        let blobs = images.iter().flat_map(|image| image.blobs.iter().map(|blob| (image.layer, blob)));
        plain.chain(blobs.map(|(layer, blob)| ((layer, blob.table.blob()), blob.clone()))).collect()
    }

    /// Asks the registry what `reference` names at present. A reference with a digest is not asked about.
    ///
    /// # Errors
    /// [`ImageError::Resolve`].
    pub async fn resolve(&self, reference: &Reference) -> Result<ObjectId, ImageError> {
        if let Some(digest) = reference.digest() {
            return Ok(digest);
        }
        self.origin
            .registry()
            .resolve(reference)
            .await
            .map(|(id, _)| id)
            .map_err(|source| ImageError::Resolve { reference: reference.to_string(), source: Arc::new(source) })
    }

    /// The client that reads registries.
    pub(crate) fn registry(&self) -> &Registry {
        self.origin.registry()
    }

    /// The image of `manifest` (an index: its lazy manifest for this platform) in `source`.
    ///
    /// # Errors
    /// Any [`ImageError`] but `Resolve`.
    pub async fn by_manifest(&self, source: &Source, manifest: ObjectId) -> Result<NamedImage, ImageError> {
        let found = self.manifest(source, manifest).await?;
        let sealed = found.manifest.seal.map(|seal| Sealed { manifest: found.id, seal });
        let bootstrap = found.manifest.bootstrap;
        let image = self.layer(source, bootstrap.id, bootstrap.size.min(MAX_OBJECT), sealed).await?;
        let mut objects = vec![manifest, found.id, image.layer];
        objects.dedup();
        objects.extend(image.metas.iter().chain(&image.unpacked));
        let blobs = image.blobs.iter().map(|blob| blob.handle.key()).collect();
        Ok(NamedImage { manifest, image, needs: Footprint { blobs, objects, ..Footprint::default() } })
    }

    /// The lazy manifest that `manifest` is, or that it has for this platform if it is an index.
    ///
    /// # Errors
    /// [`ImageError::Object`], `Manifest` or `NestedIndex`.
    pub(crate) async fn manifest(&self, source: &Source, manifest: ObjectId) -> Result<FoundManifest, ImageError> {
        let mut id = manifest;
        // An index names a manifest; a manifest names the layer. Deeper nesting is nobody's.
        for _ in 0..2 {
            let bytes = self.object(source, id, ObjectKind::Manifest, MAX_MANIFEST).await?;
            let failed = |e| ImageError::Manifest { manifest: id, source: Arc::new(e) };
            match Manifest::parse(&bytes).map_err(failed)? {
                Manifest::Index(index) => id = index.select(&Platform::here()).map_err(failed)?.id,
                Manifest::Image(manifest) => return Ok(FoundManifest { id, bytes, manifest }),
            }
        }
        Err(ImageError::NestedIndex { manifest })
    }

    /// The manifest of an image, lazy or not, that `manifest` is or that it has for this platform, with its digest and bytes.
    ///
    /// # Errors
    /// [`ImageError::Object`], `Manifest` or `NestedIndex`.
    pub(crate) async fn ordinary(
        &self,
        source: &Source,
        manifest: ObjectId,
    ) -> Result<(ObjectId, Bytes, OrdinaryManifest), ImageError> {
        let mut id = manifest;
        for _ in 0..2 {
            let bytes = self.object(source, id, ObjectKind::Manifest, MAX_MANIFEST).await?;
            let found = OrdinaryManifest::find(&bytes, &Platform::here());
            match found.map_err(|e| ImageError::Manifest { manifest: id, source: Arc::new(e) })? {
                Ordinary::Index(chosen) => id = chosen.id,
                Ordinary::Image(image) => return Ok((id, bytes, image)),
            }
        }
        Err(ImageError::NestedIndex { manifest })
    }

    /// Asks the registry what is published next to an image to read it lazily by.
    ///
    /// # Errors
    /// [`ImageError::Referrers`].
    pub(crate) async fn layer_indexes(
        &self,
        source: &Source,
        manifest: ObjectId,
    ) -> Result<Vec<LayerIndex>, ImageError> {
        let listed = self.origin.registry().layer_indexes(source, manifest).await;
        listed.map_err(|source| ImageError::Referrers { manifest, source: Arc::new(source) })
    }

    /// The image whose bootstrap layer is `layer`, which has at most `limit` bytes. One whose layer is encrypted must have been loaded by its manifest, which alone
    /// has the layer's key.
    ///
    /// # Errors
    /// Any [`ImageError`] but `Resolve` and `Manifest`.
    pub async fn by_layer(&self, source: &Source, layer: ObjectId, limit: u64) -> Result<Arc<Image>, ImageError> {
        self.layer(source, layer, limit, None).await
    }

    /// The same, with what its manifest says of its encryption.
    async fn layer(
        &self,
        source: &Source,
        layer: ObjectId,
        limit: u64,
        sealed: Option<Sealed>,
    ) -> Result<Arc<Image>, ImageError> {
        let slot = {
            let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            forget_idle(&mut loaded);
            loaded.entry(layer).or_default().clone()
        };
        let image = slot.get_or_try_init(|| self.load(source.clone(), layer, limit, sealed)).await?;
        Ok(image.clone())
    }

    /// The image with this bootstrap layer, if it is loaded.
    pub fn loaded(&self, layer: ObjectId) -> Option<Arc<Image>> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.get(&layer)?.get().cloned()
    }

    /// Whether the image with this bootstrap layer is loaded, or its layer in the store.
    pub(crate) fn has_layer(&self, layer: ObjectId) -> bool {
        self.loaded(layer).is_some() || self.store.has_object(layer)
    }

    /// All loaded images.
    pub fn all(&self) -> Vec<Arc<Image>> {
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.values().filter_map(|slot| slot.get().cloned()).collect()
    }

    /// The blob under `id` in a loaded image, or cut by its list, that means the same by `piece`.
    pub fn blob_agreeing(&self, id: BlobId, piece: u32, fingerprint: &Fingerprint) -> Option<ImageBlob> {
        if let Some(plain) = self.plain.known(id).filter(|plain| plain.blob.agrees(piece, fingerprint)) {
            return Some(plain.blob.clone());
        }
        let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let images = loaded.values().filter_map(|slot| slot.get());
        let mut blobs = images.flat_map(|image| &image.blobs);
        blobs.find(|blob| blob.table.blob() == id && blob.agrees(piece, fingerprint)).cloned()
    }

    /// An object, from the store, or else from the swarm or the registry.
    ///
    /// # Errors
    /// [`ImageError::Object`].
    pub async fn object(
        &self,
        source: &Source,
        id: ObjectId,
        kind: ObjectKind,
        limit: u64,
    ) -> Result<Bytes, ImageError> {
        if let Some(bytes) = self.stored(id).await {
            self.traffic.object(Provenance::Local, bytes.len() as u64);
            return Ok(bytes);
        }
        self.fetch_object(source, id, kind, limit, WantOrigin::Local)
            .await
            .map_err(|source| ImageError::Object { object: id, source })
    }

    /// Bytes of an object that the store has.
    pub(crate) fn stored_len(&self, id: ObjectId) -> Option<u64> {
        self.store.object_len(id)
    }

    /// The object, if the store has it, to be read part by part.
    pub(crate) async fn opened(&self, id: ObjectId) -> Option<ObjectFile> {
        let store = self.store.clone();
        let opened = blocking(move || store.object_file(id)).await;
        opened.unwrap_or_else(|error| {
            tracing::warn!("cannot read object {id} from the store: {}", crate::chain(&error));
            None
        })
    }

    /// The object, if the store has it.
    pub(crate) async fn stored(&self, id: ObjectId) -> Option<Bytes> {
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || store.object(id)).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(error)) => {
                tracing::warn!("cannot read object {id} from the store: {}", crate::chain(&error));
                None
            }
            Err(_) => None,
        }
    }

    /// The object, from the swarm or the registry.
    pub(crate) async fn fetch_object(
        &self,
        source: &Source,
        id: ObjectId,
        kind: ObjectKind,
        limit: u64,
        origin: WantOrigin,
    ) -> Result<Bytes, WantFailed> {
        let stake = self.know_object(source, id, kind, limit).await;
        let item = Item { blob: stake.key(), piece: 0 };
        loop {
            match self.driver.want(item, Priority::OnDemand, self.patience, origin).await? {
                Fetched::Object { bytes, .. } => return Ok(bytes),
                // It came between the look into the store and the want, or for others who want it still.
                Fetched::Present | Fetched::Piece { .. } | Fetched::List { .. } => {
                    if let Some(bytes) = self.stored(id).await {
                        return Ok(bytes);
                    }
                    self.driver.event(Event::Lost { item }).await;
                }
            }
        }
    }

    /// Makes an object known to the scheduler, for as long as the stake is held.
    pub(crate) async fn know_object(&self, source: &Source, id: ObjectId, kind: ObjectKind, limit: u64) -> Stake {
        let stake = self.driver.stake(BlobKey::from(id));
        let target = ObjectTarget { source: source.clone(), id, kind, limit };
        self.driver.add(&stake, Target::Object(Arc::new(target))).await;
        stake
    }

    async fn load(
        &self,
        source: Source,
        layer: ObjectId,
        limit: u64,
        sealed: Option<Sealed>,
    ) -> Result<Arc<Image>, ImageError> {
        let manifest = sealed.as_ref().map(|sealed| sealed.manifest);
        let unpacked = match self.kept(layer).await {
            Some(unpacked) => unpacked,
            None => self.unpack(&source, layer, limit, sealed).await?,
        };
        if let Some(place) = &unpacked.backend {
            self.origin.registry().note_backend(&source, place);
        }
        let metas = self.metas(&source, &unpacked).await?;
        let (store, driver) = (self.store.clone(), self.driver.clone());
        let opened = tokio::task::spawn_blocking(move || open(&store, &driver, unpacked, &metas, source)).await;
        let image = opened.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
        for blob in &image.blobs {
            let target = BlobTarget {
                source: image.source.clone(),
                bootstrap: layer,
                manifest,
                table: blob.table.clone(),
                handle: blob.handle.clone(),
                origins: blob.origins.clone(),
                others: Vec::new(),
            };
            self.driver.add(&blob.stake, Target::Blob(Arc::new(target))).await;
        }
        tracing::info!(%layer, blobs = image.blobs.len(), inodes = image.metadata.inode_count(), "image loaded");
        Ok(Arc::new(image))
    }

    /// A bootstrap layer that was unpacked before.
    async fn kept(&self, layer: ObjectId) -> Option<Unpacked> {
        let store = self.store.clone();
        tokio::task::spawn_blocking(move || Unpacked::kept(&store, layer)).await.ok().flatten()
    }

    async fn unpack(
        &self,
        source: &Source,
        layer: ObjectId,
        limit: u64,
        sealed: Option<Sealed>,
    ) -> Result<Unpacked, ImageError> {
        let bytes = self.object(source, layer, ObjectKind::Blob, limit).await?;
        let (registry, store) = (self.origin.registry().clone(), self.store.clone());
        let unpack = move || {
            // The store keeps the layer as it came: the keys of the image are in memory alone.
            let opened = match &sealed {
                None if !bytes.starts_with(&GZIP) => Err(SealError::NoManifest { layer }),
                sealed => registry.open_layer(layer, bytes, sealed.as_ref().map(|sealed| &sealed.seal)),
            };
            let opened = opened.map_err(|e| ImageError::Layer { layer, source: Arc::new(e.into()) })?;
            let unpacked = Unpacked::read(&opened, layer)?;
            Ok(if sealed.is_some() { unpacked } else { unpacked.keep(&store) })
        };
        let unpacked = tokio::task::spawn_blocking(unpack).await;
        unpacked.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// The meta blobs of an image, by digest.
    async fn metas(&self, source: &Source, unpacked: &Unpacked) -> Result<Metas, ImageError> {
        let missing = futures::stream::iter(unpacked.metas().collect::<Vec<_>>());
        let fetch = |(id, size)| async move {
            Ok::<_, ImageError>((id, self.object(source, id, ObjectKind::Blob, size).await?))
        };
        missing.map(fetch).buffer_unordered(METAS_AT_ONCE).try_collect().await
    }
}

/// Drops loaded images that nobody uses, but for a few.
fn forget_idle(loaded: &mut HashMap<ObjectId, Slot>) {
    let idle =
        |slot: &Slot| Arc::strong_count(slot) == 1 && slot.get().is_none_or(|image| Arc::strong_count(image) == 1);
    let mut spare = loaded.values().filter(|slot| idle(slot)).count().saturating_sub(MAX_IDLE_IMAGES);
    loaded.retain(|_, slot| {
        let drop = spare > 0 && idle(slot);
        spare -= usize::from(drop);
        !drop
    });
}
