//! From a tree whose chunks have places to files: the rest of the blob, and the bootstrap, inside of it and beside it.

use std::path::Path;

use shoal_proto::BlobId;

use super::blob::BlobWriter;
use super::bootstrap::{self, Contents};
use super::dictionary::{self, Dictionary};
use super::parts::{FinishedBlob, OpenBlob};
use super::tree::{ChunkPlace, InodeIndex, Tree};
use super::{BuildError, BuildOptions, BuildReport, replace};
use crate::layout::{BlobEntry, ChunkRecord};

/// A tree, the blob with its chunks, and the earlier images that it uses.
pub(super) struct Image {
    pub(super) options: BuildOptions,
    pub(super) tree: Tree,
    pub(super) writer: BlobWriter,
    pub(super) dictionary: Dictionary,
    /// What the prefetch table lists, in order.
    pub(super) prefetch: Vec<InodeIndex>,
}

/// Blobs and chunks of an image.
struct Tables {
    /// Numbers of the blobs in the order of the blob table.
    order: Vec<u32>,
    records: Vec<ChunkRecord>,
    /// Of these, chunks in blobs of earlier images.
    shared_chunks: u64,
    /// Their bytes, decoded.
    shared_bytes: u64,
}

impl Image {
    /// Completes the blob, and writes the bootstrap to `path` if it is wanted beside the blob. Of the report the notes are
    /// missing.
    pub(super) fn write(mut self, chunks: u64, path: Option<&Path>) -> Result<BuildReport, BuildError> {
        let mut blob = OpenBlob::new(self.writer)?;
        let unique_chunks = blob.records.len() as u64;
        let tables = Tables::new(&mut self.tree, std::mem::take(&mut blob.records), &self.dictionary)?;
        let contents = |own: Option<BlobEntry>| Contents {
            blobs: tables.entries(own, &self.dictionary),
            records: tables.records.clone(),
            prefetch: self.prefetch.clone(),
            chunk_size: self.options.chunk_size,
            compressor: self.options.compressor,
            algorithm: self.options.algorithm,
            tarfs: false,
        };
        let inlined = self.options.inline_meta.then(|| bootstrap::write(&self.tree, contents(blob.inlined_entry())));
        let inlined = inlined.transpose()?;
        let blob = blob.finish(inlined.as_deref())?;
        let mut bootstrap_bytes = inlined.map_or(0, |inlined| inlined.len() as u64);
        if let Some(path) = path {
            let bytes = bootstrap::write(&self.tree, contents(blob.as_ref().and_then(|blob| blob.entry)))?;
            replace(path, &bytes)?;
            bootstrap_bytes = bytes.len() as u64;
        }
        let (encoded_bytes, blob) =
            blob.map_or((0, None), |FinishedBlob { id, encoded_size, .. }| (encoded_size, Some(id)));
        Ok(BuildReport {
            encoded_bytes,
            bootstrap_bytes,
            chunks,
            unique_chunks,
            shared_chunks: tables.shared_chunks,
            shared_bytes: tables.shared_bytes,
            prefetched: self.prefetch.len() as u64,
            blob,
            shared_blobs: tables.shared_blobs(&self.dictionary),
            ..BuildReport::of(&self.tree)
        })
    }
}

impl Tables {
    /// Numbers the blobs of a tree by first use. Of the own blob all chunks are described, of the others those that the tree
    /// names.
    fn new(tree: &mut Tree, own: Vec<ChunkRecord>, dictionary: &Dictionary) -> Result<Self, BuildError> {
        let mut order = tree.number_blobs();
        // All of its files may have been replaced by later ones of an archive.
        if !own.is_empty() && !order.contains(&dictionary::OWN) {
            order.push(dictionary::OWN);
        }
        let position = order.iter().position(|number| *number == dictionary::OWN).unwrap_or(0) as u32;
        let mut tables = Self { order, records: own, shared_chunks: 0, shared_bytes: 0 };
        tables.records.iter_mut().for_each(|record| record.blob = position.into());
        for place in tree.places() {
            let number = tables.order[place.blob as usize];
            if number != dictionary::OWN {
                let record = dictionary.record(ChunkPlace { blob: number, ..place })?;
                tables.records.push(ChunkRecord { blob: place.blob.into(), ..record });
                tables.shared_chunks += 1;
                tables.shared_bytes += u64::from(record.decoded_size.get());
            }
        }
        Ok(tables)
    }

    /// The blobs of earlier images among them.
    fn shared_blobs(&self, dictionary: &Dictionary) -> Vec<BlobId> {
        self.order.iter().filter(|number| **number != dictionary::OWN).map(|number| dictionary.id(*number)).collect()
    }

    /// The blob table, with what is known of the own blob.
    fn entries(&self, own: Option<BlobEntry>, dictionary: &Dictionary) -> Vec<BlobEntry> {
        let entry = |number: &u32| match *number {
            dictionary::OWN => own,
            number => Some(dictionary.entry(number)),
        };
        self.order.iter().filter_map(entry).collect()
    }
}
