//! The blobs of which something came that no neighbour had: their news should not wait. The driver notes them, the exchange tells.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
};

use shoal_scheduler::BlobKey;
use tokio::sync::Notify;

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct RareNews {
    blobs: Mutex<HashSet<BlobKey>>,
    /// There is one more.
    came: Notify,
}

impl RareNews {
    fn lock(&self) -> MutexGuard<'_, HashSet<BlobKey>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something of a blob came that no neighbour had.
    pub(crate) fn insert(&self, blob: BlobKey) {
        if self.lock().insert(blob) {
            self.came.notify_one();
        }
    }

    /// The news of a blob is told, or does not matter any more.
    pub(crate) fn remove(&self, blob: BlobKey) {
        self.lock().remove(&blob);
    }

    pub(crate) fn contains(&self, blob: BlobKey) -> bool {
        self.lock().contains(&blob)
    }

    /// Waits until there is a blob more. For one task at a time. Cancel safe.
    pub(crate) async fn come(&self) {
        self.came.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn wakes_once_for_each_blob_that_is_new() {
        let (rare, blob) = (RareNews::default(), BlobKey { id: [1; 32], variant: 0 });
        let comes = async || timeout(Duration::ZERO, rare.come()).await.is_ok();
        assert!(!comes().await);
        rare.insert(blob);
        assert!(comes().await && rare.contains(blob));
        rare.insert(blob);
        assert!(!comes().await, "it is known");
        rare.remove(blob);
        assert!(!rare.contains(blob));
        rare.insert(blob);
        assert!(comes().await);
    }
}
