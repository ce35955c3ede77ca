//! What an image says about itself, as structures that can be printed: super blocks, blobs, an inode by its path, the
//! chunks of a file. `docs/image-json.md` describes them for scripts; fields are added, not changed.
//!
//! Names and targets are text: bytes that are no UTF-8 become U+FFFD. Digests and values of xattrs are hexadecimal.

use serde::Serialize;
use shoal_proto::Digest;

use crate::bootstrap::{Bootstrap, BootstrapError, Inode, Kind, Nid, SuperBlocks};
use crate::codec::Compressor;

/// An image as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageSummary {
    /// Size of the bootstrap.
    pub bootstrap_bytes: u64,
    /// Fields of both super blocks.
    pub super_blocks: SuperBlocks,
    /// Compressor in the super block, that of the last builder.
    pub compressor: Compressor,
    /// Digest algorithm in the super block.
    pub digester: String,
    /// Whether chunks have digests; without, the image is in tarfs mode.
    pub chunk_digests: bool,
    /// Names in the tree, the root included.
    pub names: u64,
    /// Distinct inodes.
    pub inodes: u64,
    /// The blobs, in the order of the tables.
    pub blobs: Vec<BlobSummary>,
    /// Inodes that are to be read early, in order.
    pub prefetch: Vec<u64>,
}

/// A blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BlobSummary {
    /// Its id in hexadecimal.
    pub id: String,
    /// Size of the stored file.
    pub encoded_size: u64,
    /// Size of its decoded address space.
    pub decoded_size: u64,
    /// First byte behind the chunks.
    pub data_end: u64,
    /// Chunks of the whole blob.
    pub chunks: u32,
    /// Chunks that the image names.
    pub named_chunks: u64,
    /// How its chunks are compressed.
    pub compressor: Compressor,
    /// How its chunks are digested.
    pub digester: String,
    /// Whether it is encrypted. With what key is not shown.
    pub encrypted: bool,
    /// Feature bits of the format.
    pub features: u32,
    /// Offset of its chunk table.
    pub chunk_table_offset: u64,
    /// Stored size of its chunk table.
    pub chunk_table_encoded_size: u64,
    /// Decoded size of its chunk table.
    pub chunk_table_decoded_size: u64,
    /// How its chunk table is compressed.
    pub chunk_table_compressor: Compressor,
    /// Block of the image where it lies on a flat device; 0 where nobody has said.
    pub mapped_block: u32,
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InodeSummary {
    /// The path that was asked for.
    pub path: String,
    /// Where it lies: its number within the image.
    pub nid: u64,
    /// The builder's sequence number.
    pub ino: u32,
    /// `file`, `directory`, `symlink`, `char`, `block`, `fifo` or `socket`.
    pub kind: &'static str,
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Number of names.
    pub nlink: u32,
    /// Device number in Linux's 32-bit form.
    pub rdev: u32,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Its nanoseconds.
    pub mtime_nsec: u32,
    /// Target of a symbolic link.
    pub target: Option<String>,
    /// Extended attributes: name and value.
    pub xattrs: Vec<(String, String)>,
    /// Names in a directory, without `.` and `..`.
    pub entries: Option<Vec<EntrySummary>>,
    /// Chunks of a file, in order.
    pub chunks: Option<Vec<ChunkSummary>>,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EntrySummary {
    /// The name.
    pub name: String,
    /// What it leads to.
    pub nid: u64,
    /// What that is.
    pub kind: &'static str,
}

/// A chunk of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ChunkSummary {
    /// Where it starts in the file.
    pub file_offset: u64,
    /// Position of its blob.
    pub blob: u32,
    /// Its index in the blob.
    pub index: u32,
    /// Digest of its decoded bytes, with the algorithm in front; empty where the image has none.
    pub digest: String,
    /// Decoded bytes.
    pub decoded_size: u32,
    /// Where it starts in the blob's decoded address space.
    pub decoded_offset: u64,
    /// Stored bytes; none for a chunk in a batch, which the bootstrap cannot place.
    pub encoded_size: Option<u32>,
    /// Where it starts in the stored blob.
    pub encoded_offset: Option<u64>,
    /// Whether its stored bytes are compressed.
    pub compressed: Option<bool>,
}

/// Describes an image.
pub fn inspect(image: &Bootstrap) -> ImageSummary {
    ImageSummary {
        bootstrap_bytes: image.as_bytes().len() as u64,
        super_blocks: image.super_blocks(),
        compressor: image.compressor(),
        digester: image.algorithm().to_string(),
        chunk_digests: image.has_digests(),
        names: image.name_count(),
        inodes: image.inode_count(),
        blobs: (0..image.blobs().len() as u32).map(|index| blob(image, index)).collect(),
        prefetch: image.prefetch().iter().map(|nid| nid.0).collect(),
    }
}

/// Describes what a path leads to, symbolic links not followed; `None` where nothing is. `path` is taken from the root.
pub fn inspect_path(image: &Bootstrap, path: &[u8]) -> Result<Option<InodeSummary>, BootstrapError> {
    let Some(nid) = find(image, path)? else { return Ok(None) };
    let inode = image.inode(nid)?;
    let directory = inode.kind() == Kind::Directory;
    let entries = inode.entries().filter_map(|entry| match entry {
        Ok(entry) if entry.name == b"." || entry.name == b".." => None,
        Ok(entry) => Some(Ok(EntrySummary { name: text(entry.name), nid: entry.nid.0, kind: kind(entry.kind) })),
        Err(error) => Some(Err(error)),
    });
    Ok(Some(InodeSummary {
        path: text(path),
        nid: nid.0,
        ino: inode.ino(),
        kind: kind(inode.kind()),
        mode: inode.mode(),
        uid: inode.uid(),
        gid: inode.gid(),
        size: inode.size(),
        nlink: inode.nlink(),
        rdev: inode.rdev(),
        mtime: inode.mtime().0,
        mtime_nsec: inode.mtime().1,
        target: (inode.kind() == Kind::Symlink).then(|| inode.target().map(text)).transpose()?,
        xattrs: inode.xattrs().map(|(name, value)| (text(&name), hex::encode(value))).collect(),
        entries: directory.then(|| entries.collect()).transpose()?,
        chunks: (inode.kind() == Kind::File).then(|| chunks(image, &inode)),
    }))
}

fn find(image: &Bootstrap, path: &[u8]) -> Result<Option<Nid>, BootstrapError> {
    let mut nid = image.root();
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
        match image.inode(nid)?.lookup(name)? {
            Some(next) => nid = next,
            None => return Ok(None),
        }
    }
    Ok(Some(nid))
}

fn blob(image: &Bootstrap, index: u32) -> BlobSummary {
    let blob = &image.blobs()[index as usize];
    BlobSummary {
        id: blob.id.to_string(),
        encoded_size: blob.encoded_size,
        decoded_size: blob.decoded_size,
        data_end: blob.data_end,
        chunks: blob.chunk_count,
        encrypted: blob.cipher.is_some(),
        named_chunks: image.chunks(index).count() as u64,
        compressor: blob.compressor,
        digester: blob.algorithm.to_string(),
        features: blob.features,
        chunk_table_offset: blob.chunk_table.offset,
        chunk_table_encoded_size: blob.chunk_table.encoded_size,
        chunk_table_decoded_size: blob.chunk_table.decoded_size,
        chunk_table_compressor: blob.chunk_table.compressor,
        mapped_block: blob.mapped_block,
    }
}

fn chunks(image: &Bootstrap, file: &Inode<'_>) -> Vec<ChunkSummary> {
    let offsets = (0..).step_by(file.chunk_size() as usize);
    let named = file
        .chunks()
        .zip(offsets)
        .filter_map(|(chunk, offset)| Some((image.named_chunk(chunk.id)?, chunk.id, offset)));
    let summary = named.map(|(named, id, file_offset)| {
        let placed = named.encoded_len > 0;
        let Digest { algorithm, bytes } = named.chunk.digest;
        ChunkSummary {
            file_offset,
            blob: id.blob,
            index: id.index,
            digest: match image.has_digests() {
                true => format!("{algorithm}:{}", hex::encode(bytes)),
                false => String::new(),
            },
            decoded_size: named.chunk.decoded_len,
            decoded_offset: named.chunk.decoded_offset,
            encoded_size: placed.then_some(named.encoded_len),
            encoded_offset: placed.then_some(named.encoded_offset),
            compressed: placed.then_some(named.chunk.compressed),
        }
    });
    summary.collect()
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::File => "file",
        Kind::Directory => "directory",
        Kind::Symlink => "symlink",
        Kind::CharDevice => "char",
        Kind::BlockDevice => "block",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
