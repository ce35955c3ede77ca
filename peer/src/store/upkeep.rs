//! What is done now and then, in the background: pieces are made durable, what is above the marks goes, and the index is
//! told when each blob was last used. That is written seldom rather than with each read: after a crash eviction may begin
//! with a blob that was used a minute later than the index says.

use std::collections::BTreeSet;

use super::{
    StoreError,
    blobs::{Blobs, lock},
    holdings::Holding,
};
use crate::index::{BlobKey, Change, Survives, VariantRecord};

/// Seconds by which the index may be behind with when a blob was last used.
const USE_INTERVAL: u64 = 60;

impl Blobs {
    /// What the background thread does round after round.
    pub(super) fn look_after(&self) {
        let report = |what, error: StoreError| {
            tracing::warn!(error = &error as &dyn std::error::Error, "{what}");
        };
        self.flush().err().into_iter().for_each(|error| report("pieces could not be made durable", error));
        self.evict_surplus();
        let recorded = self.sweep().and_then(|()| self.record_uses(USE_INTERVAL));
        recorded.err().into_iter().for_each(|error| report("the index could not be tidied", error));
    }

    /// Makes everything durable, and when each blob was last used.
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        self.flush()?;
        self.record_uses(0)
    }

    /// Records last uses of which the index is behind by at least `seconds`.
    fn record_uses(&self, seconds: u64) -> Result<(), StoreError> {
        let uses = self.holdings.unrecorded_uses(seconds);
        // Held throughout: a variant that is evicted meanwhile must not come back as a record.
        let (_flushing, _open) = (lock(&self.flushing), lock(&self.open));
        let mut changes = Vec::new();
        for (holding, last_use) in uses {
            match holding {
                Holding::Object(_) | Holding::Decoded(_) => self.files.record_use(holding, last_use),
                Holding::Blob(key) => {
                    if let Some(record) = self.records.variants(&key.blob)?.get(&key.variant) {
                        changes.push(Change::Variant(key, VariantRecord { last_use, ..*record }));
                    }
                }
            }
        }
        match changes.is_empty() {
            true => Ok(()),
            false => Ok(self.records.commit(&changes, Survives::Kill)?),
        }
    }

    /// Removes the digest records that lead to evicted variants. Whatever is left of them leads nowhere and is no harm, so
    /// one look through all of them serves many evictions, and a crash before it loses nothing.
    fn sweep(&self) -> Result<(), StoreError> {
        let evicted = std::mem::take(&mut *lock(&self.swept));
        if evicted.is_empty() {
            return Ok(());
        }
        let known: BTreeSet<BlobKey> = self.records.all()?.into_iter().map(|(key, _)| key).collect();
        let gone: BTreeSet<_> = evicted.difference(&known).copied().collect();
        Ok(self.records.forget_places(&|key| gone.contains(&key))?)
    }

    /// Removes every digest record that leads to no variant: what evictions before a crash left behind.
    pub(super) fn tidy(&self) -> Result<(), StoreError> {
        let known: BTreeSet<BlobKey> = self.records.all()?.into_iter().map(|(key, _)| key).collect();
        Ok(self.records.forget_places(&|key| !known.contains(&key))?)
    }
}
