//! What lies behind the chunk data of a blob made for registries: files with their tar headers *behind* them, so the way
//! leads backwards from the end.
//!
//! ```text
//! chunk data            [header "image.blob"]
//! chunk table, header   [header "blob.meta"]
//! digest array          [header "blob.digest"]      with a table of contents
//! bootstrap             [header "image.boot"]       if it is inside the blob
//! table of contents     [header "rafs.blob.toc"]
//! ```

use std::io;
use std::ops::Range;

use super::{ChunkTableError, invalid};

/// Most files in a blob.
const MAX_MEMBERS: usize = 8;
/// Bytes of a tar header.
pub(crate) const TAR_HEADER: u64 = 512;

/// A file in a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name in its tar header.
    pub name: String,
    /// Its bytes in the blob. The header of 512 bytes follows them.
    pub range: Range<u64>,
}

/// Reads from a blob: fills the buffer with the bytes from an offset on, or fails.
pub(crate) trait ReadAt {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, offset)
    }
}

impl ReadAt for &[u8] {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|start| self.get(start..)?.get(..buffer.len()));
        buffer.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// The files at the end of a blob of `size` bytes, the last one first; none where the blob does not end with a tar header.
pub(crate) fn members(blob: &impl ReadAt, size: u64) -> io::Result<Vec<Member>> {
    let (mut members, mut end) = (Vec::new(), size);
    while let Some(start) = end.checked_sub(TAR_HEADER).filter(|_| members.len() < MAX_MEMBERS) {
        let mut block = [0; TAR_HEADER as usize];
        blob.read_exact_at(&mut block, start)?;
        let header = tar::Header::from_byte_slice(&block);
        if header.as_gnu().is_none() || !checksum_matches(header) {
            break;
        }
        let Some(previous) = header.entry_size().ok().and_then(|len| start.checked_sub(len)) else { break };
        let name = String::from_utf8_lossy(&header.path_bytes()).into_owned();
        members.push(Member { name, range: previous..start });
        end = previous;
    }
    Ok(members)
}

/// The header of a member of `size` bytes: GNU, without mode, owner and time, as other builders write it.
///
/// # Errors
/// A name that does not fit; none of ours is that long.
pub(crate) fn tar_header(name: &str, size: u64) -> io::Result<[u8; TAR_HEADER as usize]> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_size(size);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    Ok(*header.as_bytes())
}

/// Whether a tar header is one.
pub(crate) fn checksum_matches(header: &tar::Header) -> bool {
    let mut copy = header.clone();
    copy.set_cksum();
    copy.cksum().ok().zip(header.cksum().ok()).is_some_and(|(expected, found)| expected == found)
}

/// The bytes of a member, which are at most `limit`.
pub(crate) fn content(
    blob: &impl ReadAt,
    range: &Range<u64>,
    what: &'static str,
    limit: u64,
) -> Result<Vec<u8>, ChunkTableError> {
    let len = range.end.saturating_sub(range.start);
    if len > limit {
        return Err(invalid(what, format!("{len} bytes, at most {limit} are read")));
    }
    let mut bytes = vec![0; len as usize];
    let read = blob.read_exact_at(&mut bytes, range.start);
    read.map_err(|error| invalid(what, format!("its {len} bytes at {} cannot be read: {error}", range.start)))?;
    Ok(bytes)
}
