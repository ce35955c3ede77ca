use bytes::Bytes;
use proptest::prelude::*;
use shoal_proto::{Algorithm, BlobId};

use super::*;
use crate::bootstrap::ChunkTableRange;
use crate::codec::{Compressor, digest};
use crate::layout::features;

/// What a chunk of the model is: alone with its stored size, or one of a batch.
#[derive(Debug, Clone)]
enum Unit {
    Plain(u32),
    Batch(Vec<u32>),
}

fn units() -> impl Strategy<Value = Vec<Unit>> {
    let unit = prop_oneof![
        (1..5000u32).prop_map(Unit::Plain),
        prop::collection::vec(1..500u32, 1..6).prop_map(Unit::Batch),
    ];
    prop::collection::vec(unit, 1..20)
}

/// Chunk table file, chunks and blob of a model in which nothing is compressed.
struct Model {
    meta: Vec<u8>,
    named: Vec<Named>,
    /// Per chunk: number, encoded offset and length of its piece.
    places: Vec<(u32, u64, u32)>,
    blob: Blob,
}

fn model(units: &[Unit]) -> Model {
    let (mut entries, mut contexts, mut named, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut offset, mut decoded) = (0u64, 0u64);
    for (number, unit) in (0u32..).zip(units) {
        let (lens, batched) = match unit {
            Unit::Plain(len) => (vec![*len], false),
            Unit::Batch(lens) => (lens.clone(), true),
        };
        let (total, mut within) = (lens.iter().sum::<u32>(), 0u32);
        for len in &lens {
            let (flags, size, data) = match batched {
                true => (5, 0, (contexts.len() as u64 / 40) << 32 | u64::from(within)),
                false => (0, *len, 0),
            };
            let words =
                [flags << 56 | u64::from(len - 1) << 32 | decoded >> 12, u64::from(size) << 40 | offset, data];
            entries.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            let chunk = Chunk {
                index: places.len() as u32,
                digest: digest(Algorithm::Blake3, &[]),
                decoded_offset: decoded,
                decoded_len: *len,
                compressed: false,
            };
            let (encoded_offset, encoded_len) = if batched { (0, 0) } else { (offset, *len) };
            named.push(Named { chunk, encoded_offset, encoded_len });
            places.push((number, offset, total));
            decoded += u64::from(*len).next_multiple_of(4096);
            within += len;
        }
        if batched {
            contexts.extend([total, total].iter().flat_map(|size| size.to_le_bytes()));
            contexts.extend([0; 32]);
        }
        offset += u64::from(total);
    }
    let count = places.len() as u32;
    let header = |at: &mut Vec<u8>, table: usize| {
        let features = features::ALIGNED | features::CHUNK_INFO_V2 | features::BATCH;
        let start = at.len();
        for word in [0xB10B_B10B, features, 0, count] {
            at.extend(word.to_le_bytes());
        }
        for long in [offset, table as u64, table as u64, entries.len() as u64, contexts.len() as u64] {
            at.extend(long.to_le_bytes());
        }
        at.extend((contexts.len() as u32 / 40).to_le_bytes());
        at.resize(start + 4092, 0);
        at.extend(0xB10B_B10Bu32.to_le_bytes());
    };
    let mut meta = [&entries[..], &contexts].concat();
    let table = meta.len();
    meta.resize(table.next_multiple_of(4096), 0);
    header(&mut meta, table);
    let range = ChunkTableRange {
        offset,
        encoded_size: table as u64,
        decoded_size: table as u64,
        compressor: Compressor::None,
    };
    let blob = Blob {
        id: BlobId::new([1; 32]),
        encoded_size: offset + table as u64 + 4096,
        decoded_size: decoded,
        chunk_count: count,
        compressor: Compressor::Zstd,
        algorithm: Algorithm::Blake3,
        data_end: offset,
        chunk_table: range,
        features: features::ALIGNED | features::CHUNK_INFO_V2 | features::BATCH,
        mapped_block: 0,
        toc: None,
        meta: None,
        cipher: None,
    };
    Model { meta, named, places, blob }
}

proptest! {
    /// Whatever the image names, each named chunk is in the piece that has it, under the number that counts the whole
    /// blob.
    #[test]
    fn pieces_are_numbered_over_the_whole_blob(units in units(), mask in any::<u64>()) {
        let Model { meta, named, places, blob } = model(&units);
        let is_named = |index: u32| mask >> (index % 64) & 1 == 1;
        let table = ChunkTable::parse(&meta.into()).unwrap();
        let pieces = group(&blob, named.into_iter().filter(|named| is_named(named.chunk.index)), Some(&table)).unwrap();
        prop_assert_eq!(pieces.len() as usize, units.len());
        for (index, (number, offset, len)) in (0u32..).zip(places) {
            prop_assert_eq!(pieces.piece_of_chunk(index), is_named(index).then_some(number));
            prop_assert_eq!(pieces.chunk(index).is_some(), is_named(index));
            if is_named(index) {
                let piece = pieces.piece(number).unwrap();
                prop_assert_eq!(piece.encoded(), offset..offset + u64::from(len));
                prop_assert_eq!(piece.decoded_len(), len);
            }
        }
    }

    /// A damaged chunk table is refused, or makes pieces that lie in the blob.
    #[test]
    fn damage_ends_in_pieces_that_lie_in_the_blob(
        units in units(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), 0..8u8), 1..4),
    ) {
        let Model { mut meta, named, blob, .. } = model(&units);
        let used = meta.len() - 4096 + 60;
        for (position, bit) in damage {
            meta[position.index(used)] ^= 1 << bit;
        }
        if let Ok(table) = ChunkTable::parse(&Bytes::from(meta))
            && let Ok(pieces) = group(&blob, named.into_iter(), Some(&table))
        {
            for (_, piece) in pieces.pieces() {
                prop_assert!(piece.encoded().end <= blob.data_end && !piece.chunks().is_empty());
            }
        }
    }
}

#[test]
fn interrupted_batches_and_other_counts_are_refused() {
    let Model { meta, named, mut blob, .. } =
        model(&[Unit::Batch(vec![10, 20]), Unit::Plain(5), Unit::Batch(vec![30])]);
    let problem = |meta: &[u8], blob: &Blob| {
        let table = ChunkTable::parse(&Bytes::copy_from_slice(meta)).unwrap();
        group(blob, named.iter().copied(), Some(&table)).unwrap_err()
    };
    let mut changed = meta.clone();
    // The batch of the last chunk becomes the first batch again.
    changed[3 * 24 + 20] = 0;
    assert!(matches!(problem(&changed, &blob), PieceTableError::Chunk { index: 3, .. }));
    blob.chunk_count = 5;
    assert_eq!(problem(&meta, &blob), PieceTableError::Length { expected: 5, found: 4 });
    blob.chunk_count = 4;
    blob.data_end = 40;
    assert!(problem(&meta, &blob).to_string().contains("behind the chunk data"));
}
