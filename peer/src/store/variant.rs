//! One reading of a blob in memory: which pieces images have declared, and how far each piece has come.
//!
//! ```text
//! declared --begin_write--> writing --end_write--> fresh --take_fresh--> (being synced) --durable--> durable
//!     ^                        |                     |                         |                        |
//!     +------- it failed ------+--------- lost: the sync failed ---------------+------- forget ---------+
//! ```
//!
//! *Present* are fresh, being synced and durable. An eviction makes everything declared and nothing more, and the variant
//! unrecorded: nothing of it is on disk until somebody writes again. The declared pieces of a variant never overlap in the stored blob,
//! and lie in the order of their numbers: so writing one can never touch the bytes of another. No IO here.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use shoal_proto::{Bitfield, Fingerprint};
use shoal_rafs::{Piece, PieceTable};

use super::StoreError;
use crate::index::{BlobKey, PieceRecord};

/// Fresh pieces, each with the table of an image that names it.
pub(super) type Fresh = BTreeMap<u32, Arc<PieceTable>>;

/// Shared by all handles of a variant.
pub(super) struct Variant {
    key: BlobKey,
    /// Held for look-ups and changes in memory, never during IO.
    state: Mutex<State>,
}

struct State {
    declared: BTreeMap<u32, PieceRecord>,
    present: Bitfield,
    writing: BTreeSet<u32>,
    fresh: Fresh,
    /// Counts failed syncs and evictions. A write that began before a failed sync may have lost pages to it, and a read
    /// that began before an eviction may have met the holes of a new file.
    epoch: u64,
    /// Whether the index knows the variant and it has a file. If not, the index may hold records that were true of an
    /// earlier file.
    recorded: bool,
}

/// Where a piece lies, as of a moment.
#[derive(Debug)]
pub(super) struct Readable {
    pub(super) encoded: Range<u64>,
    epoch: u64,
}

/// Leave to write one piece.
#[derive(Debug)]
pub(super) struct Ticket {
    piece: u32,
    epoch: u64,
    pub(super) encoded: Range<u64>,
}

impl Variant {
    /// A blob of `len` pieces, of which the durable ones of `declared` are present.
    pub(super) fn new(key: BlobKey, len: u32, declared: BTreeMap<u32, PieceRecord>) -> Self {
        let mut present = Bitfield::new(len);
        for (&piece, _) in declared.iter().filter(|(_, record)| record.durable) {
            present.insert(piece);
        }
        let (writing, fresh) = (BTreeSet::new(), BTreeMap::new());
        let state = State { declared, present, writing, fresh, epoch: 0, recorded: true };
        Self { key, state: Mutex::new(state) }
    }

    pub(super) fn key(&self) -> BlobKey {
        self.key
    }

    /// Pieces of the whole blob.
    pub(super) fn pieces(&self) -> u32 {
        self.state().present.len()
    }

    /// Whether an image may share this variant: same number of pieces, same fingerprint for each piece that both
    /// name, and no piece of one where another piece of the other lies.
    pub(super) fn agrees(&self, table: &PieceTable) -> bool {
        let state = self.state();
        state.present.len() == table.len() && table.pieces().all(|(number, piece)| state.agrees_on(number, piece))
    }

    /// The pieces of an image that have not been declared yet.
    pub(super) fn undeclared(&self, table: &PieceTable) -> Vec<(u32, PieceRecord)> {
        let state = self.state();
        let new = table.pieces().filter(|(number, _)| !state.declared.contains_key(number));
        new.map(|(number, piece)| (number, declaration(piece))).collect()
    }

    /// Adds what [`undeclared`](Self::undeclared) returned for an image that agrees.
    pub(super) fn declare(&self, pieces: Vec<(u32, PieceRecord)>) {
        self.state().declared.extend(pieces);
    }

    pub(super) fn fingerprint(&self, piece: u32) -> Option<Fingerprint> {
        Some(self.state().declared.get(&piece)?.fingerprint)
    }

    pub(super) fn is_present(&self, piece: u32) -> bool {
        self.state().present.contains(piece)
    }

    pub(super) fn present(&self) -> Bitfield {
        self.state().present.clone()
    }

    /// Pieces that are present, and their encoded bytes.
    pub(super) fn usage(&self) -> (u64, u64) {
        let state = self.state();
        sum(state.declared.iter().filter(|(piece, _)| state.present.contains(**piece)).map(|(_, record)| record))
    }

    pub(super) fn durable(&self) -> Bitfield {
        let state = self.state();
        let mut durable = Bitfield::new(state.present.len());
        for (&piece, _) in state.declared.iter().filter(|(_, record)| record.durable) {
            durable.insert(piece);
        }
        durable
    }

    /// Where to read a piece; `None` unless it is present.
    pub(super) fn readable(&self, piece: u32) -> Option<Readable> {
        let state = self.state();
        let record = state.declared.get(&piece)?;
        let readable = || Readable { encoded: record.encoded.clone(), epoch: state.epoch };
        state.present.contains(piece).then(readable)
    }

    /// Whether what was read from there since is the piece.
    pub(super) fn still(&self, readable: &Readable) -> bool {
        self.state().epoch == readable.epoch
    }

    /// Whether the index knows the variant and it has a file.
    pub(super) fn is_recorded(&self) -> bool {
        self.state().recorded
    }

    /// The index knows all that is declared, and there is an empty file.
    pub(super) fn recorded(&self) {
        self.state().recorded = true;
    }

    /// All that images have declared, as the index is to know it of an empty file.
    pub(super) fn declarations(&self) -> Vec<(u32, PieceRecord)> {
        self.state().declared.iter().map(|(piece, record)| (*piece, record.clone())).collect()
    }

    /// Nothing is present any more, nor recorded. False, and nothing is changed, while a piece is being written.
    pub(super) fn vacate(&self) -> bool {
        let mut state = self.state();
        if !state.writing.is_empty() {
            return false;
        }
        state.epoch += 1;
        state.recorded = false;
        state.present = Bitfield::new(state.present.len());
        state.fresh.clear();
        state.declared.values_mut().for_each(|record| record.durable = false);
        true
    }

    /// Leave to write a declared piece of this length; `None` when it is present or somebody else is writing it.
    pub(super) fn begin_write(&self, piece: u32, len: usize) -> Result<Option<Ticket>, StoreError> {
        let blob = self.key.blob;
        let mut state = self.state();
        let record = state.declared.get(&piece).ok_or(StoreError::UnknownPiece { blob, piece })?;
        let encoded = record.encoded.clone();
        let (expected, found) = (encoded.end - encoded.start, len as u64);
        if expected != found {
            return Err(StoreError::WrongLength { blob, piece, expected, found });
        }
        if state.present.contains(piece) || !state.writing.insert(piece) {
            return Ok(None);
        }
        Ok(Some(Ticket { piece, epoch: state.epoch, encoded }))
    }

    /// Ends a write. With a table it succeeded, and the piece is present unless a sync failed meanwhile: returns
    /// whether it is.
    pub(super) fn end_write(&self, ticket: Ticket, written: Option<Arc<PieceTable>>) -> bool {
        let mut state = self.state();
        state.writing.remove(&ticket.piece);
        let Some(table) = written.filter(|_| state.epoch == ticket.epoch) else {
            return false;
        };
        state.fresh.insert(ticket.piece, table);
        state.present.insert(ticket.piece);
        true
    }

    /// Takes the fresh pieces for syncing. Each must come back through one of the three calls below.
    pub(super) fn take_fresh(&self) -> Fresh {
        std::mem::take(&mut self.state().fresh)
    }

    /// The sync failed: whatever was not durable is not present either, for the kernel may have dropped its pages and
    /// a second sync would succeed without them.
    pub(super) fn lose(&self, taken: Fresh) {
        let mut state = self.state();
        let state = &mut *state;
        state.epoch += 1;
        for piece in taken.into_keys().chain(std::mem::take(&mut state.fresh).into_keys()) {
            state.present.remove(piece);
        }
    }

    /// Synced, but could not be recorded: to be tried again.
    pub(super) fn put_back(&self, piece: u32, table: Arc<PieceTable>) {
        self.state().fresh.insert(piece, table);
    }

    /// The record to write for a synced piece.
    pub(super) fn durable_record(&self, piece: u32) -> Option<PieceRecord> {
        let record = self.state().declared.get(&piece)?.clone();
        Some(PieceRecord { durable: true, ..record })
    }

    /// The record was written.
    pub(super) fn mark_durable(&self, piece: u32) {
        if let Some(record) = self.state().declared.get_mut(&piece) {
            record.durable = true;
        }
    }

    /// A piece that turned out to be damaged is declared and nothing more. Returns the record to write if it was
    /// durable.
    pub(super) fn forget(&self, piece: u32) -> Option<PieceRecord> {
        let mut state = self.state();
        state.present.remove(piece);
        state.fresh.remove(&piece);
        let record = state.declared.get_mut(&piece)?;
        std::mem::take(&mut record.durable).then(|| record.clone())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many pieces these are, and their encoded bytes.
pub(super) fn sum<'a>(records: impl Iterator<Item = &'a PieceRecord>) -> (u64, u64) {
    let lengths = records.map(|record| record.encoded.end - record.encoded.start);
    lengths.fold((0, 0), |(pieces, bytes), length| (pieces + 1, bytes + length))
}

impl State {
    fn agrees_on(&self, number: u32, piece: &Piece) -> bool {
        let kept = piece.kept();
        if let Some(record) = self.declared.get(&number) {
            return record.fingerprint == piece.fingerprint() && record.encoded == kept;
        }
        let before = self.declared.range(..number).next_back();
        let after = self.declared.range(number..).next();
        before.is_none_or(|(_, record)| record.encoded.end <= kept.start)
            && after.is_none_or(|(_, record)| kept.end <= record.encoded.start)
    }
}

fn declaration(piece: &Piece) -> PieceRecord {
    PieceRecord { fingerprint: piece.fingerprint(), encoded: piece.kept(), durable: false }
}

#[cfg(test)]
mod tests {
    use shoal_proto::{Algorithm, BlobId, Digest};
    use shoal_rafs::{Chunk, Compressor};

    use super::*;

    fn variant() -> (Variant, Arc<PieceTable>) {
        let digest = Digest { algorithm: Algorithm::Blake3, bytes: [1; 32] };
        let chunk = Chunk { index: 0, digest, decoded_offset: 0, decoded_len: 4, compressed: false };
        let piece = Piece::plain(chunk, 0, 4, Compressor::None);
        let blob = BlobId::new([1; 32]);
        let table = Arc::new(PieceTable::new(blob, 4, 1, vec![piece]).unwrap());
        let variant = Variant::new(BlobKey { blob, variant: 0 }, 1, BTreeMap::new());
        variant.declare(variant.undeclared(&table));
        (variant, table)
    }

    #[test]
    fn one_writes_at_a_time_and_a_failed_write_may_be_repeated() {
        let (variant, table) = variant();
        let first = variant.begin_write(0, 4).unwrap().unwrap();
        assert!(variant.begin_write(0, 4).unwrap().is_none());
        assert!(!variant.end_write(first, None));
        assert!(!variant.is_present(0));
        let second = variant.begin_write(0, 4).unwrap().unwrap();
        assert!(variant.end_write(second, Some(table)));
        assert!(variant.begin_write(0, 4).unwrap().is_none());
        assert_eq!(variant.readable(0).unwrap().encoded, 0..4);
    }

    #[test]
    fn a_write_during_a_failed_sync_does_not_count() {
        let (variant, table) = variant();
        let ticket = variant.begin_write(0, 4).unwrap().unwrap();
        variant.lose(variant.take_fresh());
        assert!(!variant.end_write(ticket, Some(table.clone())));
        assert!(!variant.is_present(0) && variant.take_fresh().is_empty());
        let ticket = variant.begin_write(0, 4).unwrap().unwrap();
        assert!(variant.end_write(ticket, Some(table)));
    }

    #[test]
    fn a_variant_is_vacated_between_writes_and_reads_across_it_do_not_count() {
        let (variant, table) = variant();
        let ticket = variant.begin_write(0, 4).unwrap().unwrap();
        assert!(!variant.vacate());
        assert!(variant.end_write(ticket, Some(table.clone())));
        let before = variant.readable(0).unwrap();
        assert!(variant.still(&before) && variant.vacate() && !variant.still(&before));
        assert!(!variant.is_present(0) && !variant.is_recorded() && variant.take_fresh().is_empty());
        assert_eq!(variant.declarations().len(), 1);
        let ticket = variant.begin_write(0, 4).unwrap().unwrap();
        assert!(variant.end_write(ticket, Some(table)));
    }
}
