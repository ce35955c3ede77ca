//! Bootstraps that are read in place: what they say is what a verified one says, what they cost does not depend on the number of
//! files, and whatever is in one, a reader gets an answer or an error.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use proptest::prelude::*;
use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, Builder, ChunkId, ImageFile, Kind, Metadata, Nid, extents};

mod support;

use support::image::build;

/// A bootstrap of `files` files of no bytes, in folders of a thousand.
fn crowd(files: usize, work: &Path) -> PathBuf {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    for number in 0..files {
        let name = format!("d{:04}/file-{number}", number / 1000);
        tar.append_data(&mut header, name, &[][..]).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let boot = work.join(format!("boot-{files}"));
    Builder::new(BuildOptions::default()).build_tar(&tar[..], Path::new("tar"), &boot, &work.join("blobs")).unwrap();
    boot
}

/// Bytes that this thread has read from files.
fn bytes_read() -> u64 {
    let counters = fs::read_to_string("/proc/thread-self/io").unwrap();
    counters.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
}

fn find(image: &Metadata, path: &str) -> Option<Nid> {
    path.split('/')
        .try_fold(image.root(), |nid, name| image.look().inode(nid).unwrap().lookup(name.as_bytes()).unwrap())
}

#[test]
fn what_is_read_does_not_grow_with_the_number_of_files() {
    let dir = tempfile::tempdir().unwrap();
    let costs = [10_000, 100_000].map(|files| {
        let boot = crowd(files, dir.path());
        let before = bytes_read();
        let image = Metadata::open(File::open(&boot).unwrap()).unwrap();
        let opened = bytes_read();
        for number in [0, 1, files / 3, files / 2, files - 1] {
            let nid = find(&image, &format!("d{:04}/file-{number}", number / 1000)).unwrap();
            assert_eq!(image.look().inode(nid).unwrap().kind(), Kind::File);
        }
        assert_eq!(find(&image, "d0003/file-0"), None);
        let looked = bytes_read();
        (opened - before, looked - opened, fs::metadata(&boot).unwrap().len())
    });
    let [(opened, looked, small), (opened_more, looked_more, large)] = costs;
    println!("{small} bytes: {opened} to open, {looked} to look; {large} bytes: {opened_more}, {looked_more}");
    assert!(large > 8 * small);
    // The counters themselves are read, too, and have more digits.
    assert!(opened_more < opened + 100, "{opened}, {opened_more}");
    // A search takes one block more for each doubling of what it searches.
    assert!(looked_more < 2 * looked, "{looked}, {looked_more}");
    assert!(looked_more < large / 20);
}

/// All that both say of an inode and what is below it.
fn assert_same(whole: &Bootstrap, image: &Metadata) {
    let mut directories = vec![whole.root()];
    assert_eq!(whole.root(), image.root());
    while let Some(nid) = directories.pop() {
        let expected: Vec<_> = whole.inode(nid).unwrap().entries().map(Result::unwrap).collect();
        let look = image.look();
        let found: Vec<_> = look.inode(nid).unwrap().entries().map(Result::unwrap).collect();
        assert_eq!(expected, found);
        for entry in expected {
            let look = image.look();
            let (a, b) = (whole.inode(entry.nid).unwrap(), look.inode(entry.nid).unwrap());
            assert_eq!((a.kind(), a.mode(), a.size(), a.mtime()), (b.kind(), b.mode(), b.size(), b.mtime()));
            assert_eq!((a.uid(), a.gid(), a.nlink(), a.rdev()), (b.uid(), b.gid(), b.nlink(), b.rdev()));
            assert_eq!(a.target().unwrap(), b.target().unwrap());
            assert!(a.xattrs().eq(b.xattrs()));
            assert!(a.chunks().eq(b.chunks()));
            assert_eq!(whole.inode(nid).unwrap().lookup(entry.name).unwrap(), Some(entry.nid));
            if entry.kind == Kind::Directory && entry.name != b"." && entry.name != b".." {
                directories.push(entry.nid);
            }
        }
    }
}

#[test]
fn it_says_what_the_verified_one_says() {
    let dir = tempfile::tempdir().unwrap();
    support::nasty_tree(&dir.path().join("source"));
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    let built = build(&dir.path().join("source"), &dir.path().join("work"), options);
    let (image, paths) = ImageFile::open_in_place(&built.boot, Some(&built.blobs)).unwrap();
    assert!(matches!(image, Metadata::InPlace(_)));
    assert_same(&built.image, &image);
    assert_eq!(image.hash().unwrap(), Metadata::from(built.image.clone()).hash().unwrap());
    assert_eq!(image.read().unwrap(), *built.image.as_bytes());
    assert_eq!(image.blobs(), built.image.blobs());

    let (lazy, whole) = (BlobDirReader::lazily(&image, &paths).unwrap(), &built.reader);
    for chunk in built.image.chunks(0) {
        let id = ChunkId { blob: 0, index: chunk.index };
        assert_eq!(lazy.read(id).unwrap(), whole.read(id).unwrap());
    }
    let unknown = lazy.read(ChunkId { blob: 0, index: u32::MAX }).unwrap_err();
    assert!(unknown.reason.contains("does not name it"), "{unknown}");
}

#[test]
fn a_file_that_is_cut_or_overwritten_is_an_error_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let boot = crowd(10_000, dir.path());
    let image = Metadata::open(File::open(&boot).unwrap()).unwrap();
    let nid = find(&image, "d0009/file-9999").unwrap();
    let file = File::options().write(true).open(&boot).unwrap();
    file.set_len(8192).unwrap();
    let error = image.look().inode(nid).unwrap_err();
    assert!(error.to_string().contains("cannot be read"), "{error}");
    // It has its length again, and nothing in it.
    file.set_len(1 << 20).unwrap();
    assert!(image.look().inode(nid).is_err());
    assert!(image.read().is_ok() || image.read().is_err());
}

/// Everything that a mount would do, for as long as a tree of this size may take.
fn walk(image: &Metadata, limit: usize) {
    let mut queue = vec![image.root()];
    let mut left = limit;
    while let Some(nid) = queue.pop() {
        let look = image.look();
        let Ok(inode) = look.inode(nid) else { continue };
        let _ = (inode.target(), inode.xattr(b"user.x"), inode.xattrs().count());
        let covered: u64 = extents(&inode, 0, 1 << 24).map(|extent| u64::from(extent.len)).sum();
        assert!(covered <= 1 << 24);
        for entry in inode.entries() {
            let Ok(entry) = entry else { break };
            assert!(!entry.name.is_empty() && !entry.name.contains(&b'/'));
            let _ = inode.lookup(entry.name);
            if left == 0 {
                return;
            }
            left -= 1;
            queue.push(entry.nid);
        }
    }
}

/// An image of a nasty tree, small.
fn honest() -> &'static [u8] {
    static HONEST: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    HONEST.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        support::nasty_tree(&dir.path().join("source"));
        let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
        let mut bytes = Vec::new();
        let built = build(&dir.path().join("source"), &dir.path().join("work"), options);
        File::open(built.boot).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Damage in the part that the tree lies in, where a walk would have found it before.
    #[test]
    fn whatever_is_in_it_a_look_ends(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40)) {
        let mut bytes = honest().to_vec();
        for (at, value) in &damage {
            let at = 1024 + at.index(bytes.len() - 1024);
            bytes[at] = *value;
        }
        let mut file = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut file, &bytes).unwrap();
        if let Ok(image) = Metadata::open(file) {
            walk(&image, 5_000);
            let _ = (image.prefetch_files(), image.named_chunks().is_ok());
            // What a verified one accepts says the same in place.
            if let Ok(whole) = Bootstrap::parse(Bytes::from(bytes)) {
                assert_same(&whole, &image);
            }
        }
    }
}
