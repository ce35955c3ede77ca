//! The bytes of a bootstrap with what is needed to read inodes in them.

use bytes::Bytes;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::chunks::Chunks;
use super::error::At;
use super::superblock::Header;
use super::windows::Windows;
use super::{Blob, BootstrapError, Nid};
use crate::blob::ChunkTable;
use crate::piece::{self, Named, PieceTable, PieceTableError};
use crate::source::ChunkId;

/// Where the bytes are.
#[derive(Debug)]
pub(super) enum Source {
    /// All of them in memory.
    Memory(Bytes),
    /// In a file, of which a look reads what it needs.
    File(Box<Windows>),
}

/// What inodes are read with. Says nothing yet about the tree.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) source: Source,
    /// Offset of nid 0.
    pub(super) meta_offset: u64,
    /// Bytes of a block.
    pub(super) block: u64,
    pub(super) chunk_size: u32,
    /// Owner of every inode, in images that do not store owners.
    pub(super) owners: Option<(u32, u32)>,
}

/// The decoded tables: what chunks there are, and where.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) blobs: Vec<Blob>,
    pub(super) chunks: Chunks,
}

impl Source {
    /// Bytes of the bootstrap.
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Memory(bytes) => bytes.len() as u64,
            Self::File(windows) => windows.size(),
        }
    }

    /// For another look.
    pub(super) fn again(&self) -> Self {
        match self {
            Self::Memory(bytes) => Self::Memory(bytes.clone()),
            Self::File(windows) => Self::File(Box::new(windows.again())),
        }
    }

    pub(super) fn slice(&self, at: At, len: u64) -> Result<&[u8], BootstrapError> {
        match self {
            Self::Memory(bytes) => slice(bytes, at, len),
            Self::File(windows) => {
                self.require(at, len)?;
                // It lies in a file that was opened here, and one this large cannot.
                let len = usize::try_from(len).map_err(|_| at.invalid(format!("its {len} bytes")))?;
                windows.slice(at, len)
            }
        }
    }

    pub(super) fn view<T>(&self, at: At) -> Result<&T, BootstrapError>
    where
        T: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        viewed(self.slice(at, size_of::<T>() as u64)?, at)
    }

    /// Whether `len` bytes lie there, without looking at them.
    pub(super) fn require(&self, at: At, len: u64) -> Result<(), BootstrapError> {
        let size = self.size();
        at.require(at.offset.checked_add(len).is_some_and(|end| end <= size), || beyond(len, size))
    }
}

impl Image {
    pub(super) fn new(source: Source, header: &Header) -> Self {
        let Header { block, meta_offset, chunk_size, .. } = *header;
        Self { source, meta_offset, block, chunk_size, owners: header.owners() }
    }

    pub(super) fn slice(&self, at: At, len: u64) -> Result<&[u8], BootstrapError> {
        self.source.slice(at, len)
    }

    pub(super) fn view<T>(&self, at: At) -> Result<&T, BootstrapError>
    where
        T: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        self.source.view(at)
    }

    /// Whether `len` bytes lie there, without looking at them.
    pub(super) fn require(&self, at: At, len: u64) -> Result<(), BootstrapError> {
        self.source.require(at, len)
    }

    /// Offset of an inode, or `None` where no file reaches.
    pub(super) fn inode_offset(&self, nid: Nid) -> Option<u64> {
        nid.0.checked_mul(32)?.checked_add(self.meta_offset).filter(|offset| *offset < self.source.size())
    }
}

impl Content {
    /// A chunk that the image names.
    pub(super) fn chunk(&self, id: ChunkId) -> Option<Named> {
        let position = id.blob as usize;
        self.chunks.find(position, self.blobs.get(position)?, id.index)
    }

    /// The chunks of a blob that the image names, by index.
    pub(super) fn named(&self, blob: u32) -> impl Iterator<Item = Named> {
        let described = self.blobs.get(blob as usize);
        described.into_iter().flat_map(move |described| self.chunks.of(blob as usize, described))
    }

    /// The pieces of a blob, of which there must be one at this position; `table` is its own chunk table.
    pub(super) fn piece_table(&self, blob: u32, table: Option<&ChunkTable>) -> Result<PieceTable, PieceTableError> {
        if !self.chunks.have_digests() {
            return Err(PieceTableError::NoDigests);
        }
        piece::group(&self.blobs[blob as usize], self.named(blob), table)
    }
}

/// Part of the file, or an error that says how far it would have reached.
pub(crate) fn slice(bytes: &[u8], at: At, len: u64) -> Result<&[u8], BootstrapError> {
    let size = bytes.len();
    usize::try_from(at.offset)
        .ok()
        .zip(usize::try_from(len).ok())
        .and_then(|(start, len)| bytes.get(start..start.checked_add(len)?))
        .ok_or_else(|| at.invalid(beyond(len, size as u64)))
}

fn beyond(len: u64, size: u64) -> String {
    format!("its {len} bytes end behind the file of {size} bytes")
}

/// One structure of the file.
pub(crate) fn view<T>(bytes: &[u8], at: At) -> Result<&T, BootstrapError>
where
    T: FromBytes + Immutable + KnownLayout + Unaligned,
{
    viewed(slice(bytes, at, size_of::<T>() as u64)?, at)
}

fn viewed<T>(part: &[u8], at: At) -> Result<&T, BootstrapError>
where
    T: FromBytes + Immutable + KnownLayout + Unaligned,
{
    T::ref_from_bytes(part).map_err(|error| at.invalid(error.to_string()))
}
