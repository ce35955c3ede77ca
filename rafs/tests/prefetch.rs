//! What is read early: tables from lists and traces, through builds, merges and new layouts.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use shoal_rafs::{
    BlobDirReader, Bootstrap, BuildOptions, Builder, ChunkId, Compressor, ImageFile, MergeOptions, Nid, PrefetchList,
    Trace, check, extents, merge, merge_with, unpack,
};

mod support;

use support::image::{facts, walk};
use support::noise;

fn options() -> BuildOptions {
    BuildOptions { chunk_size: 0x1000, compressor: Compressor::Zstd, ..BuildOptions::default() }
}

fn list(text: &str) -> PrefetchList {
    PrefetchList::paths(text.as_bytes()).unwrap()
}

/// Opens an image that is sound.
fn open(boot: &Path, blobs: &Path) -> (Bootstrap, BlobDirReader) {
    let image = Bootstrap::open(boot).unwrap();
    let report = check(image.as_bytes().clone(), Some(blobs));
    assert!(report.ok, "{:?}", report.problems);
    let reader = BlobDirReader::open(&image, blobs).unwrap();
    (image, reader)
}

fn paths(image: &Bootstrap, nids: &[Nid]) -> Vec<PathBuf> {
    let names = walk(image);
    let path = |nid: &Nid| names.iter().find(|(_, other)| *other == nid).map(|(path, _)| path.clone());
    nids.iter().map(|nid| path(nid).unwrap()).collect()
}

fn tree(source: &Path) {
    for name in ["etc/a.conf", "etc/b.conf", "lib/x.so", "lib/y.so", "lib/sub/z.so", "bin/tool"] {
        let path = source.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, noise(name.len() as u64 + u64::from(name.as_bytes()[4]), 0x2800)).unwrap();
    }
    std::os::unix::fs::symlink("tool", source.join("bin/link")).unwrap();
}

#[test]
fn a_list_becomes_the_table_and_the_order_of_the_blob() {
    let dir = tempfile::tempdir().unwrap();
    let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
    tree(&source);
    let wanted = "/bin/tool\n/lib/?.so\n/etc\n/bin/link\n/bin/tool\n/nothing/at/all\n";
    let report = Builder::new(options()).prefetch(list(wanted)).build(&source, &boot, &blobs).unwrap();
    assert_eq!(report.prefetched, 4);
    assert_eq!(report.notes, ["/bin/link: no file to prefetch", "/nothing/at/all: no file to prefetch"]);
    let (image, reader) = open(&boot, &blobs);
    assert_eq!(paths(&image, image.prefetch()), ["bin/tool", "lib/x.so", "lib/y.so", "etc"].map(PathBuf::from));
    support::assert_same(&support::facts(&source), &facts(&image, &reader));
    // What is wanted lies in front, in order; the rest follows breadth first.
    let files = ["bin/tool", "lib/x.so", "lib/y.so", "etc/a.conf", "etc/b.conf", "lib/sub/z.so"];
    let names = walk(&image);
    let indexes = files.iter().flat_map(|file| {
        let inode = image.inode(names[Path::new(file)]).unwrap();
        inode.chunks().map(|chunk| chunk.id.index).collect::<Vec<_>>()
    });
    assert!(indexes.eq(0..18));
    assert_eq!(image.prefetch_chunks().unwrap().len(), 15);
    // An archive is stored in its own order, with the same table.
    let mut tar = Vec::new();
    unpack(&image, &reader, &mut tar).unwrap();
    let builder = Builder::new(options()).prefetch(list(wanted));
    builder.build_tar(&tar[..], Path::new("tar"), &boot, &blobs).unwrap();
    let (image, _) = open(&boot, &blobs);
    assert_eq!(paths(&image, image.prefetch()), ["bin/tool", "lib/x.so", "lib/y.so", "etc"].map(PathBuf::from));
}

#[test]
fn a_merged_image_wants_what_its_layers_want() {
    let dir = tempfile::tempdir().unwrap();
    let blobs = dir.path().join("blobs");
    let layer = |name: &str, files: &[(&str, u64)], wanted: &str| {
        let (source, boot) = (dir.path().join(name), dir.path().join(format!("{name}.boot")));
        for (file, seed) in files {
            fs::create_dir_all(source.join(file).parent().unwrap()).unwrap();
            fs::write(source.join(file), noise(*seed, 0x1800)).unwrap();
        }
        let options = BuildOptions { inline_meta: true, toc: true, ..options() };
        let report = Builder::new(options).prefetch(list(wanted)).build(&source, &boot, &blobs).unwrap();
        ImageFile::open(&blobs.join(report.blob.unwrap().to_string())).unwrap().parse().unwrap()
    };
    let layers = [
        layer("low", &[("d/one", 1), ("d/two", 2), ("gone", 3), ("e/x", 4)], "gone\nd/two\ne\n"),
        layer("high", &[("d/two", 5), (".wh.gone", 6), ("e/y", 7)], "e/y\nd\n"),
    ];
    let boot = dir.path().join("merged");
    let report = merge(&layers, &boot).unwrap();
    let (image, _) = open(&boot, &blobs);
    // The name counts: what the upper layer has at d/two, and the directory e with what both have in it.
    assert_eq!(paths(&image, image.prefetch()), ["d/two", "e", "e/y", "d"].map(PathBuf::from));
    assert_eq!((report.prefetched, report.not_prefetched.len()), (4, 0));
    let options = MergeOptions { prefetch: Some(list("/e/x\n/gone\n")), ..MergeOptions::default() };
    let report = merge_with(&layers, &options, &boot).unwrap();
    let (image, _) = open(&boot, &blobs);
    assert_eq!(paths(&image, image.prefetch()), [Path::new("e/x")]);
    assert_eq!(report.not_prefetched, ["/gone"]);
    // What a layer cannot know of its own blob, the image does.
    for (described, layer) in image.blobs().iter().zip(&layers) {
        let stored = fs::read(blobs.join(described.id.to_string())).unwrap();
        assert_eq!(described.encoded_size, stored.len() as u64);
        assert_eq!((described.features, described.toc), (0x7000_0021, layer.blobs()[0].toc));
        assert_eq!(described.toc.unwrap().size, 5 * 128 + 512);
    }
}

/// The ranges of a blob that chunks take, merged where they touch.
fn ranges(image: &Bootstrap, chunks: &[ChunkId]) -> usize {
    let mut ranges = BTreeSet::new();
    for chunk in chunks {
        let table = image.piece_table(chunk.blob, None).unwrap();
        let encoded = table.piece(table.piece_of_chunk(chunk.index).unwrap()).unwrap().encoded();
        ranges.insert((chunk.blob, encoded.start, encoded.end));
    }
    let ranges: Vec<_> = ranges.into_iter().collect();
    let apart = |pair: &[(u32, u64, u64)]| (pair[0].0, pair[0].2) != (pair[1].0, pair[1].1);
    ranges.windows(2).filter(|pair| apart(pair)).count() + usize::from(!ranges.is_empty())
}

/// Parts of files: path, first byte, bytes.
type Reads = Vec<(PathBuf, u64, u64)>;

/// The chunks that reads need, in order.
fn chunks(image: &Bootstrap, reads: &Reads) -> Vec<ChunkId> {
    let names = walk(image);
    let of_read = |(path, offset, len): &(PathBuf, u64, u64)| {
        let inode = image.inode(names[path]).unwrap();
        extents(&inode, *offset, *len).map(|extent| extent.chunk).collect::<Vec<_>>()
    };
    reads.iter().flat_map(of_read).collect()
}

/// What a mount of the image would have written.
fn trace(image: &Bootstrap, reads: &Reads) -> PrefetchList {
    let (trace, names) = (Trace::new(image.clone()), walk(image));
    for (path, offset, len) in reads {
        trace.read(names[path], *offset, *len);
    }
    let mut text = Vec::new();
    trace.write(&mut text).unwrap();
    PrefetchList::trace(&text[..]).unwrap()
}

#[test]
fn hot_chunks_become_one_range_in_the_order_of_their_access() {
    let dir = tempfile::tempdir().unwrap();
    let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
    support::nasty_tree(&source);
    fs::write(source.join(".wh.kept"), b"whiteouts are names here").unwrap();
    Builder::new(options()).build(&source, &boot, &blobs).unwrap();
    let (image, reader) = open(&boot, &blobs);
    let reads: Reads = [
        ("sizes/noise-163857", 0x5000, 0x1800),
        ("names/...", 0, 3),
        ("sizes/noise-12293", 0, 0x10),
        ("sizes/noise-163857", 0, 1),
        ("sizes/text-8192", 0, 0x2000),
        ("links/sub/third", 0, 0x1000),
    ]
    .map(|(path, offset, len)| (PathBuf::from(path), offset, len))
    .into();
    let before = ranges(&image, &chunks(&image, &reads));
    assert!(before >= 5, "{before}");
    let output = dir.path().join("optimized");
    let builder = Builder::new(options()).prefetch(trace(&image, &reads));
    let report = builder.optimize(&image, &reader, &output, &blobs).unwrap();
    let (optimized, reader) = open(&output, &blobs);
    support::assert_same(&support::facts(&source), &facts(&optimized, &reader));
    let hot = chunks(&optimized, &reads);
    assert_eq!(ranges(&optimized, &hot), 1);
    assert_eq!((report.ranges_before as usize, report.hot_chunks as usize), (before, hot.len()));
    let own = optimized.blobs().iter().position(|blob| Some(blob.id) == report.blob).unwrap() as u32;
    assert!(hot.iter().copied().eq((0..hot.len() as u32).map(|index| ChunkId { blob: own, index })));
    // The old blob is the same file, and is still needed.
    assert!(optimized.blobs().iter().any(|blob| blob.id == image.blobs()[0].id));
    let first: Vec<_> = paths(&optimized, optimized.prefetch());
    assert_eq!(first[..3], ["sizes/noise-163857", "names/...", "sizes/noise-12293"].map(PathBuf::from));
}

#[test]
fn a_hot_chunk_that_is_damaged_ends_the_new_layout() {
    let dir = tempfile::tempdir().unwrap();
    let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
    tree(&source);
    let report = Builder::new(options()).build(&source, &boot, &blobs).unwrap();
    let (image, _) = open(&boot, &blobs);
    let path = blobs.join(report.blob.unwrap().to_string());
    let mut bytes = fs::read(&path).unwrap();
    bytes[10] ^= 1;
    fs::write(&path, bytes).unwrap();
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    let output = dir.path().join("optimized");
    let builder = Builder::new(options()).prefetch(list("*\n"));
    let error = builder.optimize(&image, &reader, &output, &blobs).unwrap_err();
    assert!(shoal_rafs::chain(&error).contains("digest"), "{}", shoal_rafs::chain(&error));
    assert!(!output.exists());
    assert_eq!(fs::read_dir(&blobs).unwrap().count(), 1);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 100, ..ProptestConfig::default() })]

    /// Any reads of any image, with and without batches: the new image is the old one, and its hot chunks are one range.
    #[test]
    fn random_reads_become_one_range(
        files in prop::collection::vec((0..6u64, 0..0x5000usize), 1..20),
        reads in prop::collection::vec((any::<prop::sample::Index>(), 0..0x5000u64, 1..0x3000u64), 0..12),
        before: bool,
        after: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
        fs::create_dir(&source).unwrap();
        for (number, (seed, len)) in files.iter().enumerate() {
            fs::write(source.join(number.to_string()), noise(*seed, *len)).unwrap();
        }
        let batches = |batches: bool| BuildOptions { batch_size: batches.then_some(0x1000), ..options() };
        Builder::new(batches(before)).build(&source, &boot, &blobs).unwrap();
        let (image, reader) = open(&boot, &blobs);
        let reads: Reads = reads.iter().map(|(file, offset, len)| {
            (PathBuf::from(file.index(files.len()).to_string()), *offset, *len)
        }).collect();
        let hot: BTreeSet<_> = chunks(&image, &reads).into_iter().collect();
        let builder = Builder::new(batches(after)).prefetch(trace(&image, &reads));
        let report = builder.optimize(&image, &reader, &boot, &blobs).unwrap();
        prop_assert_eq!(report.hot_chunks as usize, hot.len());
        let (optimized, reader) = open(&boot, &blobs);
        support::assert_same(&support::facts(&source), &facts(&optimized, &reader));
        let own = optimized.blobs().iter().position(|blob| Some(blob.id) == report.blob);
        prop_assert_eq!(own.is_some(), !hot.is_empty());
        let found: BTreeSet<_> = chunks(&optimized, &reads).into_iter().collect();
        prop_assert!(found.iter().all(|chunk| Some(chunk.blob as usize) == own));
        prop_assert_eq!(found.len(), hot.len());
    }
}
