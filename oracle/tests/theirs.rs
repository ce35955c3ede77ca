//! What `nydus-builder` builds, Shoal reads, finds nothing wrong with, and tells as the source is.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use shoal_rafs::{BlobDirReader, Bootstrap, ImageFile, check_file};

mod common;

use common::support::{self, Facts, assert_same, image};
use common::{assert_theirs_agree, new_file, peer, peer_with_input, text};

/// The facts of an image as Shoal reads it, once it passed the check.
fn checked(file: &Path, blobs: &Path) -> BTreeMap<PathBuf, Facts> {
    let file = ImageFile::open(file).unwrap();
    let report = check_file(&file, Some(blobs));
    assert!(report.ok, "{:#?}", report.problems);
    assert!(report.blobs.iter().all(|blob| blob.verified_chunks == blob.named_chunks));
    let image = file.parse().unwrap();
    let reader = BlobDirReader::at(&image, &file.blob_paths(Some(blobs))).unwrap();
    image::facts(&image, &reader)
}

/// Their directory builder gives the root no time.
fn without_root_time(mut facts: BTreeMap<PathBuf, Facts>) -> BTreeMap<PathBuf, Facts> {
    facts.get_mut(Path::new("")).unwrap().mtime = (0, 0);
    facts
}

/// Their reader of tars drops fractions.
fn whole_seconds(mut facts: BTreeMap<PathBuf, Facts>) -> BTreeMap<PathBuf, Facts> {
    facts.values_mut().for_each(|facts| facts.mtime.1 = 0);
    facts
}

fn source(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    support::nasty_tree(&source);
    source
}

#[test]
fn plain_images() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let expected = without_root_time(support::facts(&source));
    for (compressor, digester, chunk_size) in [
        ("none", "blake3", "0x1000"),
        ("lz4_block", "sha256", "0x1000"),
        ("zstd", "blake3", "0x1000"),
        ("zstd", "sha256", "0x100000"),
    ] {
        let work = dir.path().join(format!("{compressor}-{digester}"));
        let (boot, blobs) = (work.join("boot"), work.join("blobs"));
        fs::create_dir_all(&blobs).unwrap();
        peer(&[
            "create",
            "--compressor",
            compressor,
            "--digester",
            digester,
            "--chunk-size",
            chunk_size,
            "--bootstrap",
            text(&boot),
            "--blob-dir",
            text(&blobs),
            text(&source),
        ]);
        assert_same(&expected, &checked(&boot, &blobs));
    }
}

#[test]
fn the_older_form_of_the_format() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    for (compressor, digester) in [("zstd", "blake3"), ("lz4_block", "sha256")] {
        let work = dir.path().join(digester);
        let (boot, blobs) = (work.join("boot"), work.join("blobs"));
        fs::create_dir_all(&blobs).unwrap();
        peer(&[
            "create",
            "--fs-version",
            "5",
            "--compressor",
            compressor,
            "--digester",
            digester,
            "--chunk-size",
            "0x1000",
            "--bootstrap",
            text(&boot),
            "--blob-dir",
            text(&blobs),
            text(&source),
        ]);
        assert_same(&without_root_time(support::facts(&source)), &checked(&boot, &blobs));
    }
}

#[test]
fn batches() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    fs::create_dir(&blobs).unwrap();
    peer(&[
        "create",
        "--chunk-size",
        "0x10000",
        "--batch-size",
        "0x10000",
        "--bootstrap",
        text(&boot),
        "--blob-dir",
        text(&blobs),
        text(&source),
    ]);
    let image = Bootstrap::open(&boot).unwrap();
    assert!(image.blobs()[0].has_batches());
    assert_same(&without_root_time(support::facts(&source)), &checked(&boot, &blobs));
}

#[test]
fn encrypted_images() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    for len in 1..40 {
        fs::write(source.join(format!("short-{len}")), support::noise(len, len as usize)).unwrap();
    }
    let expected = without_root_time(support::facts(&source));
    for (number, (compressor, batch_size)) in
        [("none", "0x0"), ("zstd", "0x0"), ("lz4_block", "0x0"), ("zstd", "0x1000")].into_iter().enumerate()
    {
        let work = dir.path().join(number.to_string());
        let (boot, blobs) = (work.join("boot"), work.join("blobs"));
        fs::create_dir_all(&blobs).unwrap();
        peer(&[
            "create",
            "--encrypt",
            "--compressor",
            compressor,
            "--chunk-size",
            "0x1000",
            "--batch-size",
            batch_size,
            "--bootstrap",
            text(&boot),
            "--blob-dir",
            text(&blobs),
            text(&source),
        ]);
        assert!(Bootstrap::open(&boot).unwrap().is_encrypted());
        assert_same(&expected, &checked(&boot, &blobs));
    }
}

/// With the bootstrap inside, the blob alone is enough to read it.
#[test]
fn an_encrypted_blob_with_its_key_inside() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    peer(&[
        "create",
        "--encrypt",
        "--blob-inline-meta",
        "--chunk-size",
        "0x1000",
        "--blob-dir",
        text(&blobs),
        text(&source),
    ]);
    let blob = new_file(&blobs, &[]);
    assert!(ImageFile::open(&blob).unwrap().parse().unwrap().is_encrypted());
    assert_same(&without_root_time(support::facts(&source)), &checked(&blob, &blobs));
}

#[test]
fn layers_as_converters_make_them_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    let mut layers: Vec<PathBuf> = Vec::new();
    for (name, features) in [("lower", &["--features", "blob-toc"][..]), ("upper", &[])] {
        let tree = dir.path().join(name);
        tame_tree(&tree);
        fs::write(tree.join(format!("only-{name}")), support::noise(7, 5000)).unwrap();
        let tar = dir.path().join(format!("{name}.tar"));
        tree_as_tar(&tree, &tar);
        let layer = ["create", "--type", "tar-rafs", "--blob-inline-meta", "--whiteout-spec", "none"];
        let places = ["--chunk-size", "0x1000", "--blob-dir", text(&blobs), text(&tar)];
        peer(&[&layer, features, &places].concat());
        let blob = named_by_digest(&new_file(&blobs, &layers));
        assert_same(&whole_seconds(support::facts(&tree)), &checked(&blob, &blobs));
        layers.push(blob);
    }
    let digests: Vec<_> = layers.iter().map(|layer| layer.file_name().unwrap().to_str().unwrap()).collect();
    let sizes: Vec<_> = layers.iter().map(|layer| layer.metadata().unwrap().len().to_string()).collect();
    let merged = dir.path().join("merged");
    let boots: Vec<_> = layers.iter().map(|layer| extract_bootstrap(layer, dir.path())).collect();
    peer(&[
        "merge",
        "--blob-digests",
        &digests.join(","),
        "--blob-sizes",
        &sizes.join(","),
        "--bootstrap",
        text(&merged),
        text(&boots[0]),
        text(&boots[1]),
    ]);
    let facts = checked(&merged, &blobs);
    assert!(facts.contains_key(Path::new("only-lower")) && facts.contains_key(Path::new("only-upper")));
    assert_theirs_agree(&facts, &merged, &blobs);
}

#[test]
fn a_prefetch_table() {
    let dir = tempfile::tempdir().unwrap();
    let source = source(dir.path());
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    fs::create_dir(&blobs).unwrap();
    peer_with_input(
        &["create", "--prefetch-policy", "fs", "--bootstrap", text(&boot), "--blob-dir", text(&blobs), text(&source)],
        "/sizes\n/links/first\n",
    );
    assert_same(&without_root_time(support::facts(&source)), &checked(&boot, &blobs));
    let image = Bootstrap::open(&boot).unwrap();
    let nids = image::walk(&image);
    assert_eq!(image.prefetch(), [nids[Path::new("sizes")], nids[Path::new("links/first")]]);
}

/// What their reader of tars can take: it refuses PAX records whose values have a line break, and so most binary ones.
fn tame_tree(root: &Path) {
    fs::create_dir_all(root.join("dir/empty")).unwrap();
    for len in [0, 1, 4096, 4097, 50_000] {
        fs::write(root.join(format!("dir/{len}")), support::noise(len as u64, len)).unwrap();
    }
    fs::hard_link(root.join("dir/4097"), root.join("second")).unwrap();
    std::os::unix::fs::symlink("dir/1", root.join("link")).unwrap();
    fs::write(root.join(".wh.whiteout"), b"").unwrap();
    xattr::set(root.join("dir/1"), "user.name", b"value").unwrap();
    fs::write(root.join("a".repeat(150)), b"a long name").unwrap();
}

/// The tree as a tar, which Shoal's own reader and writer of them make.
fn tree_as_tar(tree: &Path, tar: &Path) {
    let work = tempfile::tempdir().unwrap();
    let built = image::build(tree, work.path(), shoal_rafs::BuildOptions::default());
    shoal_rafs::unpack(&built.image, &built.reader, fs::File::create(tar).unwrap()).unwrap();
}

/// Their own name for a blob with a table of contents leaves the digests out; registries do not.
fn named_by_digest(blob: &Path) -> PathBuf {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(fs::read(blob).unwrap());
    let path = blob.with_file_name(digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    fs::rename(blob, &path).unwrap();
    path
}

/// The bootstrap of a layer in a file of its own, as converters hand it to the merge: named by the layer.
fn extract_bootstrap(layer: &Path, dir: &Path) -> PathBuf {
    let boots = dir.join("boots");
    fs::create_dir_all(&boots).unwrap();
    let path = boots.join(layer.file_name().unwrap());
    fs::write(&path, ImageFile::open(layer).unwrap().bootstrap()).unwrap();
    path
}

/// A tar of files of some MiB in gzip, at `path`.
fn gzip_layer(dir: &Path) -> (PathBuf, BTreeMap<PathBuf, Facts>) {
    let (tree, tar, path) = (dir.join("tree"), dir.join("layer.tar"), dir.join("layer.tar.gz"));
    tame_tree(&tree);
    fs::write(tree.join("large"), support::noise(5, 2_500_000)).unwrap();
    fs::write(tree.join("text"), b"the same words ".repeat(300_000)).unwrap();
    tree_as_tar(&tree, &tar);
    let mut encoder = flate2::write::GzEncoder::new(fs::File::create(&path).unwrap(), flate2::Compression::default());
    std::io::copy(&mut fs::File::open(&tar).unwrap(), &mut encoder).unwrap();
    encoder.finish().unwrap();
    (path, whole_seconds(support::facts(&tree)))
}

#[test]
fn an_index_over_a_gzip_layer() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, expected) = gzip_layer(dir.path());
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    fs::create_dir(&blobs).unwrap();
    peer(&[
        "create",
        "--type",
        "targz-ref",
        "--whiteout-spec",
        "none",
        "--bootstrap",
        text(&boot),
        "--blob-dir",
        text(&blobs),
        text(&layer),
    ]);
    fs::copy(&layer, blobs.join("layer")).unwrap();
    named_by_digest(&blobs.join("layer"));
    assert_same(&expected, &checked(&boot, &blobs));
}

#[test]
fn a_tar_as_it_is_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    let boots = ["lower", "upper"].map(|name| {
        let (tree, tar, boot) = (dir.path().join(name), blobs.join(name), dir.path().join(format!("{name}.boot")));
        tame_tree(&tree);
        fs::write(tree.join(format!("only-{name}")), support::noise(7, 5000)).unwrap();
        tree_as_tar(&tree, &tar);
        peer(&[
            "create",
            "--type",
            "tar-tarfs",
            "--whiteout-spec",
            "none",
            "--chunk-size",
            "0x1000",
            "--bootstrap",
            text(&boot),
            "--blob-dir",
            text(dir.path()),
            text(&tar),
        ]);
        named_by_digest(&tar);
        assert!(!Bootstrap::open(&boot).unwrap().has_digests());
        assert_same(&whole_seconds(support::facts(&tree)), &checked(&boot, &blobs));
        boot
    });
    let merged = dir.path().join("merged");
    peer(&["merge", "--bootstrap", text(&merged), text(&boots[0]), text(&boots[1])]);
    let facts = checked(&merged, &blobs);
    assert!(facts.contains_key(Path::new("only-lower")) && facts.contains_key(Path::new("only-upper")));
}

#[test]
fn an_index_with_the_bootstrap_inside() {
    let dir = tempfile::tempdir().unwrap();
    let (layer, expected) = gzip_layer(dir.path());
    let blobs = dir.path().join("blobs");
    fs::create_dir(&blobs).unwrap();
    peer(&[
        "create",
        "--type",
        "targz-ref",
        "--blob-inline-meta",
        "--features",
        "blob-toc",
        "--whiteout-spec",
        "none",
        "--blob-dir",
        text(&blobs),
        text(&layer),
    ]);
    let meta = named_by_digest(&new_file(&blobs, &[]));
    fs::copy(&layer, blobs.join("layer")).unwrap();
    named_by_digest(&blobs.join("layer"));
    assert_same(&expected, &checked(&meta, &blobs));
}
