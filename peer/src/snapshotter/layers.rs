//! Which layers are lazy, and what of an image a layer is.
//!
//! The marks in the labels decide where there are any, as far as the manifest agrees. A puller need not pass them on, though, so a layer without a mark
//! is looked up in its image's manifest. That must not hold up ordinary images, whose registry this node may not even be
//! allowed to read: what is not found out soon is ordinary, and for a while not asked about again.
//!
//! With `lazy_oci` an ordinary image is looked up once more: for what is published next to it to read it lazily by, a lazy
//! image for each of its layers that holds all up to there. So each layer stands for itself, whatever else descends from it.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use sha2::{Digest as _, Sha256};
use shoal_proto::ObjectId;
use shoal_rafs::oci::{ImageManifest, LayerIndex, Reference};

use super::{
    SnapshotError,
    labels::{LayerLabels, Mark},
};
use crate::{images::ImageError, node::Node};

/// How long the pull of a layer without a mark waits for the manifest.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a manifest that could not be had is not asked for again.
const FORGET_FAILURE: Duration = Duration::from_secs(60);
/// Manifests that are remembered: the images that are being pulled at a time, and some.
const MAX_REMEMBERED: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// How a layer is prepared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layer {
    /// Downloaded and unpacked by containerd.
    Ordinary,
    /// Not at all: it is read through its image, whose manifest has it as a blob.
    Blob {
        /// The image, with a digest.
        reference: Reference,
        /// The blob, and with it the layer's `diff_id`.
        layer: ObjectId,
    },
    /// By mounting this image, whose bootstrap layer it is.
    Image {
        /// With a digest.
        reference: Reference,
        /// The layer's own digest, if that is known.
        layer: Option<ObjectId>,
    },
    /// Through an image that is published next to its own, which is ordinary, and holds all layers up to this one.
    Unmodified {
        /// With a digest.
        reference: Reference,
        /// The same for all layers: what is to be had if any of them is to be read this way.
        whole: Reference,
    },
}

impl Layer {
    /// What a layer is in a lazy image.
    fn of(manifest: &ImageManifest, reference: Reference, layer: ObjectId) -> Self {
        if layer == manifest.bootstrap.id {
            Self::Image { reference, layer: Some(layer) }
        } else if manifest.layers.iter().any(|listed| listed.id == layer) {
            Self::Blob { reference, layer }
        } else {
            Self::Ordinary
        }
    }
}

/// The manifest of a lazy image; none for an ordinary image, and until then for one that could not be had.
#[derive(Debug, Clone)]
enum Seen {
    Lazy(Arc<ImageManifest>),
    /// Not lazy by itself, and read by what is published next to it.
    Unmodified(Arc<Unmodified>),
    Ordinary,
    Failed(Instant),
}

/// An ordinary image, and what is published next to it.
#[derive(Debug)]
struct Unmodified {
    /// The lowest first.
    layers: Vec<ObjectId>,
    /// Not none.
    indexes: Vec<LayerIndex>,
}

impl Unmodified {
    /// What its layer with so many `below` is.
    fn layer(&self, image: &Reference, layer: ObjectId, below: usize) -> Layer {
        let index = |layers| self.indexes.iter().find(|index| index.layers == layers);
        let indexes = index(below + 1).zip(index(self.layers.len()));
        match indexes.filter(|_| self.layers.get(below) == Some(&layer)) {
            Some((up_to_here, whole)) => {
                let [reference, whole] = [up_to_here, whole].map(|index| image.pinned(index.manifest));
                Layer::Unmodified { reference, whole }
            }
            None => Layer::Ordinary,
        }
    }
}

/// Tells lazy layers from ordinary ones.
#[derive(Debug)]
pub(super) struct Layers {
    node: Arc<Node>,
    lazy_oci: bool,
    /// By reference with digest. Locked for look-ups only.
    seen: Mutex<LruCache<Reference, Seen>>,
}

impl Layers {
    pub(super) fn new(node: Arc<Node>, lazy_oci: bool) -> Self {
        Self { node, lazy_oci, seen: Mutex::new(LruCache::new(MAX_REMEMBERED)) }
    }

    /// How to prepare the layer that a snapshot's labels describe, with so many layers `below` it.
    ///
    /// # Errors
    /// It is marked as one of a lazy image, and the labels do not say of which, or its reference cannot be resolved; or it is marked
    /// as a data blob, and the image's manifest does not have it as one, or cannot be had.
    pub(super) async fn classify(&self, labels: &LayerLabels, below: usize) -> Result<Layer, SnapshotError> {
        match (labels.mark, &labels.reference, labels.layer) {
            (Some(Mark::Blob), Some(reference), Some(layer)) => {
                let reference = self.pin(reference, labels.manifest).await?;
                match self.marked(&reference).await? {
                    manifest if manifest.bootstrap.id == layer => {}
                    manifest if manifest.layers.iter().any(|listed| listed.id == layer) => {
                        return Ok(Layer::Blob { reference, layer });
                    }
                    _ => {}
                }
                Err(SnapshotError::NoBlob { reference: reference.to_string() })
            }
            (Some(Mark::Blob), ..) | (Some(Mark::Bootstrap), None, _) => Err(SnapshotError::NoReference),
            (Some(Mark::Bootstrap), Some(reference), layer) => {
                let reference = self.pin(reference, labels.manifest).await?;
                Ok(Layer::Image { reference, layer })
            }
            (None, Some(reference), Some(layer)) => {
                let sought = tokio::time::timeout(PATIENCE, self.look_up(reference, labels, layer, below)).await;
                Ok(sought.unwrap_or_else(|_| {
                    tracing::info!(%reference, "its manifest takes too long: pulled as an ordinary image");
                    Layer::Ordinary
                }))
            }
            (None, ..) => Ok(Layer::Ordinary),
        }
    }

    async fn pin(&self, reference: &Reference, manifest: Option<ObjectId>) -> Result<Reference, ImageError> {
        match manifest {
            Some(manifest) => Ok(reference.pinned(manifest)),
            None => Ok(reference.pinned(self.node.images.resolve(reference).await?)),
        }
    }

    async fn look_up(&self, reference: &Reference, labels: &LayerLabels, layer: ObjectId, below: usize) -> Layer {
        let pinned = match self.pin(reference, labels.manifest).await {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::info!("pulled as an ordinary image: {}", crate::chain(&error));
                return Layer::Ordinary;
            }
        };
        match self.image(&pinned).await {
            Seen::Lazy(manifest) => Layer::of(&manifest, pinned, layer),
            Seen::Unmodified(image) => image.layer(&pinned, layer, below),
            Seen::Ordinary | Seen::Failed(_) => Layer::Ordinary,
        }
    }

    /// The manifest of an image that is lazy, or its mark is false.
    async fn marked(&self, pinned: &Reference) -> Result<Arc<ImageManifest>, SnapshotError> {
        if let Some(Seen::Lazy(manifest)) = self.seen().get(pinned) {
            return Ok(manifest.clone());
        }
        // With a digest, which is another error than a manifest that cannot be had.
        let digest = pinned.digest().ok_or(SnapshotError::NoReference)?;
        let manifest = Arc::new(self.node.images.manifest(pinned.source(), digest).await?.manifest);
        self.seen().put(pinned.clone(), Seen::Lazy(manifest.clone()));
        Ok(manifest)
    }

    /// What an image is.
    async fn image(&self, pinned: &Reference) -> Seen {
        match self.seen().get(pinned) {
            Some(Seen::Failed(when)) if when.elapsed() >= FORGET_FAILURE => {}
            Some(seen) => return seen.clone(),
            None => {}
        }
        // Should the wait be cut short, this stands.
        let failed = Seen::Failed(Instant::now());
        self.seen().put(pinned.clone(), failed.clone());
        let seen = self.find(pinned).await.unwrap_or_else(|error| {
            tracing::info!("{pinned} is pulled as an ordinary image: {}", crate::chain(&error));
            failed
        });
        self.seen().put(pinned.clone(), seen.clone());
        seen
    }

    async fn find(&self, pinned: &Reference) -> Result<Seen, ImageError> {
        let (images, source) = (&self.node.images, pinned.source());
        let Some(digest) = pinned.digest() else { return Ok(Seen::Ordinary) };
        match images.manifest(source, digest).await {
            Ok(found) => return Ok(Seen::Lazy(Arc::new(found.manifest))),
            Err(ImageError::Manifest { .. }) if self.lazy_oci => {}
            Err(ImageError::Manifest { .. }) => return Ok(Seen::Ordinary),
            Err(error) => return Err(error),
        }
        let (id, _, image) = images.ordinary(source, digest).await?;
        let indexes = images.layer_indexes(source, id).await?;
        let layers = image.layers.iter().map(|layer| layer.id).collect();
        match indexes.is_empty() {
            // It may be published yet.
            true => Ok(Seen::Failed(Instant::now())),
            false => Ok(Seen::Unmodified(Arc::new(Unmodified { layers, indexes }))),
        }
    }

    fn seen(&self) -> std::sync::MutexGuard<'_, LruCache<Reference, Seen>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name that containerd has for a stack of layers: `ChainID` of the OCI image specification, section "Layer ChainID".
/// `parent` is that of the layers below; none for the lowest.
pub(crate) fn chain_id(parent: Option<&str>, diff_id: ObjectId) -> String {
    let diff_id = format!("sha256:{diff_id}");
    match parent {
        None => diff_id,
        Some(parent) => {
            let chain = Sha256::digest(format!("{parent} {diff_id}"));
            format!("sha256:{}", ObjectId::new(chain.into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_read_by_what_is_published_for_its_place() {
        let [one, two, other] = [1, 2, 3].map(|byte| ObjectId::new([byte; 32]));
        let index = |layers, byte| LayerIndex { layers, manifest: ObjectId::new([byte; 32]) };
        let indexes = vec![index(3, 33), index(2, 22), index(1, 11), index(1, 12)];
        let image = Unmodified { layers: vec![one, two, one], indexes: indexes.clone() };
        let name: Reference = "localhost:5000/app:1".parse().unwrap();
        let pinned = |byte| name.pinned(ObjectId::new([byte; 32]));
        for (layer, below, byte) in [(one, 0, 11), (two, 1, 22), (one, 2, 33)] {
            let read = Layer::Unmodified { reference: pinned(byte), whole: pinned(33) };
            assert_eq!(image.layer(&name, layer, below), read);
        }
        for (layer, below) in [(other, 0), (one, 1), (one, 3)] {
            assert_eq!(image.layer(&name, layer, below), Layer::Ordinary, "{below}");
        }
        // Without the whole image the others are of no use.
        let image = Unmodified { indexes: indexes[1..].to_vec(), ..image };
        assert_eq!(image.layer(&name, one, 0), Layer::Ordinary);
    }

    #[test]
    fn a_chain_id_names_all_layers() {
        let (one, two) = (ObjectId::new([1; 32]), ObjectId::new([2; 32]));
        let lowest = chain_id(None, one);
        assert_eq!(lowest, format!("sha256:{one}"));
        // echo -n "sha256:0101.. sha256:0202.." | sha256sum
        let expected = Sha256::digest(format!("sha256:{one} sha256:{two}"));
        assert_eq!(chain_id(Some(&lowest), two), format!("sha256:{}", hex::encode(expected)));
    }
}
