//! Reads of what is on the disk decoded: nothing has to be decoded for them, nor held in memory, so a read of a page costs a page.
//!
//! That is so once a decoded form of the blob is [whole](crate::store), which [graduation](crate::mounts) makes of a complete image
//! that is mounted over FUSE. Its bytes were verified when they were written, and are trusted from then on, as the kernel trusts
//! them in a native mount. What cannot be read of one is read of the store.

use std::{fs::File, ops::Range, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use shoal_proto::DecodedId;
use shoal_rafs::PieceTable;

use crate::store::{Store, read_at_once};

/// A part of a chunk in a decoded form.
pub(super) struct Place {
    form: Arc<File>,
    offset: u64,
    len: usize,
}

impl Place {
    /// Where a part of a chunk is, if the form is there. Of a chunk that ends before the part does, up to its end.
    pub(super) fn find(
        store: &Store,
        id: DecodedId,
        table: &PieceTable,
        chunk_index: u32,
        part: &Range<u32>,
    ) -> Option<Self> {
        let form = store.decoded_file(id)?;
        let chunk = table.chunk(chunk_index)?;
        let [start, end] = [part.start, part.end].map(|at| at.min(chunk.decoded_len));
        let len = end.saturating_sub(start) as usize;
        Some(Self { form, offset: chunk.decoded_offset + u64::from(start), len })
    }

    /// Its bytes, if they are in the page cache.
    pub(super) fn at_once(&self) -> Option<Bytes> {
        read_at_once(&self.form, self.offset, self.len).ok().flatten().map(Bytes::from)
    }

    /// Its bytes, unless the disk has lost them. Blocks.
    pub(super) fn read(&self) -> Option<Bytes> {
        let mut bytes = vec![0; self.len];
        self.form.read_exact_at(&mut bytes, self.offset).ok().map(|()| bytes.into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::{Digest as _, Sha256};
    use shoal_proto::{Algorithm, BlobId, Digest};
    use shoal_rafs::{Chunk, Compressor, Piece, expand_pieces};

    use super::*;
    use crate::{native::NativeError, store::StoreOptions};

    /// A blob of raw chunks of these lengths, each at a block of its own, and their bytes.
    fn blob(lens: &[u32]) -> (PieceTable, Vec<Vec<u8>>) {
        let (mut pieces, mut contents, mut encoded, mut decoded) = (Vec::new(), Vec::new(), 0, 0);
        for (index, &len) in (0..).zip(lens) {
            let content: Vec<u8> = (0..len).map(|at| (at / 3 + 7 * index) as u8).collect();
            let digest = Digest { algorithm: Algorithm::Sha256, bytes: Sha256::digest(&content).into() };
            let chunk = Chunk { index, digest, decoded_offset: decoded, decoded_len: len, compressed: false };
            pieces.push(Piece::plain(chunk, encoded, len, Compressor::None));
            encoded += u64::from(len);
            decoded += u64::from(len).next_multiple_of(4096);
            contents.push(content);
        }
        let table = PieceTable::new(BlobId::new([1; 32]), encoded, lens.len() as u32, pieces).unwrap();
        (table, contents)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        /// The model: slices of what the chunks are.
        #[test]
        fn parts_are_slices_of_chunks_as_long_as_the_form_is_kept(
            lens in prop::collection::vec(1u32..10_000, 1..6),
            reads in prop::collection::vec((0u32..8, 0u32..12_000, 0u32..12_000), 1..40),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(folder.path(), StoreOptions::default()).unwrap();
            let (table, contents) = blob(&lens);
            let id = table.decoded_id();
            let place = |index, part: &Range<u32>| Place::find(&store, id, &table, index, part);
            prop_assert!(place(0, &(0..1)).is_none());
            let decode = |piece| Ok::<_, NativeError>(table.decode(piece, &contents[piece as usize]).unwrap());
            store.put_decoded(id, table.decoded_form_bytes(), |file| expand_pieces(&table, decode, file)).unwrap();
            for (index, start, len) in reads {
                let part = start..start + len;
                let Some(place) = place(index, &part) else {
                    prop_assert!(index as usize >= lens.len());
                    continue;
                };
                let content = &contents[index as usize];
                let [start, end] = [part.start, part.end].map(|at| (at as usize).min(content.len()));
                prop_assert_eq!(&place.read().unwrap()[..], &content[start..end]);
                prop_assert!(place.at_once().is_none_or(|bytes| bytes[..] == content[start..end]));
            }
            store.drop_decoded(id).unwrap();
            prop_assert!(place(0, &(0..1)).is_none());
        }
    }

    #[test]
    fn a_form_that_lost_its_end_gives_nothing_behind_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), StoreOptions::default()).unwrap();
        let (table, contents) = blob(&[5000, 5000]);
        let id = table.decoded_id();
        let decode = |piece| Ok::<_, NativeError>(table.decode(piece, &contents[piece as usize]).unwrap());
        store.put_decoded(id, table.decoded_form_bytes(), |file| expand_pieces(&table, decode, file)).unwrap();
        File::options().write(true).open(store.decoded(id).unwrap()).unwrap().set_len(8192).unwrap();
        let read = |index| Place::find(&store, id, &table, index, &(0..5000)).unwrap().read();
        assert!(read(0).unwrap() == contents[0] && read(1).is_none());
    }
}
