//! Images that another implementation made (`rafs/tests/data/README.md`), in a registry as its tools put them there, mounted by a
//! daemon: what is read is what GNU tar has of the archives that they were made of.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::json;
use tempfile::TempDir;

use crate::{
    converted::{digest, gzip, publish, put, tar},
    modes::Mode,
    support::{Daemon, Registry, assert_same, shoal},
};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../rafs/tests/data/peer").join(name)
}

/// The tree of these archives, one over the other, without their whiteouts.
fn unpacked(archives: &[&str], whiteouts: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    for archive in archives {
        let status = Command::new("tar").arg("-xpf").arg(data(archive)).arg("-C").arg(folder.path()).status();
        assert!(status.expect("tar runs").success());
    }
    for gone in whiteouts {
        let (dir, name) = gone.rsplit_once('/').expect("a folder");
        fs::remove_file(folder.path().join(gone)).expect("what is taken away");
        fs::remove_file(folder.path().join(format!("{dir}/.wh.{name}"))).expect("its whiteout");
    }
    folder
}

/// Mounts the image with a new node, which has nothing, and compares.
fn mounts(mode: Mode, registry: &mut Registry, tag: &str, expected: &Path) {
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Daemon::start(tag, folder.path(), &mode.settings());
    mode.mount(&node, &registry.reference(tag));
    assert_same(expected, &node.mountpoint());
    node.umount(&node.mountpoint());
    node.stop();
    registry.switch_off();
}

fn their_images_are_mounted(mode: Mode) {
    if !mode.is_possible(&format!("upstream_images ({mode:?})")) {
        return;
    }
    theirs(mode);
    their_index_over_a_gzip_layer(mode);
}

#[test]
fn over_fuse() {
    their_images_are_mounted(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    their_images_are_mounted(Mode::Lazy);
}

#[test]
fn natively() {
    their_images_are_mounted(Mode::Native);
}

fn theirs(mode: Mode) {
    let (lower, both) = (unpacked(&["lower.tar"], &[]), unpacked(&["lower.tar", "upper.tar"], &["dir/small-1"]));
    let mut registry = Registry::start();
    for (kind, expected) in [("plain", &lower), ("batch", &lower), ("prefetch", &lower), ("merged", &both)] {
        let target = format!("oci:{}:{kind}", registry.layout().display());
        let (boot, blobs) = (data(kind).join("boot"), data(kind).join("blobs"));
        shoal(&["image", "push", &target, "--bootstrap"], &[&boot, Path::new("--blob-dir"), &blobs]);
        shoal(&["image", "check", &target], &[]);
        mounts(mode, &mut registry, kind, expected.path());
    }
}

/// As nydusify has it: an index over a gzip layer is a blob layer, which names the gzip layer, and the bootstrap layer has nothing but
/// the bootstrap.
fn their_index_over_a_gzip_layer(mode: Mode) {
    let mut registry = Registry::start();
    let layout = registry.layout();
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    let blobs = fs::read_dir(data("zran").join("blobs")).expect("a folder");
    let blobs = blobs.map(|entry| fs::read(entry.expect("an entry").path()).expect("a blob"));
    let (gzip_layers, indexes): (Vec<_>, Vec<_>) = blobs.partition(|bytes| bytes.starts_with(&[0x1f, 0x8b]));
    let layer = put(&layout, "application/vnd.oci.image.layer.v1.tar+gzip", &gzip_layers[0]);
    let mut index = put(&layout, "application/vnd.oci.image.layer.nydus.blob.v1", &indexes[0]);
    index["annotations"] = json!({
        "containerd.io/snapshot/nydus-blob": "true",
        "containerd.io/snapshot/nydus-ref": layer["digest"],
    });
    diff_ids.push(digest(&indexes[0]));
    layers.push(index);

    let work = tempfile::tempdir().expect("a folder");
    fs::create_dir(work.path().join("image")).expect("a folder");
    fs::copy(data("zran").join("boot"), work.path().join("image/image.boot")).expect("a bootstrap");
    let plain = tar(work.path());
    let mut bootstrap = put(&layout, "application/vnd.oci.image.layer.v1.tar+gzip", &gzip(&plain));
    bootstrap["annotations"] = json!({
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/nydus-fs-version": "6",
    });
    diff_ids.push(digest(&plain));
    layers.push(bootstrap);
    publish(&layout, "zran", &layers, &diff_ids);
    shoal(&["image", "check", &format!("oci:{}:zran", layout.display())], &[]);
    mounts(mode, &mut registry, "zran", unpacked(&["lower.tar"], &[]).path());
}
