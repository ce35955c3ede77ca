//! RAFS v5 on disk: what is read of it, little-endian. Everything starts at a multiple of 8.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// The first four bytes.
pub(super) const MAGIC: u32 = 0x5241_4653;
/// The version of all images that are called v5.
pub(super) const VERSION: u32 = 0x500;
/// Bytes of the super block.
pub(super) const SUPER_BLOCK: u32 = 8192;
/// Unit of the inode table.
pub(super) const UNIT: u64 = 8;

/// Bit of [`InodeRecord::flags`]: there are xattrs.
pub(super) const HAS_XATTRS: u64 = 0x4;

/// The used part of the super block.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct SuperBlock {
    /// 0..4: [`MAGIC`].
    pub(super) magic: U32,
    /// 4..8: [`VERSION`].
    pub(super) version: U32,
    /// 8..12: [`SUPER_BLOCK`].
    pub(super) size: U32,
    /// 12..16: chunk size, a power of two.
    pub(super) chunk_size: U32,
    /// 16..24: as in RAFS v6, see [`flags`](crate::layout::flags).
    pub(super) flags: U64,
    /// 24..32: distinct inodes.
    pub(super) inodes: U64,
    /// 32..40: offset of the inode table, a `u32` for each name: offset of its record / 8.
    pub(super) inode_table: U64,
    /// 40..48: offset of the prefetch table.
    pub(super) prefetch_table: U64,
    /// 48..56: offset of the blob table.
    pub(super) blob_table: U64,
    /// 56..60: entries of the inode table.
    pub(super) names: U32,
    /// 60..64: entries of the prefetch table.
    pub(super) prefetch_entries: U32,
    /// 64..68: bytes of the blob table.
    pub(super) blob_table_size: U32,
    /// 68..72: entries of the extended blob table; 0 in old images.
    pub(super) blob_sizes: U32,
    /// 72..80: its offset.
    pub(super) blob_sizes_offset: U64,
}

/// Entry of the extended blob table, 64 bytes.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct BlobSizes {
    /// 0..4: chunks of the whole blob.
    pub(super) chunks: U32,
    /// 4..8: feature bits.
    pub(super) features: U32,
    /// 8..16: decoded bytes.
    pub(super) decoded: U64,
    /// 16..24: stored bytes.
    pub(super) encoded: U64,
    /// 24..64: 0.
    pub(super) reserved: [u8; 40],
}

/// One name and what it leads to, 128 bytes. Name, target of a link, xattrs (their size, 8 bytes, then for each a size of 4
/// bytes, name, NUL, value) and chunk records follow, each padded to 8.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct InodeRecord {
    /// 0..32: digest of the digests of chunks or of children, of a link's target, or of nothing.
    pub(super) digest: [u8; 32],
    /// 32..40: number of the directory.
    pub(super) parent: U64,
    /// 40..48: number; that of the first name for further ones of a file.
    pub(super) ino: U64,
    /// 48..52: owner.
    pub(super) uid: U32,
    /// 52..56: group.
    pub(super) gid: U32,
    /// 56..60: project.
    pub(super) project: U32,
    /// 60..64: type and permissions.
    pub(super) mode: U32,
    /// 64..72: size in bytes.
    pub(super) size: U64,
    /// 72..80: blocks of 512 bytes.
    pub(super) blocks: U64,
    /// 80..88: see [`HAS_XATTRS`].
    pub(super) flags: U64,
    /// 88..92: number of names.
    pub(super) nlink: U32,
    /// 92..96: number of the first child of a directory.
    pub(super) first_child: U32,
    /// 96..100: number of children, or of chunks.
    pub(super) children: U32,
    /// 100..102: bytes of the name.
    pub(super) name_len: U16,
    /// 102..104: bytes of the target of a link.
    pub(super) target_len: U16,
    /// 104..108: device number.
    pub(super) rdev: U32,
    /// 108..112: modification time, nanoseconds.
    pub(super) mtime_nsec: U32,
    /// 112..120: modification time, seconds.
    pub(super) mtime: U64,
    /// 120..128: 0.
    pub(super) reserved: [u8; 8],
}
