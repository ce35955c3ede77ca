//! The blobs of several bootstraps as one list, with the chunks that each bootstrap knows of them.

use std::collections::{HashMap, HashSet};

use shoal_proto::{Algorithm, BlobId};
use zerocopy::FromBytes;

use crate::bootstrap::{Blob, Bootstrap, TocRange};
use crate::builder::BuildError;
use crate::builder::merge::LayerBlob;
use crate::builder::tree::ChunkPlace;
use crate::layout::{self, BlobEntry, CI_HEADER, ChunkRecord, ExtSuperBlock, SuperBlock, features, flags};

/// Blobs in the order in which they were added, each once.
#[derive(Debug, Default)]
pub(super) struct Blobs {
    blobs: Vec<KnownBlob>,
    numbers: HashMap<BlobId, u32>,
    /// By number of the blob and index.
    records: HashMap<(u32, u32), ChunkRecord>,
}

#[derive(Debug)]
struct KnownBlob {
    id: BlobId,
    algorithm: Algorithm,
    entry: BlobEntry,
}

impl KnownBlob {
    /// A bootstrap in its own blob knows neither the blob's name nor how large it became.
    fn new(blob: &Blob, entry: &BlobEntry) -> Self {
        let TocRange { size, sha256 } = blob.toc.unwrap_or(TocRange { size: 0, sha256: [0; 32] });
        let entry = BlobEntry {
            blob_id: layout::blob_id(blob.id),
            features: (entry.features.get() & !features::INLINED_META).into(),
            encoded_size: blob.encoded_size.into(),
            toc_size: size.into(),
            toc_digest: sha256,
            ..*entry
        };
        Self { id: blob.id, algorithm: blob.algorithm, entry }
    }

    /// What others know of it.
    fn correct(&mut self, brought: &LayerBlob) -> Result<(), String> {
        // A tar was complete before its bootstrap, which knows all of it. Its name may still be another one.
        if self.entry.features.get() & features::TARFS != 0 {
            if let Some(id) = brought.file {
                (self.id, self.entry.blob_id) = (id, layout::blob_id(id));
            }
            return Ok(());
        }
        let separate = self.entry.features.get() & features::SEPARATE != 0;
        if let Some(id) = brought.file.filter(|_| !separate).or(brought.id) {
            (self.id, self.entry.blob_id) = (id, layout::blob_id(id));
        }
        // Of what follows these bytes the layer does not know all, but they are there.
        let least = match separate {
            false => self.entry.encoded_size.get(),
            // Nobody has looked at the offset of a table of no chunks.
            true => self.entry.ci_offset.get().saturating_add(self.entry.ci_encoded_size.get() + CI_HEADER),
        };
        if let Some(size) = brought.file_size.filter(|size| !(least..=layout::MAX_ENCODED).contains(size)) {
            return Err(format!("its blob {} has {least} bytes and more, not {size}", self.id));
        }
        match (separate, brought.file, brought.file_size) {
            (false, _, size) => self.entry.encoded_size = size.unwrap_or(least).into(),
            (true, file, size) => {
                self.entry.meta_digest = file.map_or(self.entry.meta_digest, |file| *file.as_bytes());
                self.entry.meta_size = size.unwrap_or(self.entry.meta_size.get()).into();
            }
        }
        self.entry.toc_digest = brought.toc_digest.unwrap_or(self.entry.toc_digest);
        self.entry.toc_size = brought.toc_size.unwrap_or(self.entry.toc_size.get()).into();
        Ok(())
    }
}

impl Blobs {
    /// Adds the blobs of a bootstrap, of which an image of the usual kind will use chunks; returns their numbers in the order of
    /// its blob table.
    pub(super) fn add(&mut self, bootstrap: &Bootstrap) -> Result<Vec<u32>, String> {
        if bootstrap.is_tarfs() {
            return Err("it is in tarfs mode, and chunks of other images cannot lie in tars".into());
        }
        self.add_layer(bootstrap, LayerBlob::default(), &HashSet::new())
    }

    /// Likewise, where more is known of the blob that the layer brought: the one that is none of `earlier`.
    pub(super) fn add_layer(
        &mut self,
        bootstrap: &Bootstrap,
        brought: LayerBlob,
        earlier: &HashSet<BlobId>,
    ) -> Result<Vec<u32>, String> {
        let entries = blob_entries(bootstrap)?;
        let own = |blob: &Blob| brought != LayerBlob::default() && !earlier.contains(&blob.id);
        if bootstrap.blobs().iter().filter(|blob| own(blob)).count() > 1 {
            return Err("it has several blobs, of which one alone can be named or described".into());
        }
        let mut numbers = Vec::new();
        for (blob, entry) in bootstrap.blobs().iter().zip(entries) {
            let next = self.blobs.len() as u32;
            let mut new = KnownBlob::new(blob, entry);
            if own(blob) {
                new.correct(&brought)?;
            }
            let number = *self.numbers.entry(new.id).or_insert(next);
            match self.blobs.get(number as usize) {
                Some(known) if !same_blob(&known.entry, &new.entry) => {
                    return Err(format!("it describes blob {} in another way than a layer below it", new.id));
                }
                Some(_) => {}
                None => self.blobs.push(new),
            }
            numbers.push(number);
        }
        // One name for two of its blobs would make them one.
        if numbers.iter().collect::<HashSet<_>>().len() < numbers.len() {
            return Err("the name that is given for its blob is that of another one".into());
        }
        for record in bootstrap.records() {
            // The bootstrap was verified: its records name its blobs.
            let number = numbers[record.blob.get() as usize];
            let known = self.records.entry((number, record.index.get())).or_insert(*record);
            if !same_chunk(known, record) {
                let id = self.blobs[number as usize].id;
                return Err(format!(
                    "it describes chunk {} of blob {id} in another way than a layer below it",
                    record.index
                ));
            }
        }
        Ok(numbers)
    }

    pub(super) fn numbers(&self) -> impl Iterator<Item = u32> {
        0..self.blobs.len() as u32
    }

    pub(super) fn id(&self, number: u32) -> BlobId {
        self.blobs[number as usize].id
    }

    pub(super) fn algorithm(&self, number: u32) -> Algorithm {
        self.blobs[number as usize].algorithm
    }

    /// How the blob table of another image describes a blob.
    pub(super) fn entry(&self, number: u32) -> BlobEntry {
        self.blobs[number as usize].entry
    }

    /// What is known of a chunk: its digest's algorithm and its record.
    pub(super) fn record(&self, place: ChunkPlace) -> Result<(Algorithm, ChunkRecord), BuildError> {
        let blob = &self.blobs[place.blob as usize];
        let record = self.records.get(&(place.blob, place.index));
        let record = record.ok_or(BuildError::UnknownChunk { blob: blob.id, index: place.index })?;
        Ok((blob.algorithm, *record))
    }
}

/// The blob table as it lies in the file. A bootstrap that is none of ours to merge is refused; so are blobs of RAFS v5, as
/// v6 cannot name a blob without a chunk table.
fn blob_entries(bootstrap: &Bootstrap) -> Result<&[BlobEntry], String> {
    if bootstrap.blobs().iter().any(Blob::is_v5) {
        return Err("it is of RAFS v5, and an image of v6 cannot use its blobs".into());
    }
    let bytes = bootstrap.as_bytes();
    let unreadable = || "it is no RAFS v6 bootstrap".to_owned();
    let block = bytes.get(layout::SUPER_OFFSET as usize..).ok_or_else(unreadable)?;
    let (block, ext) = SuperBlock::ref_from_prefix(block).map_err(|_| unreadable())?;
    if block.magic.get() != layout::SUPER_MAGIC {
        return Err(unreadable());
    }
    let (ext, _) = ExtSuperBlock::ref_from_prefix(ext).map_err(|_| unreadable())?;
    if ext.flags.get() & flags::EXPLICIT_OWNERS == 0 {
        return Err("it does not say who owns its files".into());
    }
    let table = bytes.get(ext.blob_table_offset.get() as usize..).ok_or_else(unreadable)?;
    let table = <[BlobEntry]>::ref_from_prefix_with_elems(table, bootstrap.blobs().len());
    table.map(|(entries, _)| entries).map_err(|_| unreadable())
}

/// Whether two bootstraps mean the same stored bytes by a blob. What only says where the bootstrap came from may differ.
fn same_blob(one: &BlobEntry, other: &BlobEntry) -> bool {
    let stored = |blob: &BlobEntry| {
        (
            (blob.chunk_count.get(), blob.compressor.get(), blob.digester.get(), blob.cipher.get()),
            (blob.decoded_size.get(), blob.ci_offset.get(), blob.ci_encoded_size.get(), blob.ci_decoded_size.get()),
            (blob.features.get() & !features::INLINED_META, blob.meta_digest, blob.meta_size.get(), blob.iv.get()),
        )
    };
    stored(one) == stored(other)
}

fn same_chunk(one: &ChunkRecord, other: &ChunkRecord) -> bool {
    let stored = |chunk: &ChunkRecord| {
        (
            (chunk.digest, chunk.flags.get(), chunk.encoded_size.get(), chunk.decoded_size.get()),
            (chunk.encoded_offset.get(), chunk.decoded_offset.get()),
        )
    };
    stored(one) == stored(other)
}
