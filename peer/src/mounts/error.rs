//! Why mounts fail.

use std::path::PathBuf;

use shoal_rafs::{MountError, oci::ReferenceError};

use crate::{filler::FillError, images::ImageError, native::NativeError, prefetch::PrefetchError, store::StoreError};

/// Why a mount was not made or not taken away.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The path is relative; the daemon's working directory is nobody's business.
    #[error("mountpoint {} is not absolute", .0.display())]
    NotAbsolute(PathBuf),
    /// Something is mounted there by this daemon, or about to be.
    #[error("{} is in use by another mount", .0.display())]
    InUse(PathBuf),
    /// Somebody has unmounted it before it was there.
    #[error("{} was unmounted while it was being mounted", .0.display())]
    Withdrawn(PathBuf),
    /// Nothing is.
    #[error("nothing is mounted at {} by this daemon", .0.display())]
    NotMounted(PathBuf),
    /// The image could not be loaded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A recorded reference cannot be read.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// A native mount needs all of the image.
    #[error("the image cannot be mounted natively yet: --wait-complete fetches what is missing first")]
    Incomplete(#[source] NativeError),
    /// Its files could not be made.
    #[error("the image cannot be mounted natively")]
    Native(#[source] NativeError),
    /// Decoded files would have in the clear what is encrypted everywhere else.
    #[error("the image is encrypted, and native mounts keep decoded files: mount it over FUSE")]
    Encrypted,
    /// Its files cannot be filled as they are read.
    #[error("the image cannot be mounted natively before it is complete")]
    Fill(#[from] FillError),
    /// What is missing of it could not be fetched.
    #[error("the image cannot be completed")]
    Complete(#[from] PrefetchError),
    /// The kernel refused.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The record could not be written or removed.
    #[error("cannot record the mount")]
    Store(#[from] StoreError),
}
