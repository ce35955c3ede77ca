//! Writes the bootstrap of a scanned and chunked tree.
//!
//! ```text
//! 1024  super blocks | device table      4096  blob table      M  one unused block
//! M+4096  root, other inodes, then data blocks of directories and links      C  chunk table
//! ```

use shoal_proto::Algorithm;
use zerocopy::{FromZeros, IntoBytes};

use super::blob::FinishedBlob;
use super::place::{self, Place, Places};
use super::tree::{self, Node, NodeIndex, Tree};
use super::{BuildError, BuildOptions, directory};
use crate::bootstrap::Kind;
use crate::codec::Compressor;
use crate::layout::{
    self, BLOCK, BlobEntry, ChunkIndex, ChunkRecord, DeviceSlot, ExtSuperBlock, ExtendedInode, SuperBlock,
    XattrEntry, data_layout, features, flags,
};

/// Where the blob table starts; a block holds more device slots than this writer makes blobs.
const BLOB_TABLE: u64 = BLOCK;
/// Devices are mapped at multiples of this on a flat device.
const DEVICE_ALIGNMENT: u64 = 0x80000;

/// The bytes of the bootstrap.
pub(super) fn write(tree: &Tree, blob: Option<&FinishedBlob>, options: BuildOptions) -> Result<Vec<u8>, BuildError> {
    let places = place::place(tree);
    let meta = if blob.is_some() { BLOB_TABLE + BLOCK } else { 0 };
    let chunk_table = meta + places.end;
    let records = blob.map(|blob| sorted_records(&blob.records)).unwrap_or_default();
    let size = (chunk_table + size_of_val(records.as_slice()) as u64).next_multiple_of(BLOCK);
    if size / BLOCK > u64::from(u32::MAX) {
        return Err(BuildError::TooLarge { what: "bytes of metadata", found: size, limit: BLOCK << 32 });
    }
    let mut image = Image { bytes: vec![0; size as usize], meta, places, tree, blob, options };
    image.put(layout::SUPER_OFFSET, image.super_block().as_bytes());
    image.put(layout::EXT_SUPER_OFFSET, image.ext_super_block(chunk_table, records.len()).as_bytes());
    if let Some(blob) = blob {
        image.put(layout::DEVICE_TABLE_OFFSET, image.device(blob).as_bytes());
        image.put(BLOB_TABLE, image.blob_entry(blob).as_bytes());
    }
    for (index, node) in tree.nodes.iter().enumerate().filter(|(_, node)| node.first_name.is_none()) {
        image.node(index, node);
    }
    image.put(chunk_table, records.as_slice().as_bytes());
    Ok(image.bytes)
}

fn sorted_records(records: &[ChunkRecord]) -> Vec<ChunkRecord> {
    let mut records = records.to_vec();
    records.sort_unstable_by_key(|record| (record.digest, record.blob.get()));
    records
}

struct Image<'a> {
    bytes: Vec<u8>,
    /// Offset of the meta area.
    meta: u64,
    places: Places,
    tree: &'a Tree,
    blob: Option<&'a FinishedBlob>,
    options: BuildOptions,
}

impl Image<'_> {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        self.bytes[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn super_block(&self) -> SuperBlock {
        SuperBlock {
            magic: layout::SUPER_MAGIC.into(),
            feature_compat: layout::COMPAT_RAFS_V6.into(),
            block_bits: layout::BLOCK_BITS,
            // The root is the first inode.
            root_nid: (self.places.places[0].nid() as u16).into(),
            inos: (self.tree.nodes.len() as u64).into(),
            blocks: self.blob.map_or(0, blocks).into(),
            meta_block: ((self.meta / BLOCK) as u32).into(),
            feature_incompat: layout::INCOMPAT.into(),
            extra_devices: u16::from(self.blob.is_some()).into(),
            device_slot: layout::DEVICE_SLOT.into(),
            ..SuperBlock::new_zeroed()
        }
    }

    fn ext_super_block(&self, chunk_table: u64, records: usize) -> ExtSuperBlock {
        let compressor = match self.options.compressor {
            Compressor::None => flags::COMPRESSOR_NONE,
            Compressor::Lz4 => flags::COMPRESSOR_LZ4,
            Compressor::Gzip => flags::COMPRESSOR_GZIP,
            Compressor::Zstd => flags::COMPRESSOR_ZSTD,
        };
        let digest = match self.options.algorithm {
            Algorithm::Blake3 => flags::DIGEST_BLAKE3,
            Algorithm::Sha256 => flags::DIGEST_SHA256,
        };
        let any_xattrs = self.tree.nodes.iter().any(|node| !node.xattrs.is_empty());
        let xattrs = if any_xattrs { flags::HAS_XATTRS } else { 0 };
        let blob_table_size = if self.blob.is_some() { size_of::<BlobEntry>() as u32 } else { 0 };
        ExtSuperBlock {
            flags: (compressor | digest | xattrs | flags::EXPLICIT_OWNERS | flags::ENCRYPTION_NONE).into(),
            blob_table_offset: BLOB_TABLE.into(),
            blob_table_size: blob_table_size.into(),
            chunk_size: self.options.chunk_size.into(),
            chunk_table_offset: chunk_table.into(),
            chunk_table_size: ((records * size_of::<ChunkRecord>()) as u64).into(),
            ..ExtSuperBlock::new_zeroed()
        }
    }

    fn device(&self, blob: &FinishedBlob) -> DeviceSlot {
        let mapped = (self.bytes.len() as u64).next_multiple_of(DEVICE_ALIGNMENT) / BLOCK;
        DeviceSlot {
            blob_id: hex_id(blob),
            blocks: blocks(blob).into(),
            mapped_block: (mapped as u32).into(),
            ..DeviceSlot::new_zeroed()
        }
    }

    fn blob_entry(&self, blob: &FinishedBlob) -> BlobEntry {
        let digester = match self.options.algorithm {
            Algorithm::Blake3 => 0,
            Algorithm::Sha256 => 1,
        };
        BlobEntry {
            blob_id: hex_id(blob),
            chunk_size: self.options.chunk_size.into(),
            chunk_count: (blob.records.len() as u32).into(),
            compressor: self.options.compressor.code().into(),
            digester: digester.into(),
            features: (features::ALIGNED | features::CAP_TAR_TOC).into(),
            encoded_size: blob.encoded_size.into(),
            decoded_size: blob.decoded_size.into(),
            ci_compressor: blob.table.compressor,
            ci_offset: blob.table.offset,
            ci_encoded_size: blob.table.encoded_size,
            ci_decoded_size: blob.table.decoded_size,
            ..BlobEntry::new_zeroed()
        }
    }

    fn node(&mut self, index: NodeIndex, node: &Node) {
        let place = self.places.places[index];
        let offset = self.meta + place.offset;
        let (seconds, nanoseconds) = node.mtime;
        let inode = ExtendedInode {
            format: (1 | place.layout << 1).into(),
            // The scan refuses more.
            xattr_count: (tree::xattr_count(&node.xattrs) as u16).into(),
            mode: (node.mode as u16).into(),
            size: place.size.into(),
            u: self.union(index, node, &place).into(),
            ino: (index as u32 + 1).into(),
            uid: node.uid.into(),
            gid: node.gid.into(),
            mtime: (seconds as u64).into(),
            mtime_nsec: nanoseconds.into(),
            nlink: node.nlink.into(),
            ..ExtendedInode::new_zeroed()
        };
        self.put(offset, inode.as_bytes());
        self.put(offset + layout::EXTENDED_INODE, &xattr_bytes(node));
        match node.kind {
            Kind::Directory => {
                let names = place::names(self.tree, index, |node| self.places.places[node].nid());
                self.data(&place, &directory::pack(&names));
            }
            Kind::Symlink => self.data(&place, &node.target),
            Kind::File => self.indexes(index, offset + place.fixed.next_multiple_of(layout::CHUNK_INDEX)),
            _ => {}
        }
    }

    /// The field `u`: device number, chunk header or block address.
    fn union(&self, index: NodeIndex, node: &Node, place: &Place) -> u32 {
        match node.kind {
            Kind::CharDevice | Kind::BlockDevice => node.rdev,
            Kind::File => layout::CHUNK_INDEXES | (self.chunk_bits(index, node) - u32::from(layout::BLOCK_BITS)),
            Kind::Directory | Kind::Symlink => (self.meta / BLOCK + place.block) as u32,
            _ => 0,
        }
    }

    /// Base-2 logarithm of the chunk size that the kernel is told. One chunk over the whole file where its chunks are
    /// consecutive: the kernel then looks at the first index only and reads on without cuts.
    fn chunk_bits(&self, index: NodeIndex, node: &Node) -> u32 {
        let bits = self.options.chunk_size.trailing_zeros();
        let whole = node.size.next_power_of_two().trailing_zeros();
        let chunks = self.tree.chunks.get(&index).map_or(&[][..], Vec::as_slice);
        let consecutive = chunks.windows(2).all(|pair| pair[1] == pair[0] + 1);
        // The field has five bits.
        if chunks.len() > 1 && consecutive && whole - u32::from(layout::BLOCK_BITS) < 32 { whole } else { bits }
    }

    /// Data of a directory or a link: whole blocks in their place, the tail behind the inode or in the last block.
    fn data(&mut self, place: &Place, data: &[u8]) {
        let (blocks, tail) = data.split_at(data.len() - place.tail as usize);
        debug_assert_eq!(data.len() as u64, place.size);
        if place.layout == data_layout::INLINE {
            self.put(self.meta + place.offset + place.fixed, tail);
        }
        self.put(self.meta + place.block * BLOCK, blocks);
    }

    fn indexes(&mut self, index: NodeIndex, mut offset: u64) {
        let (Some(chunks), Some(blob)) = (self.tree.chunks.get(&index), self.blob) else { return };
        for chunk in chunks {
            let record = &blob.records[*chunk as usize];
            let entry = ChunkIndex {
                index_low: (*chunk as u16).into(),
                // The bootstrap itself is device 0, the blob device 1.
                mixed: (((chunk >> 16) << 8) as u16 | 1).into(),
                block: ((record.decoded_offset.get() / BLOCK) as u32).into(),
            };
            self.put(offset, entry.as_bytes());
            offset += layout::CHUNK_INDEX;
        }
    }
}

/// Blocks of the decoded blob; its size limit makes them fit.
fn blocks(blob: &FinishedBlob) -> u32 {
    (blob.decoded_size / BLOCK) as u32
}

fn hex_id(blob: &FinishedBlob) -> [u8; 64] {
    let mut text = [0; 64];
    text.copy_from_slice(blob.id.to_string().as_bytes());
    text
}

/// Header and attributes; nothing without attributes.
fn xattr_bytes(node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in &node.xattrs {
        // The scan keeps only names with a known prefix.
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
