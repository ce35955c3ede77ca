//! Bytes from strangers: a damaged bootstrap is refused or describes a tree that is still safe to walk, and no byte of
//! file data comes out that a digest does not vouch for.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;
use shoal_rafs::{
    BlobDirReader, Bootstrap, BootstrapError, BuildOptions, Compressor, Kind, PieceTable, check, unpack,
};

mod support;

use support::image::{Built, build, content, walk};

/// Small enough to damage it thousands of times, with every structure in it.
fn image(dir: &Path, compressor: Compressor) -> Built {
    let source = dir.join("source");
    fs::create_dir_all(source.join("directory/sub")).unwrap();
    for (name, len) in
        [("empty", 0), ("small", 100), ("chunk", 0x1000), ("large", 0x5123), ("directory/sub/two", 0x1001)]
    {
        let half = support::noise(len as u64, len / 2);
        fs::write(source.join(name), [vec![b'x'; len - half.len()], half].concat()).unwrap();
    }
    fs::hard_link(source.join("small"), source.join("directory/again")).unwrap();
    symlink("small", source.join("link")).unwrap();
    symlink("t".repeat(4095), source.join("long-link")).unwrap();
    xattr::set(source.join("small"), "user.name", b"value").unwrap();
    xattr::set(source.join("directory"), "user.other", &[7; 100]).unwrap();
    for number in 0..60 {
        fs::write(source.join(format!("directory/sub/{number:0100}")), b"").unwrap();
    }
    build(&source, dir, BuildOptions { compressor, chunk_size: 0x1000, ..BuildOptions::default() })
}

/// The contents of all files.
fn contents(image: &Bootstrap, reader: &BlobDirReader) -> BTreeSet<Vec<u8>> {
    walk(image).into_values().map(|nid| content(&image.inode(nid).unwrap(), reader).unwrap()).collect()
}

/// Parses damaged bytes and, if they parse, touches everything. File data must be an error or one of `known`.
fn explore(bytes: Vec<u8>, blobs: &Path, known: &BTreeSet<Vec<u8>>) -> Result<(), String> {
    let report = check(bytes.clone().into(), None);
    let image = match Bootstrap::parse(bytes.into()) {
        Ok(image) => image,
        Err(BootstrapError::Invalid { .. } | BootstrapError::Unsupported { .. }) if !report.ok => return Ok(()),
        Err(error) => return Err(format!("{error:?}, check says {report:?}")),
    };
    let mut names = 0;
    for nid in walk(&image).into_values() {
        names += 1;
        let inode = image.inode(nid).map_err(|error| error.to_string())?;
        if inode.kind() == Kind::Symlink && !(1..=4096).contains(&inode.target().unwrap().len()) {
            return Err("a target out of bounds".into());
        }
        inode.xattrs().for_each(drop);
    }
    if names != image.name_count() {
        return Err(format!("{names} names found, {} counted", image.name_count()));
    }
    // Damage in the blob table can make it another blob.
    let Ok(reader) = BlobDirReader::open(&image, blobs) else { return Ok(()) };
    for (path, nid) in walk(&image) {
        match content(&image.inode(nid).unwrap(), &reader) {
            Ok(content) if !known.contains(&content) => return Err(format!("new content in {}", path.display())),
            _ => {}
        }
    }
    // Whatever it ends in, it ends.
    let _ = unpack(&image, &reader, std::io::sink());
    Ok(())
}

#[test]
fn every_flipped_bit_of_super_blocks_and_tables_is_safe() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path(), Compressor::Zstd);
    let known = contents(&built.image, &built.reader);
    let original = built.image.as_bytes().to_vec();
    let blob_table = 4096..4096 + 256;
    for position in (1024..1408 + 128).chain(blob_table) {
        for bit in 0..8 {
            let mut bytes = original.clone();
            bytes[position] ^= 1 << bit;
            explore(bytes, &built.blobs, &known).unwrap_or_else(|error| panic!("byte {position} bit {bit}: {error}"));
        }
    }
}

/// Tables that are empty may claim to lie anywhere, and do no harm.
#[test]
fn every_flipped_bit_of_an_image_without_blobs_is_safe() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("directory")).unwrap();
    let built = build(&source, dir.path(), BuildOptions::default());
    for position in 1024..1408 {
        for bit in 0..8 {
            let mut bytes = built.image.as_bytes().to_vec();
            bytes[position] ^= 1 << bit;
            let known = BTreeSet::from([Vec::new()]);
            explore(bytes, &built.blobs, &known).unwrap_or_else(|error| panic!("byte {position} bit {bit}: {error}"));
        }
    }
}

#[test]
fn a_bootstrap_cut_anywhere_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path(), Compressor::Zstd);
    let bytes = built.image.as_bytes();
    for len in (0..bytes.len()).step_by(512) {
        let error = Bootstrap::parse(bytes.slice(..len)).unwrap_err();
        assert!(matches!(error, BootstrapError::Invalid { .. }), "{len} bytes: {error}");
    }
}

#[test]
fn errors_name_structure_and_offset() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path(), Compressor::Zstd);
    let parse = |position: usize, byte: u8| {
        let mut bytes = built.image.as_bytes().to_vec();
        bytes[position] = byte;
        Bootstrap::parse(bytes.into()).unwrap_err().to_string()
    };
    // Root inode: one block into the meta area, which starts behind the blob table.
    let root = 3 * 4096;
    assert_eq!(parse(1024, 0), "super block at byte 1024: the magic is 0xe0f5e100");
    assert!(parse(1172, 1).starts_with("extended super block at byte 1152: chunk size"));
    assert!(parse(1408, b'g').starts_with("device slot at byte 1408: "));
    assert!(parse(4096, b'g').starts_with("blob entry at byte 4096: blob id"));
    assert!(parse(root, 0xF1).starts_with("inode at byte 12288: format 0xf1"), "{}", parse(root, 0xF1));
    assert!(parse(root + 64 + 8, 13).starts_with("directory block at byte 12352: "), "{}", parse(root + 72, 13));
    assert!(parse(root + 64 + 10, 1).starts_with("directory entry at byte 12352: "), "{}", parse(root + 74, 1));
}

/// Entries of the root in order: `.`, `..`, chunk, directory, empty, large, link, long-link, small.
#[test]
fn cycles_and_false_names_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path(), Compressor::Zstd);
    let dirent = |number: usize| 3 * 4096 + 64 + 12 * number;
    let names = dirent(9);
    let problem = |position: usize, bytes: &[u8]| {
        let mut image = built.image.as_bytes().to_vec();
        image[position..][..bytes.len()].copy_from_slice(bytes);
        let error = Bootstrap::parse(image.into()).unwrap_err().to_string();
        assert!(error.starts_with("directory entry at byte "), "{error}");
        error
    };
    let root = built.image.root().0.to_le_bytes();
    let directory = built.image.inode(built.image.root()).unwrap().lookup(b"directory").unwrap().unwrap();
    assert!(problem(dirent(3), &root).contains("has a name elsewhere"));
    assert!(problem(dirent(2), &root).contains("a File according to the name"));
    // "empty" becomes a second name of "directory", type and all.
    let second =
        [&directory.0.to_le_bytes()[..], &built.image.as_bytes()[dirent(4) + 8..dirent(4) + 10], &[2]].concat();
    assert!(problem(dirent(4), &second).contains("has a name elsewhere"));
    assert!(problem(dirent(0), &directory.0.to_le_bytes()).contains("\".\" leads to"));
    assert!(problem(dirent(1), &directory.0.to_le_bytes()).contains("\"..\" leads to"));
    assert!(problem(names + 3, b"/hunk").contains("name \"/hunk\""));
    assert!(problem(names + 3, b"ch\0nk").contains("name"));
    assert!(problem(names + 3, b"zhunk").contains("out of order"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// A hundred damaged copies per case: building the image costs more than parsing it.
    #[test]
    fn random_damage_is_safe(
        damage in prop::collection::vec(
            prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            100,
        ),
        bits_only in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let built = image(dir.path(), Compressor::Zstd);
        let known = contents(&built.image, &built.reader);
        let original = built.image.as_bytes().to_vec();
        // Not the gaps between structures.
        let used: Vec<usize> = (0..original.len()).filter(|position| {
            original[position.saturating_sub(16)..(position + 16).min(original.len())].iter().any(|byte| *byte != 0)
        }).collect();
        for changes in damage {
            let mut bytes = original.clone();
            for (position, value) in &changes {
                let byte = &mut bytes[used[position.index(used.len())]];
                *byte = if bits_only { *byte ^ (1 << (value % 8)) } else { *value };
            }
            let outcome = explore(bytes, &built.blobs, &known);
            prop_assert!(outcome.is_ok(), "{:?}", outcome);
        }
    }

    #[test]
    fn arbitrary_blocks_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..3 * 4096)) {
        let mut bytes = bytes;
        bytes.resize(bytes.len().next_multiple_of(4096), 0);
        prop_assert!(Bootstrap::parse(bytes.into()).is_err());
    }
}

/// Every byte of a blob, flipped in turn: exactly the chunk that has it fails.
#[test]
fn a_flipped_byte_of_a_blob_fails_the_chunk_that_has_it() {
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let dir = tempfile::tempdir().unwrap();
        let built = image(dir.path(), compressor);
        let table = built.image.piece_table(0, None).unwrap();
        let path = built.blobs.join(table.blob().to_string());
        let mut stored = fs::read(&path).unwrap();
        let originals: Vec<Bytes> = (0..table.len()).map(|number| decode(&table, number, &stored).unwrap()).collect();
        for position in (0..stored.len()).step_by(if compressor == Compressor::None { 1 } else { 3 }) {
            stored[position] ^= 0x10;
            for (number, piece) in table.pieces() {
                match decode(&table, number, &stored) {
                    Ok(bytes) => {
                        assert_eq!(bytes, originals[number as usize]);
                        // Only a compressed form has bits that mean nothing.
                        assert!(compressor != Compressor::None || !piece.encoded().contains(&(position as u64)));
                    }
                    Err(()) => assert!(piece.encoded().contains(&(position as u64)), "{compressor} byte {position}"),
                }
            }
            stored[position] ^= 0x10;
        }
    }
}

fn decode(table: &PieceTable, number: u32, stored: &[u8]) -> Result<Bytes, ()> {
    let range = table.piece(number).unwrap().encoded();
    let decoded = table.decode(number, &stored[range.start as usize..range.end as usize]).map_err(|_| ())?;
    Ok(decoded.chunk(number).unwrap())
}

#[test]
fn check_finds_every_flipped_byte_of_a_blob() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path(), Compressor::Zstd);
    let blob = &built.image.blobs()[0];
    let path = built.blobs.join(blob.id.to_string());
    let original = fs::read(&path).unwrap();
    let problems = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        assert_eq!(report.ok, report.problems.is_empty());
        report
            .problems
            .into_iter()
            .map(|problem| format!("{}: {}", problem.place, problem.problem))
            .collect::<Vec<_>>()
    };
    assert_eq!(problems(&original), [""; 0]);
    let flipped = |position: u64| {
        let mut bytes = original.clone();
        bytes[position as usize] ^= 0xFF;
        problems(&bytes)
    };
    let has = |problems: &[String], text: &str| problems.iter().any(|problem| problem.contains(text));
    let in_chunk = flipped(built.image.piece_table(0, None).unwrap().piece(2).unwrap().encoded().start + 5);
    assert!(has(&in_chunk, "sha256") && has(&in_chunk, "chunk 2 of blob"), "{in_chunk:?}");
    let in_table = flipped(blob.chunk_table.offset + 8);
    assert!(has(&in_table, "sha256") && has(&in_table, "chunk table"), "{in_table:?}");
    let in_header = flipped(blob.encoded_size - 4096);
    assert!(has(&in_header, "sha256") && has(&in_header, "magic"), "{in_header:?}");
    let cut = problems(&original[..original.len() - 1]);
    assert!(has(&cut, "in the blob table") && has(&cut, "chunk table of blob"), "{cut:?}");
    fs::remove_file(&path).unwrap();
    let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
    assert!(!report.ok && report.problems[0].problem.contains("cannot read"));
}

#[test]
fn check_counts_links_and_names() {
    let dir = tempfile::tempdir().unwrap();
    let built = image(dir.path(), Compressor::Zstd);
    let places = |position: usize, byte: u8| {
        let mut bytes = built.image.as_bytes().to_vec();
        bytes[position] = byte;
        check(bytes.into(), None).problems.into_iter().map(|problem| problem.place).collect::<Vec<_>>()
    };
    assert_eq!(places(1024 + 16, 1), ["super block at byte 1024"]);
    assert_eq!(places(3 * 4096 + 44, 9), ["inode 128"]);
}
