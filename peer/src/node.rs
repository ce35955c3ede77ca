//! The node without its outside: what readers, prefetch and the control API share.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use shoal_rafs::{ChunkCache, oci::Reference};

use crate::{
    driver::DriverHandle,
    images::{ImageError, Images, NamedImage},
    reader::{Ahead, PieceKey},
    store::Store,
    traffic::Traffic,
};

/// Shared by everything that reads images on this node.
#[derive(Debug)]
pub(crate) struct Node {
    /// Chunks and objects on disk.
    pub(crate) store: Store,
    /// The way to everything that is not here.
    pub(crate) driver: DriverHandle,
    /// Loaded images.
    pub(crate) images: Images,
    /// Decoded pieces in memory, over all mounts.
    pub(crate) decoded: Arc<ChunkCache<PieceKey>>,
    /// Where this node's bytes came from.
    pub(crate) traffic: Arc<Traffic>,
    /// How long a read waits.
    pub(crate) deadline: Duration,
    /// Encoded bytes behind a fetched piece that are fetched, too.
    pub(crate) read_ahead: u64,
    /// What is on its way for that reason. Locked for a look.
    pub(crate) ahead: Mutex<Ahead>,
}

impl Node {
    /// The image that `reference` names at present.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub(crate) async fn image(&self, reference: &Reference) -> Result<NamedImage, ImageError> {
        let manifest = self.images.resolve(reference).await?;
        self.images.by_manifest(reference.source(), manifest).await
    }
}
