//! Fetches all pieces of an image that are not here, behind every read that somebody waits for.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use shoal_proto::{Priority, control::PrefetchProgress};
use shoal_scheduler::{Item, Origin};
use tokio::sync::mpsc;
use tonic::Status;

use crate::{driver::WantFailed, images::Image, node::Node};

/// Pieces that are wanted at a time: enough to keep every source busy, few enough to leave a queue to join from.
const WINDOW: usize = 256;
/// A prefetch may wait behind many reads; it gives up only when nothing moves for this long.
const PATIENCE: Duration = Duration::from_secs(600);

/// Sends the progress after each piece as far as the listener keeps up, and always the last word. Dropping the
/// receiver ends it.
///
/// # Errors
/// The first piece that cannot be had.
pub(crate) async fn run(
    node: &Node,
    image: &Image,
    progress: &mpsc::Sender<Result<PrefetchProgress, Status>>,
) -> Result<(), WantFailed> {
    let mut now = PrefetchProgress::default();
    let mut missing = Vec::new();
    for blob in &image.blobs {
        for number in blob.pieces() {
            let bytes = blob.encoded_len(number) as u64;
            now.pieces += 1;
            now.bytes += bytes;
            if blob.handle.is_present(number) {
                now.present_pieces += 1;
                now.present_bytes += bytes;
            } else {
                missing.push((Item { blob: blob.key, piece: number }, bytes));
            }
        }
    }
    let fetches = futures::stream::iter(missing).map(|(item, bytes)| async move {
        node.driver.want(item, Priority::Prefetch, PATIENCE, Origin::Local).await.map(|_| bytes)
    });
    let mut fetches = fetches.buffer_unordered(WINDOW);
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
