//! The two super blocks: what kind of image it is and where its tables lie.

use std::ops::Range;

use serde::Serialize;
use shoal_proto::Algorithm;

use super::error::At;
use super::image::Source;
use super::{BootstrapError, Nid};
use crate::codec::Compressor;
use crate::layout::{self, ExtSuperBlock, SuperBlock, flags};

/// Both super blocks as an image has them, for `inspect`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SuperBlocks {
    /// Nid of the root directory.
    pub root_nid: u64,
    /// Offset of nid 0.
    pub meta_offset: u64,
    /// Names that it counts.
    pub names: u64,
    /// Bytes of a block: 4096, or 512 where blobs are tars.
    pub block_size: u64,
    /// Blocks of all blobs that it counts.
    pub blocks: u32,
    /// Number of blobs.
    pub blobs: u64,
    /// Flags of RAFS in the extended super block.
    pub flags: u64,
    /// Chunk size.
    pub chunk_size: u32,
    /// Offset of the blob table.
    pub blob_table_offset: u64,
    /// Its size.
    pub blob_table_size: u64,
    /// Offset of the chunk table.
    pub chunk_table_offset: u64,
    /// Its size.
    pub chunk_table_size: u64,
    /// Offset of the prefetch table; 0 for none.
    pub prefetch_table_offset: u64,
    /// Its size.
    pub prefetch_table_size: u64,
}

/// What the super blocks say of the rest. Reading does not depend on it; `check` compares.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Declared {
    /// Names in the tree.
    pub(crate) names: u64,
    /// Blocks of all blobs.
    pub(crate) blocks: u32,
    /// Whether any inode has xattrs.
    pub(crate) has_xattrs: bool,
}

/// Both super blocks, checked. The ranges lie in the file and do not overlap.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) root: Nid,
    /// Bytes of a block.
    pub(super) block: u64,
    pub(super) meta_offset: u64,
    pub(super) declared: Declared,
    pub(super) chunk_size: u32,
    pub(super) algorithm: Algorithm,
    pub(super) compressor: Compressor,
    flags: u64,
    pub(super) device_table: Range<u64>,
    pub(super) blob_table: Range<u64>,
    pub(super) prefetch_table: Range<u64>,
    pub(super) chunk_table: Range<u64>,
}

impl Header {
    pub(super) fn super_blocks(&self) -> SuperBlocks {
        let size = |range: &Range<u64>| range.end - range.start;
        SuperBlocks {
            root_nid: self.root.0,
            meta_offset: self.meta_offset,
            names: self.declared.names,
            block_size: self.block,
            blocks: self.declared.blocks,
            blobs: size(&self.device_table) / 128,
            flags: self.flags,
            chunk_size: self.chunk_size,
            blob_table_offset: self.blob_table.start,
            blob_table_size: size(&self.blob_table),
            chunk_table_offset: self.chunk_table.start,
            chunk_table_size: size(&self.chunk_table),
            prefetch_table_offset: self.prefetch_table.start,
            prefetch_table_size: size(&self.prefetch_table),
        }
    }

    /// Whether the blobs of the image are tars.
    pub(super) fn is_tarfs(&self) -> bool {
        self.flags & flags::TARFS != 0
    }

    /// The parts of the file in front of the tree, and the chunk table.
    pub(super) fn tables(&self) -> Vec<(Range<u64>, &'static str)> {
        let tables = [
            (0..layout::DEVICE_TABLE_OFFSET, "super blocks"),
            (self.device_table.clone(), "device table"),
            (self.blob_table.clone(), "blob table"),
            (self.prefetch_table.clone(), "prefetch table"),
            (self.chunk_table.clone(), "chunk table"),
        ];
        // An empty one may claim to lie anywhere.
        tables.into_iter().filter(|(range, _)| !range.is_empty()).collect()
    }

    /// Images without owners belong to whoever serves them.
    pub(super) fn owners(&self) -> Option<(u32, u32)> {
        let owners = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        (self.flags & flags::EXPLICIT_OWNERS == 0).then(owners)
    }
}

/// Reads and checks both super blocks and the places of all tables.
pub(super) fn read(source: &Source) -> Result<Header, BootstrapError> {
    let size = source.size();
    let whole = |block: u64| {
        At::new("bootstrap", 0).require(size >= layout::BLOCK && size.is_multiple_of(block), || {
            format!("its size of {size} bytes must be a multiple of {block}, and at least {}", layout::BLOCK)
        })
    };
    whole(layout::TAR_BLOCK)?;
    let at = At::new("super block", layout::SUPER_OFFSET);
    let block: &SuperBlock = source.view(at)?;
    check_super(at, block)?;
    let block_size = 1 << block.block_bits;
    whole(block_size)?;
    let ext_at = At::new("extended super block", layout::EXT_SUPER_OFFSET);
    let ext: &ExtSuperBlock = source.view(ext_at)?;
    let (algorithm, compressor) = check_ext(ext_at, ext)?;
    let tarfs = ext.flags.get() & flags::TARFS != 0;
    ext_at.require(tarfs == (block_size == layout::TAR_BLOCK), || {
        format!("flags {:#x} in an image with blocks of {block_size} bytes", ext.flags)
    })?;

    let devices = u64::from(block.extra_devices.get());
    let device_table = layout::DEVICE_TABLE_OFFSET..layout::DEVICE_TABLE_OFFSET + devices * 128;
    let blob_table =
        place(ext_at, "blob table", ext.blob_table_offset.get(), ext.blob_table_size.get().into(), size)?;
    let blobs = (blob_table.end - blob_table.start) / 256;
    ext_at.require(blobs == devices, || format!("{blobs} entries in the blob table, {devices} devices"))?;
    ext_at.require(blob_table.is_empty() || blob_table.start >= device_table.end, || {
        format!("the blob table at {} starts inside the device table", blob_table.start)
    })?;
    let chunk_table = place(ext_at, "chunk table", ext.chunk_table_offset.get(), ext.chunk_table_size.get(), size)?;
    let prefetch = (ext.prefetch_offset.get(), u64::from(ext.prefetch_size.get()));
    let prefetch_table =
        if prefetch.0 == 0 { 0..0 } else { place(ext_at, "prefetch table", prefetch.0, prefetch.1, size)? };
    for (table, unit, aligned) in [(&blob_table, 256, true), (&chunk_table, 80, true), (&prefetch_table, 4, false)] {
        let len = table.end - table.start;
        ext_at.require(len.is_multiple_of(unit), || format!("a table of {len} bytes with entries of {unit}"))?;
        ext_at.require(len == 0 || !aligned || table.start.is_multiple_of(layout::BLOCK), || {
            format!("the table at {} must start at a block", table.start)
        })?;
    }
    check_overlap(ext_at, &[&device_table, &blob_table, &prefetch_table, &chunk_table])?;
    Ok(Header {
        root: Nid(block.root_nid.get().into()),
        block: block_size,
        meta_offset: u64::from(block.meta_block.get()) * block_size,
        declared: Declared {
            names: block.inos.get(),
            blocks: block.blocks.get(),
            has_xattrs: ext.flags.get() & flags::HAS_XATTRS != 0,
        },
        chunk_size: ext.chunk_size.get(),
        algorithm,
        compressor,
        flags: ext.flags.get(),
        device_table,
        blob_table,
        prefetch_table,
        chunk_table,
    })
}

fn check_super(at: At, block: &SuperBlock) -> Result<(), BootstrapError> {
    let hex = |name, value: u32| format!("{name} is {value:#x}");
    at.require(block.magic.get() == layout::SUPER_MAGIC, || hex("the magic", block.magic.get()))?;
    at.require(block.checksum.get() == 0, || "it has a checksum".into())?;
    at.require(block.feature_compat.get() & layout::COMPAT_RAFS_V6 != 0, || {
        hex("no RAFS v6: feature_compat", block.feature_compat.get())
    })?;
    at.require(matches!(block.block_bits, layout::BLOCK_BITS | layout::TAR_BLOCK_BITS), || {
        hex("log2 of the block size", block.block_bits.into())
    })?;
    at.require(block.feature_incompat.get() == layout::INCOMPAT, || {
        hex("feature_incompat", block.feature_incompat.get())
    })?;
    at.require(block.device_slot.get() == layout::DEVICE_SLOT, || {
        format!("the device table is at slot {}", block.device_slot)
    })?;
    let zeroes = block.ext_slots == 0 && block.u1.get() == 0 && block.xattr_block.get() == 0;
    at.require(zeroes, || "a field that must be zero is not".into())?;
    at.require(block.inos.get() != 0, || "it counts no inodes".into())?;
    let devices = usize::from(block.extra_devices.get());
    at.require(devices <= layout::MAX_BLOBS, || format!("{devices} blobs, at most {}", layout::MAX_BLOBS))?;
    at.require(devices > 0 || matches!(block.blocks.get(), 0 | 4096), || {
        format!("{} blocks without a device", block.blocks)
    })
}

fn check_ext(at: At, ext: &ExtSuperBlock) -> Result<(Algorithm, Compressor), BootstrapError> {
    let bits = ext.flags.get();
    let known = flags::COMPRESSOR_NONE
        | flags::COMPRESSOR_LZ4
        | flags::COMPRESSOR_GZIP
        | flags::COMPRESSOR_ZSTD
        | flags::DIGEST_BLAKE3
        | flags::DIGEST_SHA256
        | flags::EXPLICIT_OWNERS
        | flags::HAS_XATTRS
        | flags::INLINED_DIGESTS
        | flags::TARFS
        | flags::ENCRYPTION_NONE
        | flags::ENCRYPTION_AES
        | flags::COMPATIBLE;
    at.require(bits & !known == 0, || format!("unknown flags in {bits:#x}"))?;
    let (algorithm, compressor) = algorithms(at, bits)?;
    let chunk_size = ext.chunk_size.get();
    at.require(chunk_size.is_power_of_two() && layout::CHUNK_SIZES.contains(&chunk_size), || {
        format!("chunk size {chunk_size:#x} must be a power of two from 0x1000 to 0x1000000")
    })?;
    Ok((algorithm, compressor))
}

/// Digest algorithm and compressor by the flags of a super block.
pub(crate) fn algorithms(at: At, bits: u64) -> Result<(Algorithm, Compressor), BootstrapError> {
    let compressors = [
        (flags::COMPRESSOR_NONE, Compressor::None),
        (flags::COMPRESSOR_LZ4, Compressor::Lz4),
        (flags::COMPRESSOR_GZIP, Compressor::Gzip),
        (flags::COMPRESSOR_ZSTD, Compressor::Zstd),
    ];
    let algorithms = [(flags::DIGEST_BLAKE3, Algorithm::Blake3), (flags::DIGEST_SHA256, Algorithm::Sha256)];
    let one = |what| at.invalid(format!("flags {bits:#x} must have exactly one {what} bit"));
    let compressor = only(bits, &compressors).ok_or_else(|| one("compressor"))?;
    let algorithm = only(bits, &algorithms).ok_or_else(|| one("digest"))?;
    Ok((algorithm, compressor))
}

/// The value of the one bit that is set.
fn only<T: Copy>(bits: u64, choices: &[(u64, T)]) -> Option<T> {
    let mut set = choices.iter().filter(|(bit, _)| bits & bit != 0);
    let (_, value) = set.next()?;
    set.next().is_none().then_some(*value)
}

fn place(at: At, table: &str, offset: u64, len: u64, size: u64) -> Result<Range<u64>, BootstrapError> {
    let end = if len == 0 { Some(offset) } else { offset.checked_add(len).filter(|end| *end <= size) };
    let end =
        end.ok_or_else(|| at.invalid(format!("the {table} of {len} bytes at {offset} ends behind the file")))?;
    Ok(offset..end)
}

fn check_overlap(at: At, tables: &[&Range<u64>]) -> Result<(), BootstrapError> {
    let mut tables: Vec<_> = tables.iter().filter(|table| !table.is_empty()).collect();
    tables.sort_by_key(|table| table.start);
    for pair in tables.windows(2) {
        at.require(pair[0].end <= pair[1].start, || format!("tables at {:?} and {:?} overlap", pair[0], pair[1]))?;
    }
    Ok(())
}
