//! An image whose blob is a tar as it is: verified chunk by chunk where its bootstrap has digests, read from files only where
//! it has none, and whatever contradicts the mode is wrong usage.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::{
    native_mounts::kind,
    support::{Built, Daemon, Registry, assert_same, can_mount, drop_caches, shoal, tree},
};

/// A tree, and an image of its tar.
struct Bed {
    source: TempDir,
    folder: TempDir,
    built: Built,
}

impl Bed {
    fn new() -> Self {
        // Large files, and small ones whose blocks of 512 bytes share pages.
        let (source, folder) = (tree(41, 12, 2_300_000), tempfile::tempdir().expect("a folder"));
        for n in 0..200 {
            fs::write(source.path().join(format!("small-{n}")), crate::support::noise(n, 700)).expect("a file");
        }
        let tar = folder.path().join("tar");
        gnu_tar(&["--sort=name", "-cf"], &tar, source.path(), ".");
        let built = Built::with(&tar, &["--source-type", "tar-tarfs"]);
        Self { source, folder, built }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tar(&self) -> PathBuf {
        self.file("tar")
    }

    /// The bootstrap as upstream writes it: one record is left of its chunk table, with a digest of zeroes.
    fn without_digests(&self) -> Vec<u8> {
        let mut bytes = fs::read(self.built.bootstrap()).expect("the bootstrap");
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) as usize;
        let (start, len) = (number(1176), number(1184));
        bytes[start..start + 32].fill(0);
        bytes[start + 80..start + len].fill(0);
        bytes[1184..1192].copy_from_slice(&80u64.to_le_bytes());
        bytes
    }
}

fn gnu_tar(options: &[&str], output: &Path, dir: &Path, what: &str) {
    let status = Command::new("tar").args(options).arg(output).arg("-C").arg(dir).arg(what).status();
    assert!(status.expect("tar runs").success());
}

#[test]
fn a_tar_is_read_lazily_and_then_by_the_kernel() {
    if !can_mount("tarfs") {
        return;
    }
    let bed = Bed::new();
    assert_eq!(
        fs::read(bed.built.blobs().join(bed.built.blob())).expect("the blob"),
        fs::read(bed.tar()).expect("the tar")
    );
    let mut registry = Registry::start();
    bed.built.push(&registry.layout(), "1");
    shoal(&["image", "check", &format!("oci:{}:1", registry.layout().display())], &[]);
    registry.switch_on();
    let nodes = tempfile::tempdir().expect("a folder");
    let daemon = Daemon::start("node", nodes.path(), &["mounts.keeper=off".into()]);
    let (reference, mountpoint) = (registry.reference("1"), daemon.mountpoint());
    daemon.mount(&reference);
    let tar_bytes = fs::metadata(bed.tar()).expect("the tar").len();
    assert!(registry.sent_bytes() < tar_bytes / 2, "most is read when it is needed");
    assert_same(bed.source.path(), &mountpoint);
    daemon.umount(&mountpoint);
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !known.lines().any(|line| line.trim() == "erofs") {
        println!("skipped: tarfs, mounted by the kernel (needs EROFS)");
        return;
    }
    daemon.ctl(&["mount", "--wait-complete", &reference, mountpoint.to_str().expect("UTF-8")]);
    assert_eq!(kind(&mountpoint), "erofs");
    drop_caches();
    assert_same(bed.source.path(), &mountpoint);
    daemon.umount(&mountpoint);
}

/// Puts `bootstrap` into the image `tag` of a layout, in the place of its own.
fn replace_bootstrap(layout: &Path, tag: &str, bootstrap: &[u8]) {
    let blobs = layout.join("blobs/sha256");
    let put = |bytes: &[u8]| {
        let hex = hex::encode(Sha256::digest(bytes));
        fs::write(blobs.join(&hex), bytes).expect("a blob");
        (json!(format!("sha256:{hex}")), json!(bytes.len()))
    };
    let get = |digest: &Value| -> Value {
        let hex = digest.as_str().and_then(|digest| digest.strip_prefix("sha256:")).expect("a sha256");
        serde_json::from_slice(&fs::read(blobs.join(hex)).expect("a blob")).expect("JSON")
    };
    let work = tempfile::tempdir().expect("a folder");
    fs::create_dir(work.path().join("image")).expect("a folder");
    fs::write(work.path().join("image/image.boot"), bootstrap).expect("a bootstrap");
    let [plain, gzip] = ["plain", "gzip"].map(|name| work.path().join(name));
    gnu_tar(&["-cf"], &plain, work.path(), "image");
    gnu_tar(&["-czf"], &gzip, work.path(), "image");
    // Not the same as the tar in the other, if time has passed; so that one is unpacked.
    let unpacked = Command::new("gzip").arg("-dc").arg(&gzip).output().expect("gzip runs").stdout;

    let mut index: Value =
        serde_json::from_slice(&fs::read(layout.join("index.json")).expect("an index")).expect("JSON");
    let tagged = |entry: &&mut Value| entry["annotations"]["org.opencontainers.image.ref.name"] == tag;
    let entry = index["manifests"].as_array_mut().expect("manifests").iter_mut().find(tagged).expect("the image");
    let mut manifest = get(&entry["digest"]);
    let mut config = get(&manifest["config"]["digest"]);
    *config["rootfs"]["diff_ids"].as_array_mut().expect("layers").last_mut().expect("one") = put(&unpacked).0;
    let layer = manifest["layers"].as_array_mut().expect("layers").last_mut().expect("one");
    (layer["digest"], layer["size"]) = put(&fs::read(&gzip).expect("a layer"));
    (manifest["config"]["digest"], manifest["config"]["size"]) = put(&serde_json::to_vec(&config).expect("a config"));
    (entry["digest"], entry["size"]) = put(&serde_json::to_vec(&manifest).expect("a manifest"));
    fs::write(layout.join("index.json"), serde_json::to_vec(&index).expect("an index")).expect("an index");
}

#[test]
fn without_digests_nothing_is_taken_from_the_network() {
    let bed = Bed::new();
    let mut registry = Registry::start();
    bed.built.push(&registry.layout(), "1");
    replace_bootstrap(&registry.layout(), "1", &bed.without_digests());
    registry.switch_on();
    let nodes = tempfile::tempdir().expect("a folder");
    let daemon = Daemon::start("node", nodes.path(), &["mounts.keeper=off".into()]);
    let (reference, mountpoint) = (registry.reference("1"), daemon.mountpoint());
    let refused = daemon.try_ctl(&["mount", &reference, mountpoint.to_str().expect("UTF-8")]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{error}");
    assert!(error.contains("no chunk has a digest"), "{error}");
    let tar_bytes = fs::metadata(bed.tar()).expect("the tar").len();
    assert!(registry.sent_bytes() < tar_bytes / 10, "{} bytes", registry.sent_bytes());
    // Nor is it pushed.
    fs::write(bed.file("stripped"), bed.without_digests()).expect("a bootstrap");
    let blobs = bed.built.blobs();
    let layout = format!("oci:{}:2", registry.layout().display());
    let arguments = ["image", "push", "--bootstrap"];
    let pushed = command(&arguments, &[&bed.file("stripped"), Path::new("--blob-dir"), &blobs, Path::new(&layout)]);
    assert!(pushed.1.contains("no chunk has a digest"), "{pushed:?}");
    assert_eq!(pushed.0, Some(1));
}

/// Exit code and standard error.
fn command(arguments: &[&str], paths: &[&Path]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_shoal")).args(arguments).args(paths).output().expect("shoal runs");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn from_files_it_is_read_whatever_vouches_for_it() {
    let bed = Bed::new();
    let (blobs, stripped) = (bed.built.blobs(), bed.file("stripped"));
    fs::write(&stripped, bed.without_digests()).expect("a bootstrap");
    for bootstrap in [bed.built.bootstrap(), stripped] {
        let files = [bootstrap.as_path(), Path::new("--blob-dir"), &blobs];
        shoal(&["image", "check", "--bootstrap"], &files);
        shoal(&["image", "inspect", "--bootstrap"], &files[..1]);
        let (tar, flat) = (bed.file("unpacked"), bed.file("flat"));
        shoal(&["image", "unpack", "--bootstrap"], &[&files[..], &[Path::new("--output"), &tar]].concat());
        let unpacked = tempfile::tempdir().expect("a folder");
        let status = Command::new("tar").arg("-xf").arg(&tar).arg("-C").arg(unpacked.path()).status();
        assert!(status.expect("tar runs").success());
        assert_same(bed.source.path(), unpacked.path());
        shoal(
            &["image", "export", "--block", "--bootstrap"],
            &[&files[..], &[Path::new("--output"), &flat]].concat(),
        );
        fs::remove_file(tar).expect("a tar");
        mounted(&bed, &bootstrap, &blobs);
    }
    let (code, error) = command(&["image", "stat"], &[&bed.built.bootstrap(), &bed.file("stripped")]);
    assert!(code == Some(1) && error.contains("no digests"), "{error}");
    let mut tar = fs::read(bed.tar()).expect("the tar");
    *tar.last_mut().expect("a byte") ^= 1;
    fs::write(blobs.join(bed.built.blob()), tar).expect("a blob");
    let stripped = bed.file("stripped");
    let files = [stripped.as_path(), Path::new("--blob-dir"), &blobs];
    assert_eq!(command(&["image", "check", "--bootstrap"], &files).0, Some(1));
    let flat = bed.file("flat");
    let refused = command(
        &["image", "export", "--block", "--bootstrap"],
        &[&files[..], &[Path::new("--output"), &flat]].concat(),
    );
    assert!(refused.0 == Some(1) && refused.1.contains("nothing else tells"), "{refused:?}");
}

/// `shoal mount --bootstrap`, if that can be done here.
fn mounted(bed: &Bed, bootstrap: &Path, blobs: &Path) {
    if !can_mount("shoal mount --bootstrap of a tar") {
        return;
    }
    let mountpoint = bed.file("mnt");
    fs::create_dir_all(&mountpoint).expect("a folder");
    let mut mount = Command::new(env!("CARGO_BIN_EXE_shoal"));
    mount.args(["mount", "--bootstrap"]).arg(bootstrap).arg("--blob-dir").arg(blobs).arg(&mountpoint);
    let mut mount = mount.spawn().expect("shoal runs");
    crate::support::wait("it is mounted", || kind(&mountpoint).starts_with("fuse"));
    assert_same(bed.source.path(), &mountpoint);
    unmount(&mountpoint, UnmountFlags::empty()).expect("nobody uses it");
    assert!(mount.wait().expect("it ends").success());
}

#[test]
fn options_that_contradict_a_source_that_stays_are_wrong_usage() {
    let folder = tempfile::tempdir().expect("a folder");
    let [boot, blobs] = ["boot", "blobs"].map(|name| folder.path().join(name));
    let build = |kind: &str, options: &[&str]| {
        let arguments = [&["image", "build", "--source", "/dev/null", "--source-type", kind], options].concat();
        command(&arguments, &[Path::new("--bootstrap"), &boot, Path::new("--blob-dir"), &blobs])
    };
    let both: [&[&str]; 7] = [
        &["--compressor", "zstd"],
        &["--compressor", "lz4"],
        &["--compression-level", "5"],
        &["--digester", "blake3"],
        &["--batch-size", "0x10000"],
        &["--chunk-dict", "/none"],
        &["--compressor", "zstd", "--digester", "sha256"],
    ];
    for kind in ["targz-ref", "tar-tarfs"] {
        for options in both {
            let (code, error) = build(kind, options);
            assert_eq!(code, Some(2), "{kind} {options:?}: {error}");
            assert!(error.contains(options[0]) && error.contains("Usage"), "{error}");
        }
        // What is done anyway may be asked for; /dev/null is no archive.
        let (code, error) = build(kind, &["--compressor", "none", "--digester", "sha256"]);
        assert_eq!(code, Some(1), "{error}");
    }
    for option in ["--blob-inline-meta", "--blob-toc"] {
        assert_eq!(build("tar-tarfs", &[option]).0, Some(2), "{option}");
    }
    assert!(!boot.exists());
}
