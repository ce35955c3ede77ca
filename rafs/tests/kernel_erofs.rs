//! The kernel's own EROFS driver mounts what the builder makes: bootstrap and expanded blob, no daemon.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use shoal_proto::Algorithm;
use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, Builder, Compressor, expand_blob, export_block};

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
    let mounted = Mounted(&target);
    support::assert_same(&support::facts(source), &support::facts(&target));
    drop(mounted);
    flat(&image, &reader, source, work);
}

/// The same as one disk image, which needs no further device.
fn flat(image: &Bootstrap, reader: &BlobDirReader, source: &Path, work: &Path) {
    let path = work.join("flat");
    let file = File::create_new(&path).unwrap();
    let size = export_block(image, reader, &file).unwrap();
    assert_eq!((size, size % 4096), (file.metadata().unwrap().len(), 0));
    let target = work.join("mnt");
    mount(&path, &target, "erofs", MountFlags::RDONLY, None).expect("mount(2) of the flat image");
    let _mounted = Mounted(&target);
    support::assert_same(&support::facts(source), &support::facts(&target));
}

#[test]
fn blobs_that_nobody_mapped_are_mapped_for_the_flat_image() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, work) = (dir.path().join("source"), dir.path().join("work"));
    fs::create_dir_all(work.join("mnt")).unwrap();
    fs::create_dir(&source).unwrap();
    fs::write(source.join("file"), support::noise(1, 100_000)).unwrap();
    let boot = work.join("boot");
    Builder::new(BuildOptions::default()).build(&source, &boot, &work.join("blobs")).unwrap();
    let mut bytes = fs::read(&boot).unwrap();
    bytes[1408 + 68..1408 + 72].fill(0);
    let image = Bootstrap::parse(bytes.into()).unwrap();
    let reader = BlobDirReader::open(&image, &work.join("blobs")).unwrap();
    flat(&image, &reader, &source, &work);
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
    let batched = options(Compressor::Zstd, Algorithm::Blake3, 0x1_0000);
    let cases = [
        BuildOptions { batch_size: Some(0x1_0000), inline_meta: true, toc: true, ..batched },
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
