//! Doubles of disk and index that crash: what was not synced is lost, or not, or in part.

use std::{
    collections::BTreeMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
};

use shoal_proto::{BlobId, Digest, ObjectId};

use super::disk::Disk;
use crate::index::{BlobKey, Change, ChunkPlace, IndexError, PieceRecord, Records, Survives, VariantRecord};

/// Bytes that reach the disk whole or not at all.
const SECTOR: usize = 8;

/// A machine that one store runs on at a time. Clones are the same machine.
#[derive(Clone, Default)]
pub(super) struct Machine(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    files: BTreeMap<BlobKey, File>,
    /// What programs see, and the changes since the last synced one, each with the records before it.
    records: Tables,
    unsynced: Vec<Tables>,
    /// Operations left until the power goes; afterwards everything fails.
    steps_left: Option<u32>,
    /// The error that each of the coming operations on files ends with.
    failures: Vec<io::ErrorKind>,
    /// Whether nothing more can be written, neither to files nor to the index, before something is removed.
    full: bool,
    random: u64,
}

#[derive(Default, Clone)]
struct File {
    seen: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
    list: Option<Vec<u8>>,
}

#[derive(Default, Clone)]
struct Tables {
    variants: BTreeMap<BlobKey, VariantRecord>,
    pieces: BTreeMap<(BlobKey, u32), PieceRecord>,
    places: BTreeMap<Digest, ChunkPlace>,
}

impl Machine {
    /// Lets `steps` more operations happen.
    pub(super) fn lose_power_after(&self, steps: u32) {
        self.state().steps_left = Some(steps);
    }

    /// Whether it has come to that.
    pub(super) fn is_off(&self) -> bool {
        self.state().steps_left == Some(0)
    }

    /// The next operation on files fails.
    pub(super) fn fail_next(&self, error: io::ErrorKind) {
        self.state().failures.push(error);
    }

    /// The disk is full until a file is removed, or this is called again.
    pub(super) fn fill(&self, full: bool) {
        self.state().full = full;
    }

    /// Turns the machine off and on again: of what was not synced, `seed` decides what is there.
    pub(super) fn restart(&self, seed: u64) {
        let mut state = self.state();
        state.random = seed;
        let mut files = std::mem::take(&mut state.files);
        for file in files.values_mut() {
            state.keep_some(file);
            file.seen = file.durable.clone();
        }
        state.files = files;
        let choices = state.unsynced.len() + 1;
        if let Some(records) = state.choose(choices).checked_sub(1).map(|at| state.unsynced[at].clone()) {
            state.records = records;
        }
        state.unsynced.clear();
        state.steps_left = None;
        state.failures.clear();
        state.full = false;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// One operation: its error, if it fails.
    fn step(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        match &mut state.steps_left {
            Some(0) => return Err(io::Error::other("no power")),
            Some(steps) => *steps -= 1,
            None => {}
        }
        Ok(state)
    }

    fn file_step(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.step()?;
        match state.failures.pop() {
            Some(error) => Err(error.into()),
            None => Ok(state),
        }
    }
}

impl State {
    fn room(&self) -> io::Result<()> {
        if self.full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn choose(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.random >> 33) as usize % below
    }

    /// Some of what is pending reaches the disk, sector by sector, and nothing is pending any more.
    fn keep_some(&mut self, file: &mut File) {
        for (offset, bytes) in std::mem::take(&mut file.pending) {
            for (at, sector) in bytes.chunks(SECTOR).enumerate() {
                if self.choose(2) == 0 {
                    put(&mut file.durable, offset + at * SECTOR, sector);
                }
            }
        }
    }
}

fn put(file: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    let end = offset + bytes.len();
    file.resize(file.len().max(end), 0);
    file[offset..end].copy_from_slice(bytes);
}

fn missing() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for Machine {
    fn create(&self, key: BlobKey) -> io::Result<()> {
        let mut state = self.file_step()?;
        state.room()?;
        state.files.insert(key, File::default());
        Ok(())
    }

    fn remove(&self, key: BlobKey) -> io::Result<()> {
        let mut state = self.file_step()?;
        if state.files.remove(&key).is_some_and(|file| !file.seen.is_empty()) {
            state.full = false;
        }
        Ok(())
    }

    fn keys(&self) -> io::Result<Vec<BlobKey>> {
        Ok(self.state().files.keys().copied().collect())
    }

    fn allocated(&self, key: BlobKey) -> io::Result<u64> {
        Ok(self.len(key)?.unwrap_or(0))
    }

    fn free(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn len(&self, key: BlobKey) -> io::Result<Option<u64>> {
        Ok(self.state().files.get(&key).map(|file| file.seen.len() as u64))
    }

    fn write(&self, key: BlobKey, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let outcome = self.file_step().and_then(|state| state.room());
        let mut state = self.state();
        let file = state.files.get_mut(&key).ok_or_else(missing)?;
        // A write that fails has still written a part.
        let written = if outcome.is_ok() { bytes } else { &bytes[..bytes.len() / 2] };
        put(&mut file.seen, offset as usize, written);
        file.pending.push((offset as usize, written.to_vec()));
        outcome
    }

    fn read(&self, key: BlobKey, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let state = self.state();
        let file = state.files.get(&key).ok_or_else(missing)?;
        let bytes = file.seen.get(offset as usize..offset as usize + len);
        bytes.map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn read_at_once(&self, key: BlobKey, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
        self.read(key, offset, len).map(Some)
    }

    fn sync(&self, key: BlobKey) -> io::Result<()> {
        let outcome = self.file_step().map(drop);
        let mut state = self.state();
        let mut file = state.files.remove(&key).ok_or_else(missing)?;
        if outcome.is_ok() {
            for (offset, bytes) in std::mem::take(&mut file.pending) {
                put(&mut file.durable, offset, &bytes);
            }
        } else {
            // As Linux does it: the pages count as clean from here on, written or not.
            state.keep_some(&mut file);
        }
        state.files.insert(key, file);
        outcome
    }

    fn put_list(&self, key: BlobKey, list: &[u8]) -> io::Result<()> {
        let mut state = self.file_step()?;
        state.files.get_mut(&key).ok_or_else(missing)?.list = Some(list.to_vec());
        Ok(())
    }

    fn list(&self, key: BlobKey) -> io::Result<Option<Vec<u8>>> {
        Ok(self.state().files.get(&key).and_then(|file| file.list.clone()))
    }
}

impl Records for Machine {
    fn variants(&self, blob: &BlobId) -> Result<BTreeMap<u32, VariantRecord>, IndexError> {
        let state = self.state();
        let variants = state.records.variants.iter().filter(|(key, _)| key.blob == *blob);
        Ok(variants.map(|(key, record)| (key.variant, *record)).collect())
    }

    fn all(&self) -> Result<Vec<(BlobKey, VariantRecord)>, IndexError> {
        Ok(self.state().records.variants.iter().map(|(key, record)| (*key, *record)).collect())
    }

    fn pieces(&self, key: BlobKey) -> Result<BTreeMap<u32, PieceRecord>, IndexError> {
        let state = self.state();
        let pieces = state.records.pieces.iter().filter(|((of, _), _)| *of == key);
        Ok(pieces.map(|((_, piece), record)| (*piece, record.clone())).collect())
    }

    fn piece(&self, key: BlobKey, piece: u32) -> Result<Option<PieceRecord>, IndexError> {
        Ok(self.state().records.pieces.get(&(key, piece)).cloned())
    }

    fn place(&self, digest: &Digest) -> Result<Option<ChunkPlace>, IndexError> {
        Ok(self.state().records.places.get(digest).copied())
    }

    fn forget_places(&self, gone: &dyn Fn(BlobKey) -> bool) -> Result<(), IndexError> {
        self.state().records.places.retain(|_, place| !gone(place.key));
        Ok(())
    }

    fn mounts(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError> {
        Ok(BTreeMap::new())
    }

    fn pins(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError> {
        Ok(BTreeMap::new())
    }

    fn layer(&self, _: ObjectId) -> Result<Option<Vec<u8>>, IndexError> {
        Ok(None)
    }

    fn commit(&self, changes: &[Change], survives: Survives) -> Result<(), IndexError> {
        let failed = |source| IndexError::Damaged { path: PathBuf::new(), source };
        let mut state = self.step().map_err(failed)?;
        state.room().map_err(failed)?;
        let before = state.records.clone();
        state.unsynced.push(before);
        for change in changes.iter().cloned() {
            let records = &mut state.records;
            match change {
                Change::Variant(key, record) => drop(records.variants.insert(key, record)),
                Change::DropVariant(key) => {
                    records.variants.remove(&key);
                    records.pieces.retain(|(of, _), _| *of != key);
                }
                Change::Piece(key, piece, record) => drop(records.pieces.insert((key, piece), record)),
                Change::Digest(digest, place) => drop(records.places.insert(digest, place)),
                Change::Mount(..)
                | Change::DropMount(..)
                | Change::Pin(..)
                | Change::DropPin(..)
                | Change::Layer(..) => {
                    panic!("no mounts or pins on this machine")
                }
            }
        }
        if survives == Survives::PowerCut {
            state.unsynced.clear();
        }
        Ok(())
    }
}
