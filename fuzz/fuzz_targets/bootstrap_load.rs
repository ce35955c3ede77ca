//! Parses a bootstrap, walks all of it, and checks it. Whatever the bytes are: an error or a tree that is safe to walk.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use shoal_rafs::{Bootstrap, Kind, check, extents};

fuzz_target!(|data: &[u8]| {
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
