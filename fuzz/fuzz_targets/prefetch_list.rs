//! Reads any bytes as a list of paths and as a trace, and builds an image by it: an error, or an image that passes the check
//! and lists each inode once.
#![no_main]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use shoal_rafs::{Bootstrap, BuildOptions, Builder, Compressor, PrefetchList, check};

/// A few names for patterns to match.
static SOURCE: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory for the source");
    fs::create_dir_all(dir.path().join("d/e")).expect("its directories");
    for name in ["a", "ab", "b*", "d/a", "d/e/ab"] {
        fs::write(dir.path().join(name), name.repeat(3000)).expect("its files");
    }
    dir
});

fuzz_target!(|data: &[u8]| {
    for list in [PrefetchList::paths(data), PrefetchList::trace(data)].into_iter().flatten() {
        let dir = tempfile::tempdir().expect("a directory for the image");
        let (boot, blobs): (PathBuf, PathBuf) = (dir.path().join("boot"), dir.path().join("blobs"));
        let options = BuildOptions {
            compressor: Compressor::None,
            chunk_size: 0x1000,
            threads: std::num::NonZeroUsize::new(1),
            ..BuildOptions::default()
        };
        Builder::new(options).prefetch(list).build(SOURCE.path(), &boot, &blobs).expect("an image");
        let image = Bootstrap::open(&boot).expect("its bootstrap");
        assert!(check(image.as_bytes().clone(), Some(&blobs)).ok);
        let listed: BTreeSet<_> = image.prefetch().iter().collect();
        assert_eq!(listed.len(), image.prefetch().len());
    }
});
