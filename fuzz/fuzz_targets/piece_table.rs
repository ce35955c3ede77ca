//! A bootstrap and a chunk table, both from strangers: the first four bytes say how long the bootstrap is. Whatever pieces
//! come of them lie in the blob, in order, and hold what the bootstrap names. Decoding any bytes as one of them ends.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use shoal_rafs::{Bootstrap, ChunkTable};

fuzz_target!(|data: &[u8]| {
    let Some((len, rest)) = data.split_first_chunk() else { return };
    let Some((bootstrap, meta)) = rest.split_at_checked(u32::from_le_bytes(*len) as usize) else { return };
    let Ok(image) = Bootstrap::parse(Bytes::copy_from_slice(bootstrap)) else { return };
    let table = ChunkTable::parse(&Bytes::copy_from_slice(meta)).ok();
    for (blob, index) in image.blobs().iter().zip(0..) {
        let Ok(pieces) = image.piece_table(index, table.as_ref()) else { continue };
        let (mut end, mut kept, mut named) = (0, 0, 0);
        for (number, piece) in pieces.pieces() {
            assert!(number < pieces.len() && piece.encoded().start >= end && piece.encoded().end <= blob.data_end);
            // Those of a gzip layer may overlap.
            end = if blob.is_gzip_layer() { piece.encoded().start } else { piece.encoded().end };
            assert!(piece.kept().start >= kept && piece.kept().end <= 4 * blob.encoded_size);
            kept = piece.kept().end;
            let len = (piece.encoded().end - piece.encoded().start) as usize;
            if len.max(piece.decoded_len() as usize) <= 1 << 20 {
                let encoded: Vec<u8> = rest.iter().copied().cycle().take(len).collect();
                let _ = pieces.decode(number, &encoded);
            }
            named += piece.chunks().len();
            for chunk in piece.chunks() {
                assert_eq!(pieces.piece_of_chunk(chunk.index), Some(number));
            }
        }
        assert_eq!(named, image.chunks(index).count());
    }
});
