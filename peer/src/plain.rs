//! Plain blobs: those that no image describes, such as the layers of an ordinary image, through the same exchange as the
//! others.
//!
//! A [`HashList`] cuts such a blob into pieces, and a table of those pieces is all that scheduler, store and wire need. There
//! is one list of a blob, so it needs no name: wherever a bootstrap layer would name pieces, the blob stands for its own.
//!
//! ```text
//! who wants it        home of the whole blob                registry
//!      list?  ------------>  (pending ..)  -- all of it, once -->
//!                            sha256 is right: list, pieces present
//!      <------------ list
//!      pieces <----> neighbours, the home
//!      all here: sha256 of the whole      right: used, and its list is given on
//!                                         wrong: whoever gave the list has lied
//! ```
//!
//! **Trust.** A list proves nothing. Pieces are exchanged by it, each verified against it, but the blob is *used* (given to a
//! client whole, or in part) only once all of it has been compared with its digest: [`PlainBlob::is_verified`]. Only then is the
//! list kept on disk and given to others; so whoever gives a list that turns out wrong is its author, and is banned.
//!
//! Here: what is known of such blobs, and their lists. [`Collector`] brings a blob here, [`Whole`] reads it at the registry.

mod collector;
mod whole;

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shoal_proto::{Algorithm, BlobId, Digest, HashList, HashListError, ObjectId, PeerId, Priority};
use shoal_rafs::{Chunk, Compressor, Piece, PieceTable, digest, oci::Source};
use shoal_scheduler::{BlobKey, Event, Item, Origin};

pub(crate) use self::{
    collector::{Collector, Stage},
    whole::{Whole, WholeError},
};
use crate::{
    driver::{DriverHandle, Fetched, Stake, WantFailed},
    fetch::{BlobTarget, ListTarget, Target},
    images::{ImageBlob, scheduled},
    mounts::blocking,
    store::{Footprint, Store, StoreError},
    traffic::PieceOrigins,
};

/// What the scheduler calls the list of a blob: no blob has as many variants.
const LIST: u32 = u32::MAX;
/// How long a list is waited for. A home that reads a large blob says all the while that it is at it, and one that falls
/// silent is left sooner.
const LIST_PATIENCE: Duration = Duration::from_secs(3600);
/// Most blobs that are remembered beside those in use.
const MAX_IDLE: usize = 256;

/// Why there is no list of a blob, or no blob.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlainError {
    /// Nobody could give the list.
    #[error("no list of its pieces")]
    List(#[source] WantFailed),
    /// What was given is none.
    #[error(transparent)]
    Parse(#[from] HashListError),
    /// The store refuses.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A plain blob by its list.
#[derive(Debug)]
pub(crate) struct PlainBlob {
    /// Its pieces, as those of images are kept.
    pub(crate) blob: ImageBlob,
    size: u64,
    list: Bytes,
    /// Who gave the list, if not this node made it.
    giver: Option<PeerId>,
    verified: AtomicBool,
}

impl PlainBlob {
    /// Its digest.
    pub(crate) fn id(&self) -> BlobId {
        self.blob.table.blob()
    }

    /// Bytes of it.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Whether all of it has been compared with its digest: then its list is the right one, for ever.
    pub(crate) fn is_verified(&self) -> bool {
        self.verified.load(Ordering::Acquire)
    }

    /// Its list, to be given to others once it is verified.
    pub(crate) fn list(&self) -> &Bytes {
        &self.list
    }

    /// The pieces that are not here.
    fn missing(&self) -> Vec<u32> {
        let present = self.blob.handle.present();
        (0..self.blob.table.len()).filter(|&piece| !present.contains(piece)).collect()
    }

    /// The bytes of a piece that is here, verified against the list. What the disk has damaged is forgotten. Blocks.
    pub(crate) fn read(&self, piece: u32) -> Result<Option<Bytes>, StoreError> {
        let Some(bytes) = self.blob.handle.read(piece)? else { return Ok(None) };
        if self.blob.table.decode(piece, &bytes).is_ok() {
            return Ok(Some(bytes));
        }
        tracing::warn!(blob = %self.id(), piece, "damaged on disk");
        self.blob.handle.forget(piece)?;
        Ok(None)
    }

    /// Compares all of it with its digest; nothing if not all of it is here. Blocks.
    fn compare(&self) -> Result<Option<bool>, StoreError> {
        let mut hasher = Sha256::new();
        for piece in 0..self.blob.table.len() {
            let Some(bytes) = self.read(piece)? else { return Ok(None) };
            hasher.update(&bytes);
        }
        Ok(Some(hasher.finalize()[..] == self.id().as_bytes()[..]))
    }
}

/// The plain blobs that this node knows. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct PlainBlobs {
    store: Store,
    driver: DriverHandle,
    /// Held for a look or a change.
    known: Arc<Mutex<HashMap<BlobId, Arc<PlainBlob>>>>,
}

impl PlainBlobs {
    pub(crate) fn new(store: Store, driver: DriverHandle) -> Self {
        Self { store, driver, known: Arc::default() }
    }

    /// The blob, if its list is in memory.
    pub(crate) fn known(&self, blob: BlobId) -> Option<Arc<PlainBlob>> {
        self.lock().get(&blob).cloned()
    }

    /// All whose lists are in memory.
    pub(crate) fn all(&self) -> Vec<Arc<PlainBlob>> {
        self.lock().values().cloned().collect()
    }

    /// The blob, if this node has verified all of it once.
    pub(crate) async fn verified(&self, source: &Source, blob: BlobId) -> Option<Arc<PlainBlob>> {
        if let Some(known) = self.known(blob) {
            return Some(known).filter(|known| known.is_verified());
        }
        let store = self.store.clone();
        let lists = blocking(move || store.lists(&blob)).await;
        let lists = lists.inspect_err(|error| tracing::warn!("cannot look for a list: {}", crate::chain(error)));
        for list in lists.unwrap_or_default() {
            match self.enter(source, blob, list, Entered::Kept).await {
                Ok(Some(known)) => return Some(known),
                Ok(None) => tracing::warn!(%blob, "a list on disk does not fit its blob, and is not used"),
                Err(error) => tracing::warn!(%blob, "a list on disk is not used: {}", crate::chain(&error)),
            }
        }
        None
    }

    /// Makes the list of a blob known to the scheduler, for as long as the stake is held.
    pub(crate) async fn know_list(&self, source: &Source, blob: BlobId) -> Stake {
        let stake = self.driver.stake(list_key(blob));
        self.driver.add(&stake, Target::List(Arc::new(ListTarget { source: source.clone(), blob }))).await;
        stake
    }

    /// The blob's list, from memory or disk, from its home, or made of what the registry has.
    ///
    /// # Errors
    /// [`PlainError`].
    pub(crate) async fn learn(
        &self,
        source: &Source,
        blob: BlobId,
        origin: Origin,
    ) -> Result<Arc<PlainBlob>, PlainError> {
        if let Some(known) = self.known(blob) {
            return Ok(known);
        }
        if let Some(kept) = self.verified(source, blob).await {
            return Ok(kept);
        }
        let stake = self.know_list(source, blob).await;
        let item = Item { blob: stake.key(), piece: 0 };
        loop {
            // Bulk, even where somebody waits: a list that is asked for twice is a blob that the registry sends twice.
            let fetched = self.driver.want(item, Priority::Prefetch, LIST_PATIENCE, origin).await;
            match fetched.map_err(PlainError::List)? {
                Fetched::List { bytes, giver } => {
                    let entered = giver.map_or(Entered::Made, Entered::Given);
                    if let Some(known) = self.enter(source, blob, bytes, entered).await? {
                        return Ok(known);
                    }
                }
                // It came when nobody waited for it any more, or for somebody who takes it in right now.
                Fetched::Present | Fetched::Piece { .. } | Fetched::Object { .. } => {
                    if let Some(known) = self.known(blob) {
                        return Ok(known);
                    }
                    self.driver.event(Event::Lost { item }).await;
                }
            }
        }
    }

    /// Takes a list in, unless the blob has one already; nothing if it is from the disk and fits nothing there.
    async fn enter(
        &self,
        source: &Source,
        blob: BlobId,
        bytes: Bytes,
        entered: Entered,
    ) -> Result<Option<Arc<PlainBlob>>, PlainError> {
        let list = HashList::parse(&bytes)?;
        let (store, table) = (self.store.clone(), table(blob, &list));
        let opened = table.clone();
        let handle = match entered {
            Entered::Kept => blocking(move || store.existing_blob(&opened)).await?,
            Entered::Made | Entered::Given(_) => Some(blocking(move || store.open_blob(&opened)).await?),
        };
        let Some(handle) = handle else { return Ok(None) };
        let key = scheduled(handle.key());
        let giver = if let Entered::Given(peer) = entered { Some(peer) } else { None };
        let origins = Arc::new(PieceOrigins::new(table.len()));
        let entry = Arc::new(PlainBlob {
            blob: ImageBlob { key, table, handle, origins, stake: self.driver.stake(key) },
            size: list.size(),
            list: bytes,
            giver,
            verified: AtomicBool::new(giver.is_none()),
        });
        let known = {
            let mut known = self.lock();
            if known.len() >= MAX_IDLE {
                forget_idle(&mut known);
            }
            known.entry(blob).or_insert(entry).clone()
        };
        let ImageBlob { key, table, handle, origins, stake } = known.blob.clone();
        let (source, bootstrap) = (source.clone(), as_bootstrap(blob));
        let target = BlobTarget { source, bootstrap, manifest: None, table, handle, origins, others: Vec::new() };
        self.driver.add(&stake, Target::Blob(Arc::new(target))).await;
        self.driver.event(Event::OneHome { blob: key }).await;
        Ok(Some(known))
    }

    /// All of the blob was compared with its digest: its list is kept, and given to others from now on.
    async fn confirm(&self, plain: &Arc<PlainBlob>) {
        let confirmed = plain.clone();
        let kept = blocking(move || confirmed.blob.handle.put_list(&confirmed.list)).await;
        if let Err(error) = kept {
            tracing::warn!(blob = %plain.id(), "its list is not kept: {}", crate::chain(&error));
        }
        plain.verified.store(true, Ordering::Release);
    }

    /// What came by this list is not the blob: nothing of it stays, and whoever gave it is known for a liar.
    async fn refute(&self, plain: &Arc<PlainBlob>) {
        let blob = plain.id();
        tracing::warn!(%blob, giver = ?plain.giver, "all pieces are as its list says, and the blob is not what its digest says");
        {
            let mut known = self.lock();
            if known.get(&blob).is_some_and(|known| Arc::ptr_eq(known, plain)) {
                known.remove(&blob);
            }
        }
        self.driver.retract(&plain.blob.stake).await;
        let (store, needs) = (self.store.clone(), footprint(plain));
        if let Err(error) = blocking(move || store.evict(&needs)).await {
            tracing::warn!(%blob, "false bytes are not removed: {}", crate::chain(&error));
        }
        metrics::counter!("shoal_refuted_lists_total").increment(1);
        if let Some(peer) = plain.giver {
            self.driver.event(Event::Lied { peer, item: Item { blob: list_key(blob), piece: 0 } }).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<BlobId, Arc<PlainBlob>>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a list comes from.
#[derive(Clone, Copy)]
enum Entered {
    /// This node made it of a blob that it verified.
    Made,
    /// It was kept beside a blob that this node had verified.
    Kept,
    /// A peer says so.
    Given(PeerId),
}

/// Drops what nobody uses.
fn forget_idle(known: &mut HashMap<BlobId, Arc<PlainBlob>>) {
    known.retain(|_, plain| Arc::strong_count(plain) > 1);
}

fn list_key(blob: BlobId) -> BlobKey {
    BlobKey { id: *blob.as_bytes(), variant: LIST }
}

/// What stands where a bootstrap layer would name the pieces of a blob.
pub(crate) fn as_bootstrap(blob: BlobId) -> ObjectId {
    ObjectId::new(*blob.as_bytes())
}

/// Whether this is what stands for the bootstrap layer of a plain blob: no image lies in a blob of its own.
pub(crate) fn is_plain(bootstrap: ObjectId, blob: BlobId) -> bool {
    bootstrap == as_bootstrap(blob)
}

/// Has a piece that is not here fetched. As bulk, as all of a pull: whoever reads a mounted image goes first.
pub(crate) async fn want_piece(
    driver: &DriverHandle,
    plain: &PlainBlob,
    piece: u32,
    patience: Duration,
) -> Result<Fetched, WantFailed> {
    let item = Item { blob: plain.blob.key, piece };
    let fetched = driver.want(item, Priority::Prefetch, patience, Origin::Local).await?;
    if !matches!(fetched, Fetched::Present) || plain.blob.handle.is_present(piece) {
        return Ok(fetched);
    }
    // It was evicted, or found damaged, and the scheduler has not heard of it.
    driver.event(Event::Lost { item }).await;
    driver.want(item, Priority::Prefetch, patience, Origin::Local).await
}

/// What of the store has to stay for as long as the blob is read.
fn footprint(plain: &PlainBlob) -> Footprint {
    Footprint { blobs: vec![plain.blob.handle.key()], ..Footprint::default() }
}

/// The digest of a piece, as lists have it.
fn hash(bytes: &[u8]) -> [u8; 32] {
    digest(Algorithm::Blake3, bytes).bytes
}

/// The pieces that a list names: chunks that are stored as they are.
fn table(blob: BlobId, list: &HashList) -> Arc<PieceTable> {
    let size = list.size();
    let piece = |(index, digest): (u32, &[u8; 32])| {
        let offset = u64::from(index) * HashList::PIECE;
        let length = HashList::PIECE.min(size - offset) as u32;
        let digest = Digest { algorithm: Algorithm::Blake3, bytes: *digest };
        let chunk = Chunk { index, digest, decoded_offset: offset, decoded_len: length, compressed: false };
        Piece::plain(chunk, offset, length, Compressor::None)
    };
    let pieces: Vec<_> = (0..).zip(list.digests()).map(piece).collect();
    let table = PieceTable::new(blob, size, pieces.len() as u32, pieces);
    Arc::new(table.expect("pieces behind each other, as many as the size of the blob asks for"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_cuts_a_blob_into_pieces_that_verify() {
        let bytes: Vec<u8> = (0..HashList::PIECE as usize * 2 + 7).map(|n| (n / 1000) as u8).collect();
        let digests = bytes.chunks(HashList::PIECE as usize).map(hash).collect();
        let list = HashList::new(bytes.len() as u64, digests).unwrap();
        let table = table(BlobId::new(Sha256::digest(&bytes).into()), &list);
        assert_eq!(table.len(), 3);
        for piece in 0..3 {
            let range = table.piece(piece).unwrap().encoded();
            let bytes = Bytes::copy_from_slice(&bytes[range.start as usize..range.end as usize]);
            assert!(table.decode(piece, &bytes).is_ok());
            assert!(table.decode((piece + 1) % 3, &bytes).is_err());
        }
        assert_eq!(table.piece(2).unwrap().encoded().end, bytes.len() as u64);
    }
}
