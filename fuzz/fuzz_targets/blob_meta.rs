//! Parses the chunk table of a blob as registries carry it (`<digest>.blob.meta`).
#![no_main]

use libfuzzer_sys::fuzz_target;
use shoal_rafs::ChunkTable;

fuzz_target!(|data: &[u8]| {
    if let Ok(table) = ChunkTable::parse(data) {
        assert!(table.chunks.len() * 16 <= data.len());
        assert!(table.chunks.iter().all(|chunk| chunk.decoded_offset.is_multiple_of(4096)));
    }
});
