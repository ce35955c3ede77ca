//! Writes the bootstrap of a finished tree.
//!
//! ```text
//! 1024  super blocks | device table      4096 or later  blob table | prefetch table      M  one unused block
//! M+4096  root, other inodes, then data blocks of directories and links      C  chunk table
//! ```

use shoal_proto::Algorithm;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::place::{self, Place, Places};
use super::tree::{self, Inode, InodeIndex, Node, Tree};
use super::{BuildError, directory};
use crate::bootstrap::Kind;
use crate::codec::Compressor;
use crate::layout::{
    self, BLOCK, BlobEntry, ChunkIndex, ChunkRecord, DeviceSlot, ExtSuperBlock, ExtendedInode, SuperBlock,
    XattrEntry, data_layout, features, flags,
};

/// Devices are mapped at multiples of this on a flat device.
const DEVICE_ALIGNMENT: u64 = 0x80000;

/// Everything of a bootstrap but the tree.
#[derive(Debug)]
pub(super) struct Contents {
    /// In the order of the blob table; their `index` is set here.
    pub(super) blobs: Vec<BlobEntry>,
    /// Of all chunks that the tree names; sorted here.
    pub(super) records: Vec<ChunkRecord>,
    /// What the prefetch table lists, in order; of no use without blobs.
    pub(super) prefetch: Vec<InodeIndex>,
    pub(super) chunk_size: u32,
    pub(super) compressor: Compressor,
    pub(super) algorithm: Algorithm,
    /// Whether the blobs are tars, and blocks as long as theirs.
    pub(super) tarfs: bool,
}

impl Contents {
    /// Base-2 logarithm of the block size.
    fn block_bits(&self) -> u8 {
        if self.tarfs { layout::TAR_BLOCK_BITS } else { layout::BLOCK_BITS }
    }
}

/// The bytes of the bootstrap.
pub(super) fn write(tree: &Tree, mut contents: Contents) -> Result<Vec<u8>, BuildError> {
    let too_large = |what, found, limit| Err(BuildError::TooLarge { what, found, limit });
    if contents.blobs.len() > layout::MAX_BLOBS {
        return too_large("blobs", contents.blobs.len() as u64, layout::MAX_BLOBS as u64);
    }
    contents.blobs.iter_mut().zip(0u32..).for_each(|(blob, index)| blob.index = index.into());
    contents.records.sort_unstable_by_key(|record| (record.digest, record.blob.get(), record.index.get()));
    let block = 1 << contents.block_bits();
    let places = place::place(tree, block);
    let blob_table = blob_table_offset(contents.blobs.len());
    let prefetch = prefetch_table(&contents, &places)?;
    let prefetch_offset = blob_table + size_of_val(contents.blobs.as_slice()) as u64;
    let meta = match contents.blobs.len() {
        0 => 0,
        _ => (prefetch_offset + prefetch.len() as u64).next_multiple_of(BLOCK),
    };
    let chunk_table = meta + places.end;
    let size = (chunk_table + size_of_val(contents.records.as_slice()) as u64).next_multiple_of(BLOCK);
    if size / block > u64::from(u32::MAX) {
        return too_large("bytes of metadata", size, block << 32);
    }
    let mut image = Image { bytes: vec![0; size as usize], block, meta, places, tree, contents: &contents };
    image.put(layout::SUPER_OFFSET, image.super_block().as_bytes());
    let ext = image.ext_super_block(blob_table, chunk_table);
    let ext = ExtSuperBlock {
        prefetch_offset: if prefetch.is_empty() { 0 } else { prefetch_offset }.into(),
        prefetch_size: (prefetch.len() as u32).into(),
        ..ext
    };
    image.put(layout::EXT_SUPER_OFFSET, ext.as_bytes());
    image.put(layout::DEVICE_TABLE_OFFSET, image.devices()?.as_slice().as_bytes());
    image.put(blob_table, contents.blobs.as_slice().as_bytes());
    image.put(prefetch_offset, &prefetch);
    for (index, node, inode) in tree.first_names() {
        image.inode(index as u32 + 1, node, inode);
    }
    image.put(chunk_table, contents.records.as_slice().as_bytes());
    Ok(image.bytes)
}

/// Whether these bytes of a bootstrap have the key of an encrypted blob in them.
pub(super) fn has_keys(bytes: &[u8]) -> bool {
    let ext = bytes.get(layout::EXT_SUPER_OFFSET as usize..);
    let ext = ext.and_then(|bytes| ExtSuperBlock::ref_from_prefix(bytes).ok());
    ext.is_some_and(|(ext, _)| ext.flags.get() & flags::ENCRYPTION_AES != 0)
}

/// The bytes of the prefetch table. Without blobs there is nothing to fetch.
fn prefetch_table(contents: &Contents, places: &Places) -> Result<Vec<u8>, BuildError> {
    let listed = if contents.blobs.is_empty() { &[][..] } else { &contents.prefetch };
    let mut table = Vec::with_capacity(4 * listed.len());
    for inode in listed {
        let nid = places.places[*inode].nid();
        let (what, limit) = ("slots of inodes in front of one that is prefetched", u32::MAX.into());
        let nid = u32::try_from(nid).map_err(|_| BuildError::TooLarge { what, found: nid, limit })?;
        table.extend(nid.to_le_bytes());
    }
    Ok(table)
}

/// The first block behind the device table.
fn blob_table_offset(blobs: usize) -> u64 {
    (layout::DEVICE_TABLE_OFFSET + (blobs * size_of::<DeviceSlot>()) as u64).next_multiple_of(BLOCK)
}

struct Image<'a> {
    bytes: Vec<u8>,
    /// Bytes of a block.
    block: u64,
    /// Offset of the meta area.
    meta: u64,
    places: Places,
    tree: &'a Tree,
    contents: &'a Contents,
}

impl Image<'_> {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.bytes[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn super_block(&self) -> SuperBlock {
        SuperBlock {
            magic: layout::SUPER_MAGIC.into(),
            feature_compat: layout::COMPAT_RAFS_V6.into(),
            block_bits: self.contents.block_bits(),
            // The root is the first inode.
            root_nid: (self.places.places[0].nid() as u16).into(),
            inos: (self.tree.nodes.len() as u64).into(),
            blocks: (self.contents.blobs.iter().map(|blob| u64::from(self.blocks(blob))).sum::<u64>() as u32).into(),
            meta_block: ((self.meta / self.block) as u32).into(),
            feature_incompat: layout::INCOMPAT.into(),
            extra_devices: (self.contents.blobs.len() as u16).into(),
            device_slot: layout::DEVICE_SLOT.into(),
            ..SuperBlock::new_zeroed()
        }
    }

    fn ext_super_block(&self, blob_table: u64, chunk_table: u64) -> ExtSuperBlock {
        let contents = self.contents;
        let compressor = match contents.compressor {
            Compressor::None => flags::COMPRESSOR_NONE,
            Compressor::Lz4 => flags::COMPRESSOR_LZ4,
            Compressor::Gzip => flags::COMPRESSOR_GZIP,
            Compressor::Zstd => flags::COMPRESSOR_ZSTD,
        };
        let digest = match contents.algorithm {
            Algorithm::Blake3 => flags::DIGEST_BLAKE3,
            Algorithm::Sha256 => flags::DIGEST_SHA256,
        };
        let any_xattrs = self.tree.inodes.iter().any(|inode| !inode.xattrs.is_empty());
        let xattrs = if any_xattrs { flags::HAS_XATTRS } else { 0 };
        let mut blobs = contents.blobs.iter();
        let inlined = blobs.len() > 0 && blobs.all(|blob| blob.features.get() & features::INLINED_DIGESTS != 0);
        let inlined = if inlined { flags::INLINED_DIGESTS } else { 0 };
        let tarfs = if contents.tarfs { flags::TARFS } else { 0 };
        let encrypted = contents.blobs.iter().any(|blob| blob.cipher.get() != 0);
        let encryption = if encrypted { flags::ENCRYPTION_AES } else { flags::ENCRYPTION_NONE };
        let flags = compressor | digest | xattrs | inlined | tarfs | flags::EXPLICIT_OWNERS | encryption;
        ExtSuperBlock {
            flags: flags.into(),
            blob_table_offset: blob_table.into(),
            blob_table_size: (size_of_val(contents.blobs.as_slice()) as u32).into(),
            chunk_size: contents.chunk_size.into(),
            chunk_table_offset: chunk_table.into(),
            chunk_table_size: (size_of_val(contents.records.as_slice()) as u64).into(),
            ..ExtSuperBlock::new_zeroed()
        }
    }

    /// Where each blob lies on a flat device: behind the bootstrap and the blobs before it.
    fn devices(&self) -> Result<Vec<DeviceSlot>, BuildError> {
        let mut end = self.bytes.len() as u64;
        let devices = self.contents.blobs.iter().map(|blob| {
            let mapped = end.next_multiple_of(DEVICE_ALIGNMENT) / self.block;
            let blocks = self.blocks(blob);
            end = (mapped + u64::from(blocks)) * self.block;
            let limit = self.block << 32;
            if end > limit {
                return Err(BuildError::TooLarge { what: "bytes of metadata and chunks", found: end, limit });
            }
            Ok(DeviceSlot {
                blob_id: blob.blob_id,
                blocks: blocks.into(),
                mapped_block: (mapped as u32).into(),
                ..DeviceSlot::new_zeroed()
            })
        });
        devices.collect()
    }

    fn inode(&mut self, number: u32, node: &Node, inode: &Inode) {
        let place = self.places.places[node.inode];
        let offset = self.meta + place.offset;
        let (seconds, nanoseconds) = inode.mtime;
        let fixed = ExtendedInode {
            format: (1 | place.layout << 1).into(),
            // What makes trees refuses more.
            xattr_count: (tree::xattr_count(&inode.xattrs) as u16).into(),
            mode: (inode.mode as u16).into(),
            size: place.size.into(),
            u: self.union(inode, &place).into(),
            ino: number.into(),
            uid: inode.uid.into(),
            gid: inode.gid.into(),
            mtime: (seconds as u64).into(),
            mtime_nsec: nanoseconds.into(),
            nlink: inode.nlink.into(),
            ..ExtendedInode::new_zeroed()
        };
        self.put(offset, fixed.as_bytes());
        self.put(offset + layout::EXTENDED_INODE, &xattr_bytes(inode));
        match inode.kind {
            Kind::Directory => {
                let names = place::names(self.tree, node, |inode| self.places.places[inode].nid());
                self.data(&place, &directory::pack(&names, self.block));
            }
            Kind::Symlink => self.data(&place, &inode.target),
            Kind::File => self.indexes(inode, offset + place.fixed.next_multiple_of(layout::CHUNK_INDEX)),
            _ => {}
        }
    }

    /// The field `u`: device number, chunk header or block address.
    fn union(&self, inode: &Inode, place: &Place) -> u32 {
        match inode.kind {
            Kind::CharDevice | Kind::BlockDevice => inode.rdev,
            Kind::File => layout::CHUNK_INDEXES | (self.chunk_bits(inode) - self.block.trailing_zeros()),
            Kind::Directory | Kind::Symlink => (self.meta / self.block + place.block) as u32,
            _ => 0,
        }
    }

    /// Base-2 logarithm of the chunk size that the kernel is told. One chunk over the whole file where its chunks are
    /// consecutive: the kernel then looks at the first index only and reads on without cuts.
    fn chunk_bits(&self, inode: &Inode) -> u32 {
        let bits = self.contents.chunk_size.trailing_zeros();
        let whole = inode.size.next_power_of_two().trailing_zeros();
        let step = self.contents.chunk_size / self.block as u32;
        let consecutive = inode.chunks.windows(2).all(|pair| {
            pair[1].blob == pair[0].blob
                && pair[1].index == pair[0].index + 1
                && Some(pair[1].block) == pair[0].block.checked_add(step)
        });
        // The field has five bits.
        let fits = whole < self.block.trailing_zeros() + 32;
        if inode.chunks.len() > 1 && consecutive && fits { whole } else { bits }
    }

    /// Data of a directory or a link: whole blocks in their place, the tail behind the inode or in the last block.
    fn data(&mut self, place: &Place, data: &[u8]) {
        let (blocks, tail) = data.split_at(data.len() - place.tail as usize);
        debug_assert_eq!(data.len() as u64, place.size);
        if place.layout == data_layout::INLINE {
            self.put(self.meta + place.offset + place.fixed, tail);
        }
        self.put(self.meta + place.block * self.block, blocks);
    }

    fn indexes(&mut self, inode: &Inode, mut offset: u64) {
        for chunk in &inode.chunks {
            let entry = ChunkIndex {
                index_low: (chunk.index as u16).into(),
                // The bootstrap itself is device 0, the blobs start at 1.
                mixed: (((chunk.index >> 16) << 8) as u16 | (chunk.blob + 1) as u16).into(),
                block: chunk.block.into(),
            };
            self.put(offset, entry.as_bytes());
            offset += layout::CHUNK_INDEX;
        }
    }

    /// Blocks of the decoded blob; its size limit makes them fit.
    fn blocks(&self, blob: &BlobEntry) -> u32 {
        blob.decoded_size.get().div_ceil(self.block) as u32
    }
}

/// Header and attributes; nothing without attributes.
fn xattr_bytes(inode: &Inode) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in &inode.xattrs {
        // Trees have only names with a known prefix.
        let Some((name_index, suffix)) = tree::split_xattr(name) else { continue };
        bytes.resize(bytes.len().max(layout::XATTR_HEADER as usize), 0);
        let entry = XattrEntry { name_len: suffix.len() as u8, name_index, value_len: (value.len() as u16).into() };
        bytes.extend_from_slice(entry.as_bytes());
        bytes.extend_from_slice(suffix);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}
