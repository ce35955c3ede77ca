//! Images of archives: what GNU tar writes in each of its formats, what is made by hand to be awkward, and what must be
//! refused without a trace.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use shoal_rafs::{ArchiveLimits, BuildOptions, Compressor, check, unpack};
use tar::EntryType;

mod support;

use support::archive::{PAX, Tar, build_tar, chain, gnu_tar, open_tar, tar_facts};
use support::image::{Built, build};

fn options() -> BuildOptions {
    BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() }
}

fn sound(built: &Built) {
    let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
    assert!(report.ok, "{:?}", report.problems);
}

#[test]
fn what_gnu_tar_writes_is_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let exact = tar_facts(&source);
    let mut plain = exact.clone();
    for facts in plain.values_mut() {
        facts.mtime.1 = 0;
        facts.xattrs.clear();
    }
    for (number, (arguments, expected)) in
        [(PAX, &exact), (&["--format=gnu"], &plain), (&["--format=gnu", "-b1"], &plain)].into_iter().enumerate()
    {
        let tar = gnu_tar(&source, arguments);
        let built = open_tar(tar.as_slice(), &dir.path().join(number.to_string()), options());
        support::assert_same(expected, &support::image::facts(&built.image, &built.reader));
        sound(&built);
    }
}

#[test]
fn an_unpacked_image_builds_the_same_tree() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let first = build(&source, &dir.path().join("first"), options());
    let mut tar = Vec::new();
    unpack(&first.image, &first.reader, &mut tar).unwrap();
    let second = open_tar(tar.as_slice(), &dir.path().join("second"), options());
    support::assert_same(&tar_facts(&source), &support::image::facts(&second.image, &second.reader));
}

#[test]
fn compression_is_told_from_the_first_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default().file("a/b", &support::noise(1, 10_000)).finish();
    let (first, second) = tar.split_at(700);
    let gzip = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 1).unwrap();
    let skippable = [&[0x50, 0x2A, 0x4D, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    let streams = [
        tar.clone(),
        gzip(&tar),
        [gzip(first), gzip(second)].concat(),
        zstd(&tar),
        [zstd(first), zstd(second)].concat(),
        [skippable, zstd(&tar)].concat(),
    ];
    let images = streams.iter().enumerate().map(|(number, stream)| {
        let built = open_tar(stream.as_slice(), &dir.path().join(number.to_string()), options());
        fs::read(built.boot).unwrap()
    });
    let images: Vec<_> = images.collect();
    assert!(images.iter().all(|image| *image == images[0]));
}

#[test]
fn sparse_files_of_every_form_are_whole() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    File::create(source.join("all-hole")).unwrap().set_len(1 << 20).unwrap();
    for (name, segments, end) in [("few", 3u64, 1 << 20), ("many", 60, 1 << 23), ("ends-with-data", 5, 0)] {
        let mut file = File::create(source.join(name)).unwrap();
        for number in 0..segments {
            file.seek(SeekFrom::Start(number * 0x1_0000 + 0x3000)).unwrap();
            file.write_all(&support::noise(number, 0x1000 + number as usize * 10)).unwrap();
        }
        if end > 0 {
            file.set_len(end).unwrap();
        }
    }
    let expected = support::facts(&source);
    for (number, arguments) in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ]
    .into_iter()
    .enumerate()
    {
        let tar = gnu_tar(&source, &[arguments, &["-S"]].concat());
        assert!(tar.len() < 1 << 20, "the archive is not sparse");
        let built = open_tar(tar.as_slice(), &dir.path().join(number.to_string()), options());
        let mut found = support::image::facts(&built.image, &built.reader);
        // Nanoseconds have no place in the old format.
        for (path, facts) in &mut found {
            facts.mtime.1 = expected[path].mtime.1;
        }
        support::assert_same(&expected, &found);
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    let dir = tempfile::tempdir().unwrap();
    let tar = Tar::default()
        .hard_link("early", "late")
        .hard_link("early-2", "early")
        .hard_link("gone-link", "nowhere")
        .file("gone-link", b"now a file")
        .file("d/e/f", b"implied parents")
        .raw(EntryType::Directory, b"./d/", b"", b"", |header| header.set_mode(0o700))
        .file("x", b"first")
        .hard_link("keeps-first", "x")
        .file("x", b"second")
        .file("y/below", b"")
        .file("y", b"a file where a directory was")
        .raw(EntryType::Regular, b"old-directory/", b"", b"", |header| header.as_old_mut().linkflag = [0])
        .entry(EntryType::Symlink, b"s", b"/absolute/is/fine", b"")
        .hard_link("s2", "s")
        .file(".wh.gone", b"")
        .raw(EntryType::Directory, b"./", b"", b"", |header| header.set_uid(7))
        .file("late", b"content")
        .finish();
    let built = open_tar(tar.as_slice(), dir.path(), options());
    sound(&built);
    let facts = support::image::facts(&built.image, &built.reader);
    let content = |name: &str| facts[Path::new(name)].content.unwrap();
    let bytes = |bytes: &[u8]| (bytes.len() as u64, *blake3::hash(bytes).as_bytes());
    assert_eq!(content("early"), bytes(b"content"));
    assert_eq!(facts[Path::new("early")].names, ["early", "early-2", "late"].map(PathBuf::from));
    assert_eq!((content("x"), content("keeps-first")), (bytes(b"second"), bytes(b"first")));
    assert_eq!(content("gone-link"), bytes(b"now a file"));
    assert_eq!((facts[Path::new("d")].mode, facts[Path::new("d/e")].mode), (0o040_700, 0o040_755));
    assert!(!facts.contains_key(Path::new("y/below")));
    assert_eq!(facts[Path::new("old-directory")].mode & 0o170_000, 0o040_000);
    assert_eq!(facts[Path::new("s2")].target.as_deref(), Some(&b"/absolute/is/fine"[..]));
    assert_eq!((facts[Path::new("")].uid, content(".wh.gone")), (7, bytes(b"")));
}

#[test]
fn records_of_pax_have_the_last_word() {
    let dir = tempfile::tempdir().unwrap();
    let long = "n".repeat(200) + "/" + &"m".repeat(255);
    let tar = Tar::default()
        .records(&[
            ("path", long.as_bytes()),
            ("uid", b"4000000000"),
            ("mtime", b"-1.5"),
            ("SCHILY.xattr.user.lines", b"a\nb=\0"),
            ("SCHILY.xattr.system.other", b"left out"),
            ("SCHILY.xattr.user.empty", b""),
        ])
        .file("short", b"content")
        .finish();
    let built = open_tar(tar.as_slice(), dir.path(), options());
    assert_eq!(built.report.notes, [format!("{long}: xattr system.other was left out")]);
    let facts = &support::image::facts(&built.image, &built.reader)[Path::new(&long)];
    assert_eq!((facts.uid, facts.mtime), (4_000_000_000, (-2, 500_000_000)));
    let xattrs = [(&b"user.empty"[..], &b""[..]), (b"user.lines", b"a\nb=\0")];
    assert_eq!(facts.xattrs, BTreeMap::from(xattrs.map(|(name, value)| (name.to_vec(), value.to_vec()))));
}

/// Builds something that must be refused, and looks for what is left behind.
fn refused(stream: &[u8], options: BuildOptions) -> String {
    let dir = tempfile::tempdir().unwrap();
    let error = build_tar(stream, dir.path(), options).expect_err("a bad archive became an image");
    assert!(!dir.path().join("boot").exists());
    let left = fs::read_dir(dir.path().join("blobs")).map_or(0, Iterator::count);
    assert_eq!(left, 0, "files are left in the blob directory");
    chain(&error)
}

#[test]
fn bad_archives_are_refused_by_name() {
    let file = || Tar::default().file("good", &[1; 3000]);
    let named = |path: &[u8]| file().entry(EntryType::Regular, path, b"", b"x").finish();
    let linked = |target: &[u8]| file().entry(EntryType::Link, b"link", target, b"").finish();
    let long = |len: usize| [b"d/".repeat(len / 2), b"x".to_vec()].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (named(b"../up"), "entry \"../up\": \"../up\" leads up"),
        (named(b"a/../../up"), "leads up"),
        (named(b"/etc/passwd"), "entry \"/etc/passwd\": \"/etc/passwd\" is absolute"),
        (named(b"good/below"), "entry \"good/below\": \"good\" above it is no directory"),
        (named(&[b'n'; 256]), "a name of 256 bytes"),
        (named(&long(70_000)), "a name of 70001 bytes"),
        (file().entry(EntryType::Symlink, b"./", b"x", b"").finish(), "the root must be a directory"),
        (linked(b"/etc/passwd"), "entry \"link\": as the target of a link, \"/etc/passwd\" is absolute"),
        (linked(b"../x"), "leads up"),
        (linked(b"missing"), "its target \"missing\" is no file of the archive"),
        (linked(b"link"), "leads back to itself"),
        (linked(b"."), "a hard link to a directory"),
        (file().entry(EntryType::Symlink, b"s", b"", b"").finish(), "a symbolic link of 0 bytes"),
        (file().entry(EntryType::new(b'M'), b"m", b"", b"").finish(), "another volume"),
        (file().entry(EntryType::new(b'Z'), b"z", b"", b"").finish(), "unknown entry type 'Z'"),
        (file().records(&[("uid", b"4294967296")]).file("u", b"").finish(), "more than 32 bits"),
        (file().records(&[("mtime", b"soon")]).file("u", b"").finish(), "mtime \"soon\""),
        (file().records(&[("path", b"a\0b")]).file("u", b"").finish(), "other than NUL"),
        (file().records(&[("SCHILY.xattr.user.x", &[0; 70_000])]).file("u", b"").finish(), "xattrs are too large"),
        (
            file().records(&[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"1")]).file("u", b"xy").finish(),
            "sparse",
        ),
        (
            file().records(&[("GNU.sparse.map", b"5,1,0,1"), ("GNU.sparse.size", b"9")]).file("u", b"xy").finish(),
            "sparse",
        ),
        (b"this is no tar at all, but longer than a block".repeat(20), "the checksum does not match"),
        (b"BZh91AY&SY".to_vec(), "bzip2 is not supported"),
        (b"\xFD7zXZ\0".to_vec(), "xz is not supported"),
        (Vec::new(), "cut off"),
    ];
    for (stream, expected) in cases {
        let error = refused(&stream, options());
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn an_archive_that_is_cut_off_anywhere_is_refused() {
    let tar =
        Tar::default().directory("d").file("d/one", &[1; 3000]).file("d/two", &support::noise(2, 5000)).finish();
    let end = tar.len() - 1024;
    for len in (0..=end).step_by(256) {
        assert!(refused(&tar[..len], options()).contains("cut off at"), "{len}");
    }
    let gzip = || {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(&tar).unwrap();
        encoder.finish().unwrap()
    };
    // The last bytes are a checksum behind all content.
    for len in [20, gzip().len() / 2, gzip().len() - 1] {
        assert!(refused(&gzip()[..len], options()).contains("cut off at"), "{len}");
    }
    for garbage in [&b"!"[..], b"few", b"and now something else", &[0; 512]] {
        let garbage = refused(&[&gzip(), garbage].concat(), options());
        assert!(garbage.contains("cannot read on at its end") && garbage.contains("no gzip member"), "{garbage}");
    }
    let mut flipped = gzip();
    let last = flipped.len() - 5;
    flipped[last] ^= 1;
    assert!(refused(&flipped, options()).contains("cannot read on"));
    let zstd = zstd::bulk::compress(&tar, 3).unwrap();
    assert!(refused(&zstd[..zstd.len() - 3], options()).contains("cut off at"));
    refused(&[zstd, b"garbage".to_vec()].concat(), options());
}

#[test]
fn archives_beyond_the_limits_are_refused() {
    let limits = ArchiveLimits { names: 10, bytes: 100_000 };
    let options = BuildOptions { limits, ..options() };
    let many = (0..11).fold(Tar::default(), |tar, number| tar.file(&format!("f{number}"), b""));
    assert!(refused(&many.finish(), options).contains("entry \"f9\": the archive has more than 10 names"));
    let deep = Tar::default().file(&"d/".repeat(20), b"").file(&("d/".repeat(20) + "x"), b"");
    assert!(refused(&deep.finish(), options).contains("more than 10 names"));
    let large = Tar::default().file("small", b"x").file("large", &[0; 100_000]);
    assert!(refused(&large.finish(), options).contains("entry \"large\": the archive has more than 100000 bytes"));
    // A hole costs nothing to state.
    let records: &[(&str, &[u8])] = &[("GNU.sparse.map", b"0,1"), ("GNU.sparse.size", b"9000000000000000000")];
    let hole = Tar::default().records(records).file("hole", b"x");
    assert!(
        refused(&hole.finish(), options).contains("entry \"hole\": the archive has more than 100000 bytes of files")
    );
    let claims = Tar::default().raw(EntryType::XHeader, b"x", b"", b"", |header| header.set_size(1 << 40));
    let unlimited = ArchiveLimits { bytes: u64::MAX, ..limits };
    let error = refused(&claims.finish(), BuildOptions { limits: unlimited, ..options });
    assert!(error.contains("bytes of names and attributes follow"), "{error}");
    let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    bomb.write_all(&Tar::default().file("x", b"x").finish()).unwrap();
    bomb.write_all(&[0; 200_000]).unwrap();
    assert!(refused(&bomb.finish().unwrap(), options).contains("more than 100000 bytes"));
}

#[test]
fn the_image_of_an_archive_does_not_depend_on_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let tar = gnu_tar(&source, &["--format=pax"]);
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let images = [1, 2, 7].map(|threads| {
            let options = BuildOptions { compressor, threads: std::num::NonZeroUsize::new(threads), ..options() };
            let built = open_tar(tar.as_slice(), &dir.path().join(format!("{compressor}-{threads}")), options);
            (fs::read(built.boot).unwrap(), built.report)
        });
        assert!(images.iter().all(|image| *image == images[0]), "{compressor}");
    }
}
