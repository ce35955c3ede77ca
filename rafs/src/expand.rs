//! The decoded form of a blob: every chunk at its place in the decoded address space.
//!
//! The kernel's EROFS driver takes bootstrap and expanded blobs (`device=`, in table order) and mounts the image without
//! a daemon. Stored blobs do not serve for that, not even uncompressed ones: their chunks are packed without alignment.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::blob_dir::{BlobDirReader, PieceId};
use crate::bootstrap::Bootstrap;
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

/// Writes the decoded chunks of a blob from `start` of a file on; says nothing about its length.
pub(crate) fn write_blob(reader: &BlobDirReader, blob: u32, output: &File, start: u64) -> Result<(), ExpandError> {
    let table = reader.table(blob).ok_or(ExpandError::UnknownBlob { blob })?;
    for (number, piece) in table.pieces() {
        let decoded = reader.piece(PieceId { blob, piece: number })?;
        for (chunk, (_, bytes)) in piece.chunks().iter().zip(decoded.chunks()) {
            output.write_all_at(bytes, start + chunk.decoded_offset)?;
        }
    }
    Ok(())
}
