//! Blobs as registries have them: the bootstrap inside, tar headers behind the parts, a table of contents at the end.

use std::fs;
use std::path::{Path, PathBuf};

use shoal_rafs::{
    BlobDirReader, BootstrapError, BuildOptions, CheckReport, Compressor, ImageFile, ImageFileError, check_file,
    unpack,
};

mod support;
#[path = "support/batch.rs"]
mod support_batch;
#[path = "support/layer_blob.rs"]
mod support_layer_blob;

use support::image::{build, facts};
use support_layer_blob::{Shape, layer_blob};

const SHAPES: [Shape; 4] = [
    Shape { v2: false, toc: false },
    Shape { v2: true, toc: false },
    Shape { v2: false, toc: true },
    Shape { v2: true, toc: true },
];

fn small(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    fs::create_dir(&source).unwrap();
    for (name, len) in [("a", 100), ("b", 0x1000), ("c", 0x3100)] {
        fs::write(source.join(name), support::noise(len as u64, len)).unwrap();
    }
    source
}

fn none() -> BuildOptions {
    BuildOptions { compressor: Compressor::None, chunk_size: 0x1000, ..BuildOptions::default() }
}

fn problems(report: &CheckReport) -> Vec<String> {
    report.problems.iter().map(|problem| format!("{}: {}", problem.place, problem.problem)).collect()
}

#[test]
fn an_image_is_read_from_the_blob_that_it_lies_in() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (compressor, batched) in [(Compressor::Zstd, false), (Compressor::None, false), (Compressor::Zstd, true)] {
        let work = dir.path().join(format!("{compressor}-{batched}"));
        let built = build(&source, &work, BuildOptions { compressor, chunk_size: 0x1000, ..BuildOptions::default() });
        if batched {
            support_batch::rebatch(&built.boot, &built.blobs, 0x1_0000, &|bytes| {
                zstd::bulk::compress(bytes, 3).unwrap()
            });
        }
        for shape in SHAPES.into_iter().filter(|shape| shape.v2 || !batched) {
            let path = layer_blob(&built.boot, &built.blobs, &work.join("layers"), shape);
            let file = ImageFile::open(&path).unwrap();
            assert_eq!(file.own_blob().unwrap().to_string(), path.file_name().unwrap().to_str().unwrap());
            let image = file.parse().unwrap();
            assert_eq!(image.blobs()[0].id, file.own_blob().unwrap());
            let reader = BlobDirReader::at(&image, &file.blob_paths(None)).unwrap();
            support::assert_same(&expected, &facts(&image, &reader));
            let report = check_file(&file, None);
            assert!(report.ok, "{shape:?}: {:?}", problems(&report));
            assert_eq!(report.blobs[0].verified_chunks, report.blobs[0].named_chunks);
            let tar = unpack(&image, &reader, std::io::sink()).unwrap();
            assert_eq!(tar.bytes, report.decoded_bytes);
        }
    }
}

#[test]
fn the_name_of_the_file_or_its_bytes_say_which_blob_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    let path = layer_blob(&built.boot, &built.blobs, &dir.path().join("layers"), SHAPES[3]);
    let id = ImageFile::open(&path).unwrap().own_blob();
    for name in ["layer.blob".to_owned(), format!("{}.blob", id.unwrap())] {
        let copy = dir.path().join(name);
        fs::copy(&path, &copy).unwrap();
        assert_eq!(ImageFile::open(&copy).unwrap().own_blob(), id);
    }
    // Outside of a blob the name means nothing.
    let file = ImageFile::open(&path).unwrap();
    let alone = ImageFile::from(file.bootstrap().clone());
    assert!(matches!(alone.parse(), Err(BootstrapError::Invalid { structure: "blob entry", .. })));
    // A blob under a name that is not its digest is found out by the check.
    let renamed = dir.path().join(format!("{:064x}", 7));
    fs::copy(&path, &renamed).unwrap();
    let report = check_file(&ImageFile::open(&renamed).unwrap(), None);
    assert!(problems(&report).iter().any(|problem| problem.contains("sha256")), "{:?}", problems(&report));
}

#[test]
fn files_without_a_bootstrap_inside_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    let missing = dir.path().join("missing");
    assert!(matches!(ImageFile::open(&missing), Err(ImageFileError::Io { path, .. }) if path == missing));
    // A plain blob is taken for a bootstrap, and is none.
    let blob = built.blobs.join(built.image.blobs()[0].id.to_string());
    assert!(ImageFile::open(&blob).unwrap().parse().is_err());
    // A layer that was cut in front of its bootstrap.
    let path = layer_blob(&built.boot, &built.blobs, &dir.path().join("layers"), SHAPES[0]);
    let mut bytes = fs::read(&path).unwrap();
    let boot = fs::metadata(&built.boot).unwrap().len() as usize + 512;
    bytes.truncate(bytes.len() - boot);
    fs::write(&path, bytes).unwrap();
    assert!(matches!(ImageFile::open(&path), Err(ImageFileError::NoBootstrap { .. })));
}

/// Every byte behind the chunk data, flipped in turn: the check finds it, and nothing panics.
#[test]
fn the_check_finds_every_flipped_byte_behind_the_chunks() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    for shape in [SHAPES[0], SHAPES[3]] {
        let path = layer_blob(&built.boot, &built.blobs, &dir.path().join("layers"), shape);
        let mut bytes = fs::read(&path).unwrap();
        let start = built.image.blobs()[0].chunk_table.offset as usize;
        for position in (start..bytes.len()).step_by(7) {
            bytes[position] ^= 0x21;
            fs::write(&path, &bytes).unwrap();
            if let Ok(file) = ImageFile::open(&path) {
                let report = check_file(&file, None);
                assert!(!report.ok, "{shape:?} byte {position}");
            }
            bytes[position] ^= 0x21;
        }
    }
}

#[test]
fn the_check_says_which_part_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    let path = layer_blob(&built.boot, &built.blobs, &dir.path().join("layers"), SHAPES[3]);
    let original = fs::read(&path).unwrap();
    let with = |position: usize| {
        let mut bytes = original.clone();
        bytes[position] ^= 1;
        fs::write(&path, &bytes).unwrap();
        problems(&check_file(&ImageFile::open(&path).unwrap(), None))
    };
    let data = built.image.blobs()[0].chunk_table.offset as usize;
    let has = |problems: &[String], text: &str| problems.iter().any(|problem| problem.contains(text));
    let in_data = with(10);
    assert!(has(&in_data, "chunk 0 of blob") && has(&in_data, "image.blob in the contents"), "{in_data:?}");
    let in_table = with(data + 512 + 30);
    assert!(has(&in_table, "blob.meta in the contents") && has(&in_table, "chunk table"), "{in_table:?}");
    let table_end = data + 512 + built.image.blobs()[0].chunk_count as usize * 24;
    let in_digests = with(table_end + 4096 + 512 + 40);
    assert!(has(&in_digests, "digests in the") && has(&in_digests, "blob.digest in the"), "{in_digests:?}");
}

#[test]
fn other_blobs_need_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let built = build(&small(dir.path()), dir.path(), none());
    let error = BlobDirReader::at(&built.image, &ImageFile::open(&built.boot).unwrap().blob_paths(None)).unwrap_err();
    assert!(error.to_string().contains("no folder of blobs"), "{error}");
}
