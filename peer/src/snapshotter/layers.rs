//! Which layers are lazy, and what of an image a layer is.
//!
//! The marks in the labels decide where there are any. A puller need not pass them on, though, so a layer without a mark
//! is looked up in its image's manifest. That must not hold up ordinary images, whose registry this node may not even be
//! allowed to read: what is not found out soon is ordinary, and for a while not asked about again.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use lru::LruCache;
use sha2::{Digest as _, Sha256};
use shoal_proto::ObjectId;
use shoal_rafs::oci::{ImageManifest, Reference};

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
    /// Not at all: it is read through its image.
    Blob,
    /// By mounting this image, whose bootstrap layer it is.
    Image {
        /// With a digest.
        reference: Reference,
        /// The layer's own digest, if that is known.
        layer: Option<ObjectId>,
    },
}

impl Layer {
    /// What a layer is in a lazy image.
    fn of(manifest: &ImageManifest, reference: Reference, layer: ObjectId) -> Self {
        if layer == manifest.bootstrap.id {
            Self::Image { reference, layer: Some(layer) }
        } else if manifest.layers.iter().any(|listed| listed.id == layer) {
            Self::Blob
        } else {
            Self::Ordinary
        }
    }
}

/// The manifest of a lazy image; none for an ordinary image, and until then for one that could not be had.
#[derive(Debug, Clone)]
enum Seen {
    Lazy(Arc<ImageManifest>),
    Ordinary,
    Failed(Instant),
}

/// Tells lazy layers from ordinary ones.
#[derive(Debug)]
pub(super) struct Layers {
    node: Arc<Node>,
    /// By reference with digest. Locked for look-ups only.
    seen: Mutex<LruCache<Reference, Seen>>,
}

impl Layers {
    pub(super) fn new(node: Arc<Node>) -> Self {
        Self { node, seen: Mutex::new(LruCache::new(MAX_REMEMBERED)) }
    }

    /// How to prepare the layer that a snapshot's labels describe.
    ///
    /// # Errors
    /// It is marked as a bootstrap layer, and the labels name no image, or its reference cannot be resolved.
    pub(super) async fn classify(&self, labels: &LayerLabels) -> Result<Layer, SnapshotError> {
        match (labels.mark, &labels.reference, labels.layer) {
            (Some(Mark::Blob), ..) => Ok(Layer::Blob),
            (Some(Mark::Bootstrap), None, _) => Err(SnapshotError::NoReference),
            (Some(Mark::Bootstrap), Some(reference), layer) => {
                let reference = self.pin(reference, labels.manifest).await?;
                Ok(Layer::Image { reference, layer })
            }
            (None, Some(reference), Some(layer)) => {
                let sought = tokio::time::timeout(PATIENCE, self.look_up(reference, labels, layer)).await;
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

    async fn look_up(&self, reference: &Reference, labels: &LayerLabels, layer: ObjectId) -> Layer {
        let pinned = match self.pin(reference, labels.manifest).await {
            Ok(pinned) => pinned,
            Err(error) => {
                tracing::info!("pulled as an ordinary image: {}", crate::chain(&error));
                return Layer::Ordinary;
            }
        };
        match self.manifest(&pinned).await {
            Some(manifest) => Layer::of(&manifest, pinned, layer),
            None => Layer::Ordinary,
        }
    }

    /// The manifest of a lazy image.
    async fn manifest(&self, pinned: &Reference) -> Option<Arc<ImageManifest>> {
        match self.seen().get(pinned) {
            Some(Seen::Lazy(manifest)) => return Some(manifest.clone()),
            Some(Seen::Ordinary) => return None,
            Some(Seen::Failed(when)) if when.elapsed() < FORGET_FAILURE => return None,
            _ => {}
        }
        // Should the wait be cut short, this stands.
        self.seen().put(pinned.clone(), Seen::Failed(Instant::now()));
        let digest = pinned.digest()?;
        let seen = match self.node.images.manifest(pinned.source(), digest).await {
            Ok(found) => Seen::Lazy(Arc::new(found.manifest)),
            Err(ImageError::Manifest { .. }) => Seen::Ordinary,
            Err(error) => {
                tracing::info!("{pinned} is pulled as an ordinary image: {}", crate::chain(&error));
                return None;
            }
        };
        self.seen().put(pinned.clone(), seen.clone());
        match seen {
            Seen::Lazy(manifest) => Some(manifest),
            _ => None,
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
    fn a_chain_id_names_all_layers() {
        let (one, two) = (ObjectId::new([1; 32]), ObjectId::new([2; 32]));
        let lowest = chain_id(None, one);
        assert_eq!(lowest, format!("sha256:{one}"));
        // echo -n "sha256:0101.. sha256:0202.." | sha256sum
        let expected = Sha256::digest(format!("sha256:{one} sha256:{two}"));
        assert_eq!(chain_id(Some(&lowest), two), format!("sha256:{}", hex::encode(expected)));
    }
}
