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

/// What docs/mounts.md says of the memory for chunks goes by this.
#[test]
fn a_piece_of_one_chunk_has_nothing_beside_it() {
    assert!(size_of::<Piece>() <= 176, "{} bytes", size_of::<Piece>());
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

/// Other builders encrypt what was compressed to less than a block, which grows by that.
#[test]
fn short_units_of_encrypted_blobs_are_decoded() {
    let mut key = [3; 32];
    key[0] = 4;
    let cipher = Cipher::new(crate::cipher::CipherKey::new(key, [5; 16]).unwrap());
    for (plain, compressor) in [
        (vec![7; 17], Compressor::Lz4),
        (vec![7; 16], Compressor::Lz4),
        (vec![7; 18], Compressor::Lz4),
        (vec![7; 5], Compressor::None),
        (vec![7; 18], Compressor::None),
    ] {
        let encoded = Encoder::new(compressor).unwrap().encode(&plain).unwrap();
        let compressed = encoded.is_some();
        assert_eq!(compressed, compressor == Compressor::Lz4);
        let mut stored = encoded.unwrap_or_else(|| plain.clone());
        cipher.seal(&mut stored);
        assert_eq!(stored.len(), 18);
        let of = |len, cipher| Piece::plain(chunk(2, &plain, compressed), 7, len, compressor).encrypted(cipher);
        let right = table(vec![of(18, Some(&cipher))]).unwrap();
        assert_eq!(right.decode(2, &stored).unwrap().chunk(2).unwrap(), plain, "{compressor} {}", plain.len());
        stored[3] ^= 1;
        assert!(right.decode(2, &stored).is_err());
        assert!(table(vec![of(19, Some(&cipher))]).is_err());
        assert!(plain.len() == 18 || table(vec![of(18, None)]).is_err());
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
        ("no member", vec![batch(0, 100, 100, &[])]),
        ("member behind its batch", vec![batch(0, 6, 6, &[(1, 4)])]),
        ("members overlap", vec![batch(0, 6, 6, &[(1, 0), (2, 2)])]),
        ("members out of order", vec![batch(0, 6, 6, &[(2, 0), (1, 3)])]),
        ("chunk in two pieces", vec![batch(0, 6, 6, &[(1, 0)]), batch(1, 6, 6, &[(1, 0)])]),
        ("batch larger than a chunk", vec![batch(0, 6, (1 << 24) + 1, &[(1, 0)])]),
        ("batch larger encoded", vec![batch(0, 7, 6, &[(1, 0)])]),
        ("empty batch", vec![batch(0, 0, 6, &[(1, 0)])]),
    ];
    for (name, pieces) in cases {
        assert!(table(pieces).is_err(), "{name}");
    }
}

/// A batch at the start of the blob whose members, by index and offset, are all `xyz`.
fn batch(number: u32, encoded_len: u32, decoded_len: u32, members: &[(u32, u32)]) -> Piece {
    let compressed = encoded_len != decoded_len;
    let members = members.iter().map(|(index, offset)| (chunk(*index, b"xyz", compressed), *offset));
    Piece::batch(number, 0, Batch { encoded_len, decoded_len }, Compressor::Zstd, members.collect())
}

#[test]
fn of_a_batch_only_named_chunks_come_out_and_each_is_verified() {
    let table = table(vec![batch(3, 9, 9, &[(2, 0), (4, 6)])]).unwrap();
    assert_eq!([1, 2, 3, 4, 5].map(|index| table.piece_of_chunk(index)), [None, Some(3), None, Some(3), None]);
    assert_eq!((table.piece(2), table.chunk(3), table.chunk(4).unwrap().index), (None, None, 4));
    let decoded = table.decode(3, b"xyz???xyz").unwrap();
    assert_eq!([2, 3, 4].map(|index| decoded.chunk(index)), [Some("xyz".into()), None, Some("xyz".into())]);
    assert_eq!(decoded.decoded_len(), 9);
    assert!(matches!(table.decode(3, b"xyz???xyZ"), Err(VerifyError::Digest { chunk: 4, .. })));
    assert!(matches!(table.decode(3, b"xyzxyz"), Err(VerifyError::EncodedLength { .. })));
    let plain = b"xyz".repeat(100);
    let packed = Encoder::new(Compressor::Zstd).unwrap().encode(&plain).unwrap().unwrap();
    let table = self::table(vec![batch(0, packed.len() as u32, 300, &[(1, 297)])]).unwrap();
    assert_eq!(table.decode(0, &packed).unwrap().chunk(1).unwrap(), "xyz");
}

#[test]
fn the_fingerprint_of_a_batch_depends_on_what_is_named_of_it() {
    let batches = [
        batch(0, 9, 9, &[(1, 0)]),
        batch(0, 9, 9, &[(1, 0), (2, 3)]),
        batch(0, 9, 9, &[(1, 3)]),
        batch(0, 10, 10, &[(1, 0)]),
        batch(0, 9, 10, &[(1, 0)]),
        Piece::plain(chunk(1, b"xyz", false), 0, 9, Compressor::Zstd),
    ];
    let distinct: std::collections::BTreeSet<_> = batches.iter().map(Piece::fingerprint).collect();
    assert_eq!(distinct.len(), batches.len());
    // The number is a name, not a property.
    assert_eq!(batch(0, 9, 9, &[(1, 0)]).fingerprint(), batch(7, 9, 9, &[(1, 0)]).fingerprint());
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
