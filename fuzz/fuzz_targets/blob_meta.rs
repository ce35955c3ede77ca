//! Parses the chunk table of a blob as registries carry it (`<digest>.blob.meta`).
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use shoal_rafs::ChunkTable;

fuzz_target!(|data: &[u8]| {
    if let Ok(table) = ChunkTable::parse(&Bytes::copy_from_slice(data)) {
        assert!(table.len() as usize * 16 <= data.len());
        assert_eq!(table.chunks().count(), table.len() as usize);
        for chunk in table.chunks() {
            assert!(chunk.decoded_offset.is_multiple_of(4096));
            assert!(chunk.batch.is_none_or(|batch| table.batch(batch.index).is_some()));
        }
    }
});
