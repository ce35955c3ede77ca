//! Images that use the chunks of earlier ones: what is stored again, what is not, and that all of it is read.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use proptest::prelude::*;
use shoal_proto::Algorithm;
use shoal_rafs::{
    BlobDirReader, Bootstrap, BuildError, BuildOptions, BuildReport, Builder, Compressor, ImageFile, check, unpack,
};

mod support;

use support::image::facts;
use support::noise;

fn options() -> BuildOptions {
    BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() }
}

/// Builds an image over earlier ones, and finds it sound and equal to its source. All blobs go to one folder.
fn build(source: &Path, work: &Path, options: BuildOptions, earlier: &[Bootstrap]) -> (Bootstrap, BuildReport) {
    let (boot, blobs) = (work.join("boot"), work.join("blobs"));
    let builder = Builder::new(options).chunk_dictionary(earlier.to_vec());
    let report = builder.build(source, &boot, &blobs).unwrap();
    let image = Bootstrap::open(&boot).unwrap();
    let checked = check(image.as_bytes().clone(), Some(&blobs));
    assert!(checked.ok, "{:?}", checked.problems);
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    support::assert_same(&support::facts(source), &facts(&image, &reader));
    assert_eq!(unpack(&image, &reader, std::io::sink()).unwrap().bytes, report.decoded_bytes);
    (image, report)
}

fn write(source: &Path, files: &[(&str, u64, usize)]) {
    fs::create_dir_all(source).unwrap();
    for (name, seed, len) in files {
        fs::write(source.join(name), noise(*seed, *len)).unwrap();
    }
}

fn digests(image: &Bootstrap, blob: usize) -> BTreeSet<[u8; 32]> {
    image.chunks(blob as u32).map(|chunk| chunk.digest.bytes).collect()
}

#[test]
fn what_an_earlier_image_has_is_not_stored_again() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    write(&one, &[("a", 1, 0x3000), ("b", 2, 0x1800), ("gone", 3, 0x1000)]);
    write(&two, &[("a", 1, 0x3000), ("b", 2, 0x1900), ("c", 4, 0x2000)]);
    let (first, _) = build(&one, dir.path(), options(), &[]);
    let (second, report) = build(&two, dir.path(), options(), std::slice::from_ref(&first));
    // Of b only the first chunk is the same.
    assert_eq!((report.chunks, report.unique_chunks, report.shared_chunks), (7, 3, 4));
    assert_eq!(report.shared_bytes, 0x4000);
    let ids: Vec<_> = second.blobs().iter().map(|blob| Some(blob.id)).collect();
    assert_eq!(ids, [Some(first.blobs()[0].id), report.blob], "in the order of their use");
    assert!(digests(&second, 0).is_subset(&digests(&first, 0)));
    assert!(digests(&second, 1).is_disjoint(&digests(&first, 0)));
    assert_eq!(second.blobs()[1].chunk_count, 3);
    // And so on: the third needs nothing of its own.
    let (third, report) = build(&one, dir.path(), options(), &[second, first.clone()]);
    assert_eq!((report.blob, report.unique_chunks, report.encoded_bytes), (None, 0, 0));
    assert_eq!(third.blobs().len(), 1);
    assert_eq!(third.blobs()[0].id, first.blobs()[0].id);
}

#[test]
fn dictionaries_of_every_kind_serve_images_of_every_kind() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let batched = BuildOptions { batch_size: Some(0x1000), ..options() };
    let layer = BuildOptions { inline_meta: true, toc: true, ..batched };
    let lz4 = BuildOptions { compressor: Compressor::Lz4, ..options() };
    for (number, (earlier, later)) in
        [(options(), layer), (layer, options()), (layer, lz4), (lz4, layer)].into_iter().enumerate()
    {
        let work = dir.path().join(number.to_string());
        fs::create_dir(&work).unwrap();
        let (_, report) = build(&source, &work, earlier, &[]);
        let stored = report.unique_chunks;
        // Of a layer, the bootstrap inside it is the dictionary.
        let file = if earlier.inline_meta { format!("blobs/{}", report.blob.unwrap()) } else { "boot".into() };
        let first = ImageFile::open(&work.join(file)).unwrap().parse().unwrap();
        fs::write(source.join("new"), format!("only now {number}")).unwrap();
        let (second, report) = build(&source, &work, later, &[first]);
        assert_eq!((report.unique_chunks, report.shared_chunks), (1, stored), "{earlier:?} {later:?}");
        assert_eq!(second.blobs().len(), 2);
        if later.inline_meta {
            let path = work.join("blobs").join(report.blob.unwrap().to_string());
            let file = ImageFile::open(&path).unwrap();
            let inside = file.parse().unwrap();
            let reader = BlobDirReader::at(&inside, &file.blob_paths(Some(&work.join("blobs")))).unwrap();
            support::assert_same(&support::facts(&source), &facts(&inside, &reader));
        }
        fs::remove_file(source.join("new")).unwrap();
    }
}

#[test]
fn the_same_dictionary_gives_the_same_bytes_for_any_number_of_threads() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    support::nasty_tree(&two);
    write(&one, &[("a", 1, 0x9000), ("zeroes", 0, 0)]);
    fs::copy(two.join("sizes/zeroes"), one.join("zeroes")).unwrap();
    let (first, _) = build(&one, dir.path(), options(), &[]);
    let images = [1, 2, 3, 16].map(|threads| {
        let options = BuildOptions { threads: NonZeroUsize::new(threads), ..options() };
        let (image, report) = build(&two, dir.path(), options, std::slice::from_ref(&first));
        (image.as_bytes().clone(), report)
    });
    assert!(images.iter().all(|image| *image == images[0]));
}

#[test]
fn a_dictionary_of_another_kind_is_refused_or_of_no_use() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    write(&source, &[("a", 1, 0x3000)]);
    let (first, _) = build(&source, dir.path(), options(), &[]);
    let larger = Builder::new(BuildOptions::default()).chunk_dictionary(vec![first.clone()]);
    let error = larger.build(&source, &dir.path().join("no"), &dir.path().join("none")).unwrap_err();
    assert!(matches!(error, BuildError::Dictionary { position: 1, .. }), "{error}");
    assert!(!dir.path().join("none").exists());
    let sha256 = BuildOptions { algorithm: Algorithm::Sha256, ..options() };
    let (image, report) = build(&source, dir.path(), sha256, &[first]);
    assert_eq!((report.unique_chunks, report.shared_chunks, image.blobs().len()), (3, 0, 1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 100, ..ProptestConfig::default() })]

    /// Generations of an image, each over all before it, against plain sets of contents.
    #[test]
    fn generations_store_each_content_once(
        generations in prop::collection::vec(prop::collection::vec((0..12u64, 1..0x1000usize), 1..12), 1..5),
        batches: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (mut stored, mut earlier) = (BTreeSet::new(), Vec::new());
        for (number, files) in generations.iter().enumerate() {
            let source = dir.path().join(number.to_string());
            fs::create_dir(&source).unwrap();
            let mut contents = BTreeSet::new();
            for (name, (seed, len)) in files.iter().enumerate() {
                let content = noise(*seed, 1 + len % 5 * 300);
                fs::write(source.join(name.to_string()), &content).unwrap();
                contents.insert(content);
            }
            let options = BuildOptions { batch_size: batches.then_some(0x1000), ..options() };
            let (image, report) = build(&source, dir.path(), options, &earlier);
            prop_assert_eq!(report.unique_chunks as usize, contents.difference(&stored).count());
            prop_assert_eq!(report.shared_chunks as usize, contents.intersection(&stored).count());
            stored.extend(contents);
            earlier.push(image);
        }
    }
}
