//! Why an image could not be loaded.

use std::sync::Arc;

use shoal_proto::{BlobId, ObjectId};
use shoal_rafs::{
    BootstrapError, ChunkTableError, PieceTableError,
    oci::{LayerError, ManifestError, RegistryError},
};

use crate::{driver::WantFailed, store::StoreError};

/// Why an image could not be loaded.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ImageError {
    /// The reference could not be resolved at the registry.
    #[error("cannot resolve {reference}")]
    Resolve {
        /// The reference.
        reference: String,
        /// What the registry said.
        #[source]
        source: Arc<RegistryError>,
    },
    /// What is published next to an image could not be listed.
    #[error("cannot list what refers to sha256:{manifest}")]
    Referrers {
        /// The image's manifest.
        manifest: ObjectId,
        /// What the registry said.
        #[source]
        source: Arc<RegistryError>,
    },
    /// A manifest or a bootstrap layer could not be had from anybody.
    #[error("cannot get object sha256:{object}")]
    Object {
        /// The object.
        object: ObjectId,
        /// Who was tried.
        #[source]
        source: WantFailed,
    },
    /// The manifest is not one of a lazy image.
    #[error("manifest sha256:{manifest}")]
    Manifest {
        /// The manifest.
        manifest: ObjectId,
        /// What is wrong with it.
        #[source]
        source: Arc<ManifestError>,
    },
    /// An index that names another index.
    #[error("index sha256:{manifest} names an index where an image should be")]
    NestedIndex {
        /// The outer index.
        manifest: ObjectId,
    },
    /// The contexts to inflate gzip layers from, which stay in memory, are more than a node takes.
    #[error(
        "bootstrap layer sha256:{layer}: the index over its gzip layers has {bytes} bytes, at most {limit} are taken"
    )]
    IndexTooLarge {
        /// The bootstrap layer.
        layer: ObjectId,
        /// Bytes by the bootstrap, decoded.
        bytes: u64,
        /// Most that are taken.
        limit: u64,
    },
    /// The bootstrap layer is not a tar with a bootstrap, or is encrypted and cannot be opened.
    #[error("bootstrap layer sha256:{layer}")]
    Layer {
        /// The layer.
        layer: ObjectId,
        /// What is wrong with it.
        #[source]
        source: Arc<LayerError>,
    },
    /// The bootstrap is damaged or hostile.
    #[error("bootstrap in layer sha256:{layer}")]
    Bootstrap {
        /// The layer.
        layer: ObjectId,
        /// What is wrong with it.
        #[source]
        source: Arc<BootstrapError>,
    },
    /// The chunk table of a blob, in the layer or in a meta blob, is damaged.
    #[error("chunk table of blob {blob} in layer sha256:{layer}")]
    ChunkTable {
        /// The layer.
        layer: ObjectId,
        /// The blob.
        blob: BlobId,
        /// What is wrong with it.
        #[source]
        source: Arc<ChunkTableError>,
    },
    /// Bootstrap and chunk table of a blob disagree, or one of them contradicts itself.
    #[error("blob {blob} in layer sha256:{layer}")]
    Pieces {
        /// The layer.
        layer: ObjectId,
        /// The blob.
        blob: BlobId,
        /// Which rule is broken.
        #[source]
        source: PieceTableError,
    },
    /// The store refused.
    #[error("the store cannot take the image")]
    Store(#[source] Arc<StoreError>),
}
