//! Images whose small chunks were compressed as one: read, checked, unpacked, expanded, and refused when their two tables
//! disagree.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use shoal_rafs::{
    BlobDirError, BlobDirReader, Bootstrap, BuildOptions, ChunkTable, Compressor, PieceTableError, check,
    expand_blob, unpack,
};

mod support;
#[path = "support/batch.rs"]
mod support_batch;

use support::image::{Built, build, content, facts, walk};
use support_batch::rebatch;

fn zstd_3(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 3).unwrap()
}

/// The same tree as an image without batches and as one with.
fn images(source: &Path, dir: &Path, options: BuildOptions, batch_size: usize) -> (Built, Built) {
    let plain = build(source, &dir.join("plain"), options);
    let mut batched = build(source, &dir.join("batched"), options);
    let compress = |bytes: &[u8]| if options.compressor == Compressor::Zstd { zstd_3(bytes) } else { bytes.to_vec() };
    assert!(rebatch(&batched.boot, &batched.blobs, batch_size, &compress) > 0);
    batched.image = Bootstrap::open(&batched.boot).unwrap();
    batched.reader = BlobDirReader::open(&batched.image, &batched.blobs).unwrap();
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
        (Compressor::Zstd, 0x1000, 0x1_0000),
        (Compressor::None, 0x1000, 0x1000),
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
