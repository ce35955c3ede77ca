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
//! its attributes and keeps its entries, also at the root; anything else replaces what was there. Hard links stay within
//! their layer.
//!
//! Only chunks that the image names anyway are shared: sharing never keeps a blob that would be dropped, and often drops
//! one that would be kept. Prefetch tables of layers are not carried over.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use serde::Serialize;
use shoal_proto::Algorithm;

use super::bootstrap::{self, Contents};
use super::tree::{ChunkPlace, Draft, EntryIndex, Inode, InodeIndex, Tree};
use super::{BuildError, ForeignLink, LayerNotes, replace};
use crate::bootstrap::{self as read, Bootstrap, BootstrapError, Kind, Nid};
use crate::layout::{BLOCK, ChunkRecord};
use blobs::Blobs;

mod blobs;

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

/// Merges layers, the lowest first, and writes the bootstrap to `output`, complete or not at all. Blobs are not read.
///
/// # Errors
/// Layers that differ in chunk size, that lack owners, or that disagree about a blob; an image beyond the limits of the
/// format, such as 254 blobs.
pub fn merge(layers: &[Bootstrap], output: &Path) -> Result<MergeReport, MergeError> {
    let layers: Vec<_> = layers.iter().map(|layer| (layer.clone(), LayerNotes::default())).collect();
    merge_noted(&layers, output)
}

/// Like [`merge`], with what the layers leave to each other.
///
/// # Errors
/// Also a hard link to what no lower layer has.
pub fn merge_noted(layers: &[(Bootstrap, LayerNotes)], output: &Path) -> Result<MergeReport, MergeError> {
    let (Some((lowest, _)), Some((topmost, _))) = (layers.first(), layers.last()) else {
        return Err(MergeError::Empty);
    };
    let mut blobs = Blobs::default();
    let mut draft = Draft::new(Inode::implied_directory());
    for (position, (layer, notes)) in layers.iter().enumerate() {
        let mismatch = |problem| MergeError::Mismatch { layer: position + 1, problem };
        if layer.chunk_size() != lowest.chunk_size() {
            let (found, expected) = (layer.chunk_size(), lowest.chunk_size());
            return Err(mismatch(format!("its chunk size is {found:#x}, that of the lowest {expected:#x}")));
        }
        let numbers = blobs.add(layer).map_err(mismatch)?;
        let broken = |source| MergeError::Bootstrap { layer: position + 1, source };
        let implied = implied(layer, notes).map_err(broken)?;
        let overlay = Overlay { layer, implied, numbers: &numbers, draft: &mut draft, inodes: HashMap::new() };
        overlay.run().map_err(broken)?;
        notes.links.iter().try_for_each(|foreign| link(&mut draft, foreign)).map_err(mismatch)?;
    }
    let mut tree = draft.finish();
    let shared = share(&mut tree, &blobs)?;
    let order = number_blobs(&mut tree);
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
    };
    let contents = Contents {
        blobs: order.iter().map(|blob| blobs.entry(*blob)).collect(),
        records,
        chunk_size: lowest.chunk_size(),
        compressor: topmost.compressor(),
        algorithm: topmost.algorithm(),
    };
    let bytes = bootstrap::write(&tree, contents)?;
    replace(output, &bytes)?;
    Ok(MergeReport { bootstrap_bytes: bytes.len() as u64, ..report })
}

/// The directories that a layer has and does not describe.
fn implied(layer: &Bootstrap, notes: &LayerNotes) -> Result<HashSet<Nid>, BootstrapError> {
    let mut found = HashSet::new();
    for path in &notes.implied {
        let mut nid = Some(layer.root());
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            let Some(directory) = nid else { break };
            let directory = layer.inode(directory)?;
            nid = if directory.kind() == Kind::Directory { directory.lookup(name)? } else { None };
        }
        found.extend(nid);
    }
    Ok(found)
}

/// Gives a file of a lower layer another name.
fn link(draft: &mut Draft, ForeignLink { path, target }: &ForeignLink) -> Result<(), String> {
    let show = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    let mut names = target.split(|byte| *byte == b'/');
    let found = names.try_fold(Draft::ROOT, |entry, name| draft.child(entry, name));
    let found = found.filter(|entry| !draft.is_directory(*entry));
    let found =
        found.ok_or_else(|| format!("{:?} is a hard link to {:?}, which is no file", show(path), show(target)))?;
    let inode = draft.inode_index(found);
    let mut names: Vec<_> = path.split(|byte| *byte == b'/').collect();
    let name = names.pop().unwrap_or_default();
    let mut directory = Draft::ROOT;
    for name in names {
        directory = match draft.child(directory, name).filter(|entry| draft.is_directory(*entry)) {
            Some(entry) => entry,
            None => {
                let implied = draft.add_inode(Inode::implied_directory());
                draft.put(directory, name, implied)
            }
        };
    }
    draft.put(directory, name, inode);
    Ok(())
}

/// Puts one layer over those below it.
struct Overlay<'a> {
    layer: &'a Bootstrap,
    /// Directories that keep the attributes that they have below.
    implied: HashSet<Nid>,
    /// Numbers of the layer's blobs among all blobs.
    numbers: &'a [u32],
    draft: &'a mut Draft,
    /// Files of this layer that have a name already.
    inodes: HashMap<Nid, InodeIndex>,
}

impl Overlay<'_> {
    fn run(mut self) -> Result<(), BootstrapError> {
        if !self.implied.contains(&self.layer.root()) {
            let root = self.inode(self.layer.root())?;
            self.draft.put_root(root);
        }
        let mut directories = vec![(Draft::ROOT, self.layer.root())];
        while let Some((directory, nid)) = directories.pop() {
            self.take_away(directory, nid)?;
            self.put_over(directory, nid, &mut directories)?;
        }
        Ok(())
    }

    /// Removes what the layer's directory says is gone from below.
    fn take_away(&mut self, directory: EntryIndex, nid: Nid) -> Result<(), BootstrapError> {
        let inode = self.layer.inode(nid)?;
        if is_opaque(&inode) || inode.lookup(OPAQUE)?.is_some() {
            self.draft.clear(directory);
            return Ok(());
        }
        for entry in inode.entries() {
            let entry = entry?;
            if let Some(name) = entry.name.strip_prefix(WHITEOUT) {
                self.draft.remove(directory, name);
            } else if self.is_device_whiteout(&entry)? {
                self.draft.remove(directory, entry.name);
            }
        }
        Ok(())
    }

    fn put_over(
        &mut self,
        directory: EntryIndex,
        nid: Nid,
        directories: &mut Vec<(EntryIndex, Nid)>,
    ) -> Result<(), BootstrapError> {
        for entry in self.layer.inode(nid)?.entries() {
            let entry = entry?;
            let dots = entry.name == b"." || entry.name == b"..";
            if dots || entry.name.starts_with(WHITEOUT) || self.is_device_whiteout(&entry)? {
                continue;
            }
            let below = self.draft.child(directory, entry.name).filter(|below| self.draft.is_directory(*below));
            let name = match below.filter(|_| self.implied.contains(&entry.nid)) {
                Some(below) => below,
                None => {
                    let inode = self.inode(entry.nid)?;
                    self.draft.put(directory, entry.name, inode)
                }
            };
            if entry.kind == Kind::Directory {
                directories.push((name, entry.nid));
            }
        }
        Ok(())
    }

    fn is_device_whiteout(&self, entry: &read::Entry<'_>) -> Result<bool, BootstrapError> {
        Ok(entry.kind == Kind::CharDevice && self.layer.inode(entry.nid)?.rdev() == 0)
    }

    /// An inode of the layer in the tree; names of one file share it.
    fn inode(&mut self, nid: Nid) -> Result<InodeIndex, BootstrapError> {
        if let Some(index) = self.inodes.get(&nid) {
            return Ok(*index);
        }
        let inode = self.layer.inode(nid)?;
        let mut xattrs: Vec<_> = inode.xattrs().map(|(name, value)| (name, value.to_vec())).collect();
        // Upstream's builder stores them in no particular order.
        xattrs.sort_unstable();
        if inode.kind() == Kind::Directory {
            xattrs.retain(|(name, _)| name != OVERLAY_OPAQUE);
        }
        let chunks = inode.chunks().map(|chunk| ChunkPlace {
            blob: self.numbers[chunk.id.blob as usize],
            index: chunk.id.index,
            block: (chunk.decoded_offset / BLOCK) as u32,
        });
        let index = self.draft.add_inode(Inode {
            kind: inode.kind(),
            mode: inode.mode(),
            uid: inode.uid(),
            gid: inode.gid(),
            size: if inode.kind() == Kind::Directory { 0 } else { inode.size() },
            rdev: inode.rdev(),
            mtime: inode.mtime(),
            xattrs,
            target: inode.target()?.to_vec(),
            chunks: chunks.collect(),
            nlink: 0,
            version: None,
        });
        if inode.kind() == Kind::File {
            self.inodes.insert(nid, index);
        }
        Ok(index)
    }
}

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

fn is_opaque(directory: &read::Inode<'_>) -> bool {
    directory.xattr(OVERLAY_OPAQUE) == Some(b"y")
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
    let mut places: Vec<ChunkPlace> = tree.inodes.iter().flat_map(|inode| inode.chunks.iter().copied()).collect();
    // Blobs are numbered from the lowest layer up.
    places.sort_unstable();
    places.dedup();
    let mut moved = HashMap::new();
    let mut shared = Shared::default();
    for place in places {
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

/// Numbers blobs by first use; returns their old numbers in the new order.
fn number_blobs(tree: &mut Tree) -> Vec<u32> {
    let mut order = Vec::new();
    let mut numbers = HashMap::new();
    for place in tree.inodes.iter_mut().flat_map(|inode| inode.chunks.iter_mut()) {
        place.blob = *numbers.entry(place.blob).or_insert_with(|| {
            order.push(place.blob);
            order.len() as u32 - 1
        });
    }
    order
}

/// The records of all chunks that the tree names, each once.
fn records(tree: &Tree, order: &[u32], blobs: &Blobs) -> Result<Vec<ChunkRecord>, BuildError> {
    let mut places: Vec<ChunkPlace> = tree.inodes.iter().flat_map(|inode| inode.chunks.iter().copied()).collect();
    places.sort_unstable();
    places.dedup();
    let record = |place: ChunkPlace| {
        let (_, record) = blobs.record(ChunkPlace { blob: order[place.blob as usize], ..place })?;
        Ok(ChunkRecord { blob: place.blob.into(), ..record })
    };
    places.into_iter().map(record).collect()
}
