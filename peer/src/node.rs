//! The node without its outside: what readers, prefetch and the control API share.

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use shoal_rafs::{ChunkCache, oci::Reference};

use crate::{
    driver::DriverHandle,
    exchange::Exchange,
    images::{Image, ImageError, Images, NamedImage},
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
    /// With whom it exchanges what it has; nobody as long as there is none.
    pub(crate) exchange: OnceLock<Exchange>,
}

impl Node {
    /// From now on this node reads the image: whoever has it tells what they have of it, and is told.
    pub(crate) fn joins(&self, image: &Image) {
        if let Some(exchange) = self.exchange.get() {
            exchange.interested_in(image);
        }
    }

    /// The image that `reference` names at present.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub(crate) async fn image(&self, reference: &Reference) -> Result<NamedImage, ImageError> {
        let manifest = self.images.resolve(reference).await?;
        self.images.by_manifest(reference.source(), manifest).await
    }
}
