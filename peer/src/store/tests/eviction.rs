//! Limits, holds and eviction: the real store, in sequences against a plain model, and what is read meanwhile.

use std::collections::BTreeSet;

use proptest::prelude::*;
use shoal_proto::Bitfield;

use super::holdings::Holding;
use super::*;
use crate::index::{Change, Survives, VariantRecord};

/// Bytes of a piece here: with a block of 4096 a piece takes up just itself.
const BLOCK: u32 = 4096;
const PIECES: u32 = 4;
const BLOBS: u8 = 5;
/// Room for three whole blobs; above the high mark of 90% at eleven pieces, below the low one at nine.
const LIMIT: u64 = 12 * BLOCK as u64;

fn block(blob: u8, piece: u32) -> Vec<u8> {
    (0..BLOCK).map(|at| (at * 31 + piece * 7 + u32::from(blob) * 101 + at / 256) as u8).collect()
}

fn image(blob: u8) -> Arc<PieceTable> {
    let pieces = (0..PIECES).map(|index| {
        let digest = digest(&block(blob, index));
        let decoded_offset = u64::from(index) * u64::from(BLOCK);
        let chunk = Chunk { index, digest, decoded_offset, decoded_len: BLOCK, compressed: false };
        Piece::plain(chunk, decoded_offset, BLOCK, Compressor::None)
    });
    let size = u64::from(PIECES) * u64::from(BLOCK);
    Arc::new(PieceTable::new(BlobId::new([blob; 32]), size, PIECES, pieces.collect()).unwrap())
}

fn limited(max_bytes: u64) -> StoreOptions {
    StoreOptions { limits: StoreLimits { max_bytes, ..StoreLimits::default() }, ..manual() }
}

fn key(blob: u8) -> BlobKey {
    BlobKey { blob: BlobId::new([blob; 32]), variant: 0 }
}

fn only(blob: u8) -> Footprint {
    Footprint { blobs: vec![key(blob)], ..Footprint::default() }
}

fn fill(store: &Store, blob: u8) -> BlobHandle {
    let handle = store.open_blob(&image(blob)).unwrap();
    (0..PIECES).for_each(|piece| assert!(handle.write(piece, &block(blob, piece)).unwrap()));
    handle
}

fn blobs_on_disk(dir: &tempfile::TempDir) -> usize {
    fs::read_dir(dir.path().join("blobs")).unwrap().count()
}

#[derive(Debug, Clone)]
enum Op {
    Write {
        blob: u8,
        piece: u32,
    },
    Read {
        blob: u8,
        piece: u32,
    },
    Hold(u8),
    Release(u8),
    Pin(u8),
    Unpin(u8),
    Evict(u8),
    LookAfter,
    /// Without closing it, which is what a killed process leaves; holds end with it, pins do not.
    Kill,
}

fn op() -> impl Strategy<Value = Op> {
    let blob = || 0..BLOBS;
    prop_oneof![
        12 => (blob(), 0..PIECES).prop_map(|(blob, piece)| Op::Write { blob, piece }),
        3 => (blob(), 0..PIECES).prop_map(|(blob, piece)| Op::Read { blob, piece }),
        2 => blob().prop_map(Op::Hold),
        2 => blob().prop_map(Op::Release),
        1 => blob().prop_map(Op::Pin),
        1 => blob().prop_map(Op::Unpin),
        1 => blob().prop_map(Op::Evict),
        2 => Just(Op::LookAfter),
        1 => Just(Op::Kill),
    ]
}

/// The store, and what must be true of it.
struct World {
    dir: tempfile::TempDir,
    store: Store,
    handles: Vec<BlobHandle>,
    held: BTreeMap<u8, Hold>,
    pinned: BTreeMap<u8, Hold>,
    /// What was written and may not have gone but by an eviction.
    written: BTreeSet<(u8, u32)>,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (store, handles) = Self::open(&dir);
        Self { dir, store, handles, held: BTreeMap::new(), pinned: BTreeMap::new(), written: BTreeSet::new() }
    }

    fn open(dir: &tempfile::TempDir) -> (Store, Vec<BlobHandle>) {
        let store = Store::open(dir.path(), limited(LIMIT)).unwrap();
        let handles = (0..BLOBS).map(|blob| store.open_blob(&image(blob)).unwrap()).collect();
        (store, handles)
    }

    fn present(&self) -> BTreeSet<(u8, u32)> {
        let of =
            |blob: u8| self.handles[usize::from(blob)].present().iter().map(move |piece| (blob, piece)).collect();
        (0..BLOBS).flat_map(|blob| -> Vec<_> { of(blob) }).collect()
    }

    fn is_needed(&self, blob: u8) -> bool {
        self.held.contains_key(&blob) || self.pinned.contains_key(&blob)
    }

    fn apply(&mut self, op: Op) {
        let before = self.present();
        match op {
            Op::Write { blob, piece } => match self.handles[usize::from(blob)].write(piece, &block(blob, piece)) {
                Ok(kept) => {
                    assert_eq!(kept, !before.contains(&(blob, piece)));
                    self.written.insert((blob, piece));
                }
                Err(StoreError::Full { .. }) => {
                    assert!(self.nothing_may_go_but(blob), "there was something to evict")
                }
                Err(error) => panic!("{error}"),
            },
            Op::Read { blob, piece } => {
                let read = self.handles[usize::from(blob)].read(piece).unwrap();
                assert_eq!(read.is_some(), before.contains(&(blob, piece)));
            }
            Op::Hold(blob) => drop(self.held.insert(blob, self.store.hold(only(blob)))),
            Op::Release(blob) => drop(self.held.remove(&blob)),
            Op::Pin(blob) => {
                let manifest = ObjectId::new([blob; 32]);
                let pin = PinRecord { reference: blob.to_string(), manifest, needs: only(blob), until: None };
                self.store.put_pin(&pin).unwrap();
                self.pinned.insert(blob, self.store.hold(pin.needs));
            }
            Op::Unpin(blob) => {
                self.store.remove_pin(&blob.to_string()).unwrap();
                self.pinned.remove(&blob);
            }
            Op::Evict(blob) => {
                self.store.evict(&only(blob)).unwrap();
                let gone = !self.present().iter().any(|(of, _)| *of == blob);
                assert!(gone || self.is_needed(blob));
            }
            Op::LookAfter => self.look_after(),
            Op::Kill => self.kill(),
        }
        self.check(&before);
    }

    /// Whether all the room is taken by what is needed and by `blob` itself.
    fn nothing_may_go_but(&self, blob: u8) -> bool {
        let kept = self.store.kept_blobs();
        kept.iter().all(|kept| kept.held || kept.disk_bytes == 0 || kept.key == key(blob))
    }

    fn look_after(&mut self) {
        self.store.blobs.look_after();
        let used = self.store.usage().unwrap().disk_bytes;
        let over = used > LIMIT * 9 / 10;
        assert!(!over || self.store.kept_blobs().iter().all(|kept| kept.held || kept.disk_bytes == 0));
    }

    fn kill(&mut self) {
        let durable: Vec<Bitfield> = self.handles.iter().map(BlobHandle::durable).collect();
        let pins: Vec<_> = self.pinned.keys().map(ToString::to_string).collect();
        (self.held, self.pinned) = Default::default();
        self.handles.clear();
        // The old store must have ended before a new one owns the folder.
        let elsewhere = tempfile::tempdir().unwrap();
        self.store = Store::open(elsewhere.path(), manual()).unwrap();
        (self.store, self.handles) = Self::open(&self.dir);
        assert_eq!(self.handles.iter().map(BlobHandle::present).collect::<Vec<_>>(), durable);
        for pin in self.store.pins().unwrap() {
            assert!(pins.contains(&pin.reference));
            self.pinned.insert(pin.reference.parse().unwrap(), self.store.hold(pin.needs));
        }
        assert_eq!(self.pinned.len(), pins.len());
        self.store.records_restored();
        self.written = self.present();
    }

    /// What holds after every step: nothing false, nothing lost that was needed, never above the limit.
    fn check(&mut self, before: &BTreeSet<(u8, u32)>) {
        let now = self.present();
        assert!(now.is_subset(&self.written), "{now:?} of {:?}", self.written);
        self.handles.iter().for_each(assert_all_present_verify);
        for (blob, piece) in before.difference(&now) {
            let whole = !now.iter().any(|(of, _)| of == blob);
            // A crash forgets single pieces; an eviction only whole blobs.
            assert!(!self.written.contains(&(*blob, *piece)) || (whole && !self.is_needed(*blob)));
        }
        self.written.retain(|piece| now.contains(piece));
        let usage = self.store.usage().unwrap();
        assert!(usage.disk_bytes <= LIMIT, "{usage:?}");
        assert_eq!(usage.pieces as usize, now.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_limit_holds_and_so_do_holds(ops in prop::collection::vec(op(), 1..60)) {
        let mut world = World::new();
        ops.into_iter().for_each(|op| world.apply(op));
    }
}

#[test]
fn the_blob_that_was_used_longest_ago_goes_down_to_the_low_mark() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), limited(LIMIT)).unwrap();
    let handles: Vec<_> = (0..3).map(|blob| fill(&store, blob)).collect();
    assert!(handles[0].read(1).unwrap().is_some());
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let tell = told.clone();
    store.on_evicted(move |key| tell.lock().unwrap().push(key));
    store.blobs.look_after();
    assert_eq!(*told.lock().unwrap(), [key(1)]);
    assert_eq!((handles[0].present().count(), handles[1].present().count()), (PIECES, 0));
    assert_eq!((store.usage().unwrap().disk_bytes, blobs_on_disk(&dir)), (8 * u64::from(BLOCK), 2));
    // Nothing that was in it is found by digest any more.
    assert_eq!(store.find_digest(&digest(&block(1, 0))).unwrap(), None);
    // Who still has it open may fill it again.
    assert!(handles[1].write(2, &block(1, 2)).unwrap());
    assert_all_present_verify(&handles[1]);
}

#[test]
fn other_limits_count_from_the_next_write_and_the_next_round_on() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), limited(0)).unwrap();
    let handles: Vec<_> = (0..4).map(|blob| fill(&store, blob)).collect();
    store.blobs.look_after();
    let present = || handles.iter().map(|handle| handle.present().count()).collect::<Vec<_>>();
    assert_eq!(present(), [PIECES; 4]);
    // Twelve pieces fit, down to nine of which the next round goes.
    store.adjust(StoreLimits { max_bytes: LIMIT, ..StoreLimits::default() });
    assert_eq!((store.limits().max_bytes, present()), (LIMIT, vec![PIECES; 4]));
    store.blobs.look_after();
    assert_eq!(present(), [0, 0, PIECES, PIECES]);
    store.adjust(StoreLimits { max_bytes: 8 * u64::from(BLOCK), ..StoreLimits::default() });
    assert!(handles[0].write(0, &block(0, 0)).unwrap(), "what was used longest ago goes for it");
    assert_eq!(present()[2], 0);
    store.adjust(StoreLimits::default());
    fill(&store, 1);
    fill(&store, 2);
    store.blobs.look_after();
    assert_eq!(present(), [1, PIECES, PIECES, PIECES]);
}

#[test]
fn the_order_of_use_outlives_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let object = |n: u8| (ObjectId::new(Sha256::digest([n]).into()), [n]);
    {
        let store = Store::open(dir.path(), manual()).unwrap();
        (0..2).for_each(|blob| drop(fill(&store, blob)));
        (0..2).for_each(|n| store.put_object(object(n).0, &object(n).1).unwrap());
        let long_ago = crate::store::holdings::unix_seconds() - 1000;
        let old = VariantRecord { pieces: PIECES, last_use: long_ago };
        store.close().unwrap();
        store.blobs.records.commit(&[Change::Variant(key(1), old)], Survives::Kill).unwrap();
        store.blobs.files.record_use(Holding::Object(object(0).0), long_ago - 1);
    }
    // Up to the low mark there is room for one blob and one object.
    let store = Store::open(dir.path(), limited(7 * u64::from(BLOCK))).unwrap();
    store.blobs.look_after();
    assert_eq!(store.kept_blobs().iter().map(|kept| kept.key).collect::<Vec<_>>(), [key(0)]);
    assert_eq!(store.object_ids(), [object(1).0]);
}

#[test]
fn what_is_larger_than_the_limit_is_refused_and_nothing_goes_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), limited(4 * u64::from(BLOCK))).unwrap();
    let small = fill(&store, 0);
    let large = vec![7; 5 * BLOCK as usize];
    let refused = store.put_object(ObjectId::new(Sha256::digest(&large).into()), &large);
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    assert!(small.present().is_full());
}

#[test]
fn a_held_blob_fills_the_store_and_the_rest_of_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), limited(3 * u64::from(BLOCK))).unwrap();
    let hold = store.hold(only(0));
    let handle = store.open_blob(&image(0)).unwrap();
    let kept: Vec<_> = (0..PIECES).map(|piece| handle.write(piece, &block(0, piece)).is_ok()).collect();
    assert_eq!(kept, [true, true, true, false]);
    let other = store.open_blob(&image(1)).unwrap();
    assert!(matches!(other.write(0, &block(1, 0)), Err(StoreError::Full { .. })));
    assert_all_present_verify(&handle);
    drop(hold);
    // Room is found as soon as there is some.
    assert!(other.write(0, &block(1, 0)).unwrap());
    assert!(handle.present().is_empty());
}

#[test]
fn readers_of_what_goes_and_comes_see_right_bytes_or_none() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path(), manual()).unwrap();
    let handle = fill(&store, 0);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for piece in 0..PIECES {
                        let read = handle.read(piece).unwrap();
                        assert!(read.is_none_or(|bytes| bytes == block(0, piece)), "piece {piece}");
                    }
                }
            });
        }
        for round in 0..200 {
            store.evict(&only(0)).unwrap();
            // The last piece first: the others are holes of the new file.
            for piece in [3, round % 3] {
                handle.write(piece, &block(0, piece)).unwrap();
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}

#[test]
fn an_image_can_be_opened_on_a_full_disk_and_is_kept_once_there_is_room() {
    let machine = crate::store::crash::Machine::default();
    let files = crate::store::whole_files::WholeFiles::open(tempfile::tempdir().unwrap().path()).unwrap();
    let (records, disk) = (Box::new(machine.clone()), Box::new(machine.clone()));
    let blobs = crate::store::blobs::Blobs::open(records, disk, files, &manual()).unwrap();
    let old = blobs.open_blob(&image(0)).unwrap();
    assert!(old.write(0, &block(0, 0)).unwrap());
    blobs.flush().unwrap();
    let hold = blobs.holdings.hold(only(0));
    machine.fill(true);
    let new = blobs.open_blob(&image(1)).unwrap();
    assert!(matches!(new.write(0, &block(1, 0)), Err(StoreError::Full { .. })));
    assert!(old.is_present(0) && new.present().is_empty());
    drop(hold);
    // The old one goes, although the index cannot even be told that at first.
    assert!(new.write(0, &block(1, 0)).unwrap());
    assert!(old.present().is_empty());
    assert_eq!(blobs.flush().unwrap(), 1);
    drop((old, new));
    let again = blobs.open_blob(&image(0)).unwrap();
    assert!(again.present().is_empty());
    assert!(again.write(1, &block(0, 1)).unwrap());
    assert_all_present_verify(&again);
}
