//! Parses the table of contents of a blob: an error, or entries that can be told apart.
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_rafs::Toc;

fuzz_target!(|data: &[u8]| {
    if let Ok(toc) = Toc::parse(data) {
        assert_eq!(toc.entries.len(), data.len() / 128);
        for entry in &toc.entries {
            assert_eq!(toc.entry(&entry.name), Some(entry));
            assert!(entry.range.start <= entry.range.end);
        }
    }
});
