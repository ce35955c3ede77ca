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
        let pins = Self { node, table: Arc::default() };
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
        let record = PinRecord {
            reference: reference.to_string(),
            manifest: named.manifest,
            needs: named.needs.clone(),
            until: lifetime.map(|lifetime| unix_now().saturating_add(lifetime.as_secs())),
        };
        let room = self.lock().len() < MAX_PINS || self.lock().contains_key(&record.reference);
        if !room {
            return Err(PinError::TooMany);
        }
        let (store, recorded) = (self.node.store.clone(), record.clone());
        blocking(move || store.put_pin(&recorded)).await?;
        self.hold(record);
        Ok(named)
    }

    /// Ends the pin of a reference; false when there is none.
    ///
    /// # Errors
    /// The record cannot be removed; the pin then stands.
    pub(crate) async fn unpin(&self, reference: &str) -> Result<bool, PinError> {
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
