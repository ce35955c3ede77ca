//! Power cuts at every point, against a machine that loses what was not synced.

use std::{collections::BTreeSet, io};

use proptest::{prelude::*, test_runner::TestCaseError};

use super::*;
use crate::store::{blobs::Blobs, crash::Machine, whole_files::WholeFiles};

const PIECES: u32 = 6;

#[derive(Debug, Clone)]
enum Op {
    Write {
        image: usize,
        piece: u32,
    },
    Forget {
        image: usize,
        piece: u32,
    },
    Flush,
    FailNext,
    /// The disk is full until something is evicted.
    Fill,
    Evict {
        image: usize,
    },
    LosePower {
        after: u32,
        seed: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (0..4usize, 0..PIECES);
    prop_oneof![
        8 => place().prop_map(|(image, piece)| Op::Write { image, piece }),
        1 => place().prop_map(|(image, piece)| Op::Forget { image, piece }),
        3 => Just(Op::Flush),
        1 => Just(Op::FailNext),
        1 => Just(Op::Fill),
        1 => (0..4usize).prop_map(|image| Op::Evict { image }),
        1 => (0..12u32, any::<u64>()).prop_map(|(after, seed)| Op::LosePower { after, seed }),
    ]
}

/// The second agrees with the first and names less, the third disagrees with both, the fourth is of another blob.
fn images() -> Vec<Arc<PieceTable>> {
    let all = |seed| (0..PIECES).map(|piece| (piece, seed)).collect::<Vec<_>>();
    vec![
        table(1, PIECES, &all(1)),
        table(1, PIECES, &[(0, 1), (4, 1)]),
        table(1, PIECES, &all(2)),
        table(2, PIECES, &all(3)),
    ]
}

fn open(machine: &Machine) -> (Arc<Blobs>, Vec<BlobHandle>) {
    let files = WholeFiles::open(tempfile::tempdir().unwrap().path()).unwrap();
    let (records, disk) = (Box::new(machine.clone()), Box::new(machine.clone()));
    let blobs = Blobs::open(records, disk, files, &StoreOptions::default()).unwrap();
    let handles = images().iter().map(|table| blobs.open_blob(table).unwrap()).collect();
    (blobs, handles)
}

fn durable(handles: &[BlobHandle]) -> BTreeSet<(BlobKey, u32)> {
    handles
        .iter()
        .flat_map(|handle| handle.durable().iter().map(|piece| (handle.key(), piece)).collect::<Vec<_>>())
        .collect()
}

fn present(handles: &[BlobHandle]) -> BTreeSet<(BlobKey, u32)> {
    handles
        .iter()
        .flat_map(|handle| handle.present().iter().map(|piece| (handle.key(), piece)).collect::<Vec<_>>())
        .collect()
}

/// What is durable before a power cut is there after it, all that is there is right, and what was forgotten is not.
fn holds(ops: Vec<Op>, last: u64) -> Result<(), TestCaseError> {
    let machine = Machine::default();
    let (mut blobs, mut handles) = open(&machine);
    let mut promised = durable(&handles);
    let mut forgotten = BTreeSet::new();
    let mut cut = None;
    for op in ops.into_iter().chain([Op::LosePower { after: 0, seed: last }]) {
        match op {
            Op::Write { image, piece } if handles[image].table().piece(piece).is_some() => {
                let bytes = bytes_of(handles[image].table(), piece);
                // May fail for want of power or by a failure that was asked for.
                if handles[image].write(piece, &bytes).is_ok_and(|kept| kept) {
                    prop_assert!(handles[image].is_present(piece));
                    forgotten.remove(&(handles[image].key(), piece));
                }
                // What was not used for longest may have gone for it.
                promised.retain(|promise| durable(&handles).contains(promise));
            }
            Op::Write { .. } => {}
            Op::Forget { image, piece } => {
                // What an eviction has taken out of sight, though not off the disk, need not be forgotten.
                let seen = handles[image].is_present(piece);
                if handles[image].forget(piece).is_ok() && seen {
                    forgotten.insert((handles[image].key(), piece));
                }
                promised.remove(&(handles[image].key(), piece));
                prop_assert!(!handles[image].is_present(piece));
            }
            Op::Flush => {
                if blobs.flush().is_ok() {
                    prop_assert_eq!(&durable(&handles), &present(&handles));
                }
                promised = durable(&handles);
            }
            Op::Fill => machine.fill(true),
            Op::Evict { image } => {
                let key = handles[image].key();
                let footprint = Footprint { blobs: vec![key], ..Footprint::default() };
                let whole = blobs.evict(&footprint).is_ok();
                // Nothing of it counts any more, whether the index and the files could follow or not.
                prop_assert!(handles[image].present().is_empty());
                promised.retain(|(of, _)| *of != key);
                if whole {
                    forgotten.extend((0..PIECES).map(|piece| (key, piece)));
                }
            }
            Op::FailNext => machine.fail_next(io::ErrorKind::StorageFull),
            Op::LosePower { after, seed } => {
                machine.lose_power_after(after);
                cut = Some(seed);
            }
        }
        if let Some(seed) = cut.filter(|_| machine.is_off()) {
            machine.restart(seed);
            (blobs, handles) = open(&machine);
            cut = None;
            let there = present(&handles);
            prop_assert!(promised.is_subset(&there), "{promised:?} of {there:?}");
            prop_assert!(forgotten.is_disjoint(&there), "{forgotten:?} and {there:?}");
            prop_assert_eq!(&there, &durable(&handles));
            promised = there;
        }
        handles.iter().for_each(assert_all_present_verify);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_a_power_cut_what_was_durable_is_there_and_all_that_is_there_is_right(
        ops in prop::collection::vec(op(), 1..60),
        last in any::<u64>(),
    ) {
        holds(ops, last)?;
    }
}

/// A cut had left the record of a variant and none of its pieces: every image agreed with it, and the bytes of one lay in
/// another.
#[test]
fn a_variant_with_nothing_in_it_hides_no_other() {
    let write = |image, piece| Op::Write { image, piece };
    let before = [write(0, 0), write(3, 0), Op::Evict { image: 2 }];
    let cut = [Op::LosePower { after: 7, seed: 836908741051943846 }, Op::FailNext, write(2, 0), write(0, 0)];
    let after = [write(2, 0), Op::Flush, write(3, 2), write(3, 0), Op::Evict { image: 2 }, write(2, 0)];
    for last in 0..64 {
        holds([&before[..], &cut, &after].concat(), last).unwrap();
    }
    holds([&before[..], &cut, &after].concat(), 11712467845680501624).unwrap();
}

#[test]
fn a_full_disk_is_said_so_and_the_piece_can_be_kept_later() {
    let machine = Machine::default();
    let (blobs, handles) = open(&machine);
    let bytes = bytes_of(handles[0].table(), 3);
    machine.fail_next(io::ErrorKind::StorageFull);
    assert!(matches!(handles[0].write(3, &bytes), Err(StoreError::Full { .. })));
    assert!(!handles[0].is_present(3));
    assert_eq!(handles[0].read(3).unwrap(), None);
    assert!(handles[0].write(3, &bytes).unwrap());
    assert_eq!(blobs.flush().unwrap(), 1);
}

#[test]
fn a_failed_sync_is_not_believed_when_it_later_succeeds() {
    let machine = Machine::default();
    let (blobs, handles) = open(&machine);
    let bytes = bytes_of(handles[0].table(), 3);
    handles[0].write(3, &bytes).unwrap();
    machine.fail_next(io::ErrorKind::Other);
    blobs.flush().unwrap_err();
    assert!(!handles[0].is_present(3));
    assert_eq!(blobs.flush().unwrap(), 0);
    assert!(handles[0].write(3, &bytes).unwrap());
    assert_eq!(blobs.flush().unwrap(), 1);
}
