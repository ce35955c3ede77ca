//! An image of tar layers is converted by the command line and mounted by a daemon: what a runtime would unpack is what
//! is read. Registry, archive, check, and what is said of wrong usage.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::{Command, Output},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::modes::Mode;
use crate::support::{Daemon, Registry, assert_same, json, noise, shoal};

/// A tar of what is in a folder, by the system's `tar`.
pub(crate) fn tar(folder: &Path) -> Vec<u8> {
    let packed = Command::new("tar").arg("-C").arg(folder).args(["--numeric-owner", "-cf", "-", "."]).output();
    let packed = packed.expect("tar runs");
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    packed.stdout
}

/// The same bytes, compressed.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    fs::write(file.path(), bytes).expect("its bytes");
    let packed = Command::new("gzip").arg("-nc").arg(file.path()).output().expect("gzip runs");
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    packed.stdout
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

/// Puts bytes into a layout; gives the descriptor.
pub(crate) fn put(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let digest = digest(bytes);
    let dir = layout.join("blobs/sha256");
    fs::create_dir_all(&dir).expect("a folder");
    fs::write(dir.join(&digest["sha256:".len()..]), bytes).expect("a blob");
    json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
}

/// An OCI image of two layers in a layout, packed or plain, and the tree that it stands for in `expected`. Gives the bytes of
/// the layers.
pub(crate) fn image(layout: &Path, expected: &Path, packed: bool) -> u64 {
    let (base, top) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    fs::create_dir_all(base.path().join("bin")).expect("a folder");
    fs::create_dir_all(base.path().join("data")).expect("a folder");
    let busybox = fs::read("/bin/busybox").unwrap_or_else(|_| noise(1, 2_000_000));
    for root in [base.path(), expected] {
        fs::create_dir_all(root.join("bin")).expect("a folder");
        fs::write(root.join("bin/busybox"), &busybox).expect("a file");
        fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).expect("its mode");
        fs::hard_link(root.join("bin/busybox"), root.join("bin/sh")).expect("a hard link");
        // Half of it compresses; so large that inflating it begins in several places.
        let mut large = noise(6, 7_000_000);
        large.chunks_mut(3_000).step_by(2).for_each(|part| part.fill(b'x'));
        fs::create_dir_all(root.join("data")).expect("a folder");
        fs::write(root.join("data/large"), large).expect("a file");
    }
    fs::write(base.path().join("data/gone"), noise(2, 10_000)).expect("a file");
    fs::write(base.path().join("data/replaced"), noise(3, 10_000)).expect("a file");
    fs::create_dir_all(top.path().join("data")).expect("a folder");
    fs::write(top.path().join("data/.wh.gone"), "").expect("a whiteout");
    for root in [top.path(), expected] {
        fs::create_dir_all(root.join("data")).expect("a folder");
        fs::write(root.join("data/replaced"), noise(4, 1_500_000)).expect("a file");
        fs::write(root.join("data/new"), noise(5, 100)).expect("a file");
    }
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    for folder in [base.path(), top.path()] {
        let plain = tar(folder);
        diff_ids.push(digest(&plain));
        let media_type = "application/vnd.oci.image.layer.v1.tar";
        layers.push(match packed {
            true => put(layout, &format!("{media_type}+gzip"), &gzip(&plain)),
            false => put(layout, media_type, &plain),
        });
    }
    let bytes = layers.iter().filter_map(|layer| layer["size"].as_u64()).sum();
    publish(layout, "plain", &layers, &diff_ids);
    bytes
}

/// Makes an image of layers that are in a layout the only one there.
pub(crate) fn publish(layout: &Path, tag: &str, layers: &[Value], diff_ids: &[String]) {
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = put(layout, "application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
    let mut entry = put(layout, media_type, manifest.to_string().as_bytes());
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(layout.join("index.json"), index.to_string()).expect("an index");
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a marker");
}

fn try_shoal(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shoal")).args(arguments).output().expect("shoal runs")
}

fn what_was_converted_is_mounted(mode: Mode) {
    if !mode.is_possible(&format!("converted ({mode:?})")) {
        return;
    }
    let mut registry = Registry::start();
    let expected = tempfile::tempdir().expect("a folder");
    image(&registry.layout(), expected.path(), false);
    let layout = registry.layout();
    let name = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let (plain, lazy) = (name("plain"), name("lazy"));
    let converted = json(&shoal(&["image", "convert", "--merge-index", "--json", &plain, &lazy], &[]));
    assert!(converted["sent_bytes"].as_u64() > Some(0), "{converted}");
    let checked = json(&shoal(&["image", "check", "--json", &lazy, "--source", &plain], &[]));
    assert_eq!(checked["ok"], true, "{checked}");
    // All of it is in the dictionary: the second one has no chunk of its own below the top layer.
    let (second, back) = (name("second"), name("back"));
    let shared = json(&shoal(&["image", "convert", "--chunk-dict", &lazy, "--json", &plain, &second], &[]));
    let dictionary = &shared["images"][0]["dictionary"];
    assert!(dictionary["existing_bytes"].as_u64() > Some(1_500_000), "{shared}");
    assert!(shared["sent_bytes"].as_u64() < Some(100_000), "{shared}");
    shoal(&["image", "check", &second, "--source", &plain], &[]);
    // And back to layers that any client can read.
    let reversed = json(&shoal(&["image", "convert", "--reverse", "--json", &second, &back], &[]));
    assert_eq!(
        (&reversed["images"][0]["per_layer"], reversed["images"][0]["layers"].as_array().map(Vec::len)),
        (&json!(false), Some(1))
    );
    shoal(&["image", "check", &second, "--source", &back], &[]);
    registry.switch_on();

    let folder = tempfile::tempdir().expect("a folder");
    let mut node = Daemon::start("node", folder.path(), &[mode.settings(), vec!["role=seed".into()]].concat());
    let of_dictionary = folder.path().join("second");
    fs::create_dir(&of_dictionary).expect("a folder");
    mode.mount_at(&node, &registry.reference("second"), &of_dictionary);
    assert_same(expected.path(), &of_dictionary);
    node.umount(&of_dictionary);
    mode.mount(&node, &registry.reference("lazy"));
    assert_same(expected.path(), &node.mountpoint());
    let of = |name: &str| fs::metadata(node.mountpoint().join(name)).expect("its metadata");
    assert_eq!(of("bin/sh").ino(), of("bin/busybox").ino());
    assert_eq!((of("bin/sh").mode() & 0o7777, of("bin/sh").nlink()), (0o755, 2));
    node.umount(&node.mountpoint());
    node.stop();
}

#[test]
fn over_fuse() {
    what_was_converted_is_mounted(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    what_was_converted_is_mounted(Mode::Lazy);
}

#[test]
fn natively() {
    what_was_converted_is_mounted(Mode::Native);
}

#[test]
fn an_archive_is_converted_to_an_archive() {
    let folder = tempfile::tempdir().expect("a folder");
    let (layout, expected) = (folder.path().join("layout"), folder.path().join("expected"));
    image(&layout, &expected, false);
    let archive = |name: &str| format!("oci-archive:{}", folder.path().join(name).display());
    let (plain, lazy) = (archive("plain.tar"), archive("lazy.tar:v1"));
    shoal(&["image", "copy", &format!("oci:{}:plain", layout.display()), &plain], &[]);
    let state = folder.path().join("state").display().to_string();
    let convert =
        |target: &str| json(&shoal(&["image", "convert", "--json", "--state", &state, &plain, target], &[]));
    let first = convert(&lazy);
    shoal(&["image", "check", &lazy, "--source", &plain], &[]);
    let told = format!("{lazy}@{}", first["manifest"].as_str().expect("a digest"));
    assert_eq!(first["reference"], told, "not the folder that it was made in");
    // A new archive has no blobs yet, so they are made again; the image is the same.
    assert_eq!(convert(&archive("again.tar:v1"))["manifest"], first["manifest"]);
}

#[test]
fn wrong_usage_and_failures_are_told_apart() {
    let folder = tempfile::tempdir().expect("a folder");
    let absent = format!("oci:{}:v1", folder.path().join("absent").display());
    let target = format!("oci-archive:{}", folder.path().join("target.tar").display());
    for (arguments, code) in [
        (&["image", "convert", &absent][..], 2),
        (&["image", "convert", "alpine", &target], 2),
        (&["image", "convert", "--platform", "linux", &absent, &target], 2),
        (&["image", "convert", "--json", &absent, "oci-archive:-"], 2),
        (&["image", "convert", "--reverse", "--merge-index", &absent, &target], 2),
        (&["image", "convert", "--reverse", "--chunk-dict", &absent, &absent, &target], 2),
        (&["image", "convert", "--layer-compression", "zstd", &absent, &target], 2),
        (&["image", "convert", "--layer-compression", "bzip2", "--reverse", &absent, &target], 2),
        (&["image", "convert", "--blob-backend", "ftp://host/x", &absent, &target], 2),
        (&["image", "convert", "--blob-credentials", "/absent", &absent, &target], 2),
        (&["image", "convert", "--reverse", &absent, &target], 1),
        (&["image", "check"], 2),
        (&["image", "check", "--source", &absent], 2),
        (&["image", "check", "--bootstrap", "/absent", "--blob-backend", "file:///absent"], 2),
        (&["image", "convert", &absent, &target], 1),
        (&["image", "copy", &absent, &target], 1),
        (&["image", "check", &absent], 1),
    ] {
        let output = try_shoal(arguments);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(!said.is_empty() && !folder.path().join("target.tar").exists());
    }
}
