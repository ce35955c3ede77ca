//! `shoal store scrub` finds what a disk has damaged, with a daemon and without one, and what it drops is fetched again.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;

use crate::support::{Daemon, Registry, assert_same, can_mount, drop_caches, json, tree};

/// The files of the blobs, and the only object that is compressed, which is the bootstrap layer.
fn files(data_dir: &Path) -> (PathBuf, PathBuf) {
    let entries =
        |dir: &str| fs::read_dir(data_dir.join(dir)).expect("a folder").map(|entry| entry.expect("an entry").path());
    let blob = entries("blobs").next().expect("a blob").join("encoded");
    let object = entries("objects").find(|path| fs::read(path).expect("an object").starts_with(&[0x1f, 0x8b]));
    (blob, object.expect("an object"))
}

pub(crate) fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).expect("a file");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("a byte");
    file.write_all_at(&[byte[0] ^ 1], at).expect("a byte");
}

fn scrub_offline(data_dir: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.args(["store", "scrub", "--json", "--data-dir"]).arg(data_dir).output().expect("shoal store runs")
}

fn figures(output: &Output) -> [u64; 4] {
    let result: Value = json(output);
    ["damaged_objects", "damaged_pieces", "unverified_pieces", "pieces"]
        .map(|key| result[key].as_u64().expect("a figure"))
}

#[test]
fn damage_is_found_dropped_and_fetched_again() {
    if !can_mount("store_scrub") {
        return;
    }
    let source = tree(31, 6, 200_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &["read.decoded_cache_bytes=0".into()]);
    daemon.mount(&registry.reference("1"));
    assert_same(source.path(), &daemon.mountpoint());
    let all = daemon.status()["mounts"][0]["pieces"].as_u64().expect("a figure");

    let sound = daemon.store(&["scrub", "--json"]);
    assert_eq!((sound.status.code(), figures(&sound)), (Some(0), [0, 0, 0, all]));
    let (blob, object) = files(&daemon.data_dir());
    flip(&blob, 100);
    let damaged = daemon.store(&["scrub", "--json"]);
    assert_eq!((damaged.status.code(), figures(&damaged)), (Some(1), [0, 1, 0, all - 1]));
    // The scheduler has heard of it.
    drop_caches();
    assert_same(source.path(), &daemon.mountpoint());
    assert_eq!(daemon.status()["mounts"][0]["present_pieces"], all);
    let refused = scrub_offline(&daemon.data_dir());
    let error = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && error.contains(&daemon.pid().to_string()), "{error}");

    daemon.stop();
    flip(&blob, 100);
    flip(&object, 20);
    // Without the layer nobody knows what the pieces should be.
    let damaged = scrub_offline(&daemon.data_dir());
    assert_eq!((damaged.status.code(), figures(&damaged)), (Some(1), [1, 0, all, 0]));
    daemon.start_again();
    assert_same(source.path(), &daemon.mountpoint());
    daemon.stop();
    let sound = scrub_offline(&daemon.data_dir());
    assert_eq!((sound.status.code(), figures(&sound)), (Some(0), [0, 0, 0, all]));
    assert!(!scrub_offline(folder.path()).status.success(), "not a data directory");
}
