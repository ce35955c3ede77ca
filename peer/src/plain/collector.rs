//! Brings plain blobs here: each by one task, however many wait for it, which goes on when they have gone.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt};
use shoal_proto::BlobId;
use shoal_rafs::oci::Source;
use shoal_scheduler::Origin;
use tokio::sync::{Semaphore, watch};

use super::{PlainBlob, PlainBlobs, footprint, want_piece};
use crate::{driver::DriverHandle, exchange::Exchange, mounts::blocking, node::Node, store::Store};

/// Blobs that come at a time; the others wait.
const AT_A_TIME: usize = 8;
/// Most blobs that come or wait: whoever asks may have gone long since.
const MAX_COMING: usize = 256;
/// Pieces of one blob that are wanted at a time: 64 MiB ahead of whoever reads it from its start.
const WINDOW: usize = 64;
/// A piece is given up when nothing moves for this long.
const PATIENCE: Duration = Duration::from_secs(600);
/// Lists that are believed, one after the other. The second liar is bad luck; the third is an attack, or a registry that
/// disagrees with itself.
const TRIES: usize = 3;

/// How far a blob is.
#[derive(Debug, Clone)]
pub(crate) enum Stage {
    /// Nobody has given its list yet.
    Looking,
    /// Its pieces are coming; nobody knows yet whether they are the blob.
    Coming(Arc<PlainBlob>),
    /// All of it is here, or was, and is what its digest says.
    Whole(Arc<PlainBlob>),
    /// It cannot be had, for this reason. Whoever asks again starts again.
    Failed(Arc<str>),
}

impl Stage {
    fn is_over(&self) -> bool {
        matches!(self, Self::Whole(_) | Self::Failed(_))
    }
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Collector {
    plain: PlainBlobs,
    store: Store,
    driver: DriverHandle,
    exchange: Exchange,
    places: Arc<Semaphore>,
    /// What is on its way. Held for a look or a change.
    coming: Arc<Mutex<HashMap<BlobId, watch::Receiver<Stage>>>>,
}

impl Collector {
    pub(crate) fn new(node: &Node, exchange: Exchange) -> Self {
        let (plain, store, driver) = (node.images.plain().clone(), node.store.clone(), node.driver.clone());
        let places = Arc::new(Semaphore::new(AT_A_TIME));
        Self { plain, store, driver, exchange, places, coming: Arc::default() }
    }

    /// Has the blob brought here, unless it is here or on its way. `size` is what the registry says that it has.
    pub(crate) fn bring(&self, source: &Source, blob: BlobId, size: Option<u64>) -> watch::Receiver<Stage> {
        let mut coming = self.coming.lock().unwrap_or_else(PoisonError::into_inner);
        coming.retain(|_, stage| !stage.borrow().is_over() && stage.has_changed().is_ok());
        if let Some(stage) = coming.get(&blob) {
            return stage.clone();
        }
        if coming.len() >= MAX_COMING {
            return watch::channel(Stage::Failed("too many blobs are on their way".into())).1;
        }
        let (sender, stage) = watch::channel(Stage::Looking);
        coming.insert(blob, stage.clone());
        let (collector, source) = (self.clone(), source.clone());
        tokio::spawn(async move {
            let _place = collector.places.acquire().await;
            let last = match collector.run(&source, blob, size, &sender).await {
                Ok(plain) => Stage::Whole(plain),
                Err(why) => {
                    tracing::warn!(%source, %blob, "cannot be had: {why}");
                    Stage::Failed(why.into())
                }
            };
            sender.send_replace(last);
            // Whoever holds a receiver still sees the last word.
        });
        stage
    }

    async fn run(
        &self,
        source: &Source,
        blob: BlobId,
        size: Option<u64>,
        stage: &watch::Sender<Stage>,
    ) -> Result<Arc<PlainBlob>, String> {
        for _ in 0..TRIES {
            let plain = self.plain.learn(source, blob, Origin::Local).await.map_err(|e| crate::chain(&e))?;
            if size.is_some_and(|size| size != plain.size()) {
                if plain.is_verified() {
                    return Err(format!("it has {} bytes, and the registry says {size:?}", plain.size()));
                }
                self.plain.refute(&plain).await;
                continue;
            }
            // What came first must not go for what comes last.
            let hold = self.store.hold(footprint(&plain));
            stage.send_replace(Stage::Coming(plain.clone()));
            self.exchange.interested_in_plain(&plain);
            let missing = plain.missing();
            let complete = missing.is_empty();
            self.fetch(&plain, missing).await?;
            if plain.is_verified() {
                if !complete {
                    // Its list has gone with what was evicted.
                    self.plain.confirm(&plain).await;
                }
                return Ok(plain);
            }
            let compared = plain.clone();
            match blocking(move || compared.compare()).await.map_err(|e| crate::chain(&e))? {
                Some(true) => {
                    self.plain.confirm(&plain).await;
                    return Ok(plain);
                }
                Some(false) => {
                    drop(hold);
                    stage.send_replace(Stage::Looking);
                    self.plain.refute(&plain).await;
                }
                // The disk lost some of it meanwhile.
                None => {}
            }
        }
        Err(format!("no list of its pieces, of {TRIES}, was the right one"))
    }

    async fn fetch(&self, plain: &PlainBlob, missing: Vec<u32>) -> Result<(), String> {
        let wants = futures::stream::iter(missing).map(|piece| async move {
            match want_piece(&self.driver, plain, piece, PATIENCE).await {
                Ok(fetched) if fetched.is_kept() => Ok(()),
                Ok(_) => Err("there is no room to keep it".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        });
        wants.buffer_unordered(WINDOW).try_collect::<()>().await
    }
}
