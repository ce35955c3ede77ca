//! A blob of its own for what a start needs, in the order in which it needs it.
//!
//! The hot chunks of an image are copied, in the order of a trace or a list, into a new blob, and files are led to them
//! there; all else stays where it is. So what was scattered is one range, which a node reads ahead with few, large requests,
//! and the prefetch table tells it to.
//!
//! A reordered copy of the old blobs would save the second copy of the hot chunks. But a blob is named by its bytes: all of
//! it would be new, to be pushed, fetched and kept once more by everybody, and no longer shared with other images. The old
//! blobs are what registries, nodes and dictionaries have already.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use serde::Serialize;
use shoal_proto::BlobId;

use super::blob::{BlobWriter, Known};
use super::dictionary::{Dictionary, OWN};
use super::image::Image;
use super::output::BlobTarget;
use super::overlay::Overlay;
use super::prefetch;
use super::tree::{ChunkPlace, Draft, Inode, Tree};
use super::{BuildError, BuildOptions, BuildReport, Builder, Encryption, Notes, pipeline};
use crate::blob_dir::BlobDirReader;
use crate::bootstrap::Bootstrap;
use crate::source::ChunkId;

/// What was laid out anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct OptimizeReport {
    /// Distinct chunks that the new blob has.
    pub hot_chunks: u64,
    /// Their bytes, decoded.
    pub hot_bytes: u64,
    /// Ranges of the old blobs in which they lay. In the new blob it is one.
    pub ranges_before: u64,
    /// Bytes of the new blob.
    pub encoded_bytes: u64,
    /// Size of the bootstrap file.
    pub bootstrap_bytes: u64,
    /// Files and directories that the prefetch table lists.
    pub prefetched: u64,
    /// The new blob; none where nothing is hot.
    #[serde(serialize_with = "super::display")]
    pub blob: Option<BlobId>,
    /// What was listed and is not in the image. At most [`MAX_NOTES`](super::MAX_NOTES).
    pub notes: Vec<String>,
}

impl Builder {
    /// Rewrites an image so that what the [prefetch list](Self::prefetch) means lies together in a new blob: writes the
    /// bootstrap to `bootstrap` and the blob into `blob_dir`, complete or not at all. Chunks come from `reader`, which
    /// verifies them. Chunk size and digest algorithm are those of the image, whatever the options say.
    pub fn optimize(
        &self,
        image: &Bootstrap,
        reader: &BlobDirReader,
        bootstrap: &Path,
        blob_dir: &Path,
    ) -> Result<OptimizeReport, BuildError> {
        // A copy of what is encrypted is encrypted as well.
        let encryption = if image.is_encrypted() { Encryption::FreshKey } else { self.options.encryption };
        let (chunk_size, algorithm) = (image.chunk_size(), image.algorithm());
        let options = BuildOptions { chunk_size, algorithm, encryption, ..self.options };
        options.check()?;
        let (dictionary, _) = Dictionary::new(std::slice::from_ref(image), &options)?;
        let mut tree = tree(image)?;
        let mut notes = Notes::default();
        let prefetched = self.find_prefetched(&tree, &mut notes);
        let hot = prefetch::chunks(&tree, &self.prefetch);
        let ranges_before = ranges(&hot, reader);
        let writer = BlobWriter::new(BlobTarget::Dir(blob_dir), options, Known::default())?;
        let ((), stored) = pipeline::run(options, writer, self.watch(None), |feed| {
            hot.iter().enumerate().try_for_each(|(number, place)| {
                let bytes = reader.read(chunk_id(*place)).map_err(|source| BuildError::Chunk { source })?;
                feed.stream(number, &mut &bytes[..], bytes.len() as u64, |_| BuildError::Worker)
            })
        })?;
        let moved = hot.iter().copied().zip(stored.places.into_iter().flatten()).collect();
        lead(&mut tree, &moved);
        let hot_bytes = stored.writer.records.iter().map(|record| u64::from(record.decoded_size.get())).sum();
        let prefetch = prefetched.inodes(&tree);
        let report = Image { options, tree, writer: stored.writer, dictionary, prefetch }
            .write(stored.chunks, Some(bootstrap))?;
        let BuildReport { unique_chunks: hot_chunks, encoded_bytes, bootstrap_bytes, prefetched, blob, .. } = report;
        let notes = notes.lines;
        Ok(OptimizeReport {
            hot_chunks,
            hot_bytes,
            ranges_before,
            encoded_bytes,
            bootstrap_bytes,
            prefetched,
            blob,
            notes,
        })
    }
}

/// The tree of an image, with its blobs as those of a dictionary.
fn tree(image: &Bootstrap) -> Result<Tree, BuildError> {
    let mut draft = Draft::new(Inode::implied_directory());
    let numbers: Vec<u32> = (0..image.blobs().len() as u32).map(|blob| blob + OWN + 1).collect();
    Overlay::new(image, &numbers, &mut draft).copy().map_err(|source| BuildError::Image { source })?;
    Ok(draft.finish())
}

fn chunk_id(place: ChunkPlace) -> ChunkId {
    ChunkId { blob: place.blob - OWN - 1, index: place.index }
}

/// Leads files to the new places of chunks.
fn lead(tree: &mut Tree, moved: &HashMap<ChunkPlace, ChunkPlace>) {
    for place in tree.inodes.iter_mut().flat_map(|inode| inode.chunks.iter_mut()) {
        if let Some(new) = moved.get(place) {
            *place = *new;
        }
    }
}

/// How many ranges of their blobs these chunks take: what a reader that wants just them has to ask for.
fn ranges(chunks: &[ChunkPlace], reader: &BlobDirReader) -> u64 {
    let ids = chunks.iter().map(|place| chunk_id(*place));
    let ranges: BTreeSet<_> = ids
        .filter_map(|id| {
            let table = reader.table(id.blob)?;
            let encoded = table.piece(table.piece_of_chunk(id.index)?)?.encoded();
            Some((id.blob, encoded.start, encoded.end))
        })
        .collect();
    let mut end = None;
    let starts =
        ranges.into_iter().filter(|(blob, start, stop)| end.replace((*blob, *stop)) != Some((*blob, *start)));
    starts.count() as u64
}
