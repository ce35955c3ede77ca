//! Provider records: of which blobs this node says in the DHT that it has them.

use std::collections::BTreeSet;

use shoal_proto::{BlobId, Role};

use super::Exchange;
use crate::images::ImageBlob;

/// Blobs with a provider record of ours.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeSet<BlobId>);

impl Records {
    /// Forgets the records of blobs that are not here any more; gives them.
    pub(super) fn take_back(&mut self, is_here: impl Fn(&BlobId) -> bool) -> Vec<BlobId> {
        self.0.extract_if(.., |blob| !is_here(blob)).collect()
    }
}

impl Exchange {
    /// Seed peers, and nodes that hold half of a blob, are worth a provider record.
    pub(super) async fn announce(&self, blob: &ImageBlob) {
        let id = blob.table.blob();
        let present = blob.handle.present().count();
        let half = present * 2 >= blob.table.len();
        if present > 0
            && (self.parts.role == Role::Seed || half)
            && self.lock().records.0.insert(id)
            && let Err(error) = self.parts.control.announce(id).await
        {
            tracing::debug!("not announced: {error}");
        }
    }

    /// The store has let go of a blob. Neighbours are told with the next news.
    pub(crate) async fn evicted(&self, blob: BlobId) {
        let announced = self.lock().records.0.remove(&blob);
        if announced {
            self.withdraw(blob).await;
        }
    }

    pub(super) async fn withdraw(&self, blob: BlobId) {
        if let Err(error) = self.parts.control.withdraw(blob).await {
            tracing::debug!("not withdrawn: {error}");
        }
    }
}
