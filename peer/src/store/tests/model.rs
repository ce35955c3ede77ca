//! The real store against plain maps.

use proptest::prelude::*;

use super::*;

const PIECES: u32 = 5;
const IMAGES: usize = 4;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Stage {
    Present,
    Durable,
}

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
    /// Without closing it, which is what a killed process leaves.
    Drop,
    Close,
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (0..IMAGES, 0..PIECES);
    prop_oneof![
        6 => place().prop_map(|(image, piece)| Op::Write { image, piece }),
        1 => place().prop_map(|(image, piece)| Op::Forget { image, piece }),
        1 => Just(Op::Flush),
        1 => Just(Op::Drop),
        1 => Just(Op::Close),
    ]
}

/// Images 0 and 1 agree, 2 contradicts them, 3 is of another blob.
fn images() -> [Arc<PieceTable>; IMAGES] {
    let all = |seed| (0..PIECES).map(|piece| (piece, seed)).collect::<Vec<_>>();
    [
        table(1, PIECES, &all(1)),
        table(1, PIECES, &[(1, 1), (2, 1)]),
        table(1, PIECES, &[(2, 9)]),
        table(2, PIECES, &all(3)),
    ]
}

/// Which images share their bytes.
fn variant(image: usize) -> usize {
    if image == 1 { 0 } else { image }
}

fn open(dir: &Path) -> (Store, Vec<BlobHandle>) {
    let store = Store::open(dir, manual()).unwrap();
    let handles = images().iter().map(|table| store.open_blob(table).unwrap()).collect();
    (store, handles)
}

fn assert_equals(handles: &[BlobHandle], model: &BTreeMap<(usize, u32), Stage>) {
    for (image, handle) in handles.iter().enumerate() {
        for piece in 0..PIECES {
            let stage = model.get(&(variant(image), piece)).copied();
            assert_eq!(handle.is_present(piece), stage.is_some(), "image {image} piece {piece}");
            assert_eq!(handle.present().contains(piece), stage.is_some());
            assert_eq!(handle.durable().contains(piece), stage == Some(Stage::Durable));
            assert_eq!(handle.read(piece).unwrap().is_some(), stage.is_some());
        }
        assert_all_present_verify(handle);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_ends_as_in_plain_maps(ops in prop::collection::vec(op(), 1..30)) {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, mut handles) = open(dir.path());
        let mut model = BTreeMap::new();
        for op in ops {
            match op {
                Op::Write { image, piece } => {
                    let Some(_) = handles[image].table().piece(piece) else {
                        let refused = handles[image].write(piece, &[0; PIECE as usize]);
                        prop_assert!(matches!(refused, Err(StoreError::UnknownPiece { .. })), "{refused:?}");
                        continue;
                    };
                    let kept = handles[image].write(piece, &bytes_of(handles[image].table(), piece)).unwrap();
                    prop_assert_eq!(kept, !model.contains_key(&(variant(image), piece)));
                    model.entry((variant(image), piece)).or_insert(Stage::Present);
                }
                Op::Forget { image, piece } => {
                    handles[image].forget(piece).unwrap();
                    model.remove(&(variant(image), piece));
                }
                Op::Flush => {
                    let fresh = model.values().filter(|&&stage| stage == Stage::Present).count();
                    prop_assert_eq!(store.flush().unwrap(), fresh as u64);
                    model.values_mut().for_each(|stage| *stage = Stage::Durable);
                }
                Op::Drop | Op::Close => {
                    if let Op::Close = op {
                        store.close().unwrap();
                        let refused = handles[0].write(0, &[]);
                        prop_assert!(matches!(refused, Err(StoreError::Closed)), "{refused:?}");
                        model.values_mut().for_each(|stage| *stage = Stage::Durable);
                    }
                    model.retain(|_, stage| *stage == Stage::Durable);
                    drop((store, handles));
                    (store, handles) = open(dir.path());
                }
            }
            assert_equals(&handles, &model);
        }
    }
}

#[test]
fn threads_that_write_the_same_pieces_keep_each_once() {
    let dir = tempfile::tempdir().unwrap();
    let store =
        Store::open(dir.path(), StoreOptions { flush_interval: Duration::from_millis(1), ..manual() }).unwrap();
    let pieces: Vec<_> = (0..200).map(|piece| (piece, 5)).collect();
    let handle = store.open_blob(&table(1, 200, &pieces)).unwrap();
    let contents: Vec<_> = (0..200).map(|piece| bytes_of(handle.table(), piece)).collect();
    let keep_all = || (0..200).filter(|&piece| handle.write(piece, &contents[piece as usize]).unwrap()).count();
    let kept: usize = std::thread::scope(|scope| {
        let threads = [(); 4].map(|()| scope.spawn(keep_all));
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(kept, 200);
    store.close().unwrap();
    assert!(handle.durable().is_full());
    assert_all_present_verify(&handle);
}

#[test]
fn the_background_thread_makes_pieces_durable_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let store =
        Store::open(dir.path(), StoreOptions { flush_interval: Duration::from_millis(1), ..manual() }).unwrap();
    let handle = store.open_blob(&table(1, 1, &[(0, 1)])).unwrap();
    handle.write(0, &content(0, 1)).unwrap();
    while !handle.durable().contains(0) {
        std::thread::sleep(Duration::from_millis(1));
    }
}
