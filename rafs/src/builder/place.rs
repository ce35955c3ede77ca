//! Decides where each inode and its data lie in the meta area of a bootstrap.

use std::collections::BTreeSet;

use super::directory::{self, Name};
use super::tree::{self, Inode, InodeIndex, Node, Tree};
use crate::bootstrap::Kind;
use crate::layout::{BLOCK, CHUNK_INDEX, EXTENDED_INODE, XATTR_HEADER, data_layout};

/// Inodes start at multiples of this; it is also the unit of nids.
const SLOT: u64 = 32;
/// A gap that is smaller holds no inode.
const SMALLEST_INODE: u64 = EXTENDED_INODE;

/// Where one inode lies. Offsets count from the start of the meta area.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) offset: u64,
    /// Bytes of data: those of a file, of a link's target, of packed entries.
    pub(super) size: u64,
    /// Data layout of the format.
    pub(super) layout: u16,
    /// Data that directly follows the inode and its xattrs.
    pub(super) tail: u64,
    /// First block of the other data; meaningless without.
    pub(super) block: u64,
    /// Bytes of inode and xattrs.
    pub(super) fixed: u64,
}

impl Place {
    pub(super) fn nid(&self) -> u64 {
        self.offset / SLOT
    }
}

/// The meta area of a bootstrap.
#[derive(Debug)]
pub(super) struct Places {
    /// By inode.
    pub(super) places: Vec<Place>,
    /// End of all inodes and data, a multiple of [`BLOCK`].
    pub(super) end: u64,
}

/// Places every inode in blocks of so many bytes. The root comes first, 4096 bytes into the area, so that its nid is never 0.
pub(super) fn place(tree: &Tree, block_size: u64) -> Places {
    let mut area = Area { end: BLOCK, block: block_size, gaps: BTreeSet::new() };
    let mut places: Vec<Place> = Vec::with_capacity(tree.inodes.len());
    for (_, node, inode) in tree.first_names() {
        places.push(area.place(tree, node, inode));
    }
    let mut block = area.end.div_ceil(block_size);
    for (place, inode) in places.iter_mut().zip(&tree.inodes) {
        place.block = block;
        if matches!(inode.kind, Kind::Directory | Kind::Symlink) {
            block += (place.size - place.tail).div_ceil(block_size);
        }
    }
    Places { places, end: (block * block_size).next_multiple_of(BLOCK) }
}

struct Area {
    end: u64,
    /// Bytes of a block.
    block: u64,
    /// Unused space before `end`: length and offset.
    gaps: BTreeSet<(u64, u64)>,
}

impl Area {
    fn place(&mut self, tree: &Tree, node: &Node, inode: &Inode) -> Place {
        let (fixed, block) = (EXTENDED_INODE + xattr_len(inode), self.block);
        let size = match inode.kind {
            Kind::Directory => directory::packed_size(&names(tree, node, |_| 0), block),
            _ => inode.size,
        };
        let mut place = Place { size, fixed, layout: data_layout::PLAIN, ..Place::default() };
        let len = match inode.kind {
            Kind::File => {
                place.layout = data_layout::CHUNKED;
                let indexes = inode.chunks.len() as u64 * CHUNK_INDEX;
                fixed.next_multiple_of(CHUNK_INDEX) + indexes
            }
            // A target is in one place: readers take it as it lies.
            Kind::Symlink if size > block => fixed,
            Kind::Directory | Kind::Symlink if !size.is_multiple_of(block) && fixed + size % block <= block => {
                place.layout = data_layout::INLINE;
                place.tail = size % block;
                fixed + place.tail
            }
            _ => fixed,
        };
        place.offset = self.allocate(len, place.layout == data_layout::INLINE);
        place
    }

    /// Space for `len` bytes at a multiple of 32, within one block if `whole`. The smallest gap that fits, or the end.
    fn allocate(&mut self, len: u64, whole: bool) -> u64 {
        let gap = self.gaps.range((len, 0)..).next().copied();
        let (room, offset) = match gap {
            Some(gap) => {
                self.gaps.remove(&gap);
                gap
            }
            None => {
                let start = self.end.next_multiple_of(SLOT);
                if whole && start % self.block + len > self.block {
                    let next = start.next_multiple_of(self.block);
                    self.keep_gap(start, next);
                    self.end = next + len;
                    return next;
                }
                self.end = start + len;
                return start;
            }
        };
        self.keep_gap((offset + len).next_multiple_of(SLOT), offset + room);
        offset
    }

    /// Gaps never cross a block, so what fits one needs no further check.
    fn keep_gap(&mut self, start: u64, end: u64) {
        if start + SMALLEST_INODE <= end {
            self.gaps.insert((end - start, start));
        }
    }
}

/// Bytes of the xattrs with their header.
fn xattr_len(inode: &Inode) -> u64 {
    match tree::xattr_count(&inode.xattrs) {
        0 => 0,
        count => XATTR_HEADER + 4 * (count - 1),
    }
}

/// What a directory holds in byte order, `.` and `..` included.
pub(super) fn names<'a>(tree: &'a Tree, node: &Node, nid: impl Fn(InodeIndex) -> u64) -> Vec<Name<'a>> {
    let directory = Kind::Directory.dirent_type();
    let mut names = vec![
        Name { name: b".", nid: nid(node.inode), file_type: directory },
        Name { name: b"..", nid: nid(tree.nodes[node.parent].inode), file_type: directory },
    ];
    names.extend(tree.nodes[node.children.clone()].iter().map(|child| {
        let file_type = tree.inode(child).kind.dirent_type();
        Name { name: &child.name, nid: nid(child.inode), file_type }
    }));
    names.sort_unstable_by_key(|name| name.name);
    names
}
