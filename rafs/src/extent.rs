//! From a range of a file to slices of chunks. Pure.

use std::ops::Range;

use crate::bootstrap::Inode;
use crate::source::ChunkId;

/// A run of bytes within one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The chunk.
    pub chunk: ChunkId,
    /// First byte in the decoded chunk.
    pub offset_in_chunk: u32,
    /// Bytes, at least 1.
    pub len: u32,
}

impl Extent {
    /// Its bytes in the decoded chunk.
    pub fn part(&self) -> Range<u32> {
        self.offset_in_chunk..self.offset_in_chunk + self.len
    }
}

/// The extents of `len` bytes of a file from `offset` on, in order and without gaps. What lies behind the end of the
/// file is left out, so the extents may sum up to less than `len`. Nothing for an inode that is no regular file.
pub fn extents<'a>(inode: &Inode<'a>, offset: u64, len: u64) -> impl Iterator<Item = Extent> + use<'a> {
    let inode = *inode;
    let chunk_size = u64::from(inode.chunk_size());
    let end = offset.saturating_add(len).min(if inode.chunk_count() == 0 { 0 } else { inode.size() });
    let mut position = offset;
    std::iter::from_fn(move || {
        if position >= end {
            return None;
        }
        let chunk = inode.chunk(position / chunk_size)?;
        let offset_in_chunk = position % chunk_size;
        let len = (chunk_size - offset_in_chunk).min(end - position);
        position += len;
        Some(Extent { chunk: chunk.id, offset_in_chunk: offset_in_chunk as u32, len: len as u32 })
    })
}
