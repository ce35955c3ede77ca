//! Keys and values of the index as bytes: the layout that the module above draws, and nothing else.

use shoal_proto::{Algorithm, BlobId, Digest, Fingerprint};

use super::{BlobKey, ChunkPlace, PieceRecord, VariantRecord};

pub(super) const BLOB_KEY: usize = 36;

pub(super) fn blob_key(key: BlobKey) -> [u8; BLOB_KEY] {
    let mut bytes = [0; BLOB_KEY];
    bytes[..32].copy_from_slice(key.blob.as_bytes());
    bytes[32..].copy_from_slice(&key.variant.to_be_bytes());
    bytes
}

pub(super) fn piece_key(key: BlobKey, piece: u32) -> [u8; BLOB_KEY + 4] {
    let mut bytes = [0; BLOB_KEY + 4];
    bytes[..BLOB_KEY].copy_from_slice(&blob_key(key));
    bytes[BLOB_KEY..].copy_from_slice(&piece.to_be_bytes());
    bytes
}

pub(super) fn digest_key(digest: &Digest) -> [u8; 33] {
    let mut bytes = [0; 33];
    bytes[0] = match digest.algorithm {
        Algorithm::Blake3 => 0,
        Algorithm::Sha256 => 1,
    };
    bytes[1..].copy_from_slice(&digest.bytes);
    bytes
}

pub(super) fn variant_value(record: &VariantRecord) -> Vec<u8> {
    [&record.pieces.to_be_bytes()[..], &record.last_use.to_be_bytes()].concat()
}

pub(super) fn piece_value(record: &PieceRecord) -> Vec<u8> {
    let (start, end) = (record.encoded.start.to_be_bytes(), record.encoded.end.to_be_bytes());
    [&[u8::from(record.durable)], &record.fingerprint.as_bytes()[..], &start, &end].concat()
}

pub(super) fn place_value(place: &ChunkPlace) -> Vec<u8> {
    let (piece, chunk) = (place.piece.to_be_bytes(), place.chunk.to_be_bytes());
    [&blob_key(place.key)[..], &piece, &chunk, place.fingerprint.as_bytes()].concat()
}

/// Takes values off the front of a record; every parser below ends with `finish`, so no record may be longer.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_be_bytes)
    }

    fn blob_key(&mut self) -> Option<BlobKey> {
        Some(BlobKey { blob: BlobId::new(self.take()?), variant: self.u32()? })
    }

    fn fingerprint(&mut self) -> Option<Fingerprint> {
        self.take().map(Fingerprint::new)
    }

    fn finish<T>(self, value: T) -> Option<T> {
        self.0.is_empty().then_some(value)
    }
}

pub(super) fn parse_blob_key(bytes: &[u8]) -> Option<BlobKey> {
    let mut fields = Fields(bytes);
    let key = fields.blob_key()?;
    fields.finish(key)
}

pub(super) fn parse_piece_key(bytes: &[u8]) -> Option<(BlobKey, u32)> {
    let mut fields = Fields(bytes);
    let key = (fields.blob_key()?, fields.u32()?);
    fields.finish(key)
}

pub(super) fn parse_variant(bytes: &[u8]) -> Option<VariantRecord> {
    let mut fields = Fields(bytes);
    let record = VariantRecord { pieces: fields.u32()?, last_use: fields.u64()? };
    fields.finish(record)
}

pub(super) fn parse_piece(bytes: &[u8]) -> Option<PieceRecord> {
    let mut fields = Fields(bytes);
    let durable = match fields.take()? {
        [0] => false,
        [1] => true,
        _ => return None,
    };
    let fingerprint = fields.fingerprint()?;
    let encoded = fields.u64()?..fields.u64()?;
    (encoded.start <= encoded.end).then_some(())?;
    fields.finish(PieceRecord { fingerprint, encoded, durable })
}

pub(super) fn parse_place(bytes: &[u8]) -> Option<ChunkPlace> {
    let mut fields = Fields(bytes);
    let key = fields.blob_key()?;
    let place = ChunkPlace { key, piece: fields.u32()?, chunk: fields.u32()?, fingerprint: fields.fingerprint()? };
    fields.finish(place)
}
