//! Images that another builder made (see `data/README.md`) are read as the archives that they were made of.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, Builder, ImageFile, check_file, merge};

mod support;

use support::{Facts, assert_same, image};

fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/peer").join(name)
}

/// The tree of an archive as Shoal's own builder has it.
fn archive(name: &str, dir: &Path) -> Bootstrap {
    let (boot, path) = (dir.join(name), data(name));
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    Builder::new(options).build_tar(File::open(&path).unwrap(), &path, &boot, &dir.join("blobs")).unwrap();
    Bootstrap::open(&boot).unwrap()
}

fn lower() -> BTreeMap<PathBuf, Facts> {
    let dir = tempfile::tempdir().unwrap();
    let image = archive("lower.tar", dir.path());
    image::facts(&image, &BlobDirReader::open(&image, &dir.path().join("blobs")).unwrap())
}

/// Checks the image in full; then its tree.
fn checked(file: &ImageFile, blobs: &Path) -> (Bootstrap, BTreeMap<PathBuf, Facts>) {
    let report = check_file(file, Some(blobs));
    assert!(report.ok, "{:#?}", report.problems);
    assert!(report.blobs.iter().all(|blob| blob.named_chunks > 0 && blob.verified_chunks == blob.named_chunks));
    let image = file.parse().unwrap();
    let reader = BlobDirReader::at(&image, &file.blob_paths(Some(blobs))).unwrap();
    let facts = image::facts(&image, &reader);
    (image, facts)
}

fn open(kind: &str) -> (Bootstrap, BTreeMap<PathBuf, Facts>) {
    checked(&ImageFile::open(&data(kind).join("boot")).unwrap(), &data(kind).join("blobs"))
}

#[test]
fn a_plain_image() {
    assert_same(&lower(), &open("plain").1);
}

#[test]
fn batches() {
    let (image, facts) = open("batch");
    assert!(image.blobs()[0].has_batches());
    assert_same(&lower(), &facts);
}

#[test]
fn a_prefetch_table() {
    let (image, facts) = open("prefetch");
    assert_eq!(image.prefetch(), [image::walk(&image)[Path::new("text")]]);
    assert_same(&lower(), &facts);
}

#[test]
fn a_layer_in_one_blob() {
    let blobs = data("layer").join("blobs");
    let path = fs::read_dir(&blobs).unwrap().next().unwrap().unwrap().path();
    let file = ImageFile::open(&path).unwrap();
    assert!(file.own_blob().is_some());
    assert_same(&lower(), &checked(&file, &blobs).1);
}

#[test]
fn an_index_over_a_gzip_layer() {
    let (image, facts) = open("zran");
    assert!(image.blobs()[0].is_gzip_layer());
    assert_same(&lower(), &facts);
}

#[test]
fn merged_layers_are_what_our_merge_makes_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let layers = ["lower.tar", "upper.tar"].map(|name| archive(name, dir.path()));
    let merged = dir.path().join("merged");
    merge(&layers, &merged).unwrap();
    let ours = Bootstrap::open(&merged).unwrap();
    let expected = image::facts(&ours, &BlobDirReader::open(&ours, &dir.path().join("blobs")).unwrap());
    assert!(!expected.contains_key(Path::new("dir/small-1")));
    assert_same(&expected, &open("merged").1);
}
