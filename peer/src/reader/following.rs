//! What lies behind what is read is made ready: fetched if it is not in the store, and decoded if it is. [`ahead`](super::ahead)
//! says which pieces.

use std::sync::Arc;

use futures::StreamExt;
use shoal_proto::Priority;
use shoal_scheduler::{Item, Origin as WantOrigin};

use super::{Inner, ahead::Lengths, load, lock};
use crate::{driver::Fetched, images::ImageBlob};

/// What is decoded ahead of a reader at a time is at most this part of the memory for decoded pieces, however well it is compressed.
const AHEAD_OF_MEMORY: usize = 4;

impl Inner {
    /// A piece of the store has to be decoded: so is likely what lies behind it, while the reader is busy elsewhere. Nothing is
    /// fetched for it before he goes on.
    pub(super) fn begin_decoding(self: &Arc<Self>, blob: &ImageBlob, piece: u32) {
        let next = self.window_behind(blob, piece);
        self.decode_ahead(blob, next.into_iter().filter(|piece| blob.handle.is_present(*piece)).collect());
    }

    /// A piece has to be fetched: so is likely what lies behind it, and one read of many small pieces costs little more than one of
    /// the first.
    pub(super) fn begin_following(self: &Arc<Self>, blob: &ImageBlob, piece: u32) {
        let next = self.window_behind(blob, piece);
        self.go_ahead(blob, next);
    }

    /// The pieces of a new window behind one that is not in memory.
    fn window_behind(&self, blob: &ImageBlob, piece: u32) -> Vec<u32> {
        let on_its_way = lock(&self.node.ahead).has(Item { blob: blob.key, piece });
        lock(&self.windows).missed(blob.key, piece, on_its_way, blob)
    }

    /// A piece is read: its reader may come to the end of what was made ready ahead of him.
    pub(super) fn follow(self: &Arc<Self>, blob: &ImageBlob, piece: u32) {
        let next = lock(&self.windows).read(blob.key, piece, blob);
        self.go_ahead(blob, next);
    }

    /// Has these pieces decoded in memory for a while, as they are likely to be read next: decodes what is here of them, and
    /// fetches the rest.
    fn go_ahead(self: &Arc<Self>, blob: &ImageBlob, pieces: Vec<u32>) {
        if pieces.is_empty() {
            return;
        }
        let (present, missing): (Vec<_>, Vec<_>) =
            pieces.into_iter().partition(|piece| blob.handle.is_present(*piece));
        self.decode_ahead(blob, present);
        self.fetch_ahead(blob, missing);
    }

    /// Decodes these pieces of the store one after the other, as far as nobody has or does.
    fn decode_ahead(self: &Arc<Self>, blob: &ImageBlob, present: Vec<u32>) {
        let mut room = self.cache.capacity() / AHEAD_OF_MEMORY;
        let mut fits = |piece: &u32| {
            let len = blob.table.piece(*piece).map_or(0, |piece| piece.decoded_len() as usize);
            room.checked_sub(len).inspect(|left| room = *left).is_some()
        };
        let new = present.into_iter().filter(|piece| !self.cache.has(&(blob.key, *piece)));
        let new: Vec<_> = new.take_while(|piece| fits(piece)).collect();
        let items = self.begin_ahead(blob, new);
        if items.is_empty() {
            return;
        }
        let (inner, blob) = (self.clone(), blob.clone());
        self.runtime.spawn_blocking(move || {
            for item in items {
                inner.decode_one_ahead(&blob, item.piece);
                lock(&inner.node.ahead).end(item);
            }
        });
    }

    fn decode_one_ahead(self: &Arc<Self>, blob: &ImageBlob, piece: u32) {
        let key = (blob.key, piece);
        // A reader may have come before.
        if !self.cache.lead(&key) {
            return;
        }
        match load(blob, piece) {
            Ok(Some(decoded)) => {
                self.note_decoded(blob, piece, &decoded);
                self.cache.complete(key, Ok(Arc::new(decoded)));
            }
            // Damage is dealt with where it matters to somebody.
            Ok(None) | Err(_) => {
                if let Some(index) = self.cache.give_up(&key) {
                    self.clone().lead_elsewhere(blob.clone(), piece, index, Priority::OnDemand);
                }
            }
        }
    }

    /// Those of these pieces that nobody makes ready yet; each is to be [ended](super::Ahead::end).
    fn begin_ahead(&self, blob: &ImageBlob, pieces: Vec<u32>) -> Vec<Item> {
        let mut ahead = lock(&self.node.ahead);
        let items = pieces.into_iter().map(|piece| Item { blob: blob.key, piece });
        items.filter(|item| ahead.begin(*item)).collect()
    }

    /// Fetches these pieces, and keeps them decoded.
    fn fetch_ahead(self: &Arc<Self>, blob: &ImageBlob, missing: Vec<u32>) {
        let items = self.begin_ahead(blob, missing);
        if items.is_empty() {
            return;
        }
        let inner = self.clone();
        self.runtime.spawn(async move {
            let node = &inner.node;
            let wants = node.driver.want_together(&items, Priority::Prefetch, node.deadline, WantOrigin::Local);
            let mut outcomes = std::pin::pin!(wants.await);
            while let Some((item, outcome)) = outcomes.next().await {
                lock(&node.ahead).end(item);
                // Nobody waits for it; who reads it later asks again.
                if let Ok(Fetched::Piece { piece, .. }) = outcome {
                    inner.cache.keep((item.blob, item.piece), piece);
                }
            }
        });
    }
}

impl Lengths for ImageBlob {
    fn count(&self) -> u32 {
        self.table.len()
    }

    fn of(&self, piece: u32) -> u64 {
        self.encoded_len(piece) as u64
    }
}
