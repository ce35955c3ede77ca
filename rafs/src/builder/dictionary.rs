//! Chunks of earlier images that a new one reads from where they are.
//!
//! A chunk is the same when algorithm, digest and decoded length are; how it was compressed, and whether it is in a batch,
//! is the matter of the blob that has it. What a dictionary says of a blob is not compared with the blob: if it lies, the
//! image's reader finds out, as with any other blob.

use std::collections::HashMap;

use shoal_proto::BlobId;

use super::blob::ChunkKey;
use super::blobs::Blobs;
use super::tree::ChunkPlace;
use super::{BuildError, BuildOptions};
use crate::bootstrap::Bootstrap;
use crate::layout::{BLOCK, BlobEntry, ChunkRecord};

/// Number of the blob that is being written; those of the dictionary follow.
pub(super) const OWN: u32 = 0;

/// The blobs of earlier images, numbered from [`OWN`] + 1.
#[derive(Debug, Default)]
pub(super) struct Dictionary {
    blobs: Blobs,
}

impl Dictionary {
    /// The chunks of these images that an image with these options can use, and where they lie. Where several have a chunk,
    /// that of the first image counts.
    pub(super) fn new(
        images: &[Bootstrap],
        options: &BuildOptions,
    ) -> Result<(Self, HashMap<ChunkKey, ChunkPlace>), BuildError> {
        let (mut blobs, mut chunks) = (Blobs::default(), HashMap::new());
        for (position, image) in images.iter().enumerate() {
            let failed = |problem| BuildError::Dictionary { position: position + 1, problem };
            if image.chunk_size() != options.chunk_size {
                let problem = format!("its chunk size is {:#x}, not {:#x}", image.chunk_size(), options.chunk_size);
                return Err(failed(problem));
            }
            let numbers = blobs.add(image).map_err(failed)?;
            for record in image.records() {
                let number = numbers[record.blob.get() as usize];
                if blobs.algorithm(number) == options.algorithm {
                    let block = (record.decoded_offset.get() / BLOCK) as u32;
                    let place = ChunkPlace { blob: OWN + 1 + number, index: record.index.get(), block };
                    chunks.entry((record.digest, record.decoded_size.get())).or_insert(place);
                }
            }
        }
        Ok((Self { blobs }, chunks))
    }

    /// How the blob table of another image describes a blob.
    pub(super) fn entry(&self, blob: u32) -> BlobEntry {
        self.blobs.entry(blob - OWN - 1)
    }

    /// The name of a blob.
    pub(super) fn id(&self, blob: u32) -> BlobId {
        self.blobs.id(blob - OWN - 1)
    }

    /// What is known of a chunk.
    pub(super) fn record(&self, place: ChunkPlace) -> Result<ChunkRecord, BuildError> {
        let known = self.blobs.record(ChunkPlace { blob: place.blob - OWN - 1, ..place })?;
        Ok(known.1)
    }
}
