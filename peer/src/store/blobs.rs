//! Blobs: which variant an image gets, and the way of a piece from written to durable. Over any [`Disk`] and any
//! [`Records`], so that tests can crash both.
//!
//! Locks are taken in the order `flushing`, `open`, then `closed_usage`, `dirty` or a variant's state.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt, io,
    ops::Range,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use shoal_proto::{Bitfield, Digest, Fingerprint};
use shoal_rafs::PieceTable;

use super::{
    StoreError, Usage,
    disk::Disk,
    variant::{Variant, sum},
};
use crate::index::{BlobKey, Change, ChunkPlace, PieceRecord, Records, Survives, VariantRecord};

/// Most pieces in one batch of the index, which is held in memory.
const PIECES_PER_BATCH: usize = 8192;

pub(super) struct Blobs {
    // First, so that the index is closed when the lock, which the disk holds, is given up.
    records: Box<dyn Records>,
    disk: Box<dyn Disk>,
    variants_per_blob: u32,
    closed: AtomicBool,
    /// Held while a variant is chosen or made, with the IO that needs: two images must not both make variant 0.
    open: Mutex<HashMap<BlobKey, Weak<Variant>>>,
    /// Pieces and bytes of variants that nobody has open, so that counting does not go through the index again each time.
    closed_usage: Mutex<HashMap<BlobKey, (u64, u64)>>,
    /// Variants with fresh pieces. They stay alive until those are durable.
    dirty: Mutex<BTreeMap<BlobKey, Arc<Variant>>>,
    /// Held from taking fresh pieces to recording them, so that no piece becomes durable after it was forgotten.
    flushing: Mutex<()>,
}

/// A synced piece on its way into the index.
struct Synced {
    variant: Arc<Variant>,
    piece: u32,
    table: Arc<PieceTable>,
}

impl Blobs {
    /// Removes the files that the index does not know, and begins.
    pub(super) fn open(
        records: Box<dyn Records>,
        disk: Box<dyn Disk>,
        variants_per_blob: u32,
    ) -> Result<Arc<Self>, StoreError> {
        let known: BTreeSet<_> = records.keys()?.into_iter().collect();
        for key in disk.keys().map_err(|source| StoreError::io("listing blobs", source))? {
            if !known.contains(&key) {
                disk.remove(key).map_err(|source| blob_io("removing", key, source))?;
            }
        }
        Ok(Arc::new(Self {
            records,
            disk,
            variants_per_blob: variants_per_blob.max(1),
            closed: AtomicBool::new(false),
            open: Mutex::default(),
            closed_usage: Mutex::default(),
            dirty: Mutex::default(),
            flushing: Mutex::default(),
        }))
    }

    pub(super) fn records(&self) -> &dyn Records {
        &*self.records
    }

    pub(super) fn refuse_writes(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(super) fn open_blob(self: &Arc<Self>, table: &Arc<PieceTable>) -> Result<BlobHandle, StoreError> {
        let mut open = lock(&self.open);
        open.retain(|_, variant| variant.strong_count() > 0);
        let variants = self.records.variants(&table.blob())?;
        let variant = match self.agreeing(table, &variants, &open)? {
            Some(variant) => variant,
            None => self.new_variant(table, &variants, &open)?,
        };
        let new = variant.undeclared(table);
        self.record_declared(variant.key(), table.len(), &new)?;
        variant.declare(new);
        lock(&self.closed_usage).remove(&variant.key());
        open.insert(variant.key(), Arc::downgrade(&variant));
        Ok(BlobHandle { blobs: self.clone(), variant, table: table.clone() })
    }

    /// Counts what is present: in memory where a variant is open, by the index, once, where it is not.
    pub(super) fn usage(&self) -> Result<Usage, StoreError> {
        // Held throughout: what is counted as closed must not have been opened and changed meanwhile.
        let open = lock(&self.open);
        let mut closed = lock(&self.closed_usage);
        let mut usage = Usage::default();
        for key in self.records.keys()? {
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

    fn agreeing(
        &self,
        table: &PieceTable,
        variants: &BTreeMap<u32, VariantRecord>,
        open: &HashMap<BlobKey, Weak<Variant>>,
    ) -> Result<Option<Arc<Variant>>, StoreError> {
        for (&number, record) in variants.iter().filter(|(_, record)| record.pieces == table.len()) {
            let key = BlobKey { blob: table.blob(), variant: number };
            if let Some(variant) = open.get(&key).and_then(Weak::upgrade) {
                if variant.agrees(table) {
                    return Ok(Some(variant));
                }
                continue;
            }
            let variant = Variant::new(key, record.pieces, self.records.pieces(key)?);
            if variant.agrees(table) {
                self.reconcile(&variant)?;
                return Ok(Some(Arc::new(variant)));
            }
        }
        Ok(None)
    }

    /// Drops the durable marks of pieces that a variant's file is too short for, and makes the file if it is gone.
    fn reconcile(&self, variant: &Variant) -> Result<(), StoreError> {
        let key = variant.key();
        let len = self.disk.len(key).map_err(|source| blob_io("opening", key, source))?;
        let reachable = |piece| variant.readable(piece).is_some_and(|encoded| encoded.end <= len.unwrap_or(0));
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
        self.disk.create(key(number)).map_err(|source| blob_io("making", key(number), source))?;
        Ok(Arc::new(Variant::new(key(number), table.len(), BTreeMap::new())))
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

    fn write(&self, handle: &BlobHandle, piece: u32, encoded: &[u8]) -> Result<bool, StoreError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(StoreError::Closed);
        }
        let (variant, key) = (&handle.variant, handle.key());
        if handle.table.piece(piece).is_none() {
            return Err(StoreError::UnknownPiece { blob: key.blob, piece });
        }
        let Some(ticket) = variant.begin_write(piece, encoded.len())? else {
            return Ok(false);
        };
        let outcome = self.disk.write(key, ticket.encoded.start, encoded);
        let kept = variant.end_write(ticket, outcome.is_ok().then(|| handle.table.clone()));
        outcome.map_err(|source| blob_io("writing", key, source))?;
        if kept {
            lock(&self.dirty).insert(key, variant.clone());
        }
        Ok(kept)
    }

    fn read(&self, variant: &Variant, piece: u32) -> Result<Option<Bytes>, StoreError> {
        let Some(encoded) = variant.readable(piece) else {
            return Ok(None);
        };
        let len = (encoded.end - encoded.start) as usize;
        match self.disk.read(variant.key(), encoded.start, len) {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(error) if matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::NotFound) => {
                self.forget(variant, piece).map(|()| None)
            }
            Err(source) => Err(blob_io("reading", variant.key(), source)),
        }
    }

    fn forget(&self, variant: &Variant, piece: u32) -> Result<(), StoreError> {
        let _flushing = lock(&self.flushing);
        match variant.forget(piece) {
            Some(record) => {
                Ok(self.records.commit(&[Change::Piece(variant.key(), piece, record)], Survives::PowerCut)?)
            }
            None => Ok(()),
        }
    }
}

/// A blob of the store as one image describes it. Cheap to clone.
///
/// Other handles of the same variant see the same pieces; those of images that disagree have another variant.
#[derive(Clone)]
pub struct BlobHandle {
    blobs: Arc<Blobs>,
    variant: Arc<Variant>,
    table: Arc<PieceTable>,
}

impl fmt::Debug for BlobHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobHandle").field("key", &self.key()).finish_non_exhaustive()
    }
}

impl BlobHandle {
    /// Which variant this is.
    pub fn key(&self) -> BlobKey {
        self.variant.key()
    }

    /// The image's description of the blob.
    pub fn table(&self) -> &Arc<PieceTable> {
        &self.table
    }

    /// Fingerprint of a piece that this or another image of the variant names. Who asks for a piece with another
    /// fingerprint means something else.
    pub fn fingerprint(&self, piece: u32) -> Option<Fingerprint> {
        self.variant.fingerprint(piece)
    }

    /// Whether a piece may be read and served.
    pub fn is_present(&self, piece: u32) -> bool {
        self.variant.is_present(piece)
    }

    /// The pieces that may be read and served now, also those that only other images of the variant name.
    pub fn present(&self) -> Bitfield {
        self.variant.present()
    }

    /// The pieces that a crash now would leave.
    pub fn durable(&self) -> Bitfield {
        self.variant.durable()
    }

    /// Keeps a piece. The caller has verified it: [`PieceTable::decode`] of *this handle's* table has accepted these
    /// very bytes. Present on return; does not wait for a sync.
    ///
    /// Returns whether this call made it present: not when it already was, or when another thread is writing it now,
    /// or when the disk failed to sync the blob meanwhile. [`StoreError::Full`] when there is no room: go on without.
    pub fn write(&self, piece: u32, encoded: &[u8]) -> Result<bool, StoreError> {
        self.blobs.write(self, piece, encoded)
    }

    /// The encoded bytes of a piece, or `None` when it is not present. A piece that the disk has lost is forgotten
    /// and is `None`. A disk may also lie: decode, that is verify, what comes, and [`forget`](Self::forget) it when
    /// that fails.
    pub fn read(&self, piece: u32) -> Result<Option<Bytes>, StoreError> {
        self.blobs.read(&self.variant, piece)
    }

    /// A piece is damaged on disk: it is not present any more and may be written again. May wait for a running flush.
    pub fn forget(&self, piece: u32) -> Result<(), StoreError> {
        self.blobs.forget(&self.variant, piece)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each of these is left consistent at every point where the code could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn blob_io(action: &str, key: BlobKey, source: io::Error) -> StoreError {
    StoreError::io(format!("{action} blob {} (variant {})", key.blob, key.variant), source)
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
