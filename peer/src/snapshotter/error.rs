//! Why a snapshot is not made, found, changed or removed.

use std::{io, path::PathBuf};

use shoal_snapshots::{CatalogError, FilterError, Inconsistent};

use crate::{images::ImageError, mounts::MountsError};

/// Why a snapshot is not made, found, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The rules of snapshots.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// Records on the disk that contradict each other.
    #[error("the snapshots on the disk are inconsistent")]
    Inconsistent(#[from] Inconsistent),
    /// A filter of a list.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The disk.
    #[error("cannot {what} {path}")]
    Io {
        /// What was to be done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The layer of a lazy image cannot be had.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image cannot be mounted.
    #[error(transparent)]
    Mount(#[from] MountsError),
    /// A plain `ctr images pull`.
    #[error(
        "the pull does not say which image a layer of a lazy image belongs to: pull through CRI with snapshot annotations, or \
         with `shoal ctl rpull`"
    )]
    NoReference,
    /// The manifest has another bootstrap layer than the one that is pulled.
    #[error("the layer that is pulled is not the bootstrap layer of {reference}")]
    OtherLayer {
        /// The image.
        reference: String,
    },
    /// The layer is marked as a data blob.
    #[error(
        "the manifest of {reference} does not have the layer that is pulled as a data blob, though it is marked as one"
    )]
    NoBlob {
        /// The image.
        reference: String,
    },
    /// The image's config claims to have another layer than it has.
    #[error("a layer of {reference} is not what its chain id {target} names")]
    WrongChain {
        /// The image.
        reference: String,
        /// The chain id under which containerd would look for it.
        target: String,
    },
}
