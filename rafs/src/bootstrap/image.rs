//! The bytes of a bootstrap with what is needed to read inodes in them.

use bytes::Bytes;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::chunks::Chunks;
use super::error::At;
use super::{Blob, BootstrapError, Nid};
use crate::piece::Named;
use crate::source::ChunkId;

/// Decoded super blocks and tables next to the raw bytes. Says nothing yet about the tree.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) bytes: Bytes,
    /// Offset of nid 0.
    pub(super) meta_offset: u64,
    /// Bytes of a block.
    pub(super) block: u64,
    pub(super) chunk_size: u32,
    /// Owner of every inode, in images that do not store owners.
    pub(super) owners: Option<(u32, u32)>,
    pub(super) blobs: Vec<Blob>,
    pub(super) chunks: Chunks,
}

impl Image {
    pub(super) fn slice(&self, at: At, len: u64) -> Result<&[u8], BootstrapError> {
        slice(&self.bytes, at, len)
    }

    pub(super) fn view<T>(&self, at: At) -> Result<&T, BootstrapError>
    where
        T: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        view(&self.bytes, at)
    }

    /// A chunk that the image names.
    pub(super) fn chunk(&self, id: ChunkId) -> Option<Named> {
        let position = id.blob as usize;
        self.chunks.find(position, self.blobs.get(position)?, id.index)
    }

    /// Offset of an inode, or `None` where no file reaches.
    pub(super) fn inode_offset(&self, nid: Nid) -> Option<u64> {
        nid.0.checked_mul(32)?.checked_add(self.meta_offset).filter(|offset| *offset < self.bytes.len() as u64)
    }
}

/// Part of the file, or an error that says how far it would have reached.
pub(crate) fn slice(bytes: &[u8], at: At, len: u64) -> Result<&[u8], BootstrapError> {
    let size = bytes.len();
    usize::try_from(at.offset)
        .ok()
        .zip(usize::try_from(len).ok())
        .and_then(|(start, len)| bytes.get(start..start.checked_add(len)?))
        .ok_or_else(|| at.invalid(format!("its {len} bytes end behind the file of {size} bytes")))
}

/// One structure of the file.
pub(crate) fn view<T>(bytes: &[u8], at: At) -> Result<&T, BootstrapError>
where
    T: FromBytes + Immutable + KnownLayout + Unaligned,
{
    let part = slice(bytes, at, size_of::<T>() as u64)?;
    T::ref_from_bytes(part).map_err(|error| at.invalid(error.to_string()))
}
