//! Parses the chunk table of a blob as registries carry it (`<digest>.blob.meta`), and the meta blob of a gzip layer.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use shoal_rafs::ChunkTable;

/// Most bytes that a meta blob may decode to.
const LIMIT: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let table = ChunkTable::parse(&Bytes::copy_from_slice(data));
    let meta = ChunkTable::read_meta(data, LIMIT);
    for (table, limit) in
        table.into_iter().map(|table| (table, data.len() as u64)).chain(meta.map(|meta| (meta, LIMIT)))
    {
        assert!(u64::from(table.len()) * 16 <= limit);
        assert_eq!(table.chunks().count(), table.len() as usize);
        for chunk in table.chunks() {
            assert!(chunk.decoded_offset.is_multiple_of(4096));
            let known = |index| table.batch(index).is_some() || table.context(index).is_some();
            assert!(chunk.batch.is_none_or(|batch| known(batch.index)));
        }
    }
});
