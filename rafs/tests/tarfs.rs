//! A plain tar is read where it lies, by a bootstrap over it: what a usual image of the same tar holds, verified by digests
//! of chunks or, where there are none, by the sha256 of the tar.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use sha2::{Digest, Sha256};
use shoal_rafs::{
    BlobDirError, BlobDirReader, BlobTarget, Bootstrap, BuildError, BuildOptions, Builder, Compressor, ImageFile,
    MergeError, Output, PieceTableError, PrefetchList, check, check_file, inspect_path, merge, sharing, unpack,
};
use tar::EntryType;

mod support;

use support::archive::{PAX, Tar, chain, gnu_tar, open_tar, open_tarfs, tar_facts};
use support::image::{self, Built};
use support::{Facts, assert_same, noise};

/// Where the chunk table lies is stated here, and how long it is behind that.
const CHUNK_TABLE: usize = 1176;

fn options(chunk_size: u32) -> BuildOptions {
    BuildOptions { chunk_size, ..BuildOptions::default() }
}

fn sound(built: &Built) {
    let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
    assert!(report.ok, "{:#?}", report.problems);
    assert!(report.blobs.iter().all(|blob| blob.named_chunks > 0 && blob.verified_chunks == blob.named_chunks));
    assert_eq!(report.unused_chunks, 0);
}

fn number(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
}

/// The bootstrap as upstream writes it: of each chunk table one record is left, whose digest is zero.
fn without_digests(boot: &Bootstrap) -> Bootstrap {
    let mut bytes = boot.as_bytes().to_vec();
    let (start, len) = (number(&bytes, CHUNK_TABLE), number(&bytes, CHUNK_TABLE + 8));
    bytes[start..start + 32].fill(0);
    bytes[start + 80..start + len].fill(0);
    bytes[CHUNK_TABLE + 8..CHUNK_TABLE + 16].copy_from_slice(&80u64.to_le_bytes());
    Bootstrap::parse(bytes.into()).unwrap()
}

/// An image whose chunks have no digests, in place of one that has them.
fn strip(built: Built) -> Built {
    let image = without_digests(&built.image);
    fs::write(&built.boot, image.as_bytes()).unwrap();
    let reader = BlobDirReader::open(&image, &built.blobs).unwrap();
    Built { image, reader, ..built }
}

fn facts(built: &Built) -> BTreeMap<PathBuf, Facts> {
    image::facts(&built.image, &built.reader)
}

fn blob(built: &Built) -> PathBuf {
    built.blobs.join(built.report.blob.unwrap().to_string())
}

#[test]
fn everything_that_a_tar_can_hold() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let tar = gnu_tar(&source, PAX);
    for chunk_size in [0x1000, 0x10_0000] {
        let built = open_tarfs(&tar, &dir.path().join(chunk_size.to_string()), options(chunk_size));
        assert!(built.image.is_tarfs() && built.image.has_digests() && built.image.blobs()[0].is_tar());
        assert_eq!((built.image.block_size(), built.image.blobs().len()), (512, 1));
        // The blob is the tar.
        assert_eq!(fs::read(blob(&built)).unwrap(), tar);
        let digest: String = Sha256::digest(&tar).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(built.report.blob.unwrap().to_string(), digest);
        assert_same(&tar_facts(&source), &facts(&built));
        sound(&built);
        let mut unpacked = Vec::new();
        unpack(&built.image, &built.reader, &mut unpacked).unwrap();
        let again = open_tarfs(&unpacked, &dir.path().join(format!("again-{chunk_size}")), options(chunk_size));
        assert_same(&tar_facts(&source), &facts(&again));
        let stripped = strip(again);
        assert!(!stripped.image.has_digests());
        assert_same(&tar_facts(&source), &facts(&stripped));
        sound(&stripped);
    }
}

/// Hands out few bytes at a time.
struct Drops<'a>(&'a [u8]);

impl Read for Drops<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(777).min(self.0.len());
        self.0.read(&mut buffer[..len])
    }
}

#[test]
fn the_same_tar_gives_the_same_image() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().directory("d").file("d/a", &noise(1, 20_000)).file("b", &noise(2, 10)).finish();
    let first = open_tarfs(&tar, &dir.path().join("first"), options(0x1000));
    for threads in [1, 4] {
        let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
        let options = BuildOptions { threads: NonZeroUsize::new(threads), ..options(0x1000) };
        // What a usual blob would take is of no use here.
        let options = BuildOptions { compressor: Compressor::Lz4, ..options };
        Builder::new(options).build_tarfs(Drops(&tar), Path::new("tar"), &boot, &blobs).unwrap();
        assert_eq!(fs::read(boot).unwrap(), first.image.as_bytes()[..]);
    }
}

#[test]
fn names_targets_and_attributes_longer_than_a_block() {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = Tar::default();
    let mut targets = BTreeMap::new();
    for len in [1, 400, 447, 448, 449, 511, 512, 513, 1000, 1024, 1025, 4095, 4096] {
        let (name, target) = (format!("link-{len}"), "t".repeat(len));
        tar = tar.entry(EntryType::Symlink, name.as_bytes(), target.as_bytes(), b"");
        targets.insert(name, target);
    }
    let long: Vec<_> = (0..40).map(|number| format!("{number:0255}")).collect();
    for name in &long {
        tar = tar.file(&format!("dir/{name}"), name.as_bytes());
    }
    let value = noise(3, 3000);
    let record = [("SCHILY.xattr.user.large", value.as_slice()), ("SCHILY.xattr.user.small", b"x")];
    tar = tar.records(&record).file("attributes", b"content").hard_link("other-name", "attributes");
    let built = open_tarfs(&tar.finish(), dir.path(), options(0x1000));
    sound(&built);
    let found = facts(&built);
    for (name, target) in targets {
        assert_eq!(found[Path::new(&name)].target, Some(target.into_bytes()), "{name}");
    }
    assert!(long.iter().all(|name| found.contains_key(&Path::new("dir").join(name))));
    let attributes = &found[Path::new("attributes")];
    assert_eq!(attributes.xattrs[&b"user.large"[..]], value);
    assert_eq!(attributes.names, [Path::new("attributes"), Path::new("other-name")]);
}

#[test]
fn a_tar_without_content_is_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().directory("a").file("a/empty", b"").finish();
    let built = open_tarfs(&tar, &dir.path().join("empty"), options(0x1000));
    assert_eq!((built.report.blob, built.image.blobs().len()), (None, 0));
    assert!(built.image.is_tarfs());
    assert_eq!(fs::read_dir(&built.blobs).unwrap().count(), 0);
    assert!(check(built.image.as_bytes().clone(), None).ok);
    assert_eq!(facts(&built).len(), 3);
}

#[test]
fn the_tar_may_be_elsewhere_and_under_another_name() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", b"content").finish();
    let (boot, name) = (dir.path().join("boot"), "07".repeat(32));
    let id = name.parse().unwrap();
    let output = Output { bootstrap: Some(&boot), blob: BlobTarget::Nowhere };
    let builder = Builder::new(options(0x1000));
    let report = builder.build_tarfs_to(tar.as_slice(), Path::new("tar"), output, Some(id)).unwrap();
    assert_eq!((report.blob, fs::read_dir(dir.path()).unwrap().count()), (Some(id), 1));
    fs::write(dir.path().join(name), &tar).unwrap();
    let image = Bootstrap::open(&boot).unwrap();
    // Digests of chunks vouch for what is read; the name does not.
    let reader = BlobDirReader::open(&image, dir.path()).unwrap();
    assert!(image::facts(&image, &reader)[Path::new("a")].content.is_some());
    assert!(!check(image.as_bytes().clone(), Some(dir.path())).ok);
    let refused = BlobDirReader::open(&without_digests(&image), dir.path()).unwrap_err();
    assert!(matches!(refused, BlobDirError::OtherTar { .. }), "{refused}");
}

#[test]
fn chunks_without_digests_are_as_good_as_the_tar() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", &noise(1, 9000)).file("b", &noise(2, 100)).finish();
    let built = strip(open_tarfs(&tar, dir.path(), options(0x1000)));
    assert!(matches!(built.image.piece_table(0, None), Err(PieceTableError::NoDigests)));
    assert!(check(built.image.as_bytes().clone(), None).ok);
    let chunks = inspect_path(&built.image, b"a").unwrap().unwrap().chunks.unwrap();
    assert_eq!((chunks.len(), chunks[0].digest.as_str(), chunks[0].decoded_offset), (3, "", 512));
    assert_eq!(sharing(&[built.image.clone(), built.image.clone()]).together.chunks, 0);
    // One byte of padding is enough, as nothing else vouches for the rest.
    for change in [700, tar.len() - 1] {
        let mut bytes = tar.clone();
        bytes[change] ^= 1;
        fs::write(blob(&built), bytes).unwrap();
        let error = BlobDirReader::open(&built.image, &built.blobs).unwrap_err();
        assert!(matches!(error, BlobDirError::OtherTar { .. }), "{error}");
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        assert!(!report.ok && report.blobs[0].verified_chunks == 0, "{:?}", report.problems);
    }
    fs::write(blob(&built), &tar[..tar.len() / 2]).unwrap();
    assert!(BlobDirReader::open(&built.image, &built.blobs).is_err());
    // What was whole when it was opened may change later.
    fs::write(blob(&built), &tar).unwrap();
    let reader = BlobDirReader::open(&built.image, &built.blobs).unwrap();
    let mut bytes = tar;
    bytes[512] ^= 1;
    fs::write(blob(&built), bytes).unwrap();
    let inode = built.image.inode(image::walk(&built.image)[Path::new("a")]).unwrap();
    assert!(image::content(&inode, &reader).is_err());
}

#[test]
fn a_damaged_tar_is_found_chunk_by_chunk() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", &noise(1, 9000)).file("b", &noise(2, 100)).finish();
    let built = open_tarfs(&tar, dir.path(), options(0x1000));
    let nids = image::walk(&built.image);
    let read = |name: &str| image::content(&built.image.inode(nids[Path::new(name)]).unwrap(), &built.reader);
    let mut bytes = tar.clone();
    bytes[600] ^= 1;
    fs::write(blob(&built), bytes).unwrap();
    assert!(read("a").is_err());
    assert_eq!(read("b").unwrap(), noise(2, 100));
    let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
    assert_eq!(report.blobs[0].verified_chunks, 3);
    assert!(report.problems.iter().any(|problem| problem.place.starts_with("chunk 0 of blob")));
    fs::write(blob(&built), &tar[..5000]).unwrap();
    // What was read a moment ago is remembered.
    let reader = BlobDirReader::open(&built.image, &built.blobs).unwrap();
    assert!(image::content(&built.image.inode(nids[Path::new("b")]).unwrap(), &reader).is_err());
    assert!(!check(built.image.as_bytes().clone(), Some(&built.blobs)).ok);
}

fn lower() -> Vec<u8> {
    let tar = Tar::default().directory("dir").file("dir/gone", &noise(1, 5000)).file("dir/kept", &noise(2, 5000));
    tar.file("shared", &noise(3, 9000)).hard_link("link", "shared").finish()
}

fn upper() -> Vec<u8> {
    let tar = Tar::default().file("dir/.wh.gone", b"").file("new", &noise(4, 3000));
    tar.file("shared-again", &noise(3, 9000)).finish()
}

#[test]
fn layers_are_merged_as_others_are() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let usual = [lower(), upper()].map(|tar| open_tar(tar.as_slice(), &at("usual"), options(0x1000)).image);
    merge(&usual, &at("usual-merged")).unwrap();
    let usual_merged = Bootstrap::open(&at("usual-merged")).unwrap();
    let reader = BlobDirReader::open(&usual_merged, &at("usual/blobs")).unwrap();
    let expected = image::facts(&usual_merged, &reader);

    let tars = [lower(), upper()].map(|tar| open_tarfs(&tar, &at("tars"), options(0x1000)).image);
    let none = open_tarfs(&Tar::default().file("dir/.wh.x", b"").finish(), &at("none"), options(0x1000)).image;
    let report = merge(&[tars[0].clone(), tars[1].clone(), none], &at("merged")).unwrap();
    assert_eq!((report.blobs.len(), report.shared_chunks), (2, 3));
    let open = |path: &Path| {
        let image = Bootstrap::open(path).unwrap();
        let report = check(image.as_bytes().clone(), Some(&at("tars/blobs")));
        assert!(report.ok, "{:#?}", report.problems);
        let reader = BlobDirReader::open(&image, &at("tars/blobs")).unwrap();
        (image.clone(), image::facts(&image, &reader))
    };
    let (merged, found) = open(&at("merged"));
    assert!(merged.is_tarfs() && merged.has_digests());
    assert_same(&expected, &found);

    // One layer without digests, and the image has none.
    let report = merge(&[tars[0].clone(), without_digests(&tars[1])], &at("half")).unwrap();
    assert_eq!((report.blobs.len(), report.shared_chunks), (2, 0));
    let (half, found) = open(&at("half"));
    assert!(!half.has_digests());
    assert_same(&expected, &found);

    for layers in [[usual[0].clone(), tars[1].clone()], [tars[0].clone(), usual[1].clone()]] {
        let error = merge(&layers, &at("mixed")).unwrap_err();
        assert!(matches!(error, MergeError::Mismatch { layer: 2, .. }), "{error}");
    }
    let builder = Builder::new(options(0x1000)).chunk_dictionary(vec![merged]);
    let error = builder.build(&at("none"), &at("boot"), &at("dictionary")).unwrap_err();
    assert!(matches!(error, BuildError::Dictionary { .. }), "{error}");
}

#[test]
fn what_is_read_early_is_noted() {
    let dir = tempfile::tempdir().unwrap();
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    let builder = Builder::new(options(0x1000)).prefetch(PrefetchList::paths(&b"/dir/kept\n/absent\n"[..]).unwrap());
    let report = builder.build_tarfs(lower().as_slice(), Path::new("tar"), &boot, &blobs).unwrap();
    assert_eq!((report.prefetched, report.notes.len()), (1, 1));
    let image = Bootstrap::open(&boot).unwrap();
    assert_eq!(image.prefetch(), [image::walk(&image)[Path::new("dir/kept")]]);
}

#[test]
fn what_the_mode_has_no_place_for_ends_the_build_without_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    let holes = fs::File::create(source.join("holes")).unwrap();
    holes.set_len(1 << 20).unwrap();
    (&holes).write_all(b"some data").unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&lower()).unwrap();
    let cases = [
        (gnu_tar(&source, &["--sparse", "--format=gnu"]), "\"./holes\" is a sparse file"),
        (gnu_tar(&source, &["--sparse", "--format=posix"]), "is a sparse file"),
        (gzip.finish().unwrap(), "compressed with gzip"),
        (zstd::bulk::compress(&lower(), 1).unwrap(), "compressed with zstd"),
        (lower()[..3000].to_vec(), "cut off at entry \"dir/gone\""),
        (lower()[..6144].to_vec(), "cut off"),
        (Tar::default().file("../up", b"x").finish(), "leads up"),
    ];
    for (tar, expected) in cases {
        let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
        let built = Builder::new(options(0x1000)).build_tarfs(tar.as_slice(), Path::new("tar"), &boot, &blobs);
        let error = chain(&built.unwrap_err());
        assert!(error.contains(expected), "{error}");
        assert!(!boot.exists() && fs::read_dir(&blobs).unwrap().count() == 0, "{expected}");
    }
}

#[test]
fn addresses_and_blocks_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a", &noise(1, 5000)).finish();
    let built = open_tarfs(&tar, dir.path(), options(0x1000));
    let changed = |image: &Bootstrap, at: usize, bytes: &[u8]| {
        let mut changed = image.as_bytes().to_vec();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        Bootstrap::parse(changed.into()).map_err(|error| error.to_string())
    };
    let refused = |at, bytes: &[u8], expected: &str| {
        let error = changed(&built.image, at, bytes).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    // Blocks of another size, or of that of usual images, or a usual image with these.
    refused(1024 + 12, &[10], "log2 of the block size");
    refused(1024 + 12, &[12], "an image with blocks of 4096 bytes");
    refused(1152 + 1, &[0], "an image with blocks of 512 bytes");
    // Features of the blob: not a tar, aligned, with batches.
    refused(4096 + 84, &[0x01], "a chunk table of 0 bytes for 2 chunks");
    refused(4096 + 84, &[0x41], "of a tar");
    refused(4096 + 84, &[0xC4], "of a tar");
    refused(4096 + 76, &[3], "with compressor 3");
    refused(4096 + 96, &[1], "decoded");
    refused(1408 + 64, &[1, 0], "1 blocks");
    // The last chunk index of the only file is the last thing in front of the chunk table that is not zero.
    let bytes = built.image.as_bytes();
    let table = number(bytes, CHUNK_TABLE);
    let index = bytes[..table].iter().rposition(|byte| *byte != 0).unwrap() / 8 * 8;
    refused(index + 4, &[200], "decoded offset");
    let stripped = without_digests(&built.image);
    // Behind the tar, over the chunk before it, and in front of that.
    for (block, expected) in [(200, "end behind"), (2, "overlaps"), (0, "overlaps")] {
        let error = changed(&stripped, index + 4, &[block]).unwrap_err();
        assert!(error.contains(expected), "block {block}: {error}");
    }
    let error = changed(&stripped, index, &[9]).unwrap_err();
    assert!(error.contains("chunk 9 of a blob of 2"), "{error}");
    let error = changed(&stripped, index, &[0]).unwrap_err();
    assert!(error.contains("described twice"), "{error}");
    // A table of nothing, anywhere in the file, is none.
    let nothing = [77u64.to_le_bytes(), [0; 8]].concat();
    assert!(!changed(&stripped, CHUNK_TABLE, &nothing).unwrap().has_digests());
    // Elsewhere in the tar it may be, if only the tar vouches for it.
    assert!(changed(&stripped, index + 4, &[10]).is_ok());
}

#[test]
fn every_flipped_bit_of_super_blocks_and_tables_is_safe() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().directory("d").file("d/a", &noise(1, 9000)).file("b", b"content").finish();
    let built = open_tarfs(&tar, dir.path(), options(0x1000));
    let known = [Vec::new(), noise(1, 9000), b"content".to_vec()];
    let table = number(built.image.as_bytes(), CHUNK_TABLE);
    for position in (1024..1408 + 128).chain(4096..4096 + 256).chain(table..table + 4 * 80) {
        for bit in 0..8 {
            let mut bytes = built.image.as_bytes().to_vec();
            bytes[position] ^= 1 << bit;
            let Ok(image) = Bootstrap::parse(bytes.into()) else { continue };
            let Ok(reader) = BlobDirReader::open(&image, &built.blobs) else { continue };
            for nid in image::walk(&image).into_values() {
                let content = image::content(&image.inode(nid).unwrap(), &reader);
                assert!(content.is_err() || known.contains(&content.unwrap()), "byte {position} bit {bit}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// A tar of files, the later over the earlier, holds what a map of them does.
    #[test]
    fn files_are_what_was_written_last(
        files in prop::collection::vec(("[a-d]/[a-z]{1,3}", prop_oneof![0usize..1100, 4000usize..9000]), 0..40),
        stripped in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut tar, mut model) = (Tar::default(), BTreeMap::new());
        for (number, (path, len)) in files.into_iter().enumerate() {
            let content = noise(number as u64, len);
            tar = tar.file(&path, &content);
            model.insert(PathBuf::from(path), content);
        }
        let mut built = open_tarfs(&tar.finish(), dir.path(), options(0x1000));
        if stripped && !built.image.blobs().is_empty() {
            built = strip(built);
        }
        let report = check_file(&ImageFile::open(&built.boot).unwrap(), Some(&built.blobs));
        prop_assert!(report.ok, "{:#?}", report.problems);
        let mut nids = image::walk(&built.image);
        for (path, content) in model {
            let inode = built.image.inode(nids.remove(&path).unwrap()).unwrap();
            prop_assert_eq!(image::content(&inode, &built.reader).unwrap(), content);
        }
        prop_assert!(nids.keys().all(|path| path.as_os_str().len() < 2), "{:?}", nids);
    }
}
