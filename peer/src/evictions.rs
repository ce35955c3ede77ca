//! What the store evicts is news to those who believed that it is here: the scheduler, and the DHT. Neighbours hear of it
//! from the exchange, which compares what it told them with what there is.
//!
//! The channel is bounded and the store does not wait for it. Whoever misses a word finds out when he reads: an item that
//! is not there after all is reported as lost, and wanted again.

use shoal_scheduler::Event;
use tokio::{sync::mpsc, task::JoinHandle};

use crate::{
    driver::DriverHandle,
    exchange::Exchange,
    images::scheduled,
    store::{BlobKey, Store},
};

/// Blobs whose eviction may wait to be passed on.
const QUEUE: usize = 1024;

/// Evictions as the store tells them.
#[derive(Debug)]
pub(crate) struct Evictions(mpsc::Receiver<BlobKey>);

impl Evictions {
    /// Listens to a store from now on.
    pub(crate) fn of(store: &Store) -> Self {
        let (sender, receiver) = mpsc::channel(QUEUE);
        store.on_evicted(move |key| {
            // See the module for what happens without it.
            let _ = sender.try_send(key);
        });
        Self(receiver)
    }

    /// Passes them on until the task is aborted.
    pub(crate) fn pass_on(mut self, driver: DriverHandle, exchange: Option<Exchange>) -> JoinHandle<()> {
        tokio::spawn(async move {
            while let Some(key) = self.0.recv().await {
                tracing::debug!(blob = %key.blob, variant = key.variant, "evicted");
                driver.event(Event::Evicted { blob: scheduled(key) }).await;
                if let Some(exchange) = &exchange {
                    exchange.evicted(key.blob).await;
                }
            }
        })
    }
}
