//! The kernel's own EROFS driver mounts what the builder makes: bootstrap and expanded blob, no daemon.

use std::fs::{self, File};
use std::path::Path;

use rustix::mount::{MountFlags, mount};
use shoal_proto::Algorithm;
use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, Builder, Compressor, expand_blob, export_block, merge};

#[path = "support/erofs.rs"]
mod erofs;
mod support;

use erofs::{Mounted, available, expanded, mounted};
use support::archive::{PAX, Tar, gnu_tar, open_tarfs, tar_facts};

/// Builds an image of `source`, mounts it and compares.
fn round_trip(source: &Path, work: &Path, options: BuildOptions) {
    let (image, reader, blobs) = expanded(source, work, options);
    mounted(&work.join("boot"), &blobs, &work.join("mnt"), &support::facts(source));
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

/// No expanded form is needed: the tar is the device.
#[test]
fn a_tar_is_mounted_as_it_is() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("mnt"));
    support::nasty_tree(&source);
    fs::write(source.join("last"), b"the end").unwrap();
    let expected = tar_facts(&source);
    // The second ends within a page, and within 20 blocks of a tape.
    for (number, (factor, chunk_size)) in [("-b20", 0x1000), ("-b1", 0x10_0000)].into_iter().enumerate() {
        let tar = gnu_tar(&source, &[PAX, &[factor]].concat());
        let work = dir.path().join(number.to_string());
        let built = open_tarfs(&tar, &work, BuildOptions { chunk_size, ..BuildOptions::default() });
        let blob = built.blobs.join(built.report.blob.unwrap().to_string());
        mounted(&built.boot, &[blob], &target, &expected);
        let flat = work.join("flat");
        let size = export_block(&built.image, &built.reader, &File::create_new(&flat).unwrap()).unwrap();
        assert_eq!((size, size % 4096), (flat.metadata().unwrap().len(), 0));
        mounted(&flat, &[], &target, &expected);
        // The decoded form, as the daemon keeps it.
        let expanded = work.join("device");
        expand_blob(&built.image, &built.reader, 0, &File::create_new(&expanded).unwrap()).unwrap();
        mounted(&built.boot, &[expanded], &target, &expected);
    }
}

#[test]
fn several_tars_are_mounted_as_one_tree() {
    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    let lower = Tar::default().file("a", &support::noise(1, 70_000)).file("gone", b"x").finish();
    let upper = Tar::default().file("b", &support::noise(2, 5000)).file(".wh.gone", b"").finish();
    let layers = [lower, upper].map(|tar| open_tarfs(&tar, dir.path(), options).image);
    let (merged, blobs) = (dir.path().join("merged"), dir.path().join("blobs"));
    let report = merge(&layers, &merged).unwrap();
    let image = Bootstrap::open(&merged).unwrap();
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    let expected = support::image::facts(&image, &reader);
    let devices: Vec<_> = report.blobs.iter().map(|blob| blobs.join(blob)).collect();
    mounted(&merged, &devices, &dir.path().join("mnt"), &expected);
    let flat = dir.path().join("flat");
    export_block(&image, &reader, &File::create_new(&flat).unwrap()).unwrap();
    mounted(&flat, &[], &dir.path().join("mnt"), &expected);
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

#[cfg(feature = "mount")]
#[test]
fn a_native_mount_is_found_again_and_outlives_its_files_and_its_name() {
    use shoal_rafs::{MountError, NativeMount, Unmounted};
    use std::io::Read;

    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // What mount(2) would take for the end of an option.
    let (source, work) = (dir.path().join("source"), dir.path().join("a,b"));
    support::nasty_tree(&source);
    let (_, _, blobs) = expanded(&source, &work, BuildOptions::default());
    let (boot, target) = (work.join("boot"), work.join("mnt").canonicalize().unwrap());
    let mount = NativeMount::new(&boot, &blobs, &target).unwrap();
    support::assert_same(&support::facts(&source), &support::facts(&target));
    let again = NativeMount::new(&boot, &blobs, &target);
    assert!(matches!(again, Err(MountError::Occupied { .. })), "{again:?}");

    mount.leave();
    assert!(NativeMount::existing(&work.join("other"), &target).unwrap().is_none());
    assert!(NativeMount::existing(&boot, &work).unwrap().is_none());
    let mount = NativeMount::existing(&boot, &target).unwrap().expect("the mount that was left");
    blobs.iter().for_each(|blob| fs::remove_file(blob).unwrap());
    support::assert_same(&support::facts(&source), &support::facts(&target));
    let (name, content) = support::facts(&source)
        .into_keys()
        .map(|name| (target.join(&name), source.join(name)))
        .find(|(_, path)| fs::symlink_metadata(path).is_ok_and(|file| file.is_file() && file.len() > 4096))
        .expect("a file that takes more than a page");
    let mut open = File::open(name).unwrap();
    assert_eq!(mount.unmount().unwrap(), Unmounted::Detached);
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert!(bytes == fs::read(content).unwrap(), "an open file goes on");
    assert_eq!(mount.unmount().unwrap(), Unmounted::Gone);
}

#[cfg(feature = "mount")]
#[test]
fn what_is_no_image_is_not_mounted_natively() {
    use shoal_rafs::{MountError, NativeMount};

    if !available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("mnt");
    fs::create_dir(&target).unwrap();
    let no_image = dir.path().join("file");
    fs::write(&no_image, [1; 9000]).unwrap();
    let long = dir.path().join("a".repeat(200)).join("b".repeat(60));
    for (bootstrap, blobs) in [(&no_image, vec![]), (&long, vec![]), (&no_image, vec![dir.path().join("absent")])] {
        let refused = NativeMount::new(bootstrap, &blobs, &target);
        assert!(matches!(refused, Err(MountError::Mount { .. })), "{}: {refused:?}", bootstrap.display());
    }
    let refused = NativeMount::new(&no_image, &[], &no_image);
    assert!(matches!(refused, Err(MountError::NotADirectory { .. })), "{refused:?}");
}
