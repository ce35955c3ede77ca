//! What Shoal builds, `nydus-rafs` reads as Shoal does, also over FUSE, and the original's check accepts where it is given.

use std::fs::{self, File};
use std::path::Path;

use shoal_oracle::read::Image;
use shoal_proto::Algorithm;
use shoal_rafs::{
    BlobDirReader, Bootstrap, BuildOptions, Builder, Compressor, Encryption, ImageFile, PrefetchList, merge,
};

mod common;

use common::assert_theirs_agree;
use common::support::{self, image};

#[test]
fn every_compressor_digest_and_chunk_size() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (number, (compressor, algorithm, chunk_size)) in [
        (Compressor::None, Algorithm::Blake3, 0x1000),
        (Compressor::Lz4, Algorithm::Sha256, 0x1000),
        (Compressor::Zstd, Algorithm::Blake3, 0x1000),
        (Compressor::Zstd, Algorithm::Sha256, 0x10_0000),
        (Compressor::None, Algorithm::Sha256, 0x100_0000),
    ]
    .into_iter()
    .enumerate()
    {
        let options = BuildOptions { compressor, algorithm, chunk_size, ..BuildOptions::default() };
        let built = image::build(&source, &dir.path().join(number.to_string()), options);
        assert_theirs_agree(&expected, &built.boot, &built.blobs);
    }
}

#[test]
fn encrypted_images() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    for len in 1..40 {
        fs::write(source.join(format!("short-{len}")), support::noise(len, len as usize)).unwrap();
    }
    let expected = support::facts(&source);
    for (number, (compressor, batch_size, toc)) in [
        (Compressor::None, None, false),
        (Compressor::Zstd, None, true),
        (Compressor::Lz4, Some(0x1000), false),
        (Compressor::Zstd, Some(0x1000), false),
    ]
    .into_iter()
    .enumerate()
    {
        let encryption = Encryption::FreshKey;
        let options =
            BuildOptions { compressor, chunk_size: 0x1000, batch_size, toc, encryption, ..BuildOptions::default() };
        let built = image::build(&source, &dir.path().join(number.to_string()), options);
        assert_theirs_agree(&expected, &built.boot, &built.blobs);
    }
}

#[test]
fn batches() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (number, (compressor, batch_size)) in
        [(Compressor::Zstd, 0x1000), (Compressor::Lz4, 0x10000), (Compressor::None, 0x10000)].into_iter().enumerate()
    {
        let options =
            BuildOptions { compressor, chunk_size: 0x10000, batch_size: Some(batch_size), ..BuildOptions::default() };
        let built = image::build(&source, &dir.path().join(number.to_string()), options);
        assert_theirs_agree(&expected, &built.boot, &built.blobs);
    }
}

/// The blob alone, and its bootstrap as converters take it out: named by the blob.
#[test]
fn layers_with_the_bootstrap_inside() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let expected = support::facts(&source);
    for (number, batch_size) in [None, Some(0x1000)].into_iter().enumerate() {
        let options =
            BuildOptions { chunk_size: 0x1000, batch_size, inline_meta: true, toc: true, ..BuildOptions::default() };
        let built = image::build(&source, &dir.path().join(number.to_string()), options);
        let name = built.report.blob.unwrap().to_string();
        let (blob, taken) = (built.blobs.join(&name), dir.path().join(&name));
        fs::write(&taken, ImageFile::open(&blob).unwrap().bootstrap()).unwrap();
        assert_theirs_agree(&expected, &taken, &built.blobs);
        assert_theirs_agree(&expected, &blob, &built.blobs);
    }
}

#[test]
fn a_prefetch_table() {
    let dir = tempfile::tempdir().unwrap();
    let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
    support::nasty_tree(&source);
    let wanted = PrefetchList::paths(&b"/links/first\n/sizes\n"[..]).unwrap();
    let builder = Builder::new(BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() }).prefetch(wanted);
    builder.build(&source, &boot, &blobs).unwrap();
    assert_theirs_agree(&support::facts(&source), &boot, &blobs);
    let image = Bootstrap::open(&boot).unwrap();
    let table: Vec<_> = image.prefetch().iter().map(|nid| u32::try_from(nid.0).unwrap()).collect();
    assert_eq!(table.len(), 2);
    assert_eq!(Image::open(&boot, &blobs).unwrap().prefetch(&boot).unwrap(), table);
}

#[test]
fn an_image_without_content() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("empty"), b"").unwrap();
    let built = image::build(&source, dir.path(), BuildOptions::default());
    assert_theirs_agree(&support::facts(&source), &built.boot, &built.blobs);
}

#[test]
fn merged_layers() {
    let dir = tempfile::tempdir().unwrap();
    let (blobs, merged) = (dir.path().join("blobs"), dir.path().join("merged"));
    merge(&[layer(dir.path(), "lower", lower), layer(dir.path(), "upper", upper)], &merged).unwrap();
    let image = Bootstrap::open(&merged).unwrap();
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    let ours = image::facts(&image, &reader);
    assert!(ours.contains_key(Path::new("kept")) && !ours.contains_key(Path::new("gone")));
    assert_theirs_agree(&ours, &merged, &blobs);
}

fn layer(dir: &Path, name: &str, fill: impl Fn(&Path)) -> Bootstrap {
    let source = dir.join(name);
    fs::create_dir(&source).unwrap();
    fill(&source);
    let boot = dir.join(format!("{name}.boot"));
    Builder::new(BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() })
        .build(&source, &boot, &dir.join("blobs"))
        .unwrap();
    Bootstrap::open(&boot).unwrap()
}

fn lower(root: &Path) {
    fs::write(root.join("kept"), support::noise(1, 10_000)).unwrap();
    fs::write(root.join("gone"), support::noise(2, 10_000)).unwrap();
    fs::write(root.join("shared"), support::noise(3, 10_000)).unwrap();
}

fn upper(root: &Path) {
    File::create(root.join(".wh.gone")).unwrap();
    fs::write(root.join("new"), support::noise(3, 10_000)).unwrap();
    fs::hard_link(root.join("new"), root.join("new-too")).unwrap();
}

#[test]
fn an_index_over_a_gzip_layer() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    for (number, len) in [2_500_000, 10, 700_000, 1_800_000].into_iter().enumerate() {
        fs::write(source.join(format!("noise-{number}")), support::noise(number as u64, len)).unwrap();
        fs::write(source.join(format!("text-{number}")), b"some words ".repeat(len / 11)).unwrap();
    }
    let plain = image::build(&source, &dir.path().join("plain"), BuildOptions::default());
    let mut tar = Vec::new();
    shoal_rafs::unpack(&plain.image, &plain.reader, &mut tar).unwrap();
    // One member, and several that end in the middle of files.
    for part in [tar.len(), 900_000] {
        let stream: Vec<u8> = tar.chunks(part).flat_map(gzip).collect();
        let work = dir.path().join(part.to_string());
        let (boot, blobs) = (work.join("boot"), work.join("blobs"));
        fs::create_dir_all(&blobs).unwrap();
        let report = Builder::new(BuildOptions::default())
            .build_reference(stream.as_slice(), Path::new("layer"), &boot, &blobs)
            .unwrap();
        fs::write(blobs.join(report.blob.unwrap().to_string()), &stream).unwrap();
        assert_theirs_agree(&support::facts(&source), &boot, &blobs);
    }
}

#[test]
fn a_tar_as_it_is_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (source, blobs) = (dir.path().join("source"), dir.path().join("blobs"));
    support::nasty_tree(&source);
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    let built =
        support::archive::open_tarfs(&support::archive::gnu_tar(&source, support::archive::PAX), dir.path(), options);
    assert_theirs_agree(&support::archive::tar_facts(&source), &built.boot, &blobs);
    let upper = support::archive::Tar::default().file("new", &support::noise(3, 10_000)).file("sizes/.wh.copy", b"");
    let upper = support::archive::open_tarfs(&upper.finish(), &dir.path().join("upper"), options);
    let id = upper.report.blob.unwrap().to_string();
    fs::copy(upper.blobs.join(&id), blobs.join(&id)).unwrap();
    let merged = dir.path().join("merged");
    merge(&[built.image, upper.image], &merged).unwrap();
    let image = Bootstrap::open(&merged).unwrap();
    let ours = image::facts(&image, &BlobDirReader::open(&image, &blobs).unwrap());
    assert_theirs_agree(&ours, &merged, &blobs);
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}
