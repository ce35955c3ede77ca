//! What goes into an image comes out: through the reader, through a tar, and again and again to the same bytes.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use shoal_proto::Algorithm;
use shoal_rafs::{BuildError, BuildOptions, Builder, Compressor, check, extents, unpack};

mod support;

use support::image::{build, content, walk};

fn options(compressor: Compressor, algorithm: Algorithm, chunk_size: u32) -> BuildOptions {
    BuildOptions { compressor, algorithm, chunk_size, ..BuildOptions::default() }
}

#[test]
fn a_nasty_tree_survives_every_kind_of_image() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (number, (compressor, algorithm, chunk_size)) in [
        (Compressor::Zstd, Algorithm::Blake3, 0x1000),
        (Compressor::Lz4, Algorithm::Sha256, 0x1000),
        (Compressor::None, Algorithm::Blake3, 0x2000),
        (Compressor::Zstd, Algorithm::Sha256, 0x10_0000),
        (Compressor::Lz4, Algorithm::Blake3, 0x100_0000),
    ]
    .into_iter()
    .enumerate()
    {
        let work = dir.path().join(number.to_string());
        let built = build(&source, &work, options(compressor, algorithm, chunk_size));
        support::assert_same(&expected, &support::image::facts(&built.image, &built.reader));
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        assert!(report.ok, "{:?}", report.problems);
        assert_eq!((report.names, report.decoded_bytes), (built.report.names, built.report.decoded_bytes));
        assert_eq!(report.blobs[0].verified_chunks, built.report.unique_chunks);
    }
}

#[test]
fn the_same_tree_gives_the_same_bytes_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let images = [1, 1, 2, 3, 16].into_iter().enumerate().map(|(run, threads)| {
            let options = BuildOptions {
                threads: NonZeroUsize::new(threads),
                ..options(compressor, Algorithm::Blake3, 0x1000)
            };
            let built = build(&source, &dir.path().join(format!("{compressor}-{run}")), options);
            (fs::read(built.boot).unwrap(), built.report)
        });
        let images: Vec<_> = images.collect();
        assert!(images.iter().all(|image| *image == images[0]), "{compressor}");
    }
}

#[test]
fn progress_ends_with_everything() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let builder = Builder::new(BuildOptions::default()).on_progress({
        let seen = Arc::clone(&seen);
        move |progress| seen.lock().unwrap().push(progress)
    });
    let report = builder.build(&source, &dir.path().join("boot"), &dir.path().join("blobs")).unwrap();
    let seen = seen.lock().unwrap();
    let last = seen.last().unwrap();
    assert_eq!((last.decoded_bytes, last.total_bytes), (report.decoded_bytes, Some(report.decoded_bytes)));
    assert!(seen.windows(2).all(|pair| pair[0].decoded_bytes < pair[1].decoded_bytes));
}

#[test]
fn levels_change_the_size_and_not_the_content() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let text: Vec<u8> =
        (0..200_000u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_string().into_bytes()).collect();
    fs::write(source.join("text"), &text).unwrap();
    let expected = support::facts(&source);
    let sizes = [-7, 1, 19].map(|level| {
        let options = BuildOptions { level: Some(level), ..BuildOptions::default() };
        let built = build(&source, &dir.path().join(level.to_string()), options);
        support::assert_same(&expected, &support::image::facts(&built.image, &built.reader));
        built.report.encoded_bytes
    });
    assert!(sizes[0] > sizes[1] && sizes[1] > sizes[2], "{sizes:?}");
    for (compressor, level) in [(Compressor::Zstd, 23), (Compressor::Zstd, -8), (Compressor::Lz4, 1)] {
        let options = BuildOptions { compressor, level: Some(level), ..BuildOptions::default() };
        let error = Builder::new(options).build(&source, &dir.path().join("boot"), &dir.path().join("blobs"));
        assert!(matches!(error, Err(BuildError::Level { .. })), "{compressor} {level}");
    }
}

#[test]
fn a_full_disk_ends_the_build_without_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (source, small) = (dir.path().join("source"), dir.path().join("small"));
    fs::create_dir_all(&source).unwrap();
    fs::create_dir_all(&small).unwrap();
    for number in 0..8 {
        fs::write(source.join(number.to_string()), support::noise(number, 1 << 20)).unwrap();
    }
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m", "none"]).arg(&small).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        return println!("skipped: no permission to mount a small file system");
    }
    let built = Builder::new(BuildOptions::default()).build(&source, &small.join("boot"), &small.join("blobs"));
    let left = [fs::read_dir(small.join("blobs")).unwrap().count(), fs::read_dir(&small).unwrap().count()];
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    assert!(matches!(built, Err(BuildError::Io { .. })), "{built:?}");
    assert_eq!(left, [0, 1], "only the empty directory of blobs is left");
}

/// What happens to a file.
type Change = fn(&Path);

#[test]
fn a_tree_that_changes_while_it_is_read_ends_the_build_without_a_trace() {
    let changes: [(Change, &str); 4] = [
        (|last| fs::write(last, b"longer than before").unwrap(), "it had 6 bytes and has 18"),
        (|last| fs::write(last, b"other!").unwrap(), "it was written to"),
        (|last| fs::rename(last.with_file_name("../other"), last).unwrap(), "another file has its name"),
        (|last| fs::remove_file(last).unwrap(), "No such file"),
    ];
    for (change, said) in changes {
        let dir = tempfile::tempdir().unwrap();
        let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
        fs::create_dir(&source).unwrap();
        // Far more chunks than are under way at a time, so the last file is not read before the first chunk is done.
        fs::write(source.join("a"), support::noise(1, 600 * support::CHUNK)).unwrap();
        let last = source.join("z");
        fs::write(&last, b"before").unwrap();
        fs::write(dir.path().join("other"), b"before").unwrap();
        let (once, changed) = (std::sync::Once::new(), last.clone());
        let options =
            BuildOptions { threads: NonZeroUsize::new(1), ..options(Compressor::None, Algorithm::Blake3, 0x1000) };
        let builder = Builder::new(options).on_progress(move |_| once.call_once(|| change(&changed)));
        let error = builder.build(&source, &boot, &blobs).unwrap_err();
        let told =
            format!("{error}: {}", std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default());
        assert!(told.contains(&last.display().to_string()) && told.contains(said), "{told}");
        assert!(!boot.exists());
        assert_eq!(fs::read_dir(&blobs).map_or(0, Iterator::count), 0, "{told}");
    }
}

#[test]
fn gnu_tar_restores_the_source_from_an_unpacked_image() {
    let dir = tempfile::tempdir().unwrap();
    let (source, restored) = (dir.path().join("source"), dir.path().join("restored"));
    support::nasty_tree(&source);
    let built = build(&source, &dir.path().join("work"), options(Compressor::Zstd, Algorithm::Blake3, 0x1000));
    let tar = dir.path().join("image.tar");
    let report = unpack(&built.image, &built.reader, fs::File::create(&tar).unwrap()).unwrap();
    assert_eq!(report.bytes, built.report.decoded_bytes);
    fs::create_dir(&restored).unwrap();
    let status = Command::new("tar")
        .args(["--xattrs", "--xattrs-include=*", "--same-owner", "--numeric-owner", "-xpf"])
        .arg(&tar)
        .arg("-C")
        .arg(&restored)
        .status()
        .unwrap();
    assert!(status.success());
    let mut expected = support::facts(&source);
    let sockets: Vec<_> = expected.keys().filter(|path| is_socket(&source.join(path))).cloned().collect();
    assert_eq!(report.sockets.iter().map(PathBuf::from).collect::<Vec<_>>(), sockets);
    expected.retain(|path, _| !sockets.contains(path));
    let mut found = support::facts(&restored);
    if !support::is_root() {
        expected.values_mut().chain(found.values_mut()).for_each(|facts| (facts.uid, facts.gid) = (0, 0));
    }
    support::assert_same(&expected, &found);
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).unwrap().file_type().is_socket()
}

#[test]
fn a_tree_without_content_has_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("a")).unwrap();
    fs::write(source.join("a/empty"), b"").unwrap();
    let built = build(&source, dir.path(), BuildOptions::default());
    assert_eq!((built.report.blob, built.report.encoded_bytes, built.image.blobs().len()), (None, 0, 0));
    assert_eq!(fs::read_dir(&built.blobs).unwrap().count(), 0);
    support::assert_same(&support::facts(&source), &support::image::facts(&built.image, &built.reader));
}

#[test]
fn what_cannot_be_built_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let build = |source: &Path, options| {
        Builder::new(options).build(source, &dir.path().join("boot"), &dir.path().join("blobs")).unwrap_err()
    };
    let missing = dir.path().join("missing");
    assert!(matches!(build(&missing, BuildOptions::default()), BuildError::Io { path, .. } if path == missing));
    let file = dir.path().join("file");
    fs::write(&file, b"x").unwrap();
    assert!(matches!(build(&file, BuildOptions::default()), BuildError::Unsupported { path, .. } if path == file));
    for chunk_size in [0, 1, 0x800, 0x1001, 0x200_0000] {
        let options = BuildOptions { chunk_size, ..BuildOptions::default() };
        assert!(matches!(build(dir.path(), options), BuildError::ChunkSize { found } if found == chunk_size));
    }
    let gzip = BuildOptions { compressor: Compressor::Gzip, ..BuildOptions::default() };
    assert!(matches!(build(dir.path(), gzip), BuildError::Compressor { .. }));
    assert!(!dir.path().join("boot").exists());
}

/// A file or directory of a random tree.
#[derive(Debug, Clone)]
enum Thing {
    File { seed: u64, len: usize, xattr: Option<Vec<u8>> },
    Link(String),
    SecondName,
    Directory(BTreeMap<Vec<u8>, Thing>),
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(prop::sample::select(&b"ab!.~\xff"[..]), 1..4),
        prop::collection::vec(prop::sample::select(&b"ab"[..]), 200..=255),
    ]
    .prop_filter("reserved names", |name| name != b"." && name != b"..")
}

fn thing() -> impl Strategy<Value = Thing> {
    let len = prop_oneof![Just(0), 1..0x3000usize, prop::sample::select(vec![0xFFF, 0x1000, 0x1001, 0x5000])];
    let file = (0..4u64, len, prop::option::of(prop::collection::vec(any::<u8>(), 0..200)));
    let leaf = prop_oneof![
        4 => file.prop_map(|(seed, len, xattr)| Thing::File { seed, len, xattr }),
        1 => "[a-z/]{1,300}".prop_map(Thing::Link),
        1 => Just(Thing::SecondName),
    ];
    leaf.prop_recursive(4, 60, 20, |thing| {
        prop::collection::btree_map(name(), thing, 0..20).prop_map(Thing::Directory)
    })
}

/// Makes the tree on disk; `first` is some regular file that can get second names.
fn make(path: &Path, thing: &Thing, first: &mut Option<PathBuf>) {
    match thing {
        Thing::File { seed, len, xattr } => {
            fs::write(path, support::noise(*seed, *len)).unwrap();
            if let Some(value) = xattr {
                xattr::set(path, "user.value", value).unwrap();
            }
            first.get_or_insert_with(|| path.to_owned());
        }
        Thing::Link(target) => symlink(target, path).unwrap(),
        Thing::SecondName => {
            if let Some(first) = first {
                fs::hard_link(first, path).unwrap();
            }
        }
        Thing::Directory(things) => {
            fs::create_dir(path).unwrap();
            for (name, thing) in things {
                make(&path.join(OsStr::from_bytes(name)), thing, first);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_trees_come_back(
        things in prop::collection::btree_map(name(), thing(), 0..12),
        compressor in prop::sample::select(vec![Compressor::None, Compressor::Lz4, Compressor::Zstd]),
        ranges in prop::collection::vec((0..0x6000u64, 0..0x6000u64), 8),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        make(&source, &Thing::Directory(things), &mut None);
        let built = build(&source, dir.path(), options(compressor, Algorithm::Blake3, 0x1000));
        let expected = support::facts(&source);
        support::assert_same(&expected, &support::image::facts(&built.image, &built.reader));
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        prop_assert!(report.ok, "{:?}", report.problems);
        for (path, nid) in walk(&built.image) {
            if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
                let parent = built.image.inode(walk(&built.image)[parent]).unwrap();
                prop_assert_eq!(parent.lookup(name.as_bytes()).unwrap(), Some(nid));
                let absent = [name.as_bytes(), b"\x01"].concat();
                prop_assert_eq!(parent.lookup(&absent).unwrap(), None);
            }
            let inode = built.image.inode(nid).unwrap();
            let entries: Vec<_> = inode.entries().map(Result::unwrap).collect();
            for skip in 0..=entries.len() {
                prop_assert!(inode.entries_from(skip as u64).map(Result::unwrap).eq(entries[skip..].iter().copied()));
            }
            let content = content(&inode, &built.reader).unwrap();
            for (offset, len) in &ranges {
                let slices = extents(&inode, *offset, *len).map(|extent| {
                    let start = extent.offset_in_chunk as usize;
                    built.reader.read(extent.chunk).unwrap()[start..start + extent.len as usize].to_vec()
                });
                let found: Vec<u8> = slices.flatten().collect();
                let end = content.len().min((offset + len) as usize);
                prop_assert_eq!(&found, &content[end.min(*offset as usize)..end]);
            }
        }
    }
}
