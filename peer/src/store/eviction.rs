//! Eviction: what was used longest ago goes when there is no room, or soon none. A blob or an object goes as a whole, and
//! nothing goes that a mount or a pin needs, or that is being written.
//!
//! The order makes a crash harmless: first nothing in memory counts as present, then the index forgets the variant, synced,
//! then the file is removed. A file that a crash leaves behind is unknown to the index, and is removed by the next opening.
//! Only where the disk is so full that the index cannot even forget, the file goes first: records of a file that is not
//! there are found out when the blob is opened, and withdrawn before there is another file.

use std::{
    collections::BTreeSet,
    fs::File,
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use shoal_proto::{DecodedId, ObjectId};

use super::{
    KeptBlob, StoreError, StoreLimits,
    blobs::{Blobs, blob_io, lock},
    holdings::{Footprint, Holding},
    variant::Variant,
};
use crate::index::{BlobKey, Change, Survives};

/// Shortest time between two complaints that nothing is kept.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(60);

/// What an eviction brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Blobs that went.
    pub blobs: u64,
    /// Objects that went.
    pub objects: u64,
    /// Decoded forms of blobs that went.
    pub decoded: u64,
    /// Bytes on disk that they had.
    pub bytes: u64,
    /// Of what was to go, what stays because it is held or being written.
    pub held: u64,
}

impl Evicted {
    fn add(&mut self, holding: Holding, bytes: u64) {
        match holding {
            Holding::Blob(_) => self.blobs += 1,
            Holding::Object(_) => self.objects += 1,
            Holding::Decoded(_) => self.decoded += 1,
        }
        self.bytes += bytes;
    }
}

/// Room for bytes that are on their way to the disk.
#[must_use = "the room is given up when it is dropped"]
pub(super) struct Room<'a> {
    reserved: &'a AtomicU64,
    len: u64,
}

impl<'a> Room<'a> {
    fn reserve(reserved: &'a AtomicU64, len: u64) -> Self {
        reserved.fetch_add(len, Ordering::SeqCst);
        Self { reserved, len }
    }

    /// From now on the caller sees to it that the bytes are given up.
    pub(super) fn hand_over(mut self) -> u64 {
        std::mem::take(&mut self.len)
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.reserved.fetch_sub(self.len, Ordering::SeqCst);
    }
}

impl Blobs {
    /// Makes room for `len` more bytes of `for_whom`, which itself stays. The room is to be held until they are counted.
    ///
    /// # Errors
    /// [`StoreError::Full`] when the limits leave none, whatever goes.
    pub(super) fn make_room(&self, len: u64, for_whom: Holding) -> Result<Room<'_>, StoreError> {
        let full = || StoreError::Full { what: format!("{len} bytes within the store's limits") };
        let room = Room::reserve(&self.reserved, len);
        // Of several who come at once, each sees the others.
        let used = || self.holdings.bytes() + self.reserved.load(Ordering::SeqCst) - len;
        let overflow = || self.limits().overflow(used(), self.free(), len);
        if overflow().ok_or_else(full)? == 0 {
            return Ok(room);
        }
        let _evicting = lock(&self.evicting);
        // Somebody may have made room meanwhile.
        let excess = overflow().ok_or_else(full)?;
        let evicted = self.evict_oldest(excess, BTreeSet::from([for_whom]));
        // A file system may take its time to count what was freed.
        let free = self.free().saturating_add(evicted.bytes);
        match self.limits().overflow(used(), free, len) {
            Some(0) => Ok(room),
            _ => Err(full()),
        }
    }

    pub(super) fn has_room(&self, len: u64) -> bool {
        let used = self.holdings.bytes() + self.reserved.load(Ordering::SeqCst);
        let on_disk = self.disk.free().unwrap_or(u64::MAX);
        on_disk >= len && self.limits().overflow(used, self.free(), len) == Some(0)
    }

    /// The disk is full: lets `len` bytes go, or as many as may; false if there are none.
    pub(super) fn free_up(&self, len: u64, for_whom: Holding) -> bool {
        let _evicting = lock(&self.evicting);
        self.evict_oldest(len.max(1), BTreeSet::from([for_whom])).bytes > 0
    }

    /// How large it may become at present.
    pub(super) fn limits(&self) -> StoreLimits {
        *lock(&self.limits)
    }

    /// Keeps other limits from now on.
    pub(super) fn adjust(&self, limits: StoreLimits) {
        *lock(&self.limits) = limits;
    }

    /// Lets go what is above the marks.
    pub(super) fn evict_surplus(&self) {
        if self.limits().surplus(self.holdings.bytes(), self.free()) == 0 {
            return;
        }
        let _evicting = lock(&self.evicting);
        let surplus = self.limits().surplus(self.holdings.bytes(), self.free());
        let evicted = self.evict_oldest(surplus, BTreeSet::new());
        tracing::info!(evicted.blobs, evicted.objects, evicted.bytes, surplus, "evicted what was used longest ago");
    }

    /// Evicts what `footprint` names and nobody needs.
    pub(super) fn evict(&self, footprint: &Footprint) -> Result<Evicted, StoreError> {
        self.evict_all_of(footprint.holdings())
    }

    /// Evicts everything that nobody needs.
    pub(super) fn evict_all(&self) -> Result<Evicted, StoreError> {
        self.evict_all_of(self.holdings.all().into_iter().map(|(holding, ..)| holding))
    }

    fn evict_all_of(&self, holdings: impl Iterator<Item = Holding>) -> Result<Evicted, StoreError> {
        let _evicting = lock(&self.evicting);
        let mut evicted = Evicted::default();
        for holding in holdings {
            match self.holdings.is_needed(holding) {
                true => evicted.held += 1,
                false => match self.evict_one(holding)? {
                    Some(bytes) => evicted.add(holding, bytes),
                    None => evicted.held += 1,
                },
            }
        }
        Ok(evicted)
    }

    /// Evicts one after the other until `goal` bytes are free, or there is nothing left but `passed` and what is needed.
    fn evict_oldest(&self, goal: u64, mut passed: BTreeSet<Holding>) -> Evicted {
        let mut evicted = Evicted::default();
        while evicted.bytes < goal
            && let Some(holding) = self.holdings.oldest(&passed)
        {
            passed.insert(holding);
            match self.evict_one(holding) {
                Ok(Some(bytes)) => evicted.add(holding, bytes),
                Ok(None) => {}
                Err(error) => tracing::warn!("cannot evict {holding:?}: {}", crate::chain(&error)),
            }
        }
        evicted
    }

    /// Gives the bytes that it had; `None`, with nothing done, while it is being written.
    fn evict_one(&self, holding: Holding) -> Result<Option<u64>, StoreError> {
        let bytes = match holding {
            Holding::Object(_) | Holding::Decoded(_) => self.files.remove(holding)?,
            Holding::Blob(key) => {
                if !self.remove_blob(key)? {
                    return Ok(None);
                }
                let bytes = self.holdings.gone(holding);
                metrics::counter!("shoal_evicted_blobs_total").increment(1);
                lock(&self.swept).insert(key);
                self.on_evicted.get().into_iter().for_each(|tell| tell(key));
                bytes
            }
        };
        metrics::counter!("shoal_evicted_bytes_total").increment(bytes);
        Ok(Some(bytes))
    }

    /// False, with nothing done, while a piece is being written.
    fn remove_blob(&self, key: BlobKey) -> Result<bool, StoreError> {
        let (_flushing, open) = (lock(&self.flushing), lock(&self.open));
        let variant: Option<Arc<Variant>> = open.get(&key).and_then(Weak::upgrade);
        if variant.is_some_and(|variant| !variant.vacate()) {
            return Ok(false);
        }
        lock(&self.dirty).remove(&key);
        lock(&self.closed_usage).remove(&key);
        let forget = || self.records.commit(&[Change::DropVariant(key)], Survives::PowerCut);
        let no_room = match forget() {
            Err(error) if error.is_full() => true,
            forgotten => forgotten.map(|()| false)?,
        };
        self.disk.remove(key).map_err(|source| blob_io("removing", key, source))?;
        if no_room && let Err(error) = forget() {
            tracing::debug!(blob = %key.blob, "its records are withdrawn when it is next opened: {error}");
            lock(&self.closed_usage).insert(key, (0, 0));
        }
        Ok(true)
    }

    /// Keeps an object, for which others may have to go.
    pub(super) fn put_object(&self, id: ObjectId, bytes: &[u8]) -> Result<(), StoreError> {
        let (len, holding) = (bytes.len() as u64, Holding::Object(id));
        let put = || self.files.put_object(id, bytes);
        let kept = self.make_room(len, holding).and_then(|_room| match put() {
            Err(StoreError::Full { .. }) if self.free_up(len, holding) => put(),
            outcome => outcome,
        });
        if let Err(StoreError::Full { what }) = &kept {
            self.complain(what);
        }
        kept
    }

    /// Keeps a decoded form of at most `len` bytes, for which others may have to go.
    pub(super) fn put_decoded<E: From<StoreError>>(
        &self,
        id: DecodedId,
        len: u64,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<(), E> {
        let _room = self.make_room(len, Holding::Decoded(id))?;
        self.files.put_decoded(id, fill)
    }

    /// Has `len` bytes written to a decoded form that is being filled, for which others may have to go.
    pub(super) fn fill(
        &self,
        id: DecodedId,
        len: u64,
        write: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<(), StoreError> {
        let _room = self.make_room(len, Holding::Decoded(id))?;
        write().map_err(|source| StoreError::io(format!("decoded form {id}"), source))?;
        self.files.grew(id);
        Ok(())
    }

    pub(super) fn kept_blobs(&self) -> Vec<KeptBlob> {
        let kept = self.holdings.all().into_iter();
        let blob = |(holding, disk_bytes, last_use)| match holding {
            Holding::Object(_) | Holding::Decoded(_) => None,
            Holding::Blob(key) => {
                Some(KeptBlob { key, disk_bytes, last_use, held: self.holdings.is_needed(holding) })
            }
        };
        kept.filter_map(blob).collect()
    }

    /// Free bytes of the file system, if that is of interest.
    fn free(&self) -> u64 {
        match self.limits().keep_free_bytes {
            0 => u64::MAX,
            _ => self.disk.free().unwrap_or_else(|error| {
                tracing::warn!("cannot tell how much of the disk is free: {error}");
                u64::MAX
            }),
        }
    }

    /// Says that `what` is not kept for want of room, unless that was said a moment ago.
    pub(super) fn complain(&self, what: &str) {
        let mut complained = lock(&self.complained);
        if complained.is_none_or(|last| last.elapsed() >= COMPLAINT_INTERVAL) {
            *complained = Some(Instant::now());
            tracing::warn!("there is no room: what is fetched is used but not kept ({what})");
        }
    }
}
