//! An image whose small files were compressed in batches: read from the registry, from a neighbour, and from the store
//! after a restart; the registry sees each batch once.

use shoal_rafs::ChunkTable;

use crate::{
    modes::{Mode, unmount_below},
    support::{Built, Daemon, Registry, assert_same, drop_caches, total_bytes, tree, wait},
};

fn batches_travel_and_are_kept(mode: Mode) {
    if !mode.is_possible(&format!("batch_image ({mode:?})")) {
        return;
    }
    let source = tree(7, 60, 3_000);
    let options = ["--compressor", "none", "--batch-size", "0x4000", "--blob-inline-meta", "--blob-toc"];
    let built = Built::with(source.path(), &options);
    let table = ChunkTable::read(&built.blobs().join(built.blob())).expect("its chunk table");
    assert!(table.batch(5).is_some());
    let mut registry = Registry::start();
    let encoded = built.push(&registry.layout(), "1");
    registry.switch_on();

    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut seed = Daemon::start("seed", folder.path(), &["role=seed".into()]);
    let mut node = Daemon::start("node", folder.path(), &[mode.settings(), vec![seed.join()]].concat());
    node.wait_for_home();
    mode.mount(&node, &registry.reference("1"));
    assert_same(source.path(), &node.mountpoint());
    let status = node.status();
    assert_eq!(total_bytes(&status, "registry"), 0, "{status}");
    assert!(total_bytes(&seed.status(), "registry") <= encoded, "{}", seed.status());

    // What was kept is found again under the same numbers, and nobody else is there.
    registry.switch_off();
    seed.stop();
    node.stop();
    node.start_again();
    wait("mounted again", || node.mountpoint().join("link").is_symlink());
    drop_caches();
    assert_same(source.path(), &node.mountpoint());
    drop(node);
    unmount_below(folder.path());
}

#[test]
fn over_fuse() {
    batches_travel_and_are_kept(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    batches_travel_and_are_kept(Mode::Lazy);
}

#[test]
fn natively() {
    batches_travel_and_are_kept(Mode::Native);
}
