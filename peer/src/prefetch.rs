//! Fetches pieces of an image that are not here, behind every read that somebody waits for: when the image is mounted,
//! those that its prefetch table lists, then those that other starts of the image touched first, then, if that is configured,
//! the rest; when somebody asks for it, all of them, the listed ones first.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, TryStreamExt};
use shoal_proto::{Priority, control::PrefetchProgress};
use shoal_scheduler::{Item, Origin};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    config::PrefetchConfig,
    driver::WantFailed,
    exchange::Exchange,
    images::{Image, ImageBlob, NamedImage},
    node::Node,
};

/// Pieces that are wanted at a time: enough to keep every source busy, few enough to leave a queue to join from.
const WINDOW: usize = 256;
/// A prefetch may wait behind many reads; it gives up only when nothing moves for this long.
const PATIENCE: Duration = Duration::from_secs(600);

/// Why an image was not fetched whole.
#[derive(Debug, thiserror::Error)]
pub enum PrefetchError {
    /// A piece could not be had.
    #[error(transparent)]
    Want(#[from] WantFailed),
    /// A piece came and could not be kept: there is no use in fetching more.
    #[error("there is no room to keep the image")]
    NoRoom,
}

/// Sends the progress after each piece as far as the listener keeps up, and always the last word. Dropping the
/// receiver ends it.
///
/// # Errors
/// The first piece that cannot be had, or kept.
pub(crate) async fn run(
    node: &Node,
    NamedImage { image, needs, .. }: &NamedImage,
    progress: &mpsc::Sender<Result<PrefetchProgress, Status>>,
) -> Result<(), PrefetchError> {
    // Or each node would ask nobody but homes, and where there is none the registry.
    node.joins(image);
    // Or what came first would go for what comes last.
    let _hold = node.store.hold(needs.clone());
    let mut now = PrefetchProgress::default();
    let mut missing = Vec::new();
    let mut seen = HashSet::new();
    for (blob, number) in listed(image).into_iter().chain(every(image)) {
        let item = Item { blob: blob.key, piece: number };
        if !seen.insert(item) {
            continue;
        }
        let bytes = blob.encoded_len(number) as u64;
        now.pieces += 1;
        now.bytes += bytes;
        if blob.handle.is_present(number) {
            now.present_pieces += 1;
            now.present_bytes += bytes;
        } else {
            missing.push((item, bytes));
        }
    }
    let mut fetches = std::pin::pin!(fetches(node, missing));
    while let Some(bytes) = fetches.try_next().await? {
        now.present_pieces += 1;
        now.present_bytes += bytes;
        match progress.try_send(Ok(now)) {
            Err(mpsc::error::TrySendError::Closed(_)) => return Ok(()),
            // A slow listener misses a step.
            Err(mpsc::error::TrySendError::Full(_)) | Ok(()) => {}
        }
    }
    // A listener that has just gone does not need it.
    let _ = progress.send(Ok(now)).await;
    Ok(())
}

/// As [`run`], with nobody who listens.
///
/// # Errors
/// As for [`run`].
pub(crate) async fn complete(node: &Node, named: &NamedImage) -> Result<(), PrefetchError> {
    let (progress, mut heard) = mpsc::channel(1);
    let run = async move { run(node, named, &progress).await };
    let hear = async { while heard.recv().await.is_some() {} };
    tokio::join!(run, hear).0
}

/// Fetches what is likely to be read soon of an image that has just been mounted. Whoever reads what could not be had asks
/// again.
pub(crate) async fn run_mounted(
    node: Arc<Node>,
    image: Arc<Image>,
    exchange: Option<Exchange>,
    config: PrefetchConfig,
) {
    if !fetch_missing(&node, &image, "table", listed(&image)).await || image.is_complete() {
        return;
    }
    if config.traces
        && let Some(exchange) = exchange
        && let Some(trace) = exchange.start_of(&image).await
    {
        let traced = trace.pieces().filter_map(|(blob, piece)| image.piece(blob, piece)).collect();
        if !fetch_missing(&node, &image, "trace", traced).await {
            return;
        }
    }
    if config.rest {
        fetch_missing(&node, &image, "rest", every(&image).collect()).await;
    }
}

/// Fetches those of the pieces that are not here; false if there is no room to keep more.
async fn fetch_missing(node: &Node, image: &Image, reason: &'static str, pieces: Vec<(&ImageBlob, u32)>) -> bool {
    let mut seen = HashSet::new();
    let missing = pieces.into_iter().filter(|(blob, number)| !blob.handle.is_present(*number));
    let items = missing.map(|(blob, piece)| (Item { blob: blob.key, piece }, 0));
    let missing: Vec<_> = items.filter(|(item, _)| seen.insert(*item)).collect();
    if missing.is_empty() {
        return true;
    }
    tracing::debug!(layer = %image.layer, pieces = missing.len(), reason, "prefetching");
    let mut fetches = std::pin::pin!(fetches(node, missing));
    while let Some(fetched) = fetches.next().await {
        match fetched {
            Ok(_) => metrics::counter!("shoal_prefetched_pieces_total", "reason" => reason).increment(1),
            Err(PrefetchError::NoRoom) => return false,
            Err(error) => tracing::debug!(layer = %image.layer, reason, "a piece is not here: {error}"),
        }
    }
    true
}

/// Notes what is read of an image that has just been mounted, until `time` has passed or `ended`, and tells it to the seed peer
/// that keeps such things.
pub(crate) async fn note_start(image: Arc<Image>, exchange: Exchange, time: Duration, ended: CancellationToken) {
    if !image.starts.begin() {
        return;
    }
    // Either way it is over.
    let _ = tokio::time::timeout(time, ended.cancelled()).await;
    if let Some(trace) = image.starts.finish() {
        exchange.tell_start(&image, trace).await;
    }
}

/// Wants the pieces in order, a window of them at a time, and gives the number that came with each.
fn fetches(node: &Node, missing: Vec<(Item, u64)>) -> impl Stream<Item = Result<u64, PrefetchError>> {
    let fetches = futures::stream::iter(missing).map(move |(item, bytes)| async move {
        let fetched = node.driver.want(item, Priority::Prefetch, PATIENCE, Origin::Local).await?;
        if fetched.is_kept() { Ok(bytes) } else { Err(PrefetchError::NoRoom) }
    });
    fetches.buffer_unordered(WINDOW)
}

/// All pieces of an image.
fn every(image: &Image) -> impl Iterator<Item = (&ImageBlob, u32)> {
    image.blobs.iter().flat_map(|blob| blob.pieces().map(move |number| (blob, number)))
}

/// The pieces that the prefetch table lists, in its order; one that holds several chunks may come several times.
fn listed(image: &Image) -> Vec<(&ImageBlob, u32)> {
    let chunks = image.metadata.prefetch_chunks().unwrap_or_else(|error| {
        tracing::warn!(layer = %image.layer, "cannot follow the prefetch table: {error}");
        Vec::new()
    });
    let piece = |blob: &ImageBlob, index| blob.table.piece_of_chunk(index);
    let places = chunks.into_iter().filter_map(|chunk| {
        let blob = image.blobs.get(chunk.blob as usize)?;
        Some((blob, piece(blob, chunk.index)?))
    });
    places.collect()
}
