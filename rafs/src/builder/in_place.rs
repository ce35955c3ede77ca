//! Files of a tar that stays as it is: their chunks are found where they lie. Both kinds of index over a tar read so.

use std::cell::Cell;
use std::io::Read;
use std::path::Path;

use super::BuildError;
use super::tree::InodeIndex;
use crate::archive::{Archive, Member};

/// Reads the content of `member` in chunks of `chunk_size` bytes, each into `chunk`, for which `add` may put another buffer. Of
/// each, `add` is given the bytes, where the stream stood before them, and their offset in the file, and says what is noted of it.
///
/// # Errors
/// Those of `add`, and [`BuildError::Archive`], which names the entry.
pub(super) fn read_chunks<R: Read, P: Copy, T>(
    archive: &mut Archive<R>,
    member: &Member,
    (name, chunk_size): (&Path, u32),
    position: &Cell<P>,
    chunk: &mut Vec<u8>,
    mut add: impl FnMut(&mut Vec<u8>, P, u64) -> Result<T, BuildError>,
) -> Result<Vec<T>, BuildError> {
    let place = archive.place().to_owned();
    let mut noted = Vec::new();
    let mut content = archive.content(member);
    for offset in (0..member.size).step_by(chunk_size as usize) {
        chunk.resize((member.size - offset).min(chunk_size.into()) as usize, 0);
        let before = position.get();
        let read = content.read_exact(chunk);
        read.map_err(|error| BuildError::Archive {
            archive: name.to_owned(),
            source: Archive::<&[u8]>::read_error(&place, error),
        })?;
        noted.push(add(chunk, before, offset)?);
    }
    Ok(noted)
}

/// Notes the chunks of an inode among those of all.
pub(super) fn note<T>(all: &mut Vec<Vec<T>>, inode: InodeIndex, chunks: Vec<T>) {
    if all.len() <= inode {
        all.resize_with(inode + 1, Vec::new);
    }
    all[inode] = chunks;
}
