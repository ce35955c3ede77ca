//! Images that another builder made (see `data/README.md`) are read as the archives that they were made of.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use shoal_rafs::{Blob, BlobDirReader, Bootstrap, BuildOptions, Builder, ImageFile, check_file, merge};

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
fn the_older_form_of_the_format() {
    let (image, facts) = open("v5");
    assert!(image.blobs()[0].is_v5());
    assert_same(&lower(), &facts);
}

#[test]
fn blobs_of_the_older_form_are_not_taken_into_new_images() {
    let dir = tempfile::tempdir().unwrap();
    let (image, _) = open("v5");
    let error = merge(std::slice::from_ref(&image), &dir.path().join("merged")).unwrap_err();
    assert!(error.to_string().contains("RAFS v5"), "{error}");
    let options = BuildOptions { chunk_size: image.chunk_size(), ..BuildOptions::default() };
    let builder = Builder::new(options).chunk_dictionary(vec![image]);
    let error = builder.build(dir.path(), &dir.path().join("boot"), &dir.path().join("blobs")).unwrap_err();
    assert!(error.to_string().contains("RAFS v5"), "{error}");
}

#[test]
fn every_byte_of_the_older_form_counts() {
    let boot = fs::read(data("v5").join("boot")).unwrap();
    let same = |a: &Bootstrap, b: &Bootstrap| a.as_bytes() == b.as_bytes();
    let good = Bootstrap::parse(boot.clone().into()).unwrap();
    let mut accepted = 0;
    for at in (0..200).chain(0x2000..boot.len()) {
        let mut bytes = boot.clone();
        bytes[at] ^= 0x41;
        // Never a panic; what is accepted nevertheless is an attribute, or a field that means nothing.
        if let Ok(image) = Bootstrap::parse(bytes.into()) {
            accepted += usize::from(!same(&image, &good));
        }
    }
    assert!(accepted < boot.len() / 8, "{accepted} of {}", boot.len());
    for len in [0, 4, 100, 8192, boot.len() - 8] {
        assert!(Bootstrap::parse(boot[..len].to_vec().into()).is_err(), "{len} bytes");
    }
    // The digest of the root is over those of its children, and so on down to each chunk.
    let chunk = boot.len() - 80;
    let mut bytes = boot;
    bytes[chunk] ^= 1;
    let error = Bootstrap::parse(bytes.into()).unwrap_err().to_string();
    assert!(error.contains("digest"), "{error}");
}

#[test]
fn an_index_over_a_gzip_layer() {
    let (image, facts) = open("zran");
    assert!(image.blobs()[0].is_gzip_layer());
    assert_same(&lower(), &facts);
}

/// A folder with the archives as blobs.
fn tars() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["lower.tar", "upper.tar"] {
        let tar = fs::read(data(name)).unwrap();
        let id: String = Sha256::digest(&tar).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(dir.path().join(id), tar).unwrap();
    }
    dir
}

#[test]
fn a_tar_as_it_is() {
    let blobs = tars();
    let file = ImageFile::open(&data("tarfs").join("boot")).unwrap();
    let (image, facts) = checked(&file, blobs.path());
    assert!(image.is_tarfs() && !image.has_digests());
    assert_same(&lower(), &facts);
    // Ours is the same but for what vouches for chunks.
    let (boot, path) = (blobs.path().join("boot"), data("lower.tar"));
    let builder = Builder::new(BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() });
    builder.build_tarfs(File::open(&path).unwrap(), &path, &boot, blobs.path()).unwrap();
    let ours = Bootstrap::open(&boot).unwrap();
    let theirs = image.blobs()[0].clone();
    // Of the table that is not there they name a compressor.
    assert_eq!(theirs, Blob { chunk_table: theirs.chunk_table, ..ours.blobs()[0].clone() });
    for (path, nid) in image::walk(&image) {
        let (theirs, ours) = (image.inode(nid).unwrap(), ours.inode(image::walk(&ours)[&path]).unwrap());
        assert!(theirs.chunks().eq(ours.chunks()), "{}", path.display());
    }
}

#[test]
fn merged_tars() {
    let blobs = tars();
    let file = ImageFile::open(&data("tarfs").join("merged")).unwrap();
    let (image, facts) = checked(&file, blobs.path());
    assert_eq!((image.is_tarfs(), image.blobs().len()), (true, 2));
    assert_same(&open("merged").1, &facts);
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
