//! The decoded form of a blob: every chunk at its place in the decoded address space.
//!
//! The kernel's EROFS driver takes bootstrap and expanded blobs (`device=`, in table order) and mounts the image without
//! a daemon. Stored blobs do not serve for that, not even uncompressed ones: their chunks are packed without alignment.

use std::borrow::Borrow;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::blob_dir::{BlobDirReader, PieceId};
use crate::bootstrap::Bootstrap;
use crate::codec;
use crate::piece::{DecodedPiece, PieceTable, VerifyError};
use crate::source::ChunkError;

/// Why a blob could not be expanded.
#[derive(Debug, thiserror::Error)]
pub enum ExpandError {
    /// The image has no such blob.
    #[error("the image has no blob {blob}")]
    UnknownBlob {
        /// What was asked for.
        blob: u32,
    },
    /// A chunk could not be read or is not what the image names.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The output could not be written.
    #[error("cannot write the expanded blob")]
    Write(#[from] io::Error),
}

/// Writes every chunk of a blob that the image names to its decoded offset; the file is sparse elsewhere. `blob` is a
/// position in the blob table.
pub fn expand_blob(
    bootstrap: &Bootstrap,
    reader: &BlobDirReader,
    blob: u32,
    output: &File,
) -> Result<(), ExpandError> {
    let described = bootstrap.blobs().get(blob as usize).ok_or(ExpandError::UnknownBlob { blob })?;
    output.set_len(described.decoded_size)?;
    write_blob(reader, blob, output, 0)
}

/// Writes the [decoded form](PieceTable::decoded_form_len) of a blob to an empty file. `piece` gives each piece that the
/// table names, decoded by this table, in order; its first error ends it.
///
/// # Errors
/// Those of `piece`, and what the disk says.
pub fn expand_pieces<E: From<io::Error>, P: Borrow<DecodedPiece>>(
    table: &PieceTable,
    piece: impl FnMut(u32) -> Result<P, E>,
    output: &File,
) -> Result<(), E> {
    output.set_len(table.decoded_form_len())?;
    write_pieces(table, piece, output, 0)
}

/// Verifies a decoded form that was written by this table, with the digest of every chunk.
///
/// # Errors
/// [`VerifyError::Digest`] for the first chunk that has changed, and what the disk says, in an [`io::Error`].
pub fn check_expanded(table: &PieceTable, file: &File) -> io::Result<()> {
    let mut bytes = Vec::new();
    for chunk in table.pieces().flat_map(|(_, piece)| piece.chunks()) {
        bytes.resize(chunk.decoded_len as usize, 0);
        file.read_exact_at(&mut bytes, chunk.decoded_offset)?;
        let (blob, expected) = (table.blob(), chunk.digest);
        let found = codec::digest(expected.algorithm, &bytes);
        if found != expected {
            return Err(io::Error::other(VerifyError::Digest { blob, chunk: chunk.index, expected, found }));
        }
    }
    Ok(())
}

/// Writes the decoded chunks of a blob from `start` of a file on; says nothing about its length.
pub(crate) fn write_blob(reader: &BlobDirReader, blob: u32, output: &File, start: u64) -> Result<(), ExpandError> {
    let table = reader.table(blob).ok_or(ExpandError::UnknownBlob { blob })?;
    write_pieces(table, |piece| Ok(reader.piece(PieceId { blob, piece })?), output, start)
}

fn write_pieces<E: From<io::Error>, P: Borrow<DecodedPiece>>(
    table: &PieceTable,
    mut piece: impl FnMut(u32) -> Result<P, E>,
    output: &File,
    start: u64,
) -> Result<(), E> {
    for (number, described) in table.pieces() {
        let decoded = piece(number)?;
        for (chunk, (_, bytes)) in described.chunks().iter().zip(decoded.borrow().chunks()) {
            output.write_all_at(bytes, start + chunk.decoded_offset)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use shoal_proto::{Algorithm, BlobId};

    use super::*;
    use crate::codec::Compressor;
    use crate::piece::{Chunk, Piece};

    const PLACES: [(u64, u32); 3] = [(0, 4096), (8192, 100), (0x1_0000, 5000)];

    fn content(number: usize) -> Vec<u8> {
        (0..PLACES[number].1).map(|at| (at as usize * 31 + number) as u8).collect()
    }

    fn table() -> PieceTable {
        let pieces = PLACES.iter().enumerate().map(|(number, &(decoded_offset, decoded_len))| {
            let digest = codec::digest(Algorithm::Blake3, &content(number));
            let chunk = Chunk { index: number as u32, digest, decoded_offset, decoded_len, compressed: false };
            Piece::plain(chunk, 0x1_0000 * number as u64, decoded_len, Compressor::None)
        });
        PieceTable::new(BlobId::new([1; 32]), 0x10_0000, 3, pieces.collect()).unwrap()
    }

    #[test]
    fn chunks_lie_where_the_image_says_and_a_change_of_one_is_found() {
        let (table, file) = (table(), tempfile::tempfile().unwrap());
        let decoded = |number: u32| table.decode(number, &content(number as usize)).map_err(io::Error::other);
        expand_pieces(&table, decoded, &file).unwrap();
        assert_eq!((table.decoded_form_len(), table.decoded_form_bytes()), (0x1_2000, 4096 + 4096 + 8192));
        assert_eq!(file.metadata().unwrap().len(), table.decoded_form_len());
        check_expanded(&table, &file).unwrap();
        file.write_all_at(b"?", 8192 + 99).unwrap();
        let found = check_expanded(&table, &file).unwrap_err().to_string();
        assert!(found.contains("chunk 1 of blob"), "{found}");
    }

    #[test]
    fn what_cannot_be_decoded_ends_it() {
        let (table, file) = (table(), tempfile::tempfile().unwrap());
        let decoded = |number: u32| match number {
            0 => table.decode(0, &content(0)).map_err(io::Error::other),
            _ => Err(io::ErrorKind::NotFound.into()),
        };
        assert_eq!(expand_pieces(&table, decoded, &file).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
