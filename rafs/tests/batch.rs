//! Images whose small chunks were compressed as one: built, read, checked, unpacked, expanded, and refused when their two
//! tables disagree.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use shoal_rafs::{
    BlobDirError, BlobDirReader, BuildError, BuildOptions, Builder, ChunkTable, Compressor, PieceTableError, check,
    expand_blob, unpack,
};

mod support;

use support::image::{Built, build, content, facts, walk};

/// The same tree as an image without batches and as one with.
fn images(source: &Path, dir: &Path, options: BuildOptions, batch_size: u32) -> (Built, Built) {
    let plain = build(source, &dir.join("plain"), options);
    let batched = build(source, &dir.join("batched"), BuildOptions { batch_size: Some(batch_size), ..options });
    let table = ChunkTable::read(&blob_file(&batched)).unwrap();
    assert!(table.batch(0).is_some());
    (plain, batched)
}

fn small(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    fs::create_dir(&source).unwrap();
    for number in 0..30u8 {
        fs::write(source.join(format!("{number:02}")), support::noise(number.into(), 50 + usize::from(number)))
            .unwrap();
    }
    fs::write(source.join("large"), support::noise(99, 0x3100)).unwrap();
    source
}

fn blob_file(built: &Built) -> PathBuf {
    built.blobs.join(built.image.blobs()[0].id.to_string())
}

#[test]
fn batched_images_are_read_like_any_other() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (number, (compressor, chunk_size, batch_size)) in [
        (Compressor::Zstd, 0x1000, 0x1000),
        (Compressor::None, 0x1_0000, 0x1_0000),
        (Compressor::Lz4, 0x1_0000, 0x1000),
        (Compressor::Zstd, 0x10_0000, 0x10_0000),
    ]
    .into_iter()
    .enumerate()
    {
        let work = dir.path().join(number.to_string());
        let options = BuildOptions { compressor, chunk_size, ..BuildOptions::default() };
        let (plain, batched) = images(&source, &work, options, batch_size);
        support::assert_same(&expected, &facts(&batched.image, &batched.reader));
        let report = check(batched.image.as_bytes().clone(), Some(&batched.blobs));
        assert!(report.ok, "{:?}", report.problems);
        assert_eq!(report.blobs[0].verified_chunks, plain.report.unique_chunks);
        // What the kernel would be given does not depend on how it was stored.
        let expanded = [&plain, &batched].map(|built| {
            let path = work.join("expanded");
            expand_blob(&built.image, &built.reader, 0, &File::create(&path).unwrap()).unwrap();
            let mut tar = Vec::new();
            unpack(&built.image, &built.reader, &mut tar).unwrap();
            (fs::read(path).unwrap(), tar)
        });
        assert!(expanded[0] == expanded[1]);
        let table = ChunkTable::read(&blob_file(&batched)).unwrap();
        let pieces = batched.image.piece_table(0, Some(&table)).unwrap();
        assert!(pieces.len() < table.len() && pieces.pieces().any(|(_, piece)| piece.chunks().len() > 1));
        assert_eq!(table.features() & 0x84, 0x84);
        batches_follow_the_rule(&table, batch_size);
    }
}

/// Small chunks and nothing else lie in batches, as many as fit, one behind the other.
fn batches_follow_the_rule(table: &ChunkTable, batch_size: u32) {
    let mut batches: BTreeMap<u32, Vec<_>> = BTreeMap::new();
    let mut last = None;
    for (index, chunk) in (0u32..).zip(table.chunks()) {
        let Some(place) = chunk.batch else { continue };
        assert!(chunk.decoded_len < batch_size / 2 && chunk.encoded_len == 0 && chunk.crc32.is_none());
        // A chunk beside the one before it is in another batch only where it would have filled that.
        let full = |before: &shoal_rafs::Batch| before.decoded_len + chunk.decoded_len >= batch_size;
        if let Some((before, batch)) = last.filter(|(before, batch)| *before + 1 == index && *batch != place.index) {
            assert!(full(&table.batch(batch).unwrap()), "chunk {before}");
        }
        last = Some((index, place.index));
        batches.entry(place.index).or_default().push((index, place.offset, chunk));
    }
    assert!(batches.keys().copied().eq(0..batches.len() as u32) && table.batch(batches.len() as u32).is_none());
    for (number, chunks) in batches {
        let mut end = 0;
        for (position, (index, offset, chunk)) in (0u32..).zip(&chunks) {
            assert_eq!((*index, *offset), (chunks[0].0 + position, end));
            assert_eq!(chunk.encoded_offset, chunks[0].2.encoded_offset);
            end += chunk.decoded_len;
        }
        assert_eq!(table.batch(number).unwrap().decoded_len, end);
    }
}

#[test]
fn batches_are_the_same_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let images = [1, 1, 2, 3, 16].into_iter().enumerate().map(|(run, threads)| {
            let threads = NonZeroUsize::new(threads);
            let options = BuildOptions { compressor, threads, chunk_size: 0x1000, ..BuildOptions::default() };
            let options = BuildOptions { batch_size: Some(0x1000), inline_meta: true, toc: true, ..options };
            let built = build(&source, &dir.path().join(format!("{compressor}-{run}")), options);
            (fs::read(built.boot).unwrap(), built.report)
        });
        let images: Vec<_> = images.collect();
        assert!(images.iter().all(|image| *image == images[0]), "{compressor}");
    }
}

#[test]
fn a_tree_without_small_files_has_no_batches() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    // Half of a batch is not small, and neither is the short end of a longer file.
    for (name, len) in [("half", 0x800), ("end", 0x1001)] {
        fs::write(source.join(name), support::noise(len as u64, len)).unwrap();
    }
    let built = build(&source, dir.path(), BuildOptions { batch_size: Some(0x1000), ..options() });
    let table = ChunkTable::read(&blob_file(&built)).unwrap();
    assert_eq!((table.features() & 0x84, table.len()), (0, 3));
    for batch_size in [0, 0x800, 0x1800, 0x2000] {
        let options = BuildOptions { batch_size: Some(batch_size), ..options() };
        let refused = Builder::new(options).build(&source, &dir.path().join("no"), &dir.path().join("none"));
        assert!(matches!(refused, Err(BuildError::BatchSize { found, .. }) if found == batch_size));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Files of any sizes in any order, some of them alike, against the rule and their own bytes.
    #[test]
    fn random_files_come_back_from_batches(
        files in prop::collection::vec((0..20u64, prop_oneof![0..0x900usize, 0..0x3000usize]), 1..120),
        compressor in prop::sample::select(vec![Compressor::None, Compressor::Lz4, Compressor::Zstd]),
        chunk_size in prop::sample::select(vec![0x1000, 0x4000]),
        threads in 1..4usize,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::create_dir(&source).unwrap();
        for (number, (seed, len)) in files.iter().enumerate() {
            fs::write(source.join(format!("{number:03}")), support::noise(*seed, *len)).unwrap();
        }
        let options = BuildOptions {
            compressor, chunk_size, batch_size: Some(0x1000), threads: NonZeroUsize::new(threads), ..BuildOptions::default()
        };
        let built = build(&source, dir.path(), options);
        support::assert_same(&support::facts(&source), &facts(&built.image, &built.reader));
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        prop_assert!(report.ok, "{:?}", report.problems);
        if !built.image.blobs().is_empty() {
            batches_follow_the_rule(&ChunkTable::read(&blob_file(&built)).unwrap(), 0x1000);
        }
    }
}

#[test]
fn without_its_chunk_table_a_batched_blob_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, batched) = images(&small(dir.path()), dir.path(), options(), 0x1000);
    assert_eq!(batched.image.piece_table(0, None).unwrap_err(), PieceTableError::NoChunkTable);
    let path = blob_file(&batched);
    let stored = fs::read(&path).unwrap();
    fs::write(&path, &stored[..stored.len() - 1]).unwrap();
    let error = BlobDirReader::open(&batched.image, &batched.blobs).unwrap_err();
    assert!(matches!(error, BlobDirError::ChunkTable { .. }), "{error}");
    assert!(!check(batched.image.as_bytes().clone(), Some(&batched.blobs)).ok);
}

fn options() -> BuildOptions {
    BuildOptions { compressor: Compressor::None, chunk_size: 0x1000, ..BuildOptions::default() }
}

#[test]
fn tables_that_disagree_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, batched) = images(&small(dir.path()), dir.path(), options(), 0x1000);
    for (built, entry, byte, reads) in [
        // Decoded offset of the second chunk, then of the plain image's.
        (&batched, 24, 0, false),
        // Its size; its batch; the offset of the batch.
        (&batched, 24, 4, false),
        (&batched, 24, 20, false),
        (&batched, 24, 8, false),
        // A blob without batches is read by the bootstrap alone.
        (&plain, 16, 2, true),
    ] {
        let path = blob_file(built);
        let stored = fs::read(&path).unwrap();
        let table = ChunkTable::read(&path).unwrap().range();
        let mut changed = stored.clone();
        assert_eq!(table.compressor, Compressor::None, "the test changes the table in place");
        changed[table.offset as usize + entry + byte] ^= 1;
        fs::write(&path, &changed).unwrap();
        let opened = BlobDirReader::open(&built.image, &built.blobs);
        assert_eq!(opened.is_ok(), reads, "byte {byte}: {:?}", opened.err());
        let report = check(built.image.as_bytes().clone(), Some(&built.blobs));
        let said = |text: &str| report.problems.iter().any(|problem| problem.problem.contains(text));
        assert!(!report.ok && (said("chunk table") || said("batch")), "byte {byte}: {:?}", report.problems);
        fs::write(&path, stored).unwrap();
    }
}

/// Every bit of the chunk table and the start of its header: known content, or an error.
#[test]
fn a_damaged_chunk_table_yields_nothing_new() {
    let dir = tempfile::tempdir().unwrap();
    let (_, batched) = images(&small(dir.path()), dir.path(), options(), 0x1000);
    let contents = |reader: &BlobDirReader| -> Vec<Result<Vec<u8>, ()>> {
        let inodes = walk(&batched.image).into_values().map(|nid| batched.image.inode(nid).unwrap());
        inodes.map(|inode| content(&inode, reader).map_err(drop)).collect()
    };
    let known: BTreeSet<_> = contents(&batched.reader).into_iter().map(Result::unwrap).collect();
    let path = blob_file(&batched);
    let mut stored = fs::read(&path).unwrap();
    let range = ChunkTable::read(&path).unwrap().range();
    let end = range.offset + range.encoded_size;
    let mut readable = 0;
    for position in range.offset as usize..end as usize + 64 {
        let bit = position % 8;
        stored[position] ^= 1 << bit;
        fs::write(&path, &stored).unwrap();
        if let Ok(reader) = BlobDirReader::open(&batched.image, &batched.blobs) {
            readable += 1;
            assert!(
                contents(&reader).into_iter().flatten().all(|content| known.contains(&content)),
                "byte {position}"
            );
        }
        stored[position] ^= 1 << bit;
    }
    assert!(readable > 0, "some damage shows only in the digests");
}
