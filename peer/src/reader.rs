//! What a mount asks for chunks: a decoded form, memory, then the store, then everybody else.
//!
//! The calling FUSE thread only ever looks into memory, the page cache included: small pieces that are there it decodes itself,
//! since handing them to another thread would cost more than that. Everything slower goes to the runtime, which answers from
//! there.

mod ahead;
mod decoded;

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use bytes::Bytes;
use futures::StreamExt;
use shoal_proto::{Bitfield, Priority};
use shoal_rafs::{ChunkCache, ChunkError, ChunkId, ChunkReply, ChunkSource, DecodedPiece, Lead, for_part};
use shoal_scheduler::{BlobKey, Event, Item, Origin as WantOrigin};
use tokio::runtime::Handle;

pub(crate) use self::ahead::Ahead;
use self::{
    ahead::{Lengths, Windows},
    decoded::Place,
};
use crate::{
    driver::Fetched,
    images::{Image, ImageBlob},
    node::Node,
    traffic::{Provenance, Traffic},
};

/// Most decoded bytes of a piece that a FUSE thread decodes itself: about what it costs to wake another thread, twice.
const AT_HAND_BYTES: u32 = 128 << 10;

/// What the memory of decoded pieces is keyed by: a variant of a blob, and a piece of it.
pub(crate) type PieceKey = (BlobKey, u32);

/// Chunks of one mounted image. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Reader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: Arc<Node>,
    image: Arc<Image>,
    cache: Arc<ChunkCache<PieceKey>>,
    traffic: Traffic,
    errors: AtomicU64,
    /// Bytes of pieces that were decoded from the store after they had been read before.
    decoded_again: AtomicU64,
    /// Pieces that were counted, by blob. Locked for one look.
    seen: Mutex<HashMap<BlobKey, Bitfield>>,
    /// Where it is read, to be ahead of it. Locked for one look.
    windows: Mutex<Windows>,
    runtime: Handle,
}

impl Reader {
    pub(crate) fn new(node: Arc<Node>, image: Arc<Image>, runtime: Handle) -> Self {
        let cache = node.decoded.clone();
        let windows = Mutex::new(Windows::new(node.read_ahead));
        Self(Arc::new(Inner {
            node,
            image,
            cache,
            traffic: Traffic::default(),
            errors: AtomicU64::new(0),
            decoded_again: AtomicU64::new(0),
            seen: Mutex::default(),
            windows,
            runtime,
        }))
    }

    /// The image that it reads.
    pub(crate) fn image(&self) -> &Arc<Image> {
        &self.0.image
    }

    /// Where this mount's bytes came from.
    pub(crate) fn traffic(&self) -> &Traffic {
        &self.0.traffic
    }

    /// Chunks that could not be read.
    pub(crate) fn errors(&self) -> u64 {
        self.0.errors.load(Relaxed)
    }

    /// Bytes of pieces that were decoded from the store after they had been read before: what a decoded form would have saved.
    pub(crate) fn decoded_again(&self) -> u64 {
        self.0.decoded_again.load(Relaxed)
    }
}

impl ChunkSource for Reader {
    fn read(&self, chunk: ChunkId, priority: Priority, reply: ChunkReply) {
        let blob = usize::try_from(chunk.blob).ok().and_then(|index| self.0.image.blobs.get(index));
        let place = blob.and_then(|blob| Some((blob, blob.table.piece_of_chunk(chunk.index)?)));
        let Some((blob, piece)) = place else {
            let blob = blob.map_or(shoal_proto::BlobId::new([0; 32]), |blob| blob.table.blob());
            return reply(Err(ChunkError { blob, index: chunk.index, reason: "the image does not name it".into() }));
        };
        self.0.image.starts.note(chunk.blob, piece);
        let key = (blob.key, piece);
        match self.0.cache.read(&key, chunk.index, reply) {
            // Another mount may have read it, or it was fetched ahead.
            Lead::Answered => self.0.count(blob, piece, Provenance::Local),
            Lead::Joined => {}
            Lead::Leads => self.0.clone().lead(blob.clone(), piece, chunk.index, priority),
            Lead::Refused(reply) => {
                self.0.errors.fetch_add(1, Relaxed);
                let (blob, reason) = (blob.table.blob(), "too many reads wait".into());
                return reply(Err(ChunkError { blob, index: chunk.index, reason }));
            }
        }
        self.0.follow(blob, piece);
    }

    fn read_part(&self, chunk: ChunkId, part: Range<u32>, priority: Priority, reply: ChunkReply) {
        let reply = match self.0.decoded(chunk, &part) {
            Some(place) => match place.at_once() {
                Some(bytes) => return self.0.answer_part(chunk, bytes, reply),
                None => return self.wait_for_part(place, chunk, part, priority, reply),
            },
            None => for_part(part, reply),
        };
        self.read(chunk, priority, reply);
    }
}

impl Reader {
    /// Reads a part of a decoded form that is not in the page cache.
    fn wait_for_part(&self, place: Place, chunk: ChunkId, part: Range<u32>, priority: Priority, reply: ChunkReply) {
        let reader = self.clone();
        self.0.runtime.spawn_blocking(move || match place.read() {
            Some(bytes) => reader.0.answer_part(chunk, bytes, reply),
            None => reader.read(chunk, priority, for_part(part, reply)),
        });
    }
}

impl Inner {
    /// Gets a piece for all who wait for it, by the shortest way that may have it.
    fn lead(self: Arc<Self>, blob: ImageBlob, piece: u32, index: u32, priority: Priority) {
        if let Some(decoded) = at_hand(&blob, piece) {
            self.answer(&blob, piece, decoded);
        } else if blob.handle.is_present(piece) {
            let runtime = self.runtime.clone();
            runtime.spawn_blocking(move || match load(&blob, piece) {
                Ok(Some(decoded)) => self.answer(&blob, piece, decoded),
                // Damage is dealt with there.
                Ok(None) | Err(_) => self.lead_elsewhere(blob, piece, index, priority),
            });
        } else {
            self.lead_elsewhere(blob, piece, index, priority);
        }
    }

    /// Where a part of a chunk is, if its blob has a decoded form. Whoever made one, or looked for one, has named it.
    fn decoded(&self, chunk: ChunkId, part: &Range<u32>) -> Option<Place> {
        let blob = chunk.blob as usize;
        let id = *self.image.known_native_names()?.decoded().get(blob)?;
        Place::find(&self.node.store, id, &self.image.blobs.get(blob)?.table, chunk.index, part)
    }

    /// Gives a part of a chunk to who wants it, from a decoded form.
    fn answer_part(&self, chunk: ChunkId, bytes: Bytes, reply: ChunkReply) {
        if let Some(blob) = self.image.blobs.get(chunk.blob as usize)
            && let Some(piece) = blob.table.piece_of_chunk(chunk.index)
        {
            self.image.starts.note(chunk.blob, piece);
            self.count(blob, piece, Provenance::Local);
        }
        reply(Ok(bytes));
    }

    /// Gives a piece of the store to those who wait for it.
    fn answer(&self, blob: &ImageBlob, piece: u32, decoded: DecodedPiece) {
        self.note_decoded(blob, piece, &decoded);
        self.count(blob, piece, Provenance::Local);
        self.cache.complete((blob.key, piece), Ok(Arc::new(decoded)));
    }

    fn note_decoded(&self, blob: &ImageBlob, piece: u32, decoded: &DecodedPiece) {
        if lock(&self.seen).get(&blob.key).is_some_and(|seen| seen.contains(piece)) {
            self.decoded_again.fetch_add(decoded.decoded_len() as u64, Relaxed);
        }
    }

    fn lead_elsewhere(self: Arc<Self>, blob: ImageBlob, piece: u32, index: u32, priority: Priority) {
        let runtime = self.runtime.clone();
        runtime.spawn(async move {
            let outcome = self.piece(&blob, piece, index, priority).await;
            if outcome.is_err() {
                self.errors.fetch_add(1, Relaxed);
            }
            self.cache.complete((blob.key, piece), outcome);
        });
    }

    /// Gets a piece from the store or from elsewhere. An error names the chunk for whose sake.
    async fn piece(
        self: &Arc<Self>,
        blob: &ImageBlob,
        piece: u32,
        index: u32,
        priority: Priority,
    ) -> Result<Arc<DecodedPiece>, ChunkError> {
        let fail = |reason: String| ChunkError { blob: blob.table.blob(), index, reason: reason.into() };
        let (decoded, from) = match self.stored(blob, piece).await {
            Some(decoded) => (decoded, Provenance::Local),
            None => {
                self.begin_following(blob, piece);
                self.fetched(blob, piece, priority).await.map_err(fail)?
            }
        };
        self.count(blob, piece, from);
        Ok(decoded)
    }

    /// Counts a piece for this mount the first time that it is read, and for the node if it was here before the start.
    fn count(&self, blob: &ImageBlob, piece: u32, from: Provenance) {
        let (from, news) = blob.origins.note(piece, from);
        let (bytes, chunks) = (blob.encoded_len(piece) as u64, blob.chunks(piece));
        if news {
            self.node.traffic.piece(from, bytes, chunks);
        }
        let seen = || Bitfield::new(blob.table.len());
        if lock(&self.seen).entry(blob.key).or_insert_with(seen).insert(piece) {
            self.traffic.piece(from, bytes, chunks);
        }
    }

    /// A piece has to be fetched: so is likely what lies behind it, and one read of many small pieces costs little more than one of
    /// the first.
    fn begin_following(self: &Arc<Self>, blob: &ImageBlob, piece: u32) {
        let on_its_way = lock(&self.node.ahead).has(Item { blob: blob.key, piece });
        let next = lock(&self.windows).missed(blob.key, piece, on_its_way, blob);
        self.fetch_ahead(blob, next);
    }

    /// A piece is read: its reader may come to the end of what was fetched ahead.
    fn follow(self: &Arc<Self>, blob: &ImageBlob, piece: u32) {
        let next = lock(&self.windows).read(blob.key, piece, blob);
        self.fetch_ahead(blob, next);
    }

    /// Fetches what is not here of these pieces, and keeps it decoded for a while: it is likely to be read next.
    fn fetch_ahead(self: &Arc<Self>, blob: &ImageBlob, pieces: Vec<u32>) {
        let missing = pieces.into_iter().filter(|piece| !blob.handle.is_present(*piece));
        let missing: Vec<_> = missing.map(|piece| Item { blob: blob.key, piece }).collect();
        if missing.is_empty() {
            return;
        }
        let items: Vec<_> = {
            let mut ahead = lock(&self.node.ahead);
            missing.into_iter().filter(|item| ahead.begin(*item)).collect()
        };
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

    async fn fetched(
        &self,
        blob: &ImageBlob,
        piece: u32,
        priority: Priority,
    ) -> Result<(Arc<DecodedPiece>, Provenance), String> {
        let item = Item { blob: blob.key, piece };
        let deadline = Instant::now() + self.node.deadline;
        loop {
            let patience = deadline.saturating_duration_since(Instant::now());
            let want = self.node.driver.want(item, priority, patience, WantOrigin::Local);
            match want.await.map_err(|error| error.to_string())? {
                Fetched::Piece { piece, from, .. } => return Ok((piece, from)),
                // It came, for somebody else, between the look into the store and the want; or it has been evicted since.
                Fetched::Present | Fetched::Object { .. } | Fetched::List { .. } => {
                    match self.stored(blob, piece).await {
                        Some(decoded) => return Ok((decoded, Provenance::Local)),
                        None => self.node.driver.event(Event::Lost { item }).await,
                    }
                }
            }
        }
    }

    /// The piece from the store, decoded and verified. Damage on the disk is forgotten and counts as absence.
    async fn stored(&self, blob: &ImageBlob, piece: u32) -> Option<Arc<DecodedPiece>> {
        if !blob.handle.is_present(piece) {
            return None;
        }
        let loading = blob.clone();
        let loaded = tokio::task::spawn_blocking(move || load(&loading, piece)).await;
        match loaded.unwrap_or_else(|panic| Err(panic.to_string())) {
            Ok(decoded) => decoded.map(Arc::new),
            Err(error) => {
                tracing::error!(blob = %blob.table.blob(), piece, "damaged in the store, fetching it again: {error}");
                if let Err(error) = blob.handle.forget(piece) {
                    tracing::error!("cannot forget it: {}", crate::chain(&error));
                }
                self.node.driver.event(Event::Lost { item: Item { blob: blob.key, piece } }).await;
                None
            }
        }
    }
}

/// A piece from the store, decoded and verified; `None` if it is not there. Blocks.
fn load(blob: &ImageBlob, piece: u32) -> Result<Option<DecodedPiece>, String> {
    let encoded = blob.handle.read(piece).map_err(|error| crate::chain(&error))?;
    let decode = |encoded: Bytes| blob.table.decode(piece, &encoded).map_err(|error| crate::chain(&error));
    encoded.map(decode).transpose()
}

/// The same for a small piece whose bytes are in the page cache. Does not block; damage is left to others to find.
fn at_hand(blob: &ImageBlob, piece: u32) -> Option<DecodedPiece> {
    if blob.table.piece(piece)?.decoded_len() > AT_HAND_BYTES {
        return None;
    }
    blob.table.decode(piece, &blob.handle.read_at_once(piece)?).ok()
}

impl Lengths for ImageBlob {
    fn count(&self) -> u32 {
        self.table.len()
    }

    fn of(&self, piece: u32) -> u64 {
        self.encoded_len(piece) as u64
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
