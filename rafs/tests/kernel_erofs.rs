//! The kernel's own EROFS driver mounts what the builder makes: bootstrap and expanded blob, no daemon.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use shoal_proto::Algorithm;
use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, Builder, Compressor, expand_blob};

mod support;

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        unmount(self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn available() -> bool {
    let known =
        fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|line| line.trim() == "erofs");
    if !support::is_root() || !known {
        println!("skipped: the kernel EROFS mount needs root and erofs in /proc/filesystems");
        return false;
    }
    true
}

/// Builds an image of `source`, mounts it and compares.
fn round_trip(source: &Path, work: &Path, options: BuildOptions) {
    fs::create_dir_all(work.join("mnt")).unwrap();
    let boot = work.join("boot");
    let report = Builder::new(options).build(source, &boot, &work.join("blobs")).unwrap();
    assert_eq!(report.notes, [""; 0]);
    let image = Bootstrap::open(&boot).unwrap();
    let reader = BlobDirReader::open(&image, &work.join("blobs")).unwrap();
    let mut devices = Vec::new();
    for blob in 0..image.blobs().len() as u32 {
        let path = work.join(format!("device-{blob}"));
        expand_blob(&image, &reader, blob, &File::create_new(&path).unwrap()).unwrap();
        devices.push([b"device=", path.as_os_str().as_bytes()].concat());
    }
    let data = CString::new(devices.join(&b","[..])).unwrap();
    let target = work.join("mnt");
    mount(&boot, &target, "erofs", MountFlags::RDONLY, data.as_c_str()).expect("mount(2) of type erofs");
    let _mounted = Mounted(&target);
    support::assert_same(&support::facts(source), &support::facts(&target));
}

#[test]
fn the_kernel_mounts_images_of_every_kind() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let options = |compressor, algorithm, chunk_size| BuildOptions {
        compressor,
        algorithm,
        chunk_size,
        ..BuildOptions::default()
    };
    let cases = [
        options(Compressor::Zstd, Algorithm::Blake3, 0x1000),
        options(Compressor::Lz4, Algorithm::Sha256, 0x4000),
        options(Compressor::None, Algorithm::Blake3, 0x10_0000),
    ];
    for (number, options) in cases.into_iter().enumerate() {
        round_trip(&source, &dir.path().join(format!("case-{number}")), options);
    }
}

#[test]
fn the_kernel_mounts_an_image_without_file_content() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("empty"), b"").unwrap();
    round_trip(&source, &dir.path().join("work"), BuildOptions::default());
}
