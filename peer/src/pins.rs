//! Pins: images whose blobs and objects the store keeps whether they are mounted or not, for good or for a time. A pin keeps
//! what is here and what comes; it fetches nothing but the manifest and the bootstrap layer.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use shoal_rafs::oci::Reference;

use crate::{
    images::{ImageError, NamedImage},
    membership::unix_now,
    mounts::blocking,
    node::Node,
    store::{Hold, PinRecord, StoreError},
};

/// How often it is looked whether a pin has ended.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);
/// Most images that are pinned.
const MAX_PINS: usize = 4096;

/// Why an image was not pinned, or not unpinned.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PinError {
    /// The image could not be loaded.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The record could not be written or removed.
    #[error("cannot record the pin")]
    Store(#[from] StoreError),
    /// No more can be pinned.
    #[error("{MAX_PINS} images are pinned already")]
    TooMany,
}

/// All pins. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pins {
    node: Arc<Node>,
    /// By reference. Locked for look-ups only.
    table: Arc<Mutex<BTreeMap<String, Pinned>>>,
    /// Held by who changes a pin, from the look at what there is to the change of the table.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// A pin that lasts longer than it did, and what it was before.
#[derive(Debug)]
pub(crate) struct Extended {
    record: PinRecord,
    before: Option<PinRecord>,
}

struct Pinned {
    record: PinRecord,
    _hold: Hold,
}

impl Pins {
    /// Holds again what was pinned in an earlier run.
    ///
    /// # Errors
    /// The records cannot be read.
    pub(crate) async fn restore(node: Arc<Node>) -> Result<Self, StoreError> {
        let store = node.store.clone();
        let records = blocking(move || store.pins()).await?;
        let pins = Self { node, table: Arc::default(), turn: Arc::default() };
        records.into_iter().for_each(|record| pins.hold(record));
        Ok(pins)
    }

    /// Pins what `reference` names at present, in place of what it named when it was last pinned. With a `lifetime` the pin
    /// ends by itself.
    ///
    /// # Errors
    /// See [`PinError`].
    pub(crate) async fn pin(
        &self,
        reference: &Reference,
        lifetime: Option<Duration>,
    ) -> Result<NamedImage, PinError> {
        let named = self.node.image(reference).await?;
        let record = record(reference, &named, lifetime);
        let _turn = self.turn.lock().await;
        self.put(record).await?;
        Ok(named)
    }

    /// Sees to it that what `reference` names at present, by its digest, is pinned for `lifetime` at least: a pin that lasts longer
    /// stays as it is. What this changed can be [given back](Self::give_back).
    ///
    /// # Errors
    /// See [`PinError`].
    pub(crate) async fn pin_for(
        &self,
        reference: &Reference,
        lifetime: Duration,
    ) -> Result<(NamedImage, Option<Extended>), PinError> {
        let named = self.node.image(reference).await?;
        let record = record(reference, &named, Some(lifetime));
        let _turn = self.turn.lock().await;
        let before = self.lock().get(&record.reference).map(|pinned| pinned.record.clone());
        if before.as_ref().is_some_and(|before| lasts_as_long(before, &record)) {
            return Ok((named, None));
        }
        self.put(record.clone()).await?;
        Ok((named, Some(Extended { record, before })))
    }

    /// Has a pin be as it was before it was extended, unless somebody has changed it since.
    ///
    /// # Errors
    /// The record cannot be written or removed; the pin then stands.
    pub(crate) async fn give_back(&self, Extended { record, before }: Extended) -> Result<(), PinError> {
        let _turn = self.turn.lock().await;
        if self.lock().get(&record.reference).is_none_or(|pinned| pinned.record != record) {
            return Ok(());
        }
        match before {
            Some(before) => self.put(before).await,
            None => self.remove(&record.reference).await.map(drop),
        }
    }

    /// Ends the pin of a reference; false when there is none.
    ///
    /// # Errors
    /// The record cannot be removed; the pin then stands.
    pub(crate) async fn unpin(&self, reference: &str) -> Result<bool, PinError> {
        let _turn = self.turn.lock().await;
        self.remove(reference).await
    }

    async fn put(&self, record: PinRecord) -> Result<(), PinError> {
        let room = self.lock().len() < MAX_PINS || self.lock().contains_key(&record.reference);
        if !room {
            return Err(PinError::TooMany);
        }
        let (store, recorded) = (self.node.store.clone(), record.clone());
        blocking(move || store.put_pin(&recorded)).await?;
        self.hold(record);
        Ok(())
    }

    async fn remove(&self, reference: &str) -> Result<bool, PinError> {
        let (store, name) = (self.node.store.clone(), reference.to_owned());
        blocking(move || store.remove_pin(&name)).await?;
        Ok(self.lock().remove(reference).is_some())
    }

    /// Ends each pin when its time has come, until the task is aborted.
    pub(crate) async fn run(self) {
        let mut tick = tokio::time::interval(EXPIRY_INTERVAL);
        loop {
            tick.tick().await;
            self.expire().await;
        }
    }

    async fn expire(&self) {
        let now = unix_now();
        let ended: Vec<String> = {
            let table = self.lock();
            let ended = table.values().filter(|pinned| pinned.record.until.is_some_and(|until| until <= now));
            ended.map(|pinned| pinned.record.reference.clone()).collect()
        };
        for reference in ended {
            match self.unpin(&reference).await {
                Ok(_) => tracing::info!(reference, "its pin has ended"),
                Err(error) => tracing::warn!(reference, "its pin cannot be ended: {}", crate::chain(&error)),
            }
        }
    }

    /// All pins, by reference.
    pub(crate) fn all(&self) -> Vec<PinRecord> {
        self.lock().values().map(|pinned| pinned.record.clone()).collect()
    }

    fn hold(&self, record: PinRecord) {
        let _hold = self.node.store.hold(record.needs.clone());
        self.lock().insert(record.reference.clone(), Pinned { record, _hold });
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Pinned>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record(reference: &Reference, named: &NamedImage, lifetime: Option<Duration>) -> PinRecord {
    PinRecord {
        reference: reference.to_string(),
        manifest: named.manifest,
        needs: named.needs.clone(),
        until: lifetime.map(|lifetime| unix_now().saturating_add(lifetime.as_secs())),
    }
}

/// Whether a pin is of the same image as `wanted`, and ends no sooner.
fn lasts_as_long(pin: &PinRecord, wanted: &PinRecord) -> bool {
    let end = |pin: &PinRecord| pin.until.unwrap_or(u64::MAX);
    pin.manifest == wanted.manifest && end(pin) >= end(wanted)
}

#[cfg(test)]
mod tests {
    use shoal_proto::ObjectId;

    use super::*;

    #[test]
    fn a_pin_for_good_lasts_longer_than_any_other() {
        let pin = |manifest, until| PinRecord {
            reference: "r.example/app".into(),
            manifest: ObjectId::new([manifest; 32]),
            needs: Default::default(),
            until,
        };
        assert!(lasts_as_long(&pin(1, None), &pin(1, Some(9))) && lasts_as_long(&pin(1, Some(9)), &pin(1, Some(9))));
        assert!(
            !lasts_as_long(&pin(1, Some(8)), &pin(1, Some(9))) && !lasts_as_long(&pin(1, Some(9)), &pin(1, None))
        );
        assert!(!lasts_as_long(&pin(2, None), &pin(1, Some(9))), "it is another image");
    }
}
