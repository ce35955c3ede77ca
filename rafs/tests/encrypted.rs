//! Encrypted images: built, read, checked, unpacked, merged and laid out anew; what the blob shows to who has not the
//! bootstrap, and what damage and wrong keys do.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;
use shoal_rafs::{
    BlobDirError, BlobDirReader, Bootstrap, BootstrapError, BuildError, BuildOptions, Builder, ChunkTable,
    ChunkTableError, CipherKey, Compressor, Encryption, PrefetchList, check, chunk_table_file_with, expand_blob,
    export_block, inspect, merge, unpack,
};

mod support;

use support::image::{Built, build, content, facts, walk};

/// In a file of every tree here.
const SECRET: &[u8] = b"what nobody shall read in a blob";

fn encrypted(options: BuildOptions) -> BuildOptions {
    BuildOptions { encryption: Encryption::FreshKey, ..options }
}

fn small_chunks() -> BuildOptions {
    BuildOptions { compressor: Compressor::None, chunk_size: 0x1000, ..BuildOptions::default() }
}

/// Files around the length of a block, and one of several chunks.
fn source(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    fs::create_dir(&source).unwrap();
    for len in (1..40).chain([0xFFF, 0x1000, 0x1001]) {
        fs::write(source.join(format!("{len}")), support::noise(len as u64, len)).unwrap();
    }
    fs::write(source.join("secret"), SECRET.repeat(300)).unwrap();
    source
}

fn blob_file(built: &Built) -> PathBuf {
    built.blobs.join(built.image.blobs()[0].id.to_string())
}

fn holds(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Where key and tweak of the first blob lie in its bootstrap.
fn key_range(image: &Bootstrap) -> Range<usize> {
    let entry = image.super_blocks().blob_table_offset as usize;
    entry + 168..entry + 216
}

/// What every file holds, or that it cannot be read.
fn contents(image: &Bootstrap, reader: &BlobDirReader) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let read = |(path, nid)| (path, content(&image.inode(nid).unwrap(), reader).ok());
    walk(image).into_iter().map(read).collect()
}

#[test]
fn encrypted_images_are_read_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    fs::write(source.join("secret"), SECRET).unwrap();
    let expected = support::facts(&source);
    for (number, (compressor, batch_size, toc)) in [
        (Compressor::None, None, false),
        (Compressor::Zstd, None, true),
        (Compressor::Lz4, None, false),
        (Compressor::Zstd, Some(0x1000), false),
        (Compressor::None, Some(0x1_0000), true),
        (Compressor::Lz4, Some(0x1_0000), false),
    ]
    .into_iter()
    .enumerate()
    {
        let work = dir.path().join(number.to_string());
        let options = BuildOptions { compressor, chunk_size: 0x1_0000, batch_size, toc, ..BuildOptions::default() };
        let plain = build(&source, &work.join("plain"), options);
        let sealed = build(&source, &work.join("sealed"), encrypted(options));
        assert!(sealed.image.is_encrypted() && !plain.image.is_encrypted());
        support::assert_same(&expected, &facts(&sealed.image, &sealed.reader));
        let report = check(sealed.image.as_bytes().clone(), Some(&sealed.blobs));
        assert!(report.ok, "{compressor} {batch_size:?}: {:?}", report.problems);
        assert_eq!(report.blobs[0].verified_chunks, plain.report.unique_chunks);
        let decoded = [&plain, &sealed].map(|built| {
            let path = work.join("expanded");
            expand_blob(&built.image, &built.reader, 0, &File::create(&path).unwrap()).unwrap();
            let mut tar = Vec::new();
            unpack(&built.image, &built.reader, &mut tar).unwrap();
            (fs::read(path).unwrap(), tar)
        });
        assert!(decoded[0] == decoded[1]);

        let cipher = sealed.image.blobs()[0].cipher.as_ref();
        let table = ChunkTable::read_with(&blob_file(&sealed), cipher).unwrap();
        assert_eq!(table.features() & 0x104, 0x104, "encrypted, and entries that say so");
        assert_eq!(table.features() & 0x80 != 0, batch_size.is_some());
        assert!(ChunkTable::read(&blob_file(&sealed)).is_err(), "it lies there encrypted");
        let copy = Bytes::from(chunk_table_file_with(&blob_file(&sealed), cipher).unwrap());
        assert_eq!(ChunkTable::parse(&copy).unwrap(), table);
        let stored = fs::read(blob_file(&sealed)).unwrap();
        assert!(!holds(&stored, SECRET) && !holds(&stored, &sealed.image.as_bytes()[key_range(&sealed.image)][..16]));
        // What does not shrink lies in a plain blob as it is.
        assert!(holds(&fs::read(blob_file(&plain)).unwrap(), SECRET) || batch_size.is_some());
    }
}

#[test]
fn every_blob_has_a_key_of_its_own_and_a_given_one_decides_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let of = |name: &str, options| {
        let built = build(&source, &dir.path().join(name), options);
        (built.report.blob.unwrap(), built.image.as_bytes()[key_range(&built.image)].to_vec())
    };
    let (first, second) = (of("a", encrypted(small_chunks())), of("b", encrypted(small_chunks())));
    assert!(first.0 != second.0 && first.1[..32] != second.1[..32] && first.1[32..] != second.1[32..]);
    let mut key = [7; 32];
    key[0] = 8;
    let options = |threads| BuildOptions {
        encryption: Encryption::Key(CipherKey::new(key, [9; 16]).unwrap()),
        batch_size: Some(0x1000),
        threads: NonZeroUsize::new(threads),
        ..small_chunks()
    };
    assert_eq!(of("c", options(1)), of("d", options(4)));
}

#[test]
fn without_the_right_key_nothing_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for (name, batch_size) in [("plain", None), ("batched", Some(0x1000))] {
        let work = dir.path().join(name);
        fs::create_dir(&work).unwrap();
        let built = build(&source(&work), &work, encrypted(BuildOptions { batch_size, ..small_chunks() }));
        let mut bytes = built.image.as_bytes().to_vec();
        let range = key_range(&built.image);
        // A bit of the key for blocks, of that for tweaks, of the tweak's two halves.
        for byte in [0, 16, 32, 40] {
            bytes[range.start + byte] ^= 1;
            let other = Bootstrap::parse(bytes.clone().into()).unwrap();
            match BlobDirReader::open(&other, &built.blobs) {
                Ok(reader) => {
                    let read = contents(&other, &reader).into_iter();
                    let read: Vec<_> = read.filter(|(path, content)| content.is_some() && path.is_file()).collect();
                    assert!(read.is_empty(), "byte {byte}: {read:?}");
                }
                Err(error) => assert!(matches!(error, BlobDirError::ChunkTable { .. }), "{error}"),
            }
            let report = check(bytes.clone().into(), Some(&built.blobs));
            assert_eq!((report.ok, report.blobs[0].verified_chunks), (false, 0));
            bytes[range.start + byte] ^= 1;
        }
        // No key at all, and what says that there is none.
        bytes.copy_within(range.start..range.start + 16, range.start + 16);
        let refused = Bootstrap::parse(bytes.clone().into()).unwrap_err();
        assert!(refused.to_string().contains("halves of the key"), "{refused}");
        let mut bytes = built.image.as_bytes().to_vec();
        for cipher in [0, 2, 3] {
            bytes[range.end] = cipher;
            let refused = Bootstrap::parse(bytes.clone().into());
            assert!(matches!(refused, Err(BootstrapError::Invalid { structure: "blob entry", .. })));
        }
    }
}

/// XTS itself notices nothing; lengths, decoders and digests do.
#[test]
fn damage_yields_nothing_new() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&source(dir.path()), dir.path(), encrypted(small_chunks()));
    let (path, right) = (blob_file(&built), contents(&built.image, &built.reader));
    let stored = fs::read(&path).unwrap();
    let data_end = built.image.blobs()[0].data_end as usize;
    for position in (0..data_end).step_by(61) {
        let mut changed = stored.clone();
        changed[position] ^= 0x10;
        fs::write(&path, &changed).unwrap();
        let reader = BlobDirReader::open(&built.image, &built.blobs).unwrap();
        let found = contents(&built.image, &reader);
        let wrong = found.iter().filter(|(path, content)| **content != right[*path]);
        let wrong: Vec<_> = wrong.map(|(_, content)| content).collect();
        assert!(!wrong.is_empty() && wrong.iter().all(|content| content.is_none()), "byte {position}");
        assert!(!check(built.image.as_bytes().clone(), Some(&built.blobs)).ok);
    }
    fs::write(&path, &stored[..data_end / 2]).unwrap();
    let reader = BlobDirReader::open(&built.image, &built.blobs).unwrap();
    assert!(contents(&built.image, &reader).values().any(Option::is_none));
    let cipher = built.image.blobs()[0].cipher.as_ref();
    for position in [data_end, stored.len() - 4096, stored.len() - 4030, stored.len() - 1] {
        let mut changed = stored.clone();
        changed[position] ^= 1;
        fs::write(&path, &changed).unwrap();
        let read = ChunkTable::read_with(&path, cipher);
        assert!(
            matches!(read, Err(ChunkTableError::Invalid { .. }))
                || !check(built.image.as_bytes().clone(), Some(&built.blobs)).ok
        );
    }
}

#[test]
fn merged_and_optimized_images_stay_encrypted() {
    let dir = tempfile::tempdir().unwrap();
    let work = |name: &str| {
        let work = dir.path().join(name);
        fs::create_dir(&work).unwrap();
        work
    };
    let lower = build(&source(&work("lower")), &work("lower-image"), encrypted(small_chunks()));
    let upper = work("upper");
    fs::write(upper.join("in the clear"), support::noise(1234, 5000)).unwrap();
    let upper = build(&upper, &work("upper-image"), small_chunks());
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&lower.boot), mode(&upper.boot)), (0o600, 0o644), "one has a key");
    let merged = dir.path().join("merged");
    merge(&[lower.image.clone(), upper.image.clone()], &merged).unwrap();
    let merged = Bootstrap::open(&merged).unwrap();
    assert_eq!(merged.blobs().iter().map(|blob| blob.cipher.is_some()).collect::<Vec<_>>(), [true, false]);
    assert_eq!(merged.super_blocks().flags >> 24, 2, "one encrypted blob makes an encrypted image");
    fs::copy(blob_file(&upper), lower.blobs.join(upper.report.blob.unwrap().to_string())).unwrap();
    let reader = BlobDirReader::open(&merged, &lower.blobs).unwrap();
    assert!(check(merged.as_bytes().clone(), Some(&lower.blobs)).ok);

    // A dictionary's chunks are read where they are, with the key that they have there.
    let again = dir.path().join("again");
    let report = Builder::new(small_chunks())
        .chunk_dictionary(vec![merged.clone()])
        .build(&dir.path().join("lower/source"), &again, &lower.blobs)
        .unwrap();
    assert_eq!((report.blob, report.shared_blobs.len()), (None, 1));
    assert!(Bootstrap::open(&again).unwrap().is_encrypted());
    assert!(check(fs::read(&again).unwrap().into(), Some(&lower.blobs)).ok);

    // The copy of hot chunks would show them.
    let optimized = dir.path().join("optimized");
    let report = Builder::new(small_chunks())
        .prefetch(PrefetchList::paths(&b"/secret\n"[..]).unwrap())
        .optimize(&merged, &reader, &optimized, &lower.blobs)
        .unwrap();
    let hot = lower.blobs.join(report.blob.unwrap().to_string());
    assert!(!holds(&fs::read(hot).unwrap(), SECRET));
    let report = check(fs::read(&optimized).unwrap().into(), Some(&lower.blobs));
    assert!(report.ok, "{:?}", report.problems);
}

#[test]
fn no_key_leaves_the_bootstrap() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&source(dir.path()), dir.path(), encrypted(small_chunks()));
    let key = built.image.as_bytes()[key_range(&built.image)].to_vec();
    let summary = serde_json::to_string(&inspect(&built.image)).unwrap();
    assert!(summary.contains(r#""encrypted":true"#), "{summary}");
    let shown = format!("{summary} {:?} {:?}", built.image, built.image.piece_table(0, None).unwrap());
    for secret in [&key[..16], &key[16..32], &key[32..]] {
        let numbers = format!("{secret:?}").trim_matches(['[', ']']).to_owned();
        assert!(!shown.contains(&hex(secret)) && !shown.contains(&numbers));
    }
    // The kernel's disk image has the plain files anyway, but the key would open the blob in the registry.
    let flat = dir.path().join("flat");
    export_block(&built.image, &built.reader, &File::create_new(&flat).unwrap()).unwrap();
    let flat = fs::read(flat).unwrap();
    assert!(holds(&flat, SECRET) && !holds(&flat, &key[..16]) && !holds(&flat, &key[16..32]));
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let failed = |options| {
        let built =
            Builder::new(encrypted(options)).build(&source, &dir.path().join("boot"), &dir.path().join("blobs"));
        assert!(!dir.path().join("boot").exists());
        built.unwrap_err()
    };
    assert!(matches!(failed(BuildOptions { inline_meta: true, ..small_chunks() }), BuildError::KeyInBlob));
    let large = BuildOptions { chunk_size: 0x100_0000, ..small_chunks() };
    assert!(matches!(failed(large), BuildError::EncryptedChunkSize { found: 0x100_0000 }));
    let layer = Builder::new(encrypted(BuildOptions::default())).build_reference(
        &b"\x1f\x8b"[..],
        Path::new("layer"),
        &dir.path().join("boot"),
        &dir.path().join("blobs"),
    );
    assert!(matches!(layer, Err(BuildError::EncryptedLayer)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever lengths files have: of a block and less, of no whole number of blocks, alone or in batches.
    #[test]
    fn chunks_of_any_length_round_trip(
        files in prop::collection::vec((prop_oneof![1..20usize, 1..300usize, 4000..13_000usize], any::<u64>(), any::<bool>()), 1..12),
        compressor in prop_oneof![Just(Compressor::None), Just(Compressor::Lz4), Just(Compressor::Zstd)],
        batch_size in prop_oneof![Just(None), Just(Some(0x1000))],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        for (number, (len, seed, repeats)) in files.iter().enumerate() {
            let bytes = if *repeats { vec![*seed as u8; *len] } else { support::noise(*seed, *len) };
            fs::write(source.join(number.to_string()), bytes).unwrap();
        }
        let options = BuildOptions { compressor, chunk_size: 0x1000, batch_size, ..BuildOptions::default() };
        let built = build(&source, dir.path(), encrypted(options));
        support::assert_same(&support::facts(&source), &facts(&built.image, &built.reader));
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        prop_assert!(report.ok, "{:?}", report.problems);
    }
}
