//! Several layers to one image: a bootstrap over the blobs that they have.
//!
//! ```text
//! overlay    lowest layer first: whiteouts take away, the rest is put over what is there
//! share      a chunk that several blobs hold is read from the blob of the lowest layer
//! renumber   blobs by first use, breadth first; those that nothing names are dropped
//! ```
//!
//! A layer takes a name away with an empty file `.wh.NAME` (OCI) or a character device 0:0 in its place (overlayfs), and
//! all that lower layers have in a directory with a file `.wh..wh..opq` or an xattr `trusted.overlay.opaque` of `y`. None
//! of these are in the image, nor is anything else whose name starts with `.wh.`. A directory over a directory replaces
//! its attributes and keeps its entries, also at the root; anything else replaces what was there. What a layer's archive
//! says of lower layers, its bootstrap cannot: see [`LayerNotes`].
//!
//! Only chunks that the image names anyway are shared: sharing never keeps a blob that would be dropped, and often drops
//! one that would be kept.
//!
//! What layers want read early is wanted of the image, the lowest layer first: whatever is then at the paths that they list.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use shoal_proto::{Algorithm, BlobId};

use super::blobs::Blobs;
use super::bootstrap::{self, Contents};
use super::overlay::Overlay;
use super::prefetch::Prefetched;
use super::tree::{ChunkPlace, Draft, Inode, Tree};
use super::{BuildError, LayerNotes, MAX_NOTES, replace};
use crate::bootstrap::{Bootstrap, BootstrapError, Metadata};
use crate::layout::ChunkRecord;
use crate::prefetch::PrefetchList;

/// What was merged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MergeReport {
    /// Names in the image, the root included.
    pub names: u64,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Their content in bytes.
    pub decoded_bytes: u64,
    /// Size of the bootstrap file.
    pub bootstrap_bytes: u64,
    /// The blobs of the image, in the order of its blob table.
    pub blobs: Vec<String>,
    /// Blobs of the layers that the image does not need.
    pub dropped_blobs: Vec<String>,
    /// Distinct chunks that the image names.
    pub unique_chunks: u64,
    /// Chunks of upper layers that are read from the blob of a lower one.
    pub shared_chunks: u64,
    /// Their bytes, decoded: what need not be fetched a second time.
    pub shared_bytes: u64,
    /// Files and directories that the prefetch table lists.
    pub prefetched: u64,
    /// What was asked to be prefetched and is no file or directory of the image. At most [`MAX_NOTES`].
    pub not_prefetched: Vec<String>,
}

/// Why layers could not be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// There is nothing to merge.
    #[error("no layer to merge")]
    Empty,
    /// A layer does not go with the others.
    #[error("layer {layer}: {problem}")]
    Mismatch {
        /// Its position, the lowest is 1.
        layer: usize,
        /// How it differs.
        problem: String,
    },
    /// A layer could not be read.
    #[error("layer {layer}")]
    Bootstrap {
        /// Its position, the lowest is 1.
        layer: usize,
        /// What is wrong with it.
        #[source]
        source: BootstrapError,
    },
    /// The image could not be written.
    #[error(transparent)]
    Write(#[from] BuildError),
}

/// How to merge.
#[derive(Debug, Clone, Default)]
pub struct MergeOptions {
    /// What to read early, in place of what the layers say.
    pub prefetch: Option<PrefetchList>,
    /// What each layer leaves to those below it, the lowest first; layers beyond these leave nothing.
    pub notes: Vec<LayerNotes>,
    /// What is known of the blob that each layer brought, the lowest first; of layers beyond these, what they say themselves.
    pub blobs: Vec<LayerBlob>,
    /// Blobs of earlier images that layers read from: none of them was brought by a layer.
    pub earlier_blobs: HashSet<BlobId>,
}

/// What is known of the blob that a layer brought, and its bootstrap may not know: that was complete before the blob. What is
/// `None` is as the layer says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerBlob {
    /// The name of the blob.
    pub id: Option<BlobId>,
    /// The sha256 of the file with the bootstrap: the blob's name too, or for a gzip layer that of the meta blob.
    pub file: Option<BlobId>,
    /// Bytes of that file.
    pub file_size: Option<u64>,
    /// The sha256 of the table of contents at its end.
    pub toc_digest: Option<[u8; 32]>,
    /// Bytes of that table with its header.
    pub toc_size: Option<u32>,
}

/// Merges layers as [`merge_with`] does, in the usual way.
pub fn merge(layers: &[Bootstrap], output: &Path) -> Result<MergeReport, MergeError> {
    merge_with(layers, &MergeOptions::default(), output)
}

/// Merges layers, the lowest first, and writes the bootstrap to `output`, complete or not at all. Blobs are not read.
///
/// # Errors
/// Layers that differ in chunk size or in whether their blobs are tars, that lack owners, or that disagree about a blob; an image beyond the limits of the
/// format, such as 254 blobs; a hard link to what no lower layer has.
pub fn merge_with(layers: &[Bootstrap], options: &MergeOptions, output: &Path) -> Result<MergeReport, MergeError> {
    let (Some(lowest), Some(topmost)) = (layers.first(), layers.last()) else { return Err(MergeError::Empty) };
    let mut blobs = Blobs::default();
    let mut draft = Draft::new(Inode::implied_directory());
    let none = LayerNotes::default();
    for (position, layer) in layers.iter().enumerate() {
        let mismatch = |problem| MergeError::Mismatch { layer: position + 1, problem };
        if layer.chunk_size() != lowest.chunk_size() {
            let (found, expected) = (layer.chunk_size(), lowest.chunk_size());
            return Err(mismatch(format!("its chunk size is {found:#x}, that of the lowest {expected:#x}")));
        }
        if layer.is_tarfs() != lowest.is_tarfs() {
            let (found, expected) = (layer.block_size(), lowest.block_size());
            let problem =
                format!("its blocks have {found} bytes, those of the lowest {expected}: tars go with tars only");
            return Err(mismatch(problem));
        }
        let brought = options.blobs.get(position).copied().unwrap_or_default();
        let numbers = blobs.add_layer(layer, brought, &options.earlier_blobs).map_err(mismatch)?;
        let broken = |source| MergeError::Bootstrap { layer: position + 1, source };
        let notes = options.notes.get(position).unwrap_or(&none);
        let implied = notes.implied_in(layer).map_err(broken)?;
        Overlay::new(layer, &numbers, &mut draft).put(implied).map_err(broken)?;
        notes.links.iter().try_for_each(|link| link.put(&mut draft)).map_err(mismatch)?;
    }
    let mut tree = draft.finish();
    let prefetched = match &options.prefetch {
        Some(list) => Prefetched::find(&tree, list),
        None => Prefetched::find(&tree, &prefetch_of(layers)?),
    };
    // What has no digest cannot be compared, and an image has all digests or none.
    let digests = layers.iter().all(Bootstrap::has_digests);
    let shared = if digests { share(&mut tree, &blobs)? } else { Shared::default() };
    let order = tree.number_blobs();
    let records = records(&tree, &order, &blobs)?;
    let dropped = blobs.numbers().filter(|blob| !order.contains(blob));
    let report = MergeReport {
        names: tree.nodes.len() as u64,
        files: tree.files().count() as u64,
        decoded_bytes: tree.files().map(|inode| inode.size).sum(),
        bootstrap_bytes: 0,
        blobs: order.iter().map(|blob| blobs.id(*blob).to_string()).collect(),
        dropped_blobs: dropped.map(|blob| blobs.id(blob).to_string()).collect(),
        unique_chunks: records.len() as u64,
        shared_chunks: shared.chunks,
        shared_bytes: shared.bytes,
        prefetched: prefetched.nodes.len() as u64,
        not_prefetched: match options.prefetch {
            Some(_) => prefetched.unmatched.iter().take(MAX_NOTES).cloned().collect(),
            // What a lower layer wanted may be gone.
            None => Vec::new(),
        },
    };
    let contents = Contents {
        blobs: order.iter().map(|blob| blobs.entry(*blob)).collect(),
        records: if digests { records } else { Vec::new() },
        prefetch: prefetched.inodes(&tree),
        chunk_size: lowest.chunk_size(),
        compressor: topmost.compressor(),
        algorithm: topmost.algorithm(),
        tarfs: lowest.is_tarfs(),
    };
    let bytes = bootstrap::write(&tree, contents)?;
    replace(output, &bytes)?;
    Ok(MergeReport { bootstrap_bytes: bytes.len() as u64, ..report })
}

/// What the prefetch tables of layers list, by path.
fn prefetch_of(layers: &[Bootstrap]) -> Result<PrefetchList, MergeError> {
    let mut paths = Vec::new();
    for (position, layer) in layers.iter().enumerate() {
        let listed = Metadata::from(layer.clone()).prefetch_paths();
        paths.extend(listed.map_err(|source| MergeError::Bootstrap { layer: position + 1, source })?);
    }
    Ok(PrefetchList::exact(paths.iter().map(Vec::as_slice)))
}

/// What need not be fetched twice.
#[derive(Debug, Default)]
struct Shared {
    chunks: u64,
    bytes: u64,
}

/// Lets all files read a chunk from one place: that in the blob of the lowest layer among those that are named.
fn share(tree: &mut Tree, blobs: &Blobs) -> Result<Shared, BuildError> {
    let mut lowest: HashMap<(Algorithm, [u8; 32], u32), ChunkPlace> = HashMap::new();
    let mut moved = HashMap::new();
    let mut shared = Shared::default();
    // Blobs are numbered from the lowest layer up.
    for place in tree.places() {
        let (algorithm, record) = blobs.record(place)?;
        let key = (algorithm, record.digest, record.decoded_size.get());
        let target = *lowest.entry(key).or_insert(place);
        if target != place {
            moved.insert(place, target);
            shared.chunks += 1;
            shared.bytes += u64::from(record.decoded_size.get());
        }
    }
    for place in tree.inodes.iter_mut().flat_map(|inode| inode.chunks.iter_mut()) {
        if let Some(target) = moved.get(place) {
            *place = *target;
        }
    }
    Ok(shared)
}

/// The records of all chunks that the tree names, each once.
fn records(tree: &Tree, order: &[u32], blobs: &Blobs) -> Result<Vec<ChunkRecord>, BuildError> {
    let record = |place: ChunkPlace| {
        let (_, record) = blobs.record(ChunkPlace { blob: order[place.blob as usize], ..place })?;
        Ok(ChunkRecord { blob: place.blob.into(), ..record })
    };
    tree.places().into_iter().map(record).collect()
}
