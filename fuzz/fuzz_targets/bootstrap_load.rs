//! Parses a bootstrap, walks all of it, and checks it. Whatever the bytes are: an error or a tree that is safe to walk. And looks at it
//! in place, as a mount does: answers or errors, and an end.
#![no_main]

use std::io::Write;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use shoal_rafs::{Bootstrap, Kind, Metadata, check, extents};

/// Names that are looked at in a tree that may lead back to itself.
const LOOKS: usize = 2000;

fn look(data: &[u8]) {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(data).expect("a file");
    let Ok(image) = Metadata::open(file) else { return };
    let (mut queue, mut left) = (vec![image.root()], LOOKS);
    while let Some(nid) = queue.pop() {
        let look = image.look();
        let Ok(inode) = look.inode(nid) else { continue };
        let _ = (inode.target(), inode.xattrs().count(), inode.xattr(b"user.x"));
        let covered: u64 = extents(&inode, 0, 1 << 24).map(|extent| u64::from(extent.len)).sum();
        assert!(covered <= 1 << 24);
        for entry in inode.entries().map_while(Result::ok) {
            let Some(rest) = left.checked_sub(1) else { return };
            left = rest;
            assert!(!entry.name.is_empty() && !entry.name.contains(&b'/'));
            let _ = inode.lookup(entry.name);
            queue.push(entry.nid);
        }
    }
    if let Ok(named) = image.named_chunks() {
        (0..image.blobs().len() as u32).for_each(|blob| drop(named.piece_table(blob, None)));
    }
}

fuzz_target!(|data: &[u8]| {
    look(data);
    let report = check(Bytes::copy_from_slice(data), None);
    let parsed = Bootstrap::parse(Bytes::copy_from_slice(data));
    assert!(parsed.is_ok() || !report.ok, "a bootstrap that does not parse passes the check");
    // It may have been taken out of a blob, which it does not name.
    let own = "07".repeat(32).parse().expect("an id");
    let Ok(image) = parsed.or_else(|_| Bootstrap::parse_extracted(Bytes::copy_from_slice(data), own)) else { return };
    let mut directories = vec![image.root()];
    let mut names = 1;
    while let Some(directory) = directories.pop() {
        let directory = image.inode(directory).expect("a directory of the tree");
        for entry in directory.entries() {
            let entry = entry.expect("an entry of a verified directory");
            assert_eq!(directory.lookup(entry.name).expect("a verified directory"), Some(entry.nid));
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            names += 1;
            let inode = image.inode(entry.nid).expect("an inode of the tree");
            assert_eq!(inode.kind(), entry.kind);
            assert!(inode.target().expect("a verified target").len() <= 4096);
            assert!(inode.xattrs().all(|(name, _)| !name.is_empty()));
            let sizes: u64 = extents(&inode, 0, u64::MAX).map(|extent| u64::from(extent.len)).sum();
            assert_eq!(sizes, if inode.kind() == Kind::File { inode.size() } else { 0 });
            for chunk in inode.chunks() {
                let known = image.chunk(chunk.id).expect("a chunk that the image names");
                assert_eq!((known.decoded_offset, known.decoded_len), (chunk.decoded_offset, chunk.decoded_len));
            }
            if entry.kind == Kind::Directory {
                directories.push(entry.nid);
            }
        }
    }
    assert_eq!(names, image.name_count());
    for blob in 0..image.blobs().len() as u32 {
        // Whatever the tables say, nothing is handed out that no digest vouches for.
        assert!(image.has_digests() || image.piece_table(blob, None).is_err());
    }
});
