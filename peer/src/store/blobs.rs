//! Blobs: which variant an image gets, and the way of a piece from written to durable. Over any [`Disk`] and any
//! [`Records`], so that tests can crash both. How they go again is in [`eviction`](super::eviction), what
//! is done now and then in [`upkeep`](super::upkeep).
//!
//! Locks are taken in the order `evicting`, `flushing`, `open`, then `closed_usage`, `dirty`, `swept`, the holdings or a
//! variant's state.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::Bytes;
use shoal_proto::{BlobId, Digest};
use shoal_rafs::PieceTable;

use super::{
    StoreError, StoreOptions, Usage,
    disk::Disk,
    handle::BlobHandle,
    holdings::{Holding, Holdings, unix_seconds},
    limits::StoreLimits,
    variant::{Variant, sum},
    whole_files::WholeFiles,
};
use crate::index::{BlobKey, Change, ChunkPlace, PieceRecord, Records, Survives, VariantRecord};

/// Most pieces in one batch of the index, which is held in memory.
const PIECES_PER_BATCH: usize = 8192;

/// Is told of each blob that was evicted.
pub(super) type OnEvicted = Box<dyn Fn(BlobKey) + Send + Sync>;

/// All blobs of a data directory, and what is evicted with them.
pub(super) struct Blobs {
    // First, so that the index is closed when the lock, which the disk holds, is given up.
    pub(super) records: Box<dyn Records>,
    pub(super) disk: Box<dyn Disk>,
    /// Here, because what is evicted is a blob or one of them.
    pub(super) files: WholeFiles,
    pub(super) holdings: Arc<Holdings>,
    /// Held for a copy or a change.
    pub(super) limits: Mutex<StoreLimits>,
    variants_per_blob: u32,
    closed: AtomicBool,
    /// Bytes that are being written and not yet among the holdings.
    pub(super) reserved: AtomicU64,
    /// Held while something is evicted, so that two who need room do not both make it.
    pub(super) evicting: Mutex<()>,
    pub(super) on_evicted: OnceLock<OnEvicted>,
    /// Variants that were evicted and to which digest records may still lead.
    pub(super) swept: Mutex<BTreeSet<BlobKey>>,
    /// When it was last said that nothing is kept for want of room.
    pub(super) complained: Mutex<Option<Instant>>,
    /// Held while a variant is chosen, made or evicted, with the IO that needs: two images must not both make variant 0.
    pub(super) open: Mutex<HashMap<BlobKey, Weak<Variant>>>,
    /// Pieces and bytes of variants that nobody has open, so that counting does not go through the index again each time.
    pub(super) closed_usage: Mutex<HashMap<BlobKey, (u64, u64)>>,
    /// Variants with fresh pieces. They stay alive until those are durable.
    pub(super) dirty: Mutex<BTreeMap<BlobKey, Arc<Variant>>>,
    /// Held from taking fresh pieces to recording them, so that no piece becomes durable after it was forgotten or evicted.
    pub(super) flushing: Mutex<()>,
}

/// A synced piece on its way into the index.
struct Synced {
    variant: Arc<Variant>,
    piece: u32,
    table: Arc<PieceTable>,
}

impl Blobs {
    /// Removes the files that the index does not know, measures the others, and begins.
    pub(super) fn open(
        records: Box<dyn Records>,
        disk: Box<dyn Disk>,
        files: WholeFiles,
        options: &StoreOptions,
    ) -> Result<Arc<Self>, StoreError> {
        let known: BTreeMap<_, _> = records.all()?.into_iter().collect();
        let holdings = files.holdings().clone();
        for key in disk.keys().map_err(|source| StoreError::io("listing blobs", source))? {
            if let Some(record) = known.get(&key) {
                let bytes = disk.allocated(key).map_err(|source| blob_io("measuring", key, source))?;
                holdings.found(Holding::Blob(key), bytes, record.last_use);
            } else {
                disk.remove(key).map_err(|source| blob_io("removing", key, source))?;
            }
        }
        Ok(Arc::new(Self {
            records,
            disk,
            files,
            holdings,
            limits: Mutex::new(options.limits),
            variants_per_blob: options.variants_per_blob.max(1),
            closed: AtomicBool::new(false),
            reserved: AtomicU64::new(0),
            evicting: Mutex::default(),
            on_evicted: OnceLock::new(),
            swept: Mutex::default(),
            complained: Mutex::default(),
            open: Mutex::default(),
            closed_usage: Mutex::default(),
            dirty: Mutex::default(),
            flushing: Mutex::default(),
        }))
    }

    pub(super) fn refuse_writes(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(super) fn open_blob(self: &Arc<Self>, table: &Arc<PieceTable>) -> Result<BlobHandle, StoreError> {
        let mut open = lock(&self.open);
        open.retain(|_, variant| variant.strong_count() > 0);
        let variants = self.variants(table, &open)?;
        let variant = match self.agreeing(table, &variants, &open)? {
            Some(variant) => variant,
            None => self.new_variant(table, &variants, &open)?,
        };
        self.declare(&variant, table)?;
        lock(&self.closed_usage).remove(&variant.key());
        open.insert(variant.key(), Arc::downgrade(&variant));
        Ok(BlobHandle::new(self.clone(), variant, table.clone()))
    }

    /// As [`open_blob`](Self::open_blob), but nothing is made or recorded: `None` if no variant agrees.
    pub(super) fn existing_blob(self: &Arc<Self>, table: &Arc<PieceTable>) -> Result<Option<BlobHandle>, StoreError> {
        let mut open = lock(&self.open);
        let variants = self.variants(table, &open)?;
        let Some(variant) = self.agreeing(table, &variants, &open)? else { return Ok(None) };
        lock(&self.closed_usage).remove(&variant.key());
        open.insert(variant.key(), Arc::downgrade(&variant));
        Ok(Some(BlobHandle::new(self.clone(), variant, table.clone())))
    }

    /// The variants of a blob that the index has, and those that only somebody who has them open knows.
    fn variants(
        &self,
        table: &PieceTable,
        open: &HashMap<BlobKey, Weak<Variant>>,
    ) -> Result<BTreeMap<u32, VariantRecord>, StoreError> {
        let mut variants = self.records.variants(&table.blob())?;
        for variant in
            open.iter().filter(|(key, _)| key.blob == table.blob()).filter_map(|(_, known)| known.upgrade())
        {
            let record = || VariantRecord { pieces: variant.pieces(), last_use: unix_seconds() };
            variants.entry(variant.key().variant).or_insert_with(record);
        }
        Ok(variants)
    }

    /// Adds what an image names to a variant, and records it. Without room for that the image can be used all the same:
    /// nothing of it is kept until there is room.
    fn declare(&self, variant: &Variant, table: &PieceTable) -> Result<(), StoreError> {
        let (key, new) = (variant.key(), variant.undeclared(table));
        if variant.is_recorded() {
            match self.record_declared(key, table.len(), &new) {
                Ok(()) => self.measure(key),
                Err(StoreError::Full { .. }) => {
                    self.complain(&format!("blob {} cannot be recorded", key.blob));
                    if variant.present().is_empty() {
                        variant.vacate();
                    }
                }
                Err(error) => return Err(error),
            }
        }
        variant.declare(new);
        self.holdings.used(Holding::Blob(key));
        Ok(())
    }

    /// Sees to it that the index knows the variant and that it has a file.
    fn begin(&self, variant: &Variant) -> Result<(), StoreError> {
        if variant.is_recorded() {
            return Ok(());
        }
        let _open = lock(&self.open);
        if variant.is_recorded() {
            return Ok(());
        }
        let key = variant.key();
        // What was true of an earlier file must not be there when the new one is.
        self.records.commit(&[Change::DropVariant(key)], Survives::PowerCut)?;
        self.disk.create(key).map_err(|source| blob_io("making", key, source))?;
        self.record_declared(key, variant.pieces(), &variant.declarations())?;
        variant.recorded();
        Ok(())
    }

    /// Takes note of what a blob's file takes up on disk. What cannot be told now will be with the next write.
    fn measure(&self, key: BlobKey) {
        match self.disk.allocated(key) {
            Ok(bytes) => self.holdings.sized(Holding::Blob(key), bytes),
            Err(error) => tracing::warn!(blob = %key.blob, "cannot be measured: {error}"),
        }
    }

    /// Counts what is present: in memory where a variant is open, by the index, once, where it is not.
    pub(super) fn usage(&self) -> Result<Usage, StoreError> {
        // Held throughout: what is counted as closed must not have been opened and changed meanwhile.
        let open = lock(&self.open);
        let mut closed = lock(&self.closed_usage);
        let mut usage = Usage::default();
        for (key, _) in self.records.all()? {
            let (pieces, bytes) = match (open.get(&key).and_then(Weak::upgrade), closed.get(&key)) {
                (Some(variant), _) => variant.usage(),
                (None, Some(&counted)) => counted,
                (None, None) => {
                    let records = self.records.pieces(key)?;
                    let counted = sum(records.values().filter(|record| record.durable));
                    closed.insert(key, counted);
                    counted
                }
            };
            usage.blobs += 1;
            usage.pieces += pieces;
            usage.bytes += bytes;
        }
        usage.objects = self.files.object_ids().len() as u64;
        usage.disk_bytes = self.holdings.bytes();
        Ok(usage)
    }

    /// In several batches if need be: what a crash leaves of them is as good as an image that names less.
    fn record_declared(&self, key: BlobKey, len: u32, pieces: &[(u32, PieceRecord)]) -> Result<(), StoreError> {
        let used = Change::Variant(key, VariantRecord { pieces: len, last_use: unix_seconds() });
        self.records.commit(&[used], Survives::Kill)?;
        for batch in pieces.chunks(PIECES_PER_BATCH) {
            let changes = batch.iter().map(|(piece, record)| Change::Piece(key, *piece, record.clone()));
            self.records.commit(&changes.collect::<Vec<_>>(), Survives::Kill)?;
        }
        Ok(())
    }

    /// Of the variants that agree with an image, the one that has most: after a crash there may be one of which the index has
    /// no piece yet, with which every image agrees.
    fn agreeing(
        &self,
        table: &PieceTable,
        variants: &BTreeMap<u32, VariantRecord>,
        open: &HashMap<BlobKey, Weak<Variant>>,
    ) -> Result<Option<Arc<Variant>>, StoreError> {
        let mut best: Option<Arc<Variant>> = None;
        for (&number, record) in variants.iter().filter(|(_, record)| record.pieces == table.len()) {
            let key = BlobKey { blob: table.blob(), variant: number };
            let variant = match open.get(&key).and_then(Weak::upgrade) {
                Some(variant) => variant,
                None => Arc::new(Variant::new(key, record.pieces, self.records.pieces(key)?)),
            };
            let has_more = |best: &Arc<Variant>| variant.present().count() > best.present().count();
            if variant.agrees(table) && best.as_ref().is_none_or(has_more) {
                best = Some(variant);
            }
        }
        let Some(variant) = best else { return Ok(None) };
        let is_open = open.get(&variant.key()).is_some_and(|open| open.strong_count() > 0);
        if !is_open {
            match self.reconcile(&variant) {
                // What is lost cannot be unmarked now; so nothing counts as here until there is room for that.
                Err(StoreError::Full { .. }) => drop(variant.vacate()),
                outcome => outcome?,
            }
        }
        Ok(Some(variant))
    }

    /// Drops the durable marks of pieces that a variant's file is too short for, and makes the file if it is gone.
    fn reconcile(&self, variant: &Variant) -> Result<(), StoreError> {
        let key = variant.key();
        let len = self.disk.len(key).map_err(|source| blob_io("opening", key, source))?;
        let reachable = |piece| variant.readable(piece).is_some_and(|place| place.encoded.end <= len.unwrap_or(0));
        let lost: Vec<u32> = variant.present().iter().filter(|&piece| !reachable(piece)).collect();
        if !lost.is_empty() {
            tracing::warn!(blob = %key.blob, variant = key.variant, pieces = lost.len(), "bytes are gone from disk");
            let changes = lost.iter().filter_map(|&piece| Some(Change::Piece(key, piece, variant.forget(piece)?)));
            self.records.commit(&changes.collect::<Vec<_>>(), Survives::PowerCut)?;
        }
        match len {
            Some(_) => Ok(()),
            None => self.disk.create(key).map_err(|source| blob_io("making", key, source)),
        }
    }

    fn new_variant(
        &self,
        table: &PieceTable,
        variants: &BTreeMap<u32, VariantRecord>,
        open: &HashMap<BlobKey, Weak<Variant>>,
    ) -> Result<Arc<Variant>, StoreError> {
        let key = |variant| BlobKey { blob: table.blob(), variant };
        let number = match (0..self.variants_per_blob).find(|number| !variants.contains_key(number)) {
            Some(free) => free,
            None => {
                let is_open = |number| open.get(&key(number)).is_some_and(|variant| variant.strong_count() > 0);
                let closed = variants.iter().filter(|&(&number, _)| !is_open(number));
                let oldest = closed.min_by_key(|(_, record)| record.last_use).map(|(&number, _)| number);
                let limit = self.variants_per_blob;
                let oldest = oldest.ok_or(StoreError::TooManyVariants { blob: table.blob(), limit })?;
                self.records.commit(&[Change::DropVariant(key(oldest))], Survives::PowerCut)?;
                oldest
            }
        };
        let variant = Variant::new(key(number), table.len(), BTreeMap::new());
        match self.disk.create(key(number)).map_err(|source| blob_io("making", key(number), source)) {
            Err(StoreError::Full { .. }) => drop(variant.vacate()),
            outcome => outcome?,
        }
        Ok(Arc::new(variant))
    }

    pub(super) fn put_list(&self, key: BlobKey, list: &[u8]) -> Result<(), StoreError> {
        // An eviction comes before it or after it, and takes the list along.
        let _open = lock(&self.open);
        self.disk.put_list(key, list).map_err(|source| blob_io("listing the pieces of", key, source))
    }

    /// The lists that are kept of a blob's variants.
    pub(super) fn lists(&self, blob: &BlobId) -> Result<Vec<Bytes>, StoreError> {
        let keys = self.records.variants(blob)?.into_keys().map(|variant| BlobKey { blob: *blob, variant });
        let list =
            |key| self.disk.list(key).map_err(|source| blob_io("reading the list of", key, source)).transpose();
        keys.filter_map(list).map(|list| list.map(Bytes::from)).collect()
    }

    pub(super) fn find_digest(&self, digest: &Digest) -> Result<Option<(ChunkPlace, Range<u64>)>, StoreError> {
        let Some(place) = self.records.place(digest)? else {
            return Ok(None);
        };
        let piece = self.records.piece(place.key, place.piece)?;
        let piece = piece.filter(|piece| piece.durable && piece.fingerprint == place.fingerprint);
        Ok(piece.map(|piece| (place, piece.encoded)))
    }

    pub(super) fn read_place(&self, key: BlobKey, encoded: Range<u64>) -> Result<Option<Bytes>, StoreError> {
        match self.disk.read(key, encoded.start, (encoded.end - encoded.start) as usize) {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound) => Ok(None),
            Err(source) => Err(blob_io("reading", key, source)),
        }
    }

    pub(super) fn flush(&self) -> Result<u64, StoreError> {
        let _flushing = lock(&self.flushing);
        let dirty = std::mem::take(&mut *lock(&self.dirty));
        let (mut synced, mut outcome) = (Vec::new(), Ok(()));
        for variant in dirty.into_values() {
            match self.sync(&variant) {
                Ok(pieces) => synced.extend(pieces),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        let mut left = &synced[..];
        while !left.is_empty() {
            let (batch, rest) = left.split_at(left.len().min(PIECES_PER_BATCH));
            if let Err(error) = self.record(batch) {
                self.put_back(left);
                return Err(error);
            }
            left = rest;
        }
        outcome.map(|()| synced.len() as u64)
    }

    fn sync(&self, variant: &Arc<Variant>) -> Result<Vec<Synced>, StoreError> {
        let fresh = variant.take_fresh();
        if fresh.is_empty() {
            return Ok(Vec::new());
        }
        if let Err(source) = self.disk.sync(variant.key()) {
            variant.lose(fresh);
            return Err(blob_io("syncing", variant.key(), source));
        }
        self.measure(variant.key());
        let synced = fresh.into_iter().map(|(piece, table)| Synced { variant: variant.clone(), piece, table });
        Ok(synced.collect())
    }

    fn record(&self, batch: &[Synced]) -> Result<(), StoreError> {
        let mut changes = Vec::new();
        for Synced { variant, piece, table } in batch {
            let Some(record) = variant.durable_record(*piece) else { continue };
            let fingerprint = record.fingerprint;
            for chunk in table.piece(*piece).map_or(&[][..], |piece| piece.chunks()) {
                let place = ChunkPlace { key: variant.key(), piece: *piece, chunk: chunk.index, fingerprint };
                changes.push(Change::Digest(chunk.digest, place));
            }
            changes.push(Change::Piece(variant.key(), *piece, record));
        }
        self.records.commit(&changes, Survives::PowerCut)?;
        for Synced { variant, piece, .. } in batch {
            variant.mark_durable(*piece);
        }
        Ok(())
    }

    fn put_back(&self, pieces: &[Synced]) {
        let mut dirty = lock(&self.dirty);
        for Synced { variant, piece, table } in pieces {
            variant.put_back(*piece, table.clone());
            dirty.insert(variant.key(), variant.clone());
        }
    }

    pub(super) fn write(&self, handle: &BlobHandle, piece: u32, encoded: &[u8]) -> Result<bool, StoreError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(StoreError::Closed);
        }
        let (variant, key) = (handle.variant(), handle.key());
        if handle.table().piece(piece).is_none() {
            return Err(StoreError::UnknownPiece { blob: key.blob, piece });
        }
        let Some(ticket) = variant.begin_write(piece, encoded.len())? else {
            return Ok(false);
        };
        let outcome = self.place(variant, ticket.encoded.start, encoded);
        let kept = variant.end_write(ticket, outcome.is_ok().then(|| handle.table().clone()));
        if let Err(StoreError::Full { what }) = &outcome {
            self.complain(what);
        }
        outcome?;
        if kept {
            lock(&self.dirty).insert(key, variant.clone());
        }
        Ok(kept)
    }

    /// Puts bytes where they belong. What was used longest ago goes for it, if the limits or the disk ask for that.
    fn place(&self, variant: &Variant, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let (key, len) = (variant.key(), bytes.len() as u64);
        let room = self.make_room(len, Holding::Blob(key))?;
        let put = || {
            self.begin(variant)?;
            self.disk.write(key, offset, bytes).map_err(|source| blob_io("writing", key, source))
        };
        match put() {
            Err(StoreError::Full { .. }) if self.free_up(len, Holding::Blob(key)) => put()?,
            outcome => outcome?,
        }
        self.measure(key);
        drop(room);
        self.holdings.used(Holding::Blob(key));
        Ok(())
    }

    pub(super) fn read(&self, variant: &Variant, piece: u32) -> Result<Option<Bytes>, StoreError> {
        let Some(place) = variant.readable(piece) else {
            return Ok(None);
        };
        let (key, len) = (variant.key(), (place.encoded.end - place.encoded.start) as usize);
        let read = self.disk.read(key, place.encoded.start, len);
        if !variant.still(&place) {
            return Ok(None);
        }
        match read {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound) => {
                self.forget(variant, piece).map(|()| None)
            }
            Err(source) => Err(blob_io("reading", key, source)),
        }
    }

    /// As [`read`](Self::read), but `None` also if that would have to wait for the device, or fail.
    pub(super) fn read_at_once(&self, variant: &Variant, piece: u32) -> Option<Bytes> {
        let place = variant.readable(piece)?;
        let len = (place.encoded.end - place.encoded.start) as usize;
        let bytes = self.disk.read_at_once(variant.key(), place.encoded.start, len).ok()??;
        variant.still(&place).then(|| bytes.into())
    }

    pub(super) fn forget(&self, variant: &Variant, piece: u32) -> Result<(), StoreError> {
        let _flushing = lock(&self.flushing);
        match variant.forget(piece) {
            Some(record) => {
                Ok(self.records.commit(&[Change::Piece(variant.key(), piece, record)], Survives::PowerCut)?)
            }
            None => Ok(()),
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of these is left consistent at every point where the code could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn blob_io(action: &str, key: BlobKey, source: io::Error) -> StoreError {
    StoreError::io(format!("{action} blob {} (variant {})", key.blob, key.variant), source)
}
