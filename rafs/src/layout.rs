//! RAFS v6 on disk: structures and constants, one comment per byte range.
//!
//! A bootstrap is an EROFS image that holds only metadata, plus tables of RAFS's own. Every structure here is a plain
//! view of bytes (`zerocopy`, little-endian, no alignment): nothing is checked by reading one. The rules are enforced in
//! [`bootstrap`](crate::bootstrap) and [`blob`](crate::blob), the order of the parts is decided in
//! [`builder`](crate::builder).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::cipher::{CipherKey, WeakKey};

/// The EROFS block, also the unit of block addresses and of the alignment of chunks in decoded blob space.
pub(crate) const BLOCK: u64 = 4096;
/// Base-2 logarithm of [`BLOCK`].
pub(crate) const BLOCK_BITS: u8 = 12;
/// The block of an image whose blobs are tars, as theirs; its tables are aligned to [`BLOCK`] all the same.
pub(crate) const TAR_BLOCK: u64 = 512;
/// Base-2 logarithm of [`TAR_BLOCK`].
pub(crate) const TAR_BLOCK_BITS: u8 = 9;

/// Where the EROFS super block starts.
pub(crate) const SUPER_OFFSET: u64 = 1024;
/// Where the extended super block starts.
pub(crate) const EXT_SUPER_OFFSET: u64 = 1152;
/// Where the device table starts: slot 11 of 128 bytes.
pub(crate) const DEVICE_TABLE_OFFSET: u64 = 1408;
/// The slot number of the device table.
pub(crate) const DEVICE_SLOT: u16 = 11;

/// Magic of the EROFS super block.
pub(crate) const SUPER_MAGIC: u32 = 0xE0F5_E1E2;
/// `feature_compat`: the mark of RAFS v6.
pub(crate) const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// `feature_incompat`: chunked files and a device table.
pub(crate) const INCOMPAT: u32 = 0x4 | 0x8;
/// Magic at both ends of the chunk table's header.
pub(crate) const CI_MAGIC: u32 = 0xB10B_B10B;

/// Most blobs that a chunk index can name: its blob field has a byte, 0 is the bootstrap itself.
pub(crate) const MAX_BLOBS: usize = 254;
/// Most chunks of a blob: the index has 24 bits and the last value stays unused.
pub(crate) const MAX_CHUNKS: u32 = 0xFF_FFFF;
/// Most bytes of a stored blob.
pub(crate) const MAX_ENCODED: u64 = 1 << 40;
/// Most bytes of a blob's decoded address space.
pub(crate) const MAX_DECODED: u64 = 1 << 44;
/// Smallest and largest chunk size.
pub(crate) const CHUNK_SIZES: std::ops::RangeInclusive<u32> = 0x1000..=0x100_0000;
/// Longest target of a symbolic link.
pub(crate) const MAX_TARGET: u64 = 4096;
/// Longest name of a directory entry.
pub(crate) const MAX_NAME: usize = 255;

/// What stands for the id of a blob in a bootstrap inside that blob.
pub(crate) const OWN_BLOB: [u8; 64] = [b'x'; 64];

/// The id of a blob as tables have it.
pub(crate) fn blob_id(id: shoal_proto::BlobId) -> [u8; 64] {
    let mut text = [0; 64];
    text.copy_from_slice(id.to_string().as_bytes());
    text
}

/// The number of a digest algorithm in the blob table.
pub(crate) fn digester(algorithm: shoal_proto::Algorithm) -> u32 {
    match algorithm {
        shoal_proto::Algorithm::Blake3 => 0,
        shoal_proto::Algorithm::Sha256 => 1,
    }
}

/// The number of the one cipher that blobs have.
pub(crate) const AES_128_XTS: u32 = 1;

/// Bits of [`ExtSuperBlock::flags`].
pub(crate) mod flags {
    pub(crate) const COMPRESSOR_NONE: u64 = 0x1;
    pub(crate) const COMPRESSOR_LZ4: u64 = 0x2;
    pub(crate) const DIGEST_BLAKE3: u64 = 0x4;
    pub(crate) const DIGEST_SHA256: u64 = 0x8;
    pub(crate) const EXPLICIT_OWNERS: u64 = 0x10;
    pub(crate) const HAS_XATTRS: u64 = 0x20;
    pub(crate) const COMPRESSOR_GZIP: u64 = 0x40;
    pub(crate) const COMPRESSOR_ZSTD: u64 = 0x80;
    pub(crate) const INLINED_DIGESTS: u64 = 0x100;
    pub(crate) const TARFS: u64 = 0x200;
    pub(crate) const ENCRYPTION_NONE: u64 = 0x0100_0000;
    pub(crate) const ENCRYPTION_AES: u64 = 0x0200_0000;
    /// Reserved for compatible additions; any of them may be set.
    pub(crate) const COMPATIBLE: u64 = 0xFC00_0000;
}

/// Bits of [`BlobEntry::features`] and [`CiHeader::features`].
pub(crate) mod features {
    pub(crate) const ALIGNED: u32 = 0x1;
    /// The bootstrap lies in the blob too.
    pub(crate) const INLINED_META: u32 = 0x2;
    pub(crate) const CHUNK_INFO_V2: u32 = 0x4;
    pub(crate) const ZRAN: u32 = 0x8;
    pub(crate) const SEPARATE: u32 = 0x10;
    /// The digests of its chunks lie in the blob, behind the chunk table.
    pub(crate) const INLINED_DIGESTS: u32 = 0x20;
    pub(crate) const TARFS: u32 = 0x40;
    pub(crate) const BATCH: u32 = 0x80;
    pub(crate) const ENCRYPTED: u32 = 0x100;
    pub(crate) const EXTERNAL: u32 = 0x800;
    pub(crate) const HAS_TAR_HEADER: u32 = 0x1000_0000;
    pub(crate) const HAS_TOC: u32 = 0x2000_0000;
    pub(crate) const CAP_TAR_TOC: u32 = 0x4000_0000;
    /// Must be clear on disk; in memory it marks blobs of RAFS v5.
    pub(crate) const INTERNAL: u32 = 0x8000_0000;
    /// Bits of the lower half that are defined at all; another one means a newer format.
    pub(crate) const KNOWN_INCOMPAT: u32 = 0xFFF;
}

/// Bits of [`ChunkRecord::flags`].
pub(crate) mod chunk_flags {
    pub(crate) const COMPRESSED: u32 = 0x1;
    pub(crate) const ENCRYPTED: u32 = 0x4;
    pub(crate) const BATCH: u32 = 0x8;
    pub(crate) const HAS_CRC: u32 = 0x10;
}

/// Inode data layouts, bits 1..3 of `format`.
pub(crate) mod data_layout {
    pub(crate) const PLAIN: u16 = 0;
    pub(crate) const INLINE: u16 = 2;
    pub(crate) const CHUNKED: u16 = 4;
}

/// Chunk header of a regular file (`u`): the file has chunk indexes rather than a block map.
pub(crate) const CHUNK_INDEXES: u32 = 0x20;

/// Bytes of a compact inode.
pub(crate) const COMPACT_INODE: u64 = 32;
/// Bytes of an extended inode.
pub(crate) const EXTENDED_INODE: u64 = 64;
/// Bytes of a directory entry without its name.
pub(crate) const DIRENT: u64 = 12;
/// Bytes of a chunk index.
pub(crate) const CHUNK_INDEX: u64 = 8;
/// Bytes before the first xattr entry.
pub(crate) const XATTR_HEADER: u64 = 12;
/// Bytes of the chunk table's header.
pub(crate) const CI_HEADER: u64 = 4096;

/// EROFS super block, 128 bytes at 1024.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct SuperBlock {
    /// 0..4: [`SUPER_MAGIC`].
    pub(crate) magic: U32,
    /// 4..8: 0, no checksum.
    pub(crate) checksum: U32,
    /// 8..12: [`COMPAT_RAFS_V6`] is set.
    pub(crate) feature_compat: U32,
    /// 12: log2 of the block size.
    pub(crate) block_bits: u8,
    /// 13: 0, no extension slots.
    pub(crate) ext_slots: u8,
    /// 14..16: nid of the root directory.
    pub(crate) root_nid: U16,
    /// 16..24: number of names, those of hard links counted each.
    pub(crate) inos: U64,
    /// 24..32: 0, build time.
    pub(crate) build_time: U64,
    /// 32..36: 0, its nanoseconds.
    pub(crate) build_time_nsec: U32,
    /// 36..40: sum of the devices' blocks.
    pub(crate) blocks: U32,
    /// 40..44: block where nid 0 would lie.
    pub(crate) meta_block: U32,
    /// 44..48: 0, no shared xattrs.
    pub(crate) xattr_block: U32,
    /// 48..64: 0.
    pub(crate) uuid: [u8; 16],
    /// 64..80: 0.
    pub(crate) volume_name: [u8; 16],
    /// 80..84: [`INCOMPAT`].
    pub(crate) feature_incompat: U32,
    /// 84..86: 0.
    pub(crate) u1: U16,
    /// 86..88: number of blobs.
    pub(crate) extra_devices: U16,
    /// 88..90: [`DEVICE_SLOT`].
    pub(crate) device_slot: U16,
    /// 90..128: 0.
    pub(crate) reserved: [u8; 38],
}

/// RAFS extended super block, 256 bytes at 1152.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ExtSuperBlock {
    /// 0..8: see [`flags`].
    pub(crate) flags: U64,
    /// 8..16: offset of the blob table.
    pub(crate) blob_table_offset: U64,
    /// 16..20: its size in bytes.
    pub(crate) blob_table_size: U32,
    /// 20..24: chunk size, a power of two.
    pub(crate) chunk_size: U32,
    /// 24..32: offset of the chunk table.
    pub(crate) chunk_table_offset: U64,
    /// 32..40: its size in bytes.
    pub(crate) chunk_table_size: U64,
    /// 40..48: offset of the prefetch table, 0 for none.
    pub(crate) prefetch_offset: U64,
    /// 48..52: its size in bytes.
    pub(crate) prefetch_size: U32,
    /// 52..56: 0.
    pub(crate) padding: U32,
    /// 56..256: 0.
    pub(crate) reserved: [u8; 200],
}

/// One slot of the device table, 128 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct DeviceSlot {
    /// 0..64: blob id in hexadecimal.
    pub(crate) blob_id: [u8; 64],
    /// 64..68: decoded size in blocks.
    pub(crate) blocks: U32,
    /// 68..72: block address on a flat device.
    pub(crate) mapped_block: U32,
    /// 72..128: 0.
    pub(crate) reserved: [u8; 56],
}

/// One entry of the blob table, 256 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct BlobEntry {
    /// 0..64: blob id in hexadecimal.
    pub(crate) blob_id: [u8; 64],
    /// 64..68: position in the table.
    pub(crate) index: U32,
    /// 68..72: chunk size, that of the super block.
    pub(crate) chunk_size: U32,
    /// 72..76: number of chunks.
    pub(crate) chunk_count: U32,
    /// 76..80: compressor of the chunks.
    pub(crate) compressor: U32,
    /// 80..84: digest algorithm.
    pub(crate) digester: U32,
    /// 84..88: see [`features`].
    pub(crate) features: U32,
    /// 88..96: size of the stored blob.
    pub(crate) encoded_size: U64,
    /// 96..104: size of the decoded address space.
    pub(crate) decoded_size: U64,
    /// 104..108: size of the table of contents.
    pub(crate) toc_size: U32,
    /// 108..112: compressor of the chunk table.
    pub(crate) ci_compressor: U32,
    /// 112..120: offset of the chunk table in the blob.
    pub(crate) ci_offset: U64,
    /// 120..128: its stored size.
    pub(crate) ci_encoded_size: U64,
    /// 128..136: its decoded size.
    pub(crate) ci_decoded_size: U64,
    /// 136..168: sha256 of the table of contents.
    pub(crate) toc_digest: [u8; 32],
    /// 168..200: sha256 of a separate meta blob; the key of an encrypted blob.
    pub(crate) meta_digest: [u8; 32],
    /// 200..208: size of a separate meta blob; the first half of a tweak.
    pub(crate) meta_size: U64,
    /// 208..216: the second half of a tweak.
    pub(crate) iv: U64,
    /// 216..220: cipher, 0 for none or [`AES_128_XTS`].
    pub(crate) cipher: U32,
    /// 220..256: 0.
    pub(crate) reserved: [u8; 36],
}

impl BlobEntry {
    /// Key and tweak of an encrypted blob, which lie where those of a gzip layer have their meta blob.
    pub(crate) fn cipher_key(&self) -> Result<CipherKey, WeakKey> {
        let mut iv = [0; 16];
        iv[..8].copy_from_slice(&self.meta_size.get().to_le_bytes());
        iv[8..].copy_from_slice(&self.iv.get().to_le_bytes());
        CipherKey::new(self.meta_digest, iv)
    }

    /// The same entry without what is said of encryption.
    pub(crate) fn plain(self) -> Self {
        let features = (self.features.get() & !features::ENCRYPTED).into();
        Self { features, meta_digest: [0; 32], meta_size: 0.into(), iv: 0.into(), cipher: 0.into(), ..self }
    }

    /// The same entry for a blob that is encrypted with this key.
    pub(crate) fn encrypted(self, key: &CipherKey) -> Self {
        let (key, iv) = key.parts();
        let iv = u128::from_le_bytes(*iv);
        Self {
            meta_digest: *key,
            meta_size: (iv as u64).into(),
            iv: ((iv >> 64) as u64).into(),
            cipher: AES_128_XTS.into(),
            ..self
        }
    }
}

/// Compact inode, 32 bytes. Read, never written.
#[derive(Debug, Clone, Copy, FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct CompactInode {
    /// 0..2: bit 0 clear, bits 1..3 the data layout.
    pub(crate) format: U16,
    /// 2..4: size of the xattrs, see the format note.
    pub(crate) xattr_count: U16,
    /// 4..6: type and permissions.
    pub(crate) mode: U16,
    /// 6..8: number of names.
    pub(crate) nlink: U16,
    /// 8..12: size in bytes.
    pub(crate) size: U32,
    /// 12..16: 0.
    pub(crate) reserved: U32,
    /// 16..20: block address, device number or chunk header.
    pub(crate) u: U32,
    /// 20..24: sequence number.
    pub(crate) ino: U32,
    /// 24..26: owner.
    pub(crate) uid: U16,
    /// 26..28: group.
    pub(crate) gid: U16,
    /// 28..32: 0.
    pub(crate) reserved2: U32,
}

/// Extended inode, 64 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ExtendedInode {
    /// 0..2: bit 0 set, bits 1..3 the data layout.
    pub(crate) format: U16,
    /// 2..4: size of the xattrs, see the format note.
    pub(crate) xattr_count: U16,
    /// 4..6: type and permissions.
    pub(crate) mode: U16,
    /// 6..8: 0.
    pub(crate) reserved: U16,
    /// 8..16: size in bytes.
    pub(crate) size: U64,
    /// 16..20: block address, device number or chunk header.
    pub(crate) u: U32,
    /// 20..24: sequence number.
    pub(crate) ino: U32,
    /// 24..28: owner.
    pub(crate) uid: U32,
    /// 28..32: group.
    pub(crate) gid: U32,
    /// 32..40: modification time, seconds.
    pub(crate) mtime: U64,
    /// 40..44: modification time, nanoseconds.
    pub(crate) mtime_nsec: U32,
    /// 44..48: number of names.
    pub(crate) nlink: U32,
    /// 48..64: 0.
    pub(crate) reserved2: [u8; 16],
}

/// Directory entry without its name, 12 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct Dirent {
    /// 0..8: where the inode is.
    pub(crate) nid: U64,
    /// 8..10: offset of the name from the start of the block.
    pub(crate) name_offset: U16,
    /// 10: file type.
    pub(crate) file_type: u8,
    /// 11: 0.
    pub(crate) reserved: u8,
}

/// Chunk index of a regular file, 8 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkIndex {
    /// 0..2: lower 16 bits of the chunk's index in the blob.
    pub(crate) index_low: U16,
    /// 2..4: lower byte blob index + 1, upper byte bits 16..24 of the chunk's index.
    pub(crate) mixed: U16,
    /// 4..8: block address of the chunk in decoded blob space.
    pub(crate) block: U32,
}

/// Header of one xattr, 4 bytes, before name and value.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct XattrEntry {
    /// 0: bytes of the name after its prefix.
    pub(crate) name_len: u8,
    /// 1: which prefix.
    pub(crate) name_index: u8,
    /// 2..4: bytes of the value.
    pub(crate) value_len: U16,
}

/// Record of the bootstrap's chunk table, 80 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkRecord {
    /// 0..32: digest of the decoded bytes.
    pub(crate) digest: [u8; 32],
    /// 32..36: position of the blob in the blob table.
    pub(crate) blob: U32,
    /// 36..40: see [`chunk_flags`].
    pub(crate) flags: U32,
    /// 40..44: encoded size.
    pub(crate) encoded_size: U32,
    /// 44..48: decoded size.
    pub(crate) decoded_size: U32,
    /// 48..56: offset in the stored blob.
    pub(crate) encoded_offset: U64,
    /// 56..64: offset in decoded blob space.
    pub(crate) decoded_offset: U64,
    /// 64..72: offset in one of the files that have it.
    pub(crate) file_offset: U64,
    /// 72..76: index in the blob.
    pub(crate) index: U32,
    /// 76..80: CRC-32C of the decoded bytes.
    pub(crate) crc32: U32,
}

/// Header of a blob's chunk table: its first 60 bytes. Zeroes follow, and the magic again in the last 4 of 4096.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct CiHeader {
    /// 0..4: [`CI_MAGIC`].
    pub(crate) magic: U32,
    /// 4..8: see [`features`].
    pub(crate) features: U32,
    /// 8..12: compressor of the table.
    pub(crate) compressor: U32,
    /// 12..16: number of entries.
    pub(crate) entries: U32,
    /// 16..24: offset of the table in the blob.
    pub(crate) offset: U64,
    /// 24..32: its stored size.
    pub(crate) encoded_size: U64,
    /// 32..40: its decoded size.
    pub(crate) decoded_size: U64,
    /// 40..48: offset of batch or zran contexts in the decoded table.
    pub(crate) context_offset: U64,
    /// 48..56: their size.
    pub(crate) context_size: U64,
    /// 56..60: their number.
    pub(crate) context_count: U32,
}

/// The prefixes of xattr names and their numbers on disk; 2 and 3 are whole names.
pub(crate) const XATTR_PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Whether a prefix of [`XATTR_PREFIXES`] is a whole name.
pub(crate) fn is_whole_xattr_name(index: u8) -> bool {
    index == 2 || index == 3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_of_the_format() {
        assert_eq!(size_of::<SuperBlock>(), 128);
        assert_eq!(size_of::<ExtSuperBlock>(), 256);
        assert_eq!(size_of::<DeviceSlot>(), 128);
        assert_eq!(size_of::<BlobEntry>(), 256);
        assert_eq!(size_of::<CompactInode>() as u64, COMPACT_INODE);
        assert_eq!(size_of::<ExtendedInode>() as u64, EXTENDED_INODE);
        assert_eq!(size_of::<Dirent>() as u64, DIRENT);
        assert_eq!(size_of::<ChunkIndex>() as u64, CHUNK_INDEX);
        assert_eq!(size_of::<ChunkRecord>(), 80);
        assert_eq!(size_of::<CiHeader>(), 60);
        assert_eq!(size_of::<XattrEntry>(), 4);
    }
}
