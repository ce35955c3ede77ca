//! Makes an index over any bytes as a gzip layer. Either an error that leaves nothing behind, or an image that passes the
//! check together with the layer.
#![no_main]

use std::fs;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use shoal_rafs::{ArchiveLimits, BuildOptions, Builder, check};

fuzz_target!(|data: &[u8]| {
    let options = BuildOptions {
        chunk_size: 0x1000,
        limits: ArchiveLimits { names: 1000, bytes: 1 << 20 },
        ..BuildOptions::default()
    };
    let dir = tempfile::tempdir().expect("a directory for the image");
    let (boot, blobs) = (dir.path().join("boot"), dir.path().join("blobs"));
    match Builder::new(options).build_reference(data, Path::new("layer"), &boot, &blobs) {
        Ok(built) => {
            if let Some(layer) = built.blob {
                fs::write(blobs.join(layer.to_string()), data).expect("the layer");
            }
            let report = check(fs::read(&boot).expect("the bootstrap").into(), Some(&blobs));
            assert!(report.ok, "{:?}", report.problems);
            assert_eq!((report.names, report.decoded_bytes), (built.names, built.decoded_bytes));
        }
        Err(_) => {
            assert!(!boot.exists());
            assert_eq!(fs::read_dir(&blobs).map_or(0, Iterator::count), 0);
        }
    }
});
