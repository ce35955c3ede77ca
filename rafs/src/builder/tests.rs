use std::fs;
use std::os::unix::fs::symlink;

use super::*;
use crate::bootstrap::{Bootstrap, Kind};

#[test]
fn a_small_tree_is_built_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::write(source.join("a/file"), b"content ".repeat(1000)).unwrap();
    fs::write(source.join("empty"), b"").unwrap();
    symlink("a/file", source.join("link")).unwrap();
    fs::hard_link(source.join("a/file"), source.join("a/b/second")).unwrap();
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    let boot = dir.path().join("boot");
    let report = Builder::new(options).build(&source, &boot, &dir.path().join("blobs")).unwrap();
    assert_eq!((report.names, report.files, report.decoded_bytes), (7, 2, 8000));
    assert_eq!((report.chunks, report.unique_chunks), (2, 2));
    let image = Bootstrap::open(&boot).unwrap();
    assert_eq!((image.inode_count(), image.name_count(), image.declared().names), (6, 7, 7));
    let root = image.inode(image.root()).unwrap();
    let names: Vec<_> = root.entries().map(|entry| entry.unwrap().name.to_vec()).collect();
    assert_eq!(names, [&b"."[..], b"..", b"a", b"empty", b"link"]);
    let a = image.inode(root.lookup(b"a").unwrap().unwrap()).unwrap();
    let file = image.inode(a.lookup(b"file").unwrap().unwrap()).unwrap();
    assert_eq!((file.kind(), file.size(), file.nlink()), (Kind::File, 8000, 2));
    assert_eq!(image.blobs()[0].id, report.blob.unwrap());
    let link = image.inode(root.lookup(b"link").unwrap().unwrap()).unwrap();
    assert_eq!(link.target().unwrap(), b"a/file");
}
