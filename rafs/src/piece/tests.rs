use super::*;
use crate::codec::{Encoder, digest};

fn chunk(index: u32, content: &[u8], compressed: bool) -> Chunk {
    Chunk {
        index,
        digest: digest(Algorithm::Blake3, content),
        decoded_offset: u64::from(index) * 4096,
        decoded_len: content.len() as u32,
        compressed,
    }
}

fn table(pieces: Vec<Piece>) -> Result<PieceTable, PieceTableError> {
    PieceTable::new(BlobId::new([1; 32]), 10_000, 5, pieces)
}

#[test]
fn only_bytes_with_the_right_digest_come_out() {
    let plain = b"abcabcabc".repeat(100);
    for compressor in [Compressor::None, Compressor::Lz4, Compressor::Zstd] {
        let encoded = Encoder::new(compressor).unwrap().encode(&plain).unwrap();
        let compressed = encoded.is_some();
        let encoded = encoded.unwrap_or_else(|| plain.clone());
        let piece = Piece::plain(chunk(2, &plain, compressed), 7, encoded.len() as u32, compressor);
        let table = table(vec![piece]).unwrap();
        let decoded = table.decode(2, &encoded).unwrap();
        assert_eq!(decoded.chunk(2).unwrap(), plain);
        assert_eq!((decoded.chunk(1), decoded.chunk(3)), (None, None));
        assert!(matches!(table.decode(1, &encoded), Err(VerifyError::Unnamed { piece: 1, .. })));
        assert!(matches!(table.decode(2, &encoded[1..]), Err(VerifyError::EncodedLength { .. })));
        for position in 0..encoded.len() {
            let mut wrong = encoded.clone();
            wrong[position] ^= 1;
            // A frame header may have bits without meaning; then the bytes that come out are still the right ones.
            if let Ok(decoded) = table.decode(2, &wrong) {
                assert_eq!(decoded.chunk(2).unwrap(), plain, "{compressor} byte {position}");
                assert_ne!(compressor, Compressor::None);
            }
        }
    }
}

#[test]
fn a_sparse_table_numbers_the_whole_blob() {
    let piece = |index| Piece::plain(chunk(index, b"xyz", false), u64::from(index) * 3, 3, Compressor::Zstd);
    let table = table(vec![piece(4), piece(1)]).unwrap();
    assert_eq!(table.len(), 5);
    let named: Vec<_> = (0..6).filter(|number| table.piece(*number).is_some()).collect();
    assert_eq!(named, [1, 4]);
    assert_eq!(table.piece_of_chunk(4), Some(4));
    assert_eq!(table.piece_of_chunk(3), None);
    assert_eq!(table.pieces().map(|(number, _)| number).collect::<Vec<_>>(), [1, 4]);
}

#[test]
fn tables_that_contradict_themselves_are_refused() {
    let raw = |index, encoded_offset| Piece::plain(chunk(index, b"xyz", false), encoded_offset, 3, Compressor::None);
    let with = |change: fn(&mut Chunk)| {
        let mut chunk = chunk(3, b"xyz", false);
        change(&mut chunk);
        Piece::plain(chunk, 100, 3, Compressor::None)
    };
    let cases = [
        ("twice", vec![raw(1, 0), raw(1, 3)]),
        ("index", vec![raw(5, 0)]),
        ("behind the blob", vec![raw(1, 9_998)]),
        ("encoded overlap", vec![raw(1, 0), raw(2, 2)]),
        ("encoded order", vec![raw(1, 9), raw(2, 0)]),
        ("decoded overlap", vec![raw(1, 0), with(|chunk| chunk.decoded_offset = 4097)]),
        ("empty", vec![with(|chunk| chunk.decoded_len = 0)]),
        ("raw with another size", vec![with(|chunk| chunk.decoded_len = 4)]),
        ("compressed by nothing", vec![with(|chunk| chunk.compressed = true)]),
        ("encoded overflow", vec![raw(1, u64::MAX)]),
        ("decoded overflow", vec![with(|chunk| chunk.decoded_offset = u64::MAX - 1)]),
    ];
    for (name, pieces) in cases {
        assert!(table(pieces).is_err(), "{name}");
    }
}

#[test]
fn the_fingerprint_depends_on_every_field() {
    let base = chunk(1, b"xyz", true);
    let changed = [
        Piece::plain(base, 1, 2, Compressor::Zstd),
        Piece::plain(base, 0, 1, Compressor::Zstd),
        Piece::plain(base, 0, 2, Compressor::Lz4),
        Piece::plain(Chunk { index: 2, ..base }, 0, 2, Compressor::Zstd),
        Piece::plain(Chunk { decoded_offset: 0, ..base }, 0, 2, Compressor::Zstd),
        Piece::plain(Chunk { decoded_len: 4, ..base }, 0, 2, Compressor::Zstd),
        Piece::plain(Chunk { compressed: false, ..base }, 0, 2, Compressor::Zstd),
        Piece::plain(Chunk { digest: digest(Algorithm::Blake3, b"other"), ..base }, 0, 2, Compressor::Zstd),
        Piece::plain(
            Chunk { digest: Digest { algorithm: Algorithm::Sha256, ..base.digest }, ..base },
            0,
            2,
            Compressor::Zstd,
        ),
        Piece::plain(base, 0, 2, Compressor::Zstd),
    ];
    let distinct: std::collections::BTreeSet<_> = changed.iter().map(Piece::fingerprint).collect();
    assert_eq!(distinct.len(), changed.len());
}
