//! An image whose layers are the gzip that they have always been: its index alone is pushed, and nodes read ranges of the
//! layers, each from the registry once, keep them, and find out what is wrong with them.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    converted,
    modes::{Mode, unmount_below},
    support::{Daemon, Registry, assert_same, can_mount, drop_caches, files, json, shoal, total_bytes, wait},
    wrong_bytes,
};

/// A registry with an image of gzip layers and its index, and the tree that it stands for.
struct Published {
    registry: Registry,
    expected: TempDir,
    layer_bytes: u64,
    converted: Value,
}

impl Published {
    fn new() -> Self {
        let mut registry = Registry::start();
        let expected = tempfile::tempdir().expect("a folder");
        let layer_bytes = converted::image(&registry.layout(), expected.path(), true);
        let name = |tag: &str| format!("oci:{}:{tag}", registry.layout().display());
        let arguments = ["image", "convert", "--oci-ref", "--json", &name("plain"), &name("lazy")];
        let converted = json(&shoal(&arguments, &[]));
        shoal(&["image", "check", &name("lazy"), "--source", &name("plain")], &[]);
        registry.switch_on();
        Self { registry, expected, layer_bytes, converted }
    }

    fn reference(&self) -> String {
        self.registry.reference("lazy")
    }

    /// The file of the lowest layer, which is the largest.
    fn layer(&self) -> PathBuf {
        let digest = self.converted["images"][0]["layers"][0]["source"].as_str().expect("a digest");
        self.registry.layout().join("blobs/sha256").join(digest.strip_prefix("sha256:").expect("a sha256"))
    }
}

fn layers_as_they_are_travel_and_are_kept(mode: Mode) {
    if !mode.is_possible(&format!("gzip_layers ({mode:?})")) {
        return;
    }
    let mut published = Published::new();
    let report = &published.converted;
    let indexed =
        report["images"][0]["layers"].as_array().expect("layers").iter().all(|layer| layer["indexed"] == true);
    assert!(indexed && report["sent_bytes"].as_u64().expect("a figure") < published.layer_bytes / 10, "{report}");

    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut seed = Daemon::start("seed", folder.path(), &["role=seed".into()]);
    let settings = [mode.settings(), vec![seed.join(), "read.decoded_cache_bytes=0".into()]].concat();
    let mut node = Daemon::start("node", folder.path(), &settings);
    node.wait_for_home();
    mode.mount(&node, &published.reference());
    let sent = published.registry.sent_bytes();
    assert!(mode == Mode::Native || sent < published.layer_bytes / 5, "{sent} bytes were sent before a read");
    assert_same(published.expected.path(), &node.mountpoint());
    let status = node.status();
    assert_eq!(total_bytes(&status, "registry"), 0, "{status}");
    assert!(total_bytes(&status, "seed") > published.layer_bytes / 2, "{status}");
    // Ranges of the layers, what two pieces share at most twice, and the index.
    let sent = published.registry.sent_bytes();
    assert!(sent < published.layer_bytes * 3 / 2, "{sent} of {} bytes", published.layer_bytes);

    // A second node gets all of it from the first ones.
    let mut second = Daemon::start("second", folder.path(), &[seed.join()]);
    second.wait_for_home();
    second.mount(&published.reference());
    assert_same(published.expected.path(), &second.mountpoint());
    let status = second.status();
    assert_eq!(total_bytes(&status, "registry"), 0, "{status}");
    second.stop();

    let scrubbed = node.store(&["scrub", "--json"]);
    let figures = json(&scrubbed);
    assert_eq!((scrubbed.status.code(), &figures["damaged_pieces"]), (Some(0), &Value::from(0)), "{figures}");
    assert!(figures["pieces"].as_u64() > Some(3) && figures["unverified_pieces"] == 0, "{figures}");

    // What was kept is found again, and nobody else is there.
    published.registry.switch_off();
    seed.stop();
    node.stop();
    node.start_again();
    wait("mounted again", || node.mountpoint().join("data").is_dir());
    drop_caches();
    assert_same(published.expected.path(), &node.mountpoint());
    drop(node);
    unmount_below(folder.path());
}

#[test]
fn layers_as_they_are_over_fuse() {
    layers_as_they_are_travel_and_are_kept(Mode::Fuse);
}

#[test]
fn layers_as_they_are_natively_and_lazily() {
    layers_as_they_are_travel_and_are_kept(Mode::Lazy);
}

#[test]
fn layers_as_they_are_natively() {
    layers_as_they_are_travel_and_are_kept(Mode::Native);
}

#[test]
fn the_kernel_reads_layers_that_are_complete() {
    if !can_mount("gzip_layers") {
        return;
    }
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.trim() == "erofs") {
        return println!("skipped: gzip_layers (needs EROFS in the kernel)");
    }
    let published = Published::new();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut node = Daemon::start("node", folder.path(), &[]);
    let mountpoint = node.mountpoint();
    node.ctl(&["mount", "--wait-complete", &published.reference(), mountpoint.to_str().expect("UTF-8")]);
    let mounts = fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let line = format!(" {} erofs ", mountpoint.display());
    assert!(mounts.contains(&line), "{mounts}");
    assert_same(published.expected.path(), &mountpoint);
    node.umount(&mountpoint);
    node.stop();
}

/// How many files are as they should be; the others cannot be read, and none has other bytes.
fn right(expected: &Path, mount: &Path) -> usize {
    let names = files(expected);
    let read = |name: &PathBuf| match fs::read(mount.join(name)) {
        Ok(bytes) => {
            assert!(bytes == fs::read(expected.join(name)).expect("the source"), "{} differs", name.display());
            true
        }
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(5), "{error}");
            false
        }
    };
    names.iter().filter(|name| read(name)).count()
}

#[test]
fn a_damaged_byte_of_a_layer_is_found_and_spoils_nothing_else() {
    if !can_mount("gzip_layers") {
        return;
    }
    let published = Published::new();
    let (expected, layer) = (published.expected.path(), published.layer());
    let whole = fs::read(&layer).expect("the layer");
    let mut damaged = whole.clone();
    damaged[whole.len() / 2] ^= 0x10;
    fs::write(&layer, damaged).expect("a damaged layer");

    let folder = tempfile::tempdir().expect("a temporary folder");
    let settings = ["read.deadline=5s".into(), "read.decoded_cache_bytes=0".into()];
    let mut node = Daemon::start("node", folder.path(), &settings);
    node.mount(&published.reference());
    let count = files(expected).len();
    let found = right(expected, &node.mountpoint());
    assert!((1..count).contains(&found), "{found} of {count} files can be read");
    assert!(node.log().contains("rejected"), "{}", node.log());

    // Nothing that is wrong was kept: with the right bytes there, all of it can be read.
    fs::write(&layer, whole).expect("the layer");
    wait("the file can be read again", || right(expected, &node.mountpoint()) == count);
    node.stop();
}

#[test]
fn a_peer_that_lies_about_a_layer_is_banned() {
    if !can_mount("gzip_layers") {
        return;
    }
    let published = Published::new();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (data, control, address) = runtime.block_on(wrong_bytes::impostor(Arc::new(wrong_bytes::Liar)));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut node = Daemon::start("victim", folder.path(), &[format!("control.bootstrap_peers=[\"{address}\"]")]);
    node.wait_for_home();
    node.mount(&published.reference());
    assert_same(published.expected.path(), &node.mountpoint());
    assert_eq!(total_bytes(&node.status(), "seed"), 0);
    wrong_bytes::wait_for_ban(&node);
    node.stop();
    runtime.block_on(async {
        control.stop().await;
        data.stop().await;
    });
}
