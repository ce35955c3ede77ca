//! The tar of an image whose chunks have no digests. All of it is hashed once, and its chunks on the way: if the tar has the
//! sha256 that the image names it by, what was in the chunks is what the image means, and their digests verify every later
//! read, as the disk may lie then.
//!
//! It takes one pass over the tar when the image is opened. A tar under any other name, such as that of the compressed layer
//! which it came from, cannot be told from a forged one and is not read.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest as _, Sha256};
use shoal_proto::{BlobId, Digest};

use super::BlobDirError;
use crate::bootstrap::Bootstrap;
use crate::codec;
use crate::piece::PieceTable;

/// Bytes that are read at once of what is in no chunk.
const BUFFER: usize = 1 << 20;

/// The pieces of the blob at this position in the blob table, by its file at `path`.
pub(super) fn pieces(bootstrap: &Bootstrap, blob: u32, file: &File, path: &Path) -> Result<PieceTable, BlobDirError> {
    let described = &bootstrap.blobs()[blob as usize];
    let hashed = hash(file, bootstrap, blob);
    let (found, digests) = hashed.map_err(|source| BlobDirError::Tar { path: path.to_owned(), source })?;
    if found != described.id {
        let (path, expected) = (path.to_owned(), described.id);
        return Err(BlobDirError::OtherTar { path, expected, found });
    }
    let table = bootstrap.tar_pieces(blob, digests.into_iter());
    table.map_err(|source| BlobDirError::Pieces { path: path.to_owned(), source })
}

/// The sha256 of a tar, and the digests of its chunks in their order.
fn hash(mut file: &File, bootstrap: &Bootstrap, blob: u32) -> io::Result<(BlobId, Vec<Digest>)> {
    let (mut hasher, mut position) = (Sha256::new(), 0);
    let (mut buffer, mut digests) = (vec![0; BUFFER], Vec::new());
    // The bootstrap was verified: they lie in order and apart.
    for chunk in bootstrap.chunks(blob) {
        let mut gap = chunk.decoded_offset - position;
        while gap > 0 {
            let part = &mut buffer[..gap.min(BUFFER as u64) as usize];
            file.read_exact(part)?;
            hasher.update(&*part);
            gap -= part.len() as u64;
        }
        let len = chunk.decoded_len as usize;
        buffer.resize(buffer.len().max(len), 0);
        file.read_exact(&mut buffer[..len])?;
        hasher.update(&buffer[..len]);
        digests.push(codec::digest(chunk.digest.algorithm, &buffer[..len]));
        position = chunk.decoded_offset + u64::from(chunk.decoded_len);
    }
    loop {
        let len = file.read(&mut buffer)?;
        if len == 0 {
            return Ok((BlobId::new(hasher.finalize().into()), digests));
        }
        hasher.update(&buffer[..len]);
    }
}
