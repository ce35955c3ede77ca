//! RAFS v5, read by writing it anew as v6.
//!
//! The older form is a list of records, one for each name, in which every name repeats the chunks of its file. It has no block
//! addresses, and its chunks lie unaligned in the decoded blob. Nothing but the tree and the chunks is worth keeping of it:
//! [`translate`] takes these over, gives chunks aligned places in the order of their indexes, and writes a bootstrap that all
//! the rest of this crate reads like any other. Stored blobs are the same in both forms, but that those of v5 have no chunk
//! table.
//!
//! Unlike v6 an inode has a digest: over the digests of its chunks, over those of the children, over the target of a link. All of
//! them are verified. What is taken from a stranger is bounded by the size of the file, as each record counts once.
//! The prefetch table is not taken over.

use std::collections::{BTreeMap, VecDeque};

use shoal_proto::{Algorithm, BlobId};
use zerocopy::FromZeros;

use super::bootstrap::{self, Contents};
use super::tree::{ChunkPlace, Draft, EntryIndex, Inode, InodeIndex};
use crate::bootstrap::{At, BootstrapError, Kind, algorithms, is_name, slice, view};
use crate::codec::{self, Compressor};
use crate::layout::{self, BLOCK, BlobEntry, ChunkRecord, chunk_flags, features, flags};
use disk::{BlobSizes, SuperBlock};
use record::Record;

mod disk;
mod record;

/// Whether a bootstrap is one of RAFS v5.
pub(crate) fn is_v5(bytes: &[u8]) -> bool {
    bytes.starts_with(&disk::MAGIC.to_le_bytes())
}

/// The same image as a bootstrap of RAFS v6. Its blobs have the feature bit that is internal, as they lack a chunk table.
pub(crate) fn translate(bytes: &[u8]) -> Result<Vec<u8>, BootstrapError> {
    let source = Source::read(bytes)?;
    let blobs = source.blobs()?;
    let mut translation = Translation {
        left: bytes.len() as u64,
        seen: vec![false; source.names as usize],
        draft: Draft::new(Inode::implied_directory()),
        files: BTreeMap::new(),
        chunks: vec![BTreeMap::new(); blobs.len()],
        directories: VecDeque::new(),
        source,
    };
    translation.tree()?;
    translation.finish(blobs)
}

/// The super block, checked.
#[derive(Debug, Clone, Copy)]
struct Source<'a> {
    bytes: &'a [u8],
    header: &'a SuperBlock,
    names: u32,
    chunk_size: u32,
    algorithm: Algorithm,
    compressor: Compressor,
    /// Owner of everything, in images that do not store owners.
    owner: Option<(u32, u32)>,
}

impl<'a> Source<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self, BootstrapError> {
        let at = At::new("super block", 0);
        let header: &SuperBlock = view(bytes, at)?;
        let version = header.version.get();
        at.require(version == disk::VERSION && header.size.get() == disk::SUPER_BLOCK, || {
            format!("version {version:#x}, {} bytes of super block", header.size)
        })?;
        let chunk_size = header.chunk_size.get();
        at.require(chunk_size.is_power_of_two() && layout::CHUNK_SIZES.contains(&chunk_size), || {
            format!("chunk size {chunk_size:#x} must be a power of two from 0x1000 to 0x1000000")
        })?;
        let bits = header.flags.get();
        if bits & flags::ENCRYPTION_AES != 0 {
            return Err(at.unsupported("encryption"));
        }
        let (algorithm, compressor) = algorithms(at, bits)?;
        let names = header.names.get();
        at.require(names > 0, || "it has no inodes".into())?;
        slice(bytes, At::new("inode table", header.inode_table.get()), u64::from(names) * 4)?;
        let owner = || (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let owner = (bits & flags::EXPLICIT_OWNERS == 0).then(owner);
        Ok(Self { bytes, header, names, chunk_size, algorithm, compressor, owner })
    }

    /// The record with this number, counted from 0.
    fn record(&self, number: u32) -> Result<Record<'a>, BootstrapError> {
        let table = self.header.inode_table.get();
        let at = At::new("inode table", table);
        at.require(number < self.names, || format!("inode {number} of {}", self.names))?;
        let offset = slice(self.bytes, At::new("inode table", table + 4 * u64::from(number)), 4)?;
        let offset = offset.iter().rev().fold(0, |offset, byte| offset << 8 | u64::from(*byte));
        Record::read(self.bytes, offset * disk::UNIT)
    }

    /// Ids of all blobs, and their sizes where the image states them.
    fn blobs(&self) -> Result<Vec<(BlobId, Option<&'a BlobSizes>)>, BootstrapError> {
        let at = At::new("blob table", self.header.blob_table.get());
        let mut rest = slice(self.bytes, at, self.header.blob_table_size.get().into())?;
        let mut blobs = Vec::new();
        // Two numbers that tell what to read ahead, the id, and NUL between two entries.
        while rest.len() > 8 {
            let text = &rest[8..];
            let len = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
            let id = std::str::from_utf8(&text[..len]).ok().and_then(|text| text.parse().ok());
            let id = id.ok_or_else(|| at.invalid(format!("blob id {:?}", String::from_utf8_lossy(&text[..len]))))?;
            let number = blobs.len() as u32;
            at.require(blobs.len() < layout::MAX_BLOBS, || format!("more than {} blobs", layout::MAX_BLOBS))?;
            blobs.push((id, self.sizes(number)?));
            rest = text.get(len + 1..).unwrap_or(&[]);
        }
        Ok(blobs)
    }

    fn sizes(&self, number: u32) -> Result<Option<&'a BlobSizes>, BootstrapError> {
        let entries = self.header.blob_sizes.get();
        let at = At::new("extended blob table", self.header.blob_sizes_offset.get());
        at.require(entries == 0 || number < entries, || format!("{entries} entries are too few"))?;
        let offset = at.offset.saturating_add(u64::from(number) * size_of::<BlobSizes>() as u64);
        if entries == 0 { Ok(None) } else { view(self.bytes, At::new("extended blob table", offset)).map(Some) }
    }
}

struct Translation<'a> {
    source: Source<'a>,
    /// Bytes of the file that no record has claimed.
    left: u64,
    /// By number, whether some directory has it.
    seen: Vec<bool>,
    draft: Draft,
    /// Files with several names, and their digests.
    files: BTreeMap<u64, (InodeIndex, [u8; 32])>,
    /// By blob and index.
    chunks: Vec<BTreeMap<u32, &'a ChunkRecord>>,
    /// Numbers of the first child and of all children, with what is known of the directory.
    directories: VecDeque<(Record<'a>, EntryIndex)>,
}

impl<'a> Translation<'a> {
    fn tree(&mut self) -> Result<(), BootstrapError> {
        let root = self.take(0)?;
        root.at.require(root.kind == Kind::Directory, || format!("the root is a {:?}", root.kind))?;
        let inode = self.draft.add_inode(root.inode(self.source.owner)?);
        self.draft.put_root(inode);
        self.directories.push_back((root, Draft::ROOT));
        while let Some((directory, entry)) = self.directories.pop_front() {
            self.directory(&directory, entry)?;
        }
        Ok(())
    }

    /// Reads a record, each once.
    fn take(&mut self, number: u32) -> Result<Record<'a>, BootstrapError> {
        let record = self.source.record(number)?;
        let new = !std::mem::replace(&mut self.seen[number as usize], true);
        record.at.require(new, || format!("inode {number} is in two directories"))?;
        let left = self.left.checked_sub(record.len);
        self.left = left.ok_or_else(|| record.at.invalid("the inodes claim more bytes than the file has"))?;
        Ok(record)
    }

    fn directory(&mut self, directory: &Record<'a>, entry: EntryIndex) -> Result<(), BootstrapError> {
        let (first, count) = (directory.fixed.first_child.get(), directory.fixed.children.get());
        // Numbers start at 1; without children the first means nothing.
        let numbers = first.checked_sub(1).and_then(|first| Some(first..first.checked_add(count)?));
        let numbers = if count == 0 { Some(0..0) } else { numbers };
        let numbers = numbers.ok_or_else(|| directory.at.invalid(format!("{count} children from {first} on")))?;
        let mut digests = Vec::new();
        for number in numbers {
            let child = self.take(number)?;
            digests.extend_from_slice(&child.fixed.digest);
            self.child(child, entry)?;
        }
        self.verify(directory, &digests)
    }

    fn child(&mut self, child: Record<'a>, directory: EntryIndex) -> Result<(), BootstrapError> {
        let name = child.name;
        let new = is_name(name) && name != b"." && name != b".." && self.draft.child(directory, name).is_none();
        child.at.require(new, || format!("name {:?}, or it is there twice", String::from_utf8_lossy(name)))?;
        // The flag for hard links is not always set; the number tells.
        let linked = child.kind == Kind::File && child.fixed.nlink.get() > 1;
        let known = self.files.get(&child.fixed.ino.get()).copied().filter(|_| linked);
        if let Some((inode, digest)) = known {
            child.at.require(digest == child.fixed.digest, || "another name of it has another digest".into())?;
            self.draft.put(directory, name, inode);
            return Ok(());
        }
        let mut inode = child.inode(self.source.owner)?;
        match child.kind {
            Kind::Directory => {}
            Kind::File => inode.chunks = self.file(&child, inode.size)?,
            Kind::Symlink => self.verify(&child, child.target)?,
            _ => self.verify(&child, &[])?,
        }
        let inode = self.draft.add_inode(inode);
        let entry = self.draft.put(directory, name, inode);
        if linked {
            self.files.insert(child.fixed.ino.get(), (inode, child.fixed.digest));
        }
        if child.kind == Kind::Directory {
            self.directories.push_back((child, entry));
        }
        Ok(())
    }

    /// The chunks of a file; their blocks are not known yet.
    fn file(&mut self, file: &Record<'a>, size: u64) -> Result<Vec<ChunkPlace>, BootstrapError> {
        let chunk_size = u64::from(self.source.chunk_size);
        let expected = size.div_ceil(chunk_size);
        let found = u64::from(file.fixed.children.get());
        file.at.require(expected == found, || format!("{found} chunks for {size} bytes"))?;
        let (mut places, mut digests) = (Vec::new(), Vec::new());
        for (number, chunk) in (0..).zip(file.chunks(self.source.bytes)) {
            let (at, chunk) = chunk?;
            let offset = number * chunk_size;
            let len = chunk_size.min(size - offset);
            let fits = chunk.file_offset.get() == offset && u64::from(chunk.decoded_size.get()) == len;
            at.require(fits, || format!("{} bytes of the file at {}", chunk.decoded_size, chunk.file_offset))?;
            digests.extend_from_slice(&chunk.digest);
            places.push(self.chunk(at, chunk)?);
        }
        self.verify(file, &digests)?;
        Ok(places)
    }

    fn chunk(&mut self, at: At, chunk: &'a ChunkRecord) -> Result<ChunkPlace, BootstrapError> {
        let (blob, index) = (chunk.blob.get(), chunk.index.get());
        let blobs = self.chunks.len();
        let known =
            self.chunks.get_mut(blob as usize).ok_or_else(|| at.invalid(format!("blob {blob} of {blobs}")))?;
        at.require(index < layout::MAX_CHUNKS, || format!("chunk {index}"))?;
        let bits = chunk.flags.get();
        if bits & !(chunk_flags::COMPRESSED | chunk_flags::HAS_CRC) != 0 {
            return Err(at.unsupported("an encrypted chunk or one of an unknown kind"));
        }
        let what = |chunk: &ChunkRecord| {
            let encoded = (chunk.encoded_offset.get(), chunk.encoded_size.get());
            (chunk.digest, chunk.decoded_size.get(), encoded, chunk.flags.get())
        };
        let first = known.entry(index).or_insert(chunk);
        at.require(what(first) == what(chunk), || format!("chunk {index} is described in two ways"))?;
        Ok(ChunkPlace { blob, index, block: 0 })
    }

    /// Compares the digest of an inode.
    fn verify(&self, record: &Record<'_>, content: &[u8]) -> Result<(), BootstrapError> {
        let found = codec::digest(self.source.algorithm, content);
        record.at.require(found.bytes == record.fixed.digest, || {
            format!("the digest of {:?} is another", String::from_utf8_lossy(record.name))
        })
    }

    fn finish(mut self, blobs: Vec<(BlobId, Option<&BlobSizes>)>) -> Result<Vec<u8>, BootstrapError> {
        let at = At::new("blob table", self.source.header.blob_table.get());
        let (mut entries, mut records) = (Vec::new(), Vec::new());
        let mut blocks: Vec<BTreeMap<u32, u32>> = Vec::new();
        for ((id, sizes), chunks) in blobs.into_iter().zip(&self.chunks) {
            let (mut decoded, mut places) = (0, BTreeMap::new());
            for (index, chunk) in chunks {
                places.insert(*index, (decoded / BLOCK) as u32);
                records.push(ChunkRecord { decoded_offset: decoded.into(), ..**chunk });
                decoded += u64::from(chunk.decoded_size.get()).next_multiple_of(BLOCK);
            }
            at.require(decoded < layout::MAX_DECODED, || format!("{decoded} bytes in blob {id}"))?;
            entries.push(self.entry(id, sizes, chunks, decoded));
            blocks.push(places);
        }
        for place in self.draft.inodes.iter_mut().flat_map(|inode| &mut inode.chunks) {
            place.block = blocks[place.blob as usize].get(&place.index).copied().unwrap_or(0);
        }
        let Source { chunk_size, compressor, algorithm, .. } = self.source;
        let (blobs, prefetch) = (entries, Vec::new());
        let contents = Contents { blobs, records, prefetch, chunk_size, compressor, algorithm, tarfs: false };
        bootstrap::write(&self.draft.finish(), contents).map_err(|error| at.invalid(error.to_string()))
    }

    fn entry(
        &self,
        id: BlobId,
        sizes: Option<&BlobSizes>,
        chunks: &BTreeMap<u32, &ChunkRecord>,
        decoded_size: u64,
    ) -> BlobEntry {
        // What the table of an old image does not state, its chunks tell.
        let named = chunks.last_key_value().map_or(0, |(index, _)| index + 1);
        let end = |chunk: &&ChunkRecord| chunk.encoded_offset.get().saturating_add(chunk.encoded_size.get().into());
        let used = chunks.values().map(end).max().unwrap_or(0);
        BlobEntry {
            blob_id: layout::blob_id(id),
            chunk_size: self.source.chunk_size.into(),
            chunk_count: sizes.map_or(named, |sizes| sizes.chunks.get()).into(),
            compressor: self.source.compressor.code().into(),
            digester: layout::digester(self.source.algorithm).into(),
            features: (features::ALIGNED | features::INTERNAL).into(),
            encoded_size: sizes.map_or(used, |sizes| sizes.encoded.get()).into(),
            // A device must have a block, also that of a blob that nothing is read from.
            decoded_size: decoded_size.max(BLOCK).into(),
            ..BlobEntry::new_zeroed()
        }
    }
}
