//! Layers over layers: against a model that is nothing but nested maps, and the rules one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use shoal_rafs::{
    BlobDirReader, Bootstrap, BootstrapError, BuildOptions, Compressor, LayerBlob, MergeError, MergeOptions, check,
    merge, merge_with, unpack_layer,
};
use tar::EntryType;

mod support;

use support::archive::{Tar, build_tar, chain, open_tar};
use support::image::{Built, facts, walk};

fn options() -> BuildOptions {
    BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() }
}

/// Builds each archive as a layer of its own; all blobs go to one directory.
fn layers(archives: &[Vec<u8>], work: &Path) -> Vec<Bootstrap> {
    let build = |archive: &Vec<u8>| {
        build_tar(archive.as_slice(), work, options()).unwrap_or_else(|error| panic!("{}", chain(&error)));
        Bootstrap::open(&work.join("boot")).unwrap()
    };
    archives.iter().map(build).collect()
}

/// Merges archives and opens the image, which is sound.
fn merged(archives: &[Vec<u8>], work: &Path) -> (Built, shoal_rafs::MergeReport) {
    let layers = layers(archives, work);
    let (boot, blobs) = (work.join("merged"), work.join("blobs"));
    let merge_report = merge(&layers, &boot).unwrap_or_else(|error| panic!("{}", chain(&error)));
    let image = Bootstrap::open(&boot).unwrap();
    let report = check(image.as_bytes().clone(), Some(&blobs));
    assert!(report.ok, "{:?}", report.problems);
    assert_eq!((report.names, report.decoded_bytes), (merge_report.names, merge_report.decoded_bytes));
    assert_eq!(merge_report.bootstrap_bytes, image.as_bytes().len() as u64);
    assert_eq!(image.blobs().iter().map(|blob| blob.id.to_string()).collect::<Vec<_>>(), merge_report.blobs);
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    let build_report = build_tar(archives[0].as_slice(), work, options()).unwrap();
    (Built { report: build_report, image, reader, boot, blobs }, merge_report)
}

fn paths(built: &Built) -> Vec<String> {
    facts(&built.image, &built.reader).into_keys().map(|path| path.display().to_string()).collect()
}

#[test]
fn whiteouts_take_away_from_below_only() {
    let dir = tempfile::tempdir().unwrap();
    let lower = Tar::default()
        .file("a", b"a")
        .file("both", b"lower")
        .file("d/old", b"old")
        .file("gone/below", b"x")
        .file("opaque/old", b"old")
        .file("overlay/old", b"old")
        .file("device", b"x")
        .file("lone", b"x");
    let upper = Tar::default()
        .file(".wh.a", b"")
        .file(".wh.both", b"")
        .file("both", b"upper")
        .file("d/.wh.old", b"")
        .file("d/new", b"new")
        .file(".wh.gone", b"")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"new")
        .records(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.trusted.other", b"y")])
        .directory("overlay")
        .file("overlay/new", b"new")
        .entry(EntryType::Char, b"device", b"", b"")
        .file(".wh..wh.plnk", b"aufs keeps its own")
        .file(".wh.", b"")
        .file(".wh.never-there", b"");
    let (built, _) = merged(&[lower.finish(), upper.finish()], dir.path());
    let expected = ["", "both", "d", "d/new", "lone", "opaque", "opaque/new", "overlay", "overlay/new"];
    assert_eq!(paths(&built), expected);
    let facts = facts(&built.image, &built.reader);
    let xattrs: Vec<_> =
        facts[Path::new("overlay")].xattrs.keys().map(|name| String::from_utf8_lossy(name)).collect();
    assert_eq!(xattrs, ["trusted.other"]);
}

#[test]
fn the_topmost_attributes_win_and_kinds_replace_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let lower = Tar::default()
        .raw(EntryType::Directory, b"./", b"", b"", |header| header.set_uid(1))
        .raw(EntryType::Directory, b"d", b"", b"", |header| header.set_uid(2))
        .file("d/kept", b"kept")
        .file("becomes-file/x", b"x")
        .file("becomes-directory", b"x")
        .file("first", b"shared")
        .hard_link("second", "first");
    let upper = Tar::default()
        .raw(EntryType::Directory, b"./", b"", b"", |header| header.set_uid(3))
        .raw(EntryType::Directory, b"d", b"", b"", |header| header.set_uid(4))
        .file("becomes-file", b"file")
        .file("becomes-directory/y", b"y")
        .file("first", b"new");
    let (built, report) = merged(&[lower.finish(), upper.finish()], dir.path());
    let expected = ["", "becomes-directory", "becomes-directory/y", "becomes-file", "d", "d/kept", "first", "second"];
    assert_eq!(paths(&built), expected);
    let facts = facts(&built.image, &built.reader);
    assert_eq!((facts[Path::new("")].uid, facts[Path::new("d")].uid), (3, 4));
    let nlink = |name: &[u8]| {
        let root = built.image.inode(built.image.root()).unwrap();
        built.image.inode(root.lookup(name).unwrap().unwrap()).unwrap().nlink()
    };
    assert_eq!((nlink(b"first"), nlink(b"second"), nlink(b"d")), (1, 1, 2));
    assert_eq!(report.files, 5);
}

#[test]
fn layers_share_chunks_and_drop_blobs() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (support::noise(1, 0x5000), support::noise(2, 0x3000));
    let archives = [
        Tar::default().file("lower", &one).finish(),
        // All its chunks are below.
        Tar::default().file("copy", &one[0x1000..0x3000]).file("copy-again", &one).finish(),
        // Needed, but not its first chunk.
        Tar::default().file("mixed", &[&one[..0x1000], &two[..]].concat()).finish(),
        // Gone in the end.
        Tar::default().file("short-lived", &support::noise(3, 0x1000)).finish(),
        Tar::default().file(".wh.short-lived", b"").finish(),
    ];
    let (built, report) = merged(&archives, dir.path());
    let ids: Vec<String> =
        layers(&archives[..4], dir.path()).iter().map(|layer| layer.blobs()[0].id.to_string()).collect();
    // `copy` comes before `lower` and `mixed`: breadth first, names in order.
    assert_eq!(report.blobs, [ids[0].clone(), ids[2].clone()]);
    assert_eq!(report.dropped_blobs, [ids[1].clone(), ids[3].clone()]);
    assert_eq!((report.shared_chunks, report.shared_bytes, report.unique_chunks), (6, 0x6000, 8));
    assert_eq!(facts(&built.image, &built.reader)[Path::new("copy-again")].content.unwrap().0, 0x5000);
}

#[test]
fn a_chunk_that_only_a_dropped_blob_had_keeps_no_blob() {
    let dir = tempfile::tempdir().unwrap();
    let content = support::noise(1, 0x2000);
    let archives = [
        Tar::default().file("x", &content).finish(),
        Tar::default().file("x", &[&support::noise(2, 0x1000), &content[..]].concat()).finish(),
    ];
    let (_, report) = merged(&archives, dir.path());
    assert_eq!((report.blobs.len(), report.dropped_blobs.len(), report.shared_chunks), (1, 1, 0));
}

#[test]
fn merging_is_stable() {
    let dir = tempfile::tempdir().unwrap();
    let archive = Tar::default().file("a/b", &support::noise(1, 0x3000)).hard_link("c", "a/b").finish();
    let layer = layers(&[archive], dir.path()).remove(0);
    let out = dir.path().join("out");
    for layers in [vec![layer.clone()], vec![layer.clone(), layer.clone()]] {
        merge(&layers, &out).unwrap();
        assert!(fs::read(&out).unwrap() == layer.as_bytes()[..], "merging a layer with itself changes it");
    }
}

#[test]
fn what_does_not_go_together_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let build = |chunk_size| {
        let archive = Tar::default().file("a", &support::noise(1, 0x3000)).finish();
        let options = BuildOptions { chunk_size, compressor: Compressor::None, ..BuildOptions::default() };
        build_tar(archive.as_slice(), dir.path(), options).unwrap();
        Bootstrap::open(&dir.path().join("boot")).unwrap()
    };
    let (small, large) = (build(0x1000), build(0x2000));
    assert!(matches!(merge(&[], &out), Err(MergeError::Empty)));
    let error = merge(&[small.clone(), large], &out).unwrap_err();
    assert!(error.to_string().starts_with("layer 2: its chunk size is 0x2000"), "{error}");
    // The extended super block's bit for owners; then the encoded size of a chunk, with the blob's own.
    let mut bytes = small.as_bytes().to_vec();
    bytes[1152] &= !0x10;
    let anonymous: Result<Bootstrap, BootstrapError> = Bootstrap::parse(bytes.into());
    let error = merge(&[small.clone(), anonymous.unwrap()], &out).unwrap_err();
    assert!(error.to_string().contains("who owns its files"), "{error}");
    let mut bytes = small.as_bytes().to_vec();
    let digest = small.piece_table(0, None).unwrap().chunk(0).unwrap().digest.bytes;
    let position = bytes.windows(32).position(|window| window == digest).unwrap();
    bytes[position] ^= 1;
    let error = merge(&[small, Bootstrap::parse(bytes.into()).unwrap()], &out).unwrap_err();
    assert!(error.to_string().contains("describes chunk 0"), "{error}");
    assert!(!out.exists());
}

/// What a layer says of a name.
#[derive(Debug, Clone)]
enum Thing {
    File {
        seed: u64,
        len: usize,
    },
    /// A further name of the first file of the layer, if there is one.
    SecondName,
    Symlink,
    Whiteout,
    DeviceWhiteout,
    Directory(Directory),
}

#[derive(Debug, Clone)]
struct Directory {
    uid: u64,
    opaque: Option<Opaque>,
    things: BTreeMap<String, Thing>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opaque {
    Oci,
    Overlay,
}

/// What a name leads to in the end: a directory, or a leaf with what tells it apart, and for files which inode it is.
#[derive(Debug, Clone)]
enum Model {
    Directory { uid: u64, names: BTreeMap<String, Model> },
    File { seed: u64, len: usize, inode: usize },
    Symlink,
}

fn thing() -> impl Strategy<Value = Thing> {
    let leaf = prop_oneof![
        4 => (0..6u64, prop::sample::select(vec![0usize, 1, 0x1000, 0x2800])).prop_map(|(seed, len)| Thing::File { seed, len }),
        1 => Just(Thing::SecondName),
        1 => Just(Thing::Symlink),
        2 => Just(Thing::Whiteout),
        1 => Just(Thing::DeviceWhiteout),
    ];
    leaf.prop_recursive(3, 30, 6, |thing| directory(thing).prop_map(Thing::Directory))
}

fn directory(thing: impl Strategy<Value = Thing>) -> impl Strategy<Value = Directory> {
    let opaque = prop_oneof![6 => Just(None), 1 => Just(Some(Opaque::Oci)), 1 => Just(Some(Opaque::Overlay))];
    (0..9u64, opaque, prop::collection::btree_map("[abc]", thing, 0..4)).prop_map(|(uid, opaque, things)| Directory {
        uid,
        opaque,
        things,
    })
}

/// Writes a layer's directory; `first` is the first file of the layer.
fn write(mut tar: Tar, path: &str, directory: &Directory, first: &mut Option<String>) -> Tar {
    if directory.opaque == Some(Opaque::Overlay) {
        tar = tar.records(&[("SCHILY.xattr.trusted.overlay.opaque", b"y")]);
    }
    tar = tar
        .raw(EntryType::Directory, format!("./{path}").as_bytes(), b"", b"", |header| header.set_uid(directory.uid));
    if directory.opaque == Some(Opaque::Oci) {
        tar = tar.file(&format!("{path}.wh..wh..opq"), b"");
    }
    for (name, thing) in &directory.things {
        let path_of = format!("{path}{name}");
        tar = match thing {
            Thing::File { seed, len } => {
                first.get_or_insert_with(|| path_of.clone());
                tar.file(&path_of, &support::noise(*seed, *len))
            }
            Thing::SecondName => match first {
                Some(first) => tar.hard_link(&path_of, first),
                None => tar,
            },
            Thing::Symlink => tar.entry(EntryType::Symlink, path_of.as_bytes(), b"target", b""),
            Thing::Whiteout => tar.file(&format!("{path}.wh.{name}"), b""),
            Thing::DeviceWhiteout => tar.entry(EntryType::Char, path_of.as_bytes(), b"", b""),
            Thing::Directory(directory) => write(tar, &format!("{path_of}/"), directory, first),
        };
    }
    tar
}

/// The first file of a layer and the number of its inode.
type First = Option<(u64, usize, usize)>;

fn apply(names: &mut BTreeMap<String, Model>, directory: &Directory, first: &mut First, inodes: &mut usize) {
    if directory.opaque.is_some() {
        names.clear();
    }
    for (name, thing) in &directory.things {
        match thing {
            Thing::File { seed, len } => {
                *inodes += 1;
                first.get_or_insert((*seed, *len, *inodes));
                names.insert(name.clone(), Model::File { seed: *seed, len: *len, inode: *inodes });
            }
            Thing::SecondName => {
                if let Some((seed, len, inode)) = *first {
                    names.insert(name.clone(), Model::File { seed, len, inode });
                }
            }
            Thing::Symlink => drop(names.insert(name.clone(), Model::Symlink)),
            Thing::Whiteout | Thing::DeviceWhiteout => drop(names.remove(name)),
            Thing::Directory(upper) => {
                if !matches!(names.get(name), Some(Model::Directory { .. })) {
                    names.insert(name.clone(), Model::Directory { uid: 0, names: BTreeMap::new() });
                }
                if let Some(Model::Directory { uid, names }) = names.get_mut(name) {
                    *uid = upper.uid;
                    apply(names, upper, first, inodes);
                }
            }
        }
    }
}

/// What can be compared: mode and owner, content, and which paths are one file.
type Seen = BTreeMap<PathBuf, (u32, u32, Option<(u64, [u8; 32])>, Vec<PathBuf>)>;

fn flatten(
    path: &Path,
    names: &BTreeMap<String, Model>,
    seen: &mut Seen,
    inodes: &mut BTreeMap<usize, Vec<PathBuf>>,
) {
    for (name, model) in names {
        let path = path.join(name);
        let fact = match model {
            Model::Directory { uid, names } => {
                flatten(&path, names, seen, inodes);
                (0o040_755, *uid as u32, None, Vec::new())
            }
            Model::File { seed, len, inode } => {
                inodes.entry(*inode).or_default().push(path.clone());
                let content = support::noise(*seed, *len);
                (0o100_644, 0, Some((*len as u64, *blake3::hash(&content).as_bytes())), Vec::new())
            }
            Model::Symlink => (0o120_644, 0, None, Vec::new()),
        };
        seen.insert(path, fact);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn layers_merge_like_nested_maps(stack in prop::collection::vec(directory(thing()), 1..5)) {
        let (mut root, mut inodes) = (BTreeMap::new(), 0);
        for layer in &stack {
            apply(&mut root, layer, &mut None, &mut inodes);
        }
        let (mut expected, mut names) = (Seen::new(), BTreeMap::new());
        flatten(Path::new(""), &root, &mut expected, &mut names);
        expected.insert(PathBuf::new(), (0o040_755, stack.last().unwrap().uid as u32, None, Vec::new()));
        for mut group in names.into_values().filter(|group| group.len() > 1) {
            group.sort();
            group.iter().for_each(|path| expected.get_mut(path).unwrap().3.clone_from(&group));
        }
        let dir = tempfile::tempdir().unwrap();
        let archives: Vec<_> = stack.iter().map(|layer| write(Tar::default(), "", layer, &mut None).finish()).collect();
        let (built, report) = merged(&archives, dir.path());
        let found: Seen = facts(&built.image, &built.reader)
            .into_iter()
            .map(|(path, facts)| (path, (facts.mode, facts.uid, facts.content, facts.names)))
            .collect();
        prop_assert_eq!(found, expected);
        // No chunk is there twice, and every blob is needed.
        let nids: Vec<_> = walk(&built.image).into_values().collect();
        let chunks: BTreeSet<_> = nids
            .iter()
            .flat_map(|nid| built.image.inode(*nid).unwrap().chunks().collect::<Vec<_>>())
            .map(|chunk| (chunk.id.blob, chunk.id.index))
            .collect();
        let digests: BTreeSet<_> = chunks
            .iter()
            .map(|(blob, index)| built.image.piece_table(*blob, None).unwrap().chunk(*index).unwrap().digest.bytes)
            .collect();
        prop_assert_eq!((chunks.len() as u64, digests.len() as u64), (report.unique_chunks, report.unique_chunks));
    }
}

#[test]
fn a_layer_goes_back_with_the_whiteouts_of_oci() {
    let dir = tempfile::tempdir().unwrap();
    let upper = Tar::default()
        .records(&[("SCHILY.xattr.trusted.overlay.opaque", b"y"), ("SCHILY.xattr.trusted.other", b"y")])
        .directory("overlay")
        .file("overlay/new", b"new")
        .entry(EntryType::Char, b"overlay/device", b"", b"")
        .entry(EntryType::Char, b"device", b"", b"")
        .raw(EntryType::Char, b"null", b"", b"", |header| {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        })
        .file(".wh.plain", b"");
    let described = Tar::default().raw(EntryType::Directory, b"./", b"", b"", |header| header.set_mode(0o700));
    let expected = ["", ".wh.device", ".wh.plain", "null", "overlay", "overlay/.wh..wh..opq", "overlay/.wh.device"];
    let expected = [&expected[..], &["overlay/new"]].concat();
    for (tar, names, root) in [(upper, expected, false), (described, vec![""], true)] {
        let built = open_tar(tar.finish().as_slice(), &dir.path().join("layer"), options());
        let mut back = Vec::new();
        let report = unpack_layer(&built.image, &built.reader, &mut back).unwrap();
        let again = open_tar(back.as_slice(), &dir.path().join("again"), options());
        assert_eq!(paths(&again), names);
        let facts = facts(&again.image, &again.reader);
        assert_eq!(report.entries as usize, facts.len() - usize::from(!root));
        assert_eq!(facts[Path::new("")].mode & 0o777, if root { 0o700 } else { 0o755 });
        for (path, fact) in &facts {
            assert!(!fact.xattrs.contains_key(&b"trusted.overlay.opaque"[..]), "{path:?}");
        }
    }
}

/// What a merge is told of blobs that layers brought.
#[test]
fn others_know_more_of_a_blob_than_its_layer() {
    let dir = tempfile::tempdir().unwrap();
    let archives = [Tar::default().file("a", b"a").finish(), Tar::default().file("b", b"b").finish()];
    let layers = layers(&archives, dir.path());
    let output = dir.path().join("merged");
    let merged = |layers: &[Bootstrap], blobs: Vec<LayerBlob>, earlier: &[&Bootstrap]| {
        let earlier_blobs = earlier.iter().flat_map(|image| image.blobs()).map(|blob| blob.id).collect();
        let options = MergeOptions { blobs, earlier_blobs, ..MergeOptions::default() };
        merge_with(layers, &options, &output).map(|_| Bootstrap::open(&output).unwrap())
    };
    let of = |image: &Bootstrap| image.blobs().iter().map(|blob| (blob.id, blob.encoded_size)).collect::<Vec<_>>();
    let [lower, upper] = [0, 1].map(|number| of(&layers[number])[0]);
    let id = |byte| Some(shoal_proto::BlobId::new([byte; 32]));
    let named = LayerBlob { id: id(1), file_size: Some(lower.1 + 10), ..LayerBlob::default() };
    let image = merged(&layers, vec![named], &[]).unwrap();
    assert_eq!(of(&image), [(id(1).unwrap(), lower.1 + 10), upper]);
    // Both names: the digest of the file is the one that counts.
    let image = merged(&layers, vec![LayerBlob { file: id(2), ..named }], &[]).unwrap();
    assert_eq!(of(&image)[0].0, id(2).unwrap());
    let toc = LayerBlob { toc_digest: Some([3; 32]), toc_size: Some(640), ..LayerBlob::default() };
    let image = merged(&layers, vec![LayerBlob::default(), toc], &[]).unwrap();
    assert_eq!(image.blobs()[1].toc.map(|toc| (toc.size, toc.sha256)), Some((640, [3; 32])));
    // A blob of an earlier image was brought by nobody.
    assert_eq!(of(&merged(&layers, vec![named], &[&layers[0]]).unwrap()), [lower, upper]);
    let both = merged(&layers, Vec::new(), &[]).unwrap();
    let only = merged(std::slice::from_ref(&both), vec![named], &[&layers[1]]).unwrap();
    assert_eq!(of(&only), [(id(1).unwrap(), lower.1 + 10), upper]);
    for (layers, blob, earlier) in [
        (&[both.clone()][..], named, None),
        (&layers, LayerBlob { file_size: Some(lower.1 - 1), ..named }, None),
        (&layers, LayerBlob { file_size: Some(u64::MAX), ..named }, None),
        (&[both], LayerBlob { id: Some(upper.0), ..named }, Some(&layers[1])),
    ] {
        let error = merged(layers, vec![blob], earlier.as_slice()).unwrap_err();
        assert!(matches!(error, MergeError::Mismatch { layer: 1, .. }), "{error}");
    }
}
