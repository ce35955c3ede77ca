//! A gzip layer is read as it is, by an index over it: what a plain image of the same tar holds, and nothing else.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use sha2::{Digest, Sha256};
use shoal_proto::Algorithm;
use shoal_rafs::{
    BlobDirReader, BlobTarget, Bootstrap, BuildError, BuildOptions, BuildReport, Builder, CheckReport, ChunkTable,
    ImageFile, Output, PrefetchList, check_file, merge, unpack,
};

mod support;

use support::{Facts, assert_same, image, noise};

/// A folder with an index over a layer, and the layer.
struct Layer {
    dir: tempfile::TempDir,
    report: BuildReport,
}

impl Layer {
    fn new(gzip: &[u8], chunk_size: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let report = build(gzip, chunk_size, dir.path()).unwrap();
        let id: String = Sha256::digest(gzip).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(report.blob.unwrap().to_string(), id);
        fs::write(dir.path().join("blobs").join(id), gzip).unwrap();
        Self { dir, report }
    }

    fn boot(&self) -> PathBuf {
        self.dir.path().join("boot")
    }

    fn blobs(&self) -> PathBuf {
        self.dir.path().join("blobs")
    }

    fn layer(&self) -> PathBuf {
        self.blobs().join(self.report.blob.unwrap().to_string())
    }

    fn meta(&self) -> PathBuf {
        self.blobs().join(self.report.meta.unwrap().to_string())
    }

    fn check(&self) -> CheckReport {
        check_file(&ImageFile::open(&self.boot()).unwrap(), Some(&self.blobs()))
    }

    fn facts(&self) -> BTreeMap<PathBuf, Facts> {
        let report = self.check();
        assert!(report.ok, "{:#?}", report.problems);
        assert_eq!(report.blobs[0].verified_chunks, report.blobs[0].named_chunks);
        assert!(self.report.chunks >= self.report.unique_chunks && self.report.unique_chunks > 0);
        let image = Bootstrap::open(&self.boot()).unwrap();
        image::facts(&image, &BlobDirReader::open(&image, &self.blobs()).unwrap())
    }
}

fn build(gzip: &[u8], chunk_size: u32, dir: &Path) -> Result<BuildReport, BuildError> {
    let options = BuildOptions { chunk_size, ..BuildOptions::default() };
    Builder::new(options).build_reference(gzip, Path::new("layer"), &dir.join("boot"), &dir.join("blobs"))
}

fn gzip(tar: &[u8], level: u32) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::new(level));
    encoder.write_all(tar).unwrap();
    encoder.finish().unwrap()
}

/// A tree as a tar, and what it holds.
fn tar_of(source: &Path) -> (Vec<u8>, BTreeMap<PathBuf, Facts>) {
    let work = tempfile::tempdir().unwrap();
    let built = image::build(source, work.path(), BuildOptions::default());
    let mut tar = Vec::new();
    unpack(&built.image, &built.reader, &mut tar).unwrap();
    // Once more, because a tar has no sockets.
    let (boot, blobs) = (work.path().join("of-tar"), work.path().join("blobs-of-tar"));
    Builder::new(BuildOptions::default()).build_tar(tar.as_slice(), Path::new("tar"), &boot, &blobs).unwrap();
    let image = Bootstrap::open(&boot).unwrap();
    let facts = image::facts(&image, &BlobDirReader::open(&image, &blobs).unwrap());
    (tar, facts)
}

/// Some MiB in files around the sizes of chunks, so that there are several contexts.
fn large_tree(root: &Path) {
    fs::create_dir_all(root).unwrap();
    for (number, len) in [3_000_000, 1, 700_000, 0, 0x10_0000, 2_500_000, 17, 1_200_000].into_iter().enumerate() {
        let mut bytes = noise(number as u64, len);
        // Half of it compresses.
        bytes.chunks_mut(3000).step_by(2).for_each(|part| part.fill(b'x'));
        fs::write(root.join(format!("file-{number}")), bytes).unwrap();
    }
    fs::copy(root.join("file-0"), root.join("copy")).unwrap();
}

#[test]
fn everything_that_a_tree_can_hold() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    support::nasty_tree(&source);
    let (tar, expected) = tar_of(&source);
    for level in [0, 1, 6, 9] {
        assert_same(&expected, &Layer::new(&gzip(&tar, level), 0x1000).facts());
    }
}

#[test]
fn layers_of_several_contexts_and_of_several_members() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let (tar, expected) = tar_of(&source);
    let members: Vec<u8> = tar.chunks(900_000).flat_map(|part| gzip(part, 6)).collect();
    for (stream, chunk_size) in [(gzip(&tar, 6), 0x10_0000), (gzip(&tar, 2), 0x1000), (members, 0x8_0000)] {
        let layer = Layer::new(&stream, chunk_size);
        assert_same(&expected, &layer.facts());
        let image = Bootstrap::open(&layer.boot()).unwrap();
        let table = shoal_rafs::ChunkTable::read(&layer.meta()).unwrap();
        let pieces = image.piece_table(0, Some(&table)).unwrap();
        assert!(pieces.len() > 3, "{} contexts", pieces.len());
        assert!(image.piece_table(0, None).is_err());
        kept_apart(&layer, &image, &table);
        let mut unpacked = Vec::new();
        unpack(&image, &BlobDirReader::open(&image, &layer.blobs()).unwrap(), &mut unpacked).unwrap();
        assert_eq!(Layer::new(&gzip(&unpacked, 6), chunk_size).facts(), expected);
    }
}

/// Where pieces are kept they follow each other, and which of them an image names does not matter.
fn kept_apart(layer: &Layer, image: &Bootstrap, table: &ChunkTable) {
    let pieces = image.piece_table(0, Some(table)).unwrap();
    let mut end = 0;
    for (_, piece) in pieces.pieces() {
        let (kept, encoded) = (piece.kept(), piece.encoded());
        assert_eq!((kept.start, kept.end - kept.start), (end, encoded.end - encoded.start));
        end = kept.end;
    }
    let size = fs::metadata(layer.layer()).unwrap().len();
    assert!((size / 2..size * 2).contains(&end), "{end} bytes to keep of {size}");
    let meta = fs::read(layer.meta()).unwrap();
    let limit = image.blobs()[0].chunk_table.decoded_size;
    assert_eq!(&ChunkTable::read_meta(&meta, limit).unwrap(), table);
    for refused in [ChunkTable::read_meta(&meta, limit - 1), ChunkTable::read_meta(&meta[1..], limit)] {
        assert!(refused.is_err());
    }
}

#[test]
fn the_same_layer_gives_the_same_index() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let stream = gzip(&tar_of(&source).0, 6);
    let layers = [Layer::new(&stream, 0x1000), Layer::new(&stream, 0x1000)];
    assert_eq!(layers[0].report, layers[1].report);
    assert_eq!(fs::read(layers[0].boot()).unwrap(), fs::read(layers[1].boot()).unwrap());
}

#[test]
fn indexes_are_merged_like_other_layers() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let (tar, expected) = tar_of(&source);
    let lower = Layer::new(&gzip(&tar, 6), 0x1000);
    let upper_source = dir.path().join("upper");
    fs::create_dir(&upper_source).unwrap();
    fs::write(upper_source.join(".wh.file-2"), b"").unwrap();
    fs::write(upper_source.join("new"), noise(99, 10_000)).unwrap();
    let upper = Layer::new(&gzip(&tar_of(&upper_source).0, 6), 0x1000);
    for path in [upper.layer(), upper.meta()] {
        fs::copy(&path, lower.blobs().join(path.file_name().unwrap())).unwrap();
    }
    let boots = [&lower, &upper].map(|layer| Bootstrap::open(&layer.boot()).unwrap());
    merge(&boots, &lower.boot()).unwrap();
    let merged = lower.facts();
    assert!(merged.contains_key(Path::new("new")) && !merged.contains_key(Path::new("file-2")));
    assert_eq!(merged[Path::new("file-0")], expected[Path::new("file-0")]);
}

#[test]
fn an_index_says_what_to_read_early() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let stream = gzip(&tar_of(&source).0, 6);
    let list = PrefetchList::paths(&b"/file-5\n/file-1\n/absent\n"[..]).unwrap();
    let builder = Builder::new(BuildOptions::default()).prefetch(list);
    let boot = dir.path().join("boot");
    let report = builder.build_reference(&*stream, Path::new("layer"), &boot, &dir.path().join("blobs")).unwrap();
    let image = Bootstrap::open(&boot).unwrap();
    let names = image::walk(&image);
    assert_eq!(image.prefetch(), [names[Path::new("file-5")], names[Path::new("file-1")]]);
    assert_eq!((report.prefetched, report.notes), (2, vec!["/absent: no file to prefetch".to_owned()]));
}

/// What a new image has in common with an indexed layer, it reads from the layer.
#[test]
fn a_gzip_layer_is_an_earlier_image_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let (tar, expected) = tar_of(&source);
    let layer = Layer::new(&gzip(&tar, 6), 0x1000);
    let options = BuildOptions { chunk_size: 0x1000, algorithm: Algorithm::Sha256, ..BuildOptions::default() };
    let builder = Builder::new(options).chunk_dictionary(vec![Bootstrap::open(&layer.boot()).unwrap()]);
    fs::write(source.join("more"), noise(77, 5000)).unwrap();
    let report = builder.build(&source, &layer.boot(), &layer.blobs()).unwrap();
    assert_eq!(report.unique_chunks, 2);
    let check = layer.check();
    assert!(check.ok, "{:#?}", check.problems);
    let image = Bootstrap::open(&layer.boot()).unwrap();
    assert_eq!(image.blobs().iter().filter(|blob| blob.is_gzip_layer()).count(), 1);
    let facts = image::facts(&image, &BlobDirReader::open(&image, &layer.blobs()).unwrap());
    assert_eq!(facts[Path::new("file-0")], expected[Path::new("file-0")]);
}

#[test]
fn a_layer_without_content_has_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("empty"), b"").unwrap();
    let (tar, expected) = tar_of(&source);
    let report = build(&gzip(&tar, 6), 0x1000, dir.path()).unwrap();
    assert_eq!((report.blob, report.meta, report.files), (None, None, 1));
    let image = Bootstrap::open(&dir.path().join("boot")).unwrap();
    assert_same(&expected, &image::facts(&image, &BlobDirReader::open(&image, dir.path()).unwrap()));
}

#[test]
fn a_byte_that_changes_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let layer = Layer::new(&gzip(&tar_of(&source).0, 6), 0x1000);
    let flip = |path: &Path, at: u64| {
        let mut bytes = fs::read(path).unwrap();
        bytes[at as usize] ^= 0x10;
        fs::write(path, bytes).unwrap();
    };
    // Near the start, where no byte belongs to a duplicate.
    flip(&layer.layer(), 5000);
    let report = layer.check();
    assert!(!report.ok && report.blobs[0].verified_chunks < report.blobs[0].named_chunks);
    flip(&layer.layer(), 5000);
    assert!(layer.check().ok);
    // In the table, which is compressed, and in its header.
    let meta = fs::metadata(layer.meta()).unwrap().len();
    for at in [meta / 3, meta - 4096 + 12] {
        flip(&layer.meta(), at);
        let problems = layer.check().problems;
        assert!(problems.iter().any(|problem| problem.problem.contains("sha256")), "{problems:?}");
        flip(&layer.meta(), at);
    }
    fs::remove_file(layer.meta()).unwrap();
    assert!(!layer.check().ok);
}

#[test]
fn what_cannot_be_indexed_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let (tar, _) = tar_of(&source);
    let good = gzip(&tar, 6);
    let sparse = gzip(&sparse_tar(), 6);
    for (stream, expected) in [
        (good[..good.len() / 2].to_vec(), "cut off"),
        ([&good[..], b"garbage"].concat(), "no gzip member"),
        (tar, "no gzip member"),
        (sparse, "sparse file"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let error = build(&stream, 0x1000, dir.path()).unwrap_err();
        let text = shoal_rafs::chain(&error);
        assert!(text.contains(expected), "{text}");
        assert!(!dir.path().join("boot").exists());
        assert_eq!(fs::read_dir(dir.path().join("blobs")).unwrap().count(), 0);
    }
}

/// A file of 8 KiB whose first half is a hole.
fn sparse_tar() -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("sparse").unwrap();
    header.set_size(4096);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_entry_type(tar::EntryType::GNUSparse);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.sparse[0].offset.copy_from_slice(b"00000010000\0");
    gnu.sparse[0].numbytes.copy_from_slice(b"00000010000\0");
    gnu.realsize.copy_from_slice(b"00000020000\0");
    header.set_cksum();
    [&header.as_bytes()[..], &[7; 4096], &[0; 1024]].concat()
}

#[test]
fn the_registry_copy_of_the_table_is_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let layer = Layer::new(&gzip(&tar_of(&source).0, 6), 0x1000);
    let copy = shoal_rafs::chunk_table_file(&layer.meta()).unwrap();
    let table = shoal_rafs::ChunkTable::parse(&copy.into()).unwrap();
    assert_eq!(table, shoal_rafs::ChunkTable::read(&layer.meta()).unwrap());
    let mut bytes = Vec::new();
    File::open(layer.layer()).unwrap().read_to_end(&mut bytes).unwrap();
    let image = Bootstrap::open(&layer.boot()).unwrap();
    let pieces = image.piece_table(0, Some(&table)).unwrap();
    for (number, piece) in pieces.pieces() {
        let range = piece.encoded();
        pieces.decode(number, &bytes[range.start as usize..range.end as usize]).unwrap();
    }
}

/// As converters have it, who know a layer by its own digest and its index by another.
#[test]
fn an_index_with_the_bootstrap_inside() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    large_tree(&source);
    let (tar, expected) = tar_of(&source);
    let stream = gzip(&tar, 6);
    for toc in [false, true] {
        let options = BuildOptions { inline_meta: true, toc, ..BuildOptions::default() };
        let (meta, boot) = (dir.path().join(format!("meta-{toc}")), dir.path().join(format!("boot-{toc}")));
        let output = Output { bootstrap: Some(&boot), blob: BlobTarget::File(&meta) };
        let report = Builder::new(options).build_reference_to(&stream[..], Path::new("layer"), output).unwrap();
        let blobs = dir.path().join(format!("blobs-{toc}"));
        fs::create_dir(&blobs).unwrap();
        fs::write(blobs.join(report.blob.unwrap().to_string()), &stream).unwrap();
        fs::copy(&meta, blobs.join(report.meta.unwrap().to_string())).unwrap();
        for path in [&meta, &boot] {
            let file = ImageFile::open(path).unwrap();
            let checked = check_file(&file, Some(&blobs));
            assert!(checked.ok, "{:#?}", checked.problems);
            assert_eq!(checked.blobs[0].verified_chunks, checked.blobs[0].named_chunks);
            let image = file.parse().unwrap();
            assert_eq!(image.blobs()[0].id, report.blob.unwrap());
            let reader = BlobDirReader::at(&image, &file.blob_paths(Some(&blobs))).unwrap();
            assert_same(&expected, &image::facts(&image, &reader));
        }
        let image = Bootstrap::open(&boot).unwrap();
        assert_eq!(image.blobs()[0].meta.unwrap().id, report.meta.unwrap());
        // Without a file for the bootstrap there is none, and a layer without content is its bootstrap.
        let output = Output { bootstrap: None, blob: BlobTarget::File(&meta) };
        let empty = gzip(&[0; 1024], 6);
        let report = Builder::new(options).build_reference_to(&empty[..], Path::new("layer"), output).unwrap();
        assert!(report.blob.is_none() && report.meta.is_some());
        assert!(check_file(&ImageFile::open(&meta).unwrap(), None).ok);
    }
}
