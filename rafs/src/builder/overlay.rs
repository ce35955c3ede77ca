//! The tree of a bootstrap over others: whiteouts take names away, the rest is put over what is there.

use std::collections::{HashMap, HashSet};

use super::tree::{ChunkPlace, Draft, EntryIndex, Inode, InodeIndex};
use crate::bootstrap::{self as read, Bootstrap, BootstrapError, Kind, Nid};

/// Puts the tree of one bootstrap into a draft.
pub(super) struct Overlay<'a> {
    layer: &'a Bootstrap,
    /// Numbers of the layer's blobs among all blobs.
    numbers: &'a [u32],
    draft: &'a mut Draft,
    /// Whether it is a layer over others: names that take others away do so, and are not kept.
    over: bool,
    /// Directories that keep the attributes that they have below.
    implied: HashSet<Nid>,
    /// Files of this layer that have a name already.
    inodes: HashMap<Nid, InodeIndex>,
    /// In which directory each directory of the layer lies, in the draft.
    parents: HashMap<EntryIndex, EntryIndex>,
}

impl<'a> Overlay<'a> {
    pub(super) fn new(layer: &'a Bootstrap, numbers: &'a [u32], draft: &'a mut Draft) -> Self {
        Self {
            layer,
            numbers,
            draft,
            over: true,
            implied: HashSet::new(),
            inodes: HashMap::new(),
            parents: HashMap::new(),
        }
    }

    /// Puts the layer over what is there. The directories `implied` keep the attributes that they have below.
    pub(super) fn put(mut self, implied: HashSet<Nid>) -> Result<(), BootstrapError> {
        self.implied = implied;
        self.run()
    }

    /// Copies the tree as it is, whiteouts too, into an empty draft.
    pub(super) fn copy(mut self) -> Result<(), BootstrapError> {
        self.over = false;
        self.run()
    }

    fn run(&mut self) -> Result<(), BootstrapError> {
        if !self.implied.contains(&self.layer.root()) {
            let root = self.inode(self.layer.root())?;
            self.draft.put_root(root);
        }
        let mut directories = vec![(Draft::ROOT, self.layer.root())];
        while let Some((directory, nid)) = directories.pop() {
            if self.over {
                self.take_away(directory, nid)?;
            }
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
            if dots || self.over && (entry.name.starts_with(WHITEOUT) || self.is_device_whiteout(&entry)?) {
                continue;
            }
            let below = self.draft.child(directory, entry.name).filter(|_| self.implied.contains(&entry.nid));
            let name = match below {
                Some(below) if self.draft.is_directory(below) => below,
                below => {
                    let inode = match below.and_then(|link| self.led(directory, link)) {
                        Some(led) => self.draft.add_inode(self.draft.inode(led).clone()),
                        None => self.inode(entry.nid)?,
                    };
                    self.draft.put(directory, entry.name, inode)
                }
            };
            if entry.kind == Kind::Directory {
                self.parents.insert(name, directory);
                directories.push((name, entry.nid));
            }
        }
        Ok(())
    }

    /// The directory that a symbolic link in a directory of the layer leads to, if it does.
    ///
    /// A directory that takes the place of a link, only because the layer has files in it, has the attributes of that one:
    /// runtimes that unpack each layer for itself, for overlayfs, make it so.
    fn led(&self, directory: EntryIndex, link: EntryIndex) -> Option<EntryIndex> {
        let mut way = vec![directory];
        while let Some(parent) = way.last().and_then(|at| self.parents.get(at)) {
            way.push(*parent);
        }
        way.reverse();
        let (mut next, mut links, mut rest) = (Some(link), 0, Vec::<&[u8]>::new());
        loop {
            if let Some(entry) = next {
                let inode = self.draft.inode(entry);
                match inode.kind {
                    Kind::Directory => way.push(entry),
                    Kind::Symlink if links < MAX_LINKS => {
                        links += 1;
                        if inode.target.starts_with(b"/") {
                            way.truncate(1);
                        }
                        rest.extend(inode.target.split(|byte| *byte == b'/').rev());
                    }
                    _ => return None,
                }
            }
            next = match rest.pop() {
                None => return way.last().copied(),
                Some(b"" | b".") => None,
                Some(b"..") => {
                    way.truncate(way.len().max(2) - 1);
                    None
                }
                Some(name) => Some(self.draft.child(*way.last()?, name)?),
            };
        }
    }

    fn is_device_whiteout(&self, entry: &read::Entry<'_>) -> Result<bool, BootstrapError> {
        Ok(entry.kind == Kind::CharDevice && is_device_whiteout(&self.layer.inode(entry.nid)?))
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
        if self.over && inode.kind() == Kind::Directory {
            xattrs.retain(|(name, _)| name != OVERLAY_OPAQUE);
        }
        let chunks = inode.chunks().map(|chunk| ChunkPlace {
            blob: self.numbers[chunk.id.blob as usize],
            index: chunk.id.index,
            block: (chunk.decoded_offset / self.layer.block_size()) as u32,
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

/// Most symbolic links on one way, as for the kernel.
const MAX_LINKS: usize = 40;

/// What the name of a file starts with that takes the rest of the name away.
pub(crate) const WHITEOUT: &[u8] = b".wh.";
/// The file that takes away all that lower layers have in its directory.
pub(crate) const OPAQUE: &[u8] = b".wh..wh..opq";
/// The xattr that does the same.
pub(crate) const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";

/// Whether overlayfs hides what lower layers have in this directory.
pub(crate) fn is_opaque(directory: &read::Inode<'_>) -> bool {
    directory.xattr(OVERLAY_OPAQUE) == Some(b"y")
}

/// Whether overlayfs hides what lower layers have under the name of this inode.
pub(crate) fn is_device_whiteout(inode: &read::Inode<'_>) -> bool {
    inode.kind() == Kind::CharDevice && inode.rdev() == 0
}
