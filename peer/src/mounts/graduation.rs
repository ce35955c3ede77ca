//! Graduation: an image that has become complete under a FUSE mount is decoded, so that its next mount is native, and this one
//! reads what is decoded. Nobody waits for it, so it keeps out of the way: it begins when the image has been complete for a
//! while, or is read so that the same pieces are decoded again and again; on one thread, one image at a time, and only where
//! the store has room without letting anything else go.

use std::{sync::Arc, time::Duration};

use tokio::sync::Semaphore;

use crate::{images::NamedImage, mounts::blocking, native, node::Node, reader::Reader};

/// Time between two looks whether an image is complete, or decoded again and again.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes decoded for a mount that were decoded for it before, from which on it does not wait: 64 reads here and there in pieces of
/// a mebibyte.
const DECODED_AGAIN: u64 = 64 << 20;
/// Images that are decoded at a time, over all mounts of a process.
static TURNS: Semaphore = Semaphore::const_new(1);

/// Waits until the image is complete and `after` has passed, or less if its reader decodes much again, then decodes it. To be
/// dropped with its mount.
pub(super) async fn run(node: Arc<Node>, named: NamedImage, reader: Reader, after: Duration) {
    let image = &named.image;
    while !image.is_complete() {
        tokio::time::sleep(LOOK).await;
    }
    let mut left = after;
    while !left.is_zero() && reader.decoded_again() < DECODED_AGAIN {
        let step = left.min(LOOK);
        tokio::time::sleep(step).await;
        left -= step;
    }
    // The semaphore is never closed.
    let _turn = TURNS.acquire().await;
    let (store, image) = (node.store.clone(), image.clone());
    let missing = blocking(move || {
        let missing = native::missing_bytes(&store, &image);
        (missing > 0 && store.has_room(missing)).then_some(missing)
    });
    let Some(bytes) = missing.await else { return };
    let _hold = node.store.hold(named.image.native_names().needs(&named));
    match native::make(&node, &named.image).await {
        Ok(_) => {
            tracing::info!(layer = %named.image.layer, bytes, "decoded: it is read so, and its next mount is native")
        }
        Err(error) => tracing::warn!(layer = %named.image.layer, "not decoded: {}", crate::chain(&error)),
    }
}
