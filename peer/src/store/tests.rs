use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};
use shoal_proto::{Algorithm, BlobId, DecodedId, Digest, ObjectId};
use shoal_rafs::{Chunk, Compressor, InflateContext, Piece, PieceTable};

use super::*;

mod eviction;
mod files;
mod model;
mod power;

/// Encoded bytes of every piece here: not a multiple of what the crashing disk writes at once.
const PIECE: u32 = 21;

/// The flusher never gets to run.
fn manual() -> StoreOptions {
    StoreOptions { flush_interval: Duration::from_secs(3600), ..StoreOptions::default() }
}

fn content(piece: u32, seed: u8) -> Vec<u8> {
    (0..PIECE).map(|at| (at * 31 + piece * 7) as u8 ^ seed).collect()
}

fn digest(bytes: &[u8]) -> Digest {
    Digest { algorithm: Algorithm::Sha256, bytes: Sha256::digest(bytes).into() }
}

fn piece_at(index: u32, seed: u8, encoded_offset: u64) -> Piece {
    let decoded_offset = u64::from(index) * 4096;
    let digest = digest(&content(index, seed));
    let chunk = Chunk { index, digest, decoded_offset, decoded_len: PIECE, compressed: false };
    Piece::plain(chunk, encoded_offset, PIECE, Compressor::None)
}

fn table_of(blob: u8, len: u32, pieces: Vec<Piece>) -> Arc<PieceTable> {
    let size = u64::from(len) * u64::from(PIECE) * 2;
    Arc::new(PieceTable::new(BlobId::new([blob; 32]), size, len, pieces).unwrap())
}

/// A table of `len` pieces that names those given, each with content made from its seed.
fn table(blob: u8, len: u32, pieces: &[(u32, u8)]) -> Arc<PieceTable> {
    let place = |index: u32| u64::from(index) * u64::from(PIECE);
    table_of(blob, len, pieces.iter().map(|&(index, seed)| piece_at(index, seed, place(index))).collect())
}

/// The content that a table's digest stands for.
fn bytes_of(table: &PieceTable, piece: u32) -> Vec<u8> {
    let wanted = table.piece(piece).unwrap().chunks()[0].digest;
    (0..=u8::MAX).map(|seed| content(piece, seed)).find(|bytes| digest(bytes) == wanted).unwrap()
}

/// Asserts that every piece that is present and that the handle's image names verifies.
fn assert_all_present_verify(handle: &BlobHandle) {
    for piece in handle.present().iter().filter(|&piece| handle.table().piece(piece).is_some()) {
        let bytes = handle.read(piece).unwrap().unwrap_or_else(|| panic!("piece {piece} is present but not there"));
        handle.table().decode(piece, &bytes).unwrap();
    }
}
