//! A process that fills a store is killed at ten moments; each time, what it leaves is a part of what it wrote, and
//! right.

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use sha2::{Digest as _, Sha256};
use shoal::store::{BlobHandle, Store, StoreOptions};
use shoal_proto::{Algorithm, BlobId, Digest};
use shoal_rafs::{Chunk, Compressor, Piece, PieceTable};

const DATA_DIR: &str = "SHOAL_TEST_DATA_DIR";
const PIECES: u32 = 500;
const PIECE: u32 = 20_000;

fn content(piece: u32) -> Vec<u8> {
    (0..PIECE).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8 ^ piece as u8).collect()
}

fn table() -> Arc<PieceTable> {
    let pieces = (0..PIECES).map(|index| {
        let digest = Digest { algorithm: Algorithm::Sha256, bytes: Sha256::digest(content(index)).into() };
        let decoded_offset = u64::from(index) * 20_480;
        let chunk = Chunk { index, digest, decoded_offset, decoded_len: PIECE, compressed: false };
        Piece::plain(chunk, u64::from(index) * u64::from(PIECE), PIECE, Compressor::None)
    });
    let size = u64::from(PIECES) * u64::from(PIECE);
    Arc::new(PieceTable::new(BlobId::new([1; 32]), size, PIECES, pieces.collect()).unwrap())
}

fn open(dir: &Path) -> (Store, BlobHandle) {
    let options = StoreOptions { flush_interval: Duration::from_millis(1), ..StoreOptions::default() };
    let store = Store::open(dir, options).unwrap();
    let handle = store.open_blob(&table()).unwrap();
    (store, handle)
}

fn start_writer(dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "store_killed::writer", "--ignored", "--nocapture"]).env(DATA_DIR, dir);
    command.stdout(Stdio::piped()).spawn().unwrap()
}

#[test]
#[ignore = "the process that the other test starts and kills"]
fn writer() {
    let dir = std::env::var_os(DATA_DIR).expect("started by the other test");
    let (store, handle) = open(Path::new(&dir));
    // Here and there, as the reads of a mount come.
    for piece in (0..PIECES).map(|turn| turn * 1009 % PIECES) {
        handle.write(piece, &content(piece)).unwrap();
        println!("{piece}");
    }
    store.close().unwrap();
    assert!(handle.durable().is_full());
}

#[test]
fn what_a_killed_process_leaves_is_right_and_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut before = open(dir.path()).1.present();
    for round in 0..10 {
        let mut writer = start_writer(dir.path());
        let lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        assert_eq!(lines.take(10 + 40 * round).map_while(Result::ok).count(), 10 + 40 * round);
        writer.kill().unwrap();
        writer.wait().unwrap();

        let (_store, handle) = open(dir.path());
        let after = handle.present();
        let mut lost = before;
        lost.subtract(&after);
        assert!(lost.is_empty(), "{lost:?} were durable before round {round}");
        for piece in after.iter() {
            let bytes = handle.read(piece).unwrap().expect("present");
            handle.table().decode(piece, &bytes).unwrap();
        }
        before = after;
    }
    assert!(start_writer(dir.path()).wait_with_output().unwrap().status.success());
    assert!(open(dir.path()).1.present().is_full());
}
