//! The tree of an image in the two forms in which it is made.
//!
//! A [`Draft`] can be changed anywhere: an archive and a stack of layers replace and remove what came before. It is
//! turned once into a [`Tree`], whose names lie breadth first and in byte order, which is the order of everything that is
//! written. Several names of one file share an inode; what is no regular file is never shared.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use super::scan::Version;
use crate::bootstrap::Kind;
use crate::layout;

/// Position of a name in [`Tree::nodes`]; the root is 0.
pub(super) type NodeIndex = usize;

/// Position of an inode in [`Tree::inodes`] or in a [`Draft`].
pub(super) type InodeIndex = usize;

/// Position of a name in a [`Draft`].
pub(super) type EntryIndex = usize;

/// Full name and value of an extended attribute.
pub(super) type Xattr = (Vec<u8>, Vec<u8>);

/// Where a chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ChunkPlace {
    /// Position of the blob in the blob table.
    pub(super) blob: u32,
    /// Index in the blob's chunk table.
    pub(super) index: u32,
    /// First block in decoded blob space.
    pub(super) block: u32,
}

/// What one or more names lead to.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) kind: Kind,
    /// Type and permissions, as in `st_mode`.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Bytes of a file or of a link's target, 0 for the others.
    pub(super) size: u64,
    /// In the 32-bit form of the kernel; 0 unless a device.
    pub(super) rdev: u32,
    pub(super) mtime: (i64, u32),
    /// Sorted by name.
    pub(super) xattrs: Vec<Xattr>,
    pub(super) target: Vec<u8>,
    /// Content of a file, filled when it was stored.
    pub(super) chunks: Vec<ChunkPlace>,
    /// Names of a file; 2 and its subdirectories for a directory. Right in a [`Tree`] only.
    pub(super) nlink: u32,
    /// What tells whether a file on disk changes.
    pub(super) version: Option<Version>,
}

impl Inode {
    /// A directory of root that nobody described: parents that an archive leaves out, and its root.
    pub(super) fn implied_directory() -> Self {
        Self {
            kind: Kind::Directory,
            mode: 0o040_755,
            uid: 0,
            gid: 0,
            size: 0,
            rdev: 0,
            mtime: (0, 0),
            xattrs: Vec::new(),
            target: Vec::new(),
            chunks: Vec::new(),
            nlink: 0,
            version: None,
        }
    }
}

/// One name in a finished tree.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: Vec<u8>,
    pub(super) parent: NodeIndex,
    pub(super) inode: InodeIndex,
    /// Whether no earlier name leads to the same inode.
    pub(super) first: bool,
    pub(super) children: Range<NodeIndex>,
}

/// A finished tree. Inodes are numbered by their first names.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) inodes: Vec<Inode>,
}

impl Tree {
    pub(super) fn inode(&self, node: &Node) -> &Inode {
        &self.inodes[node.inode]
    }

    /// First names with their inodes.
    pub(super) fn first_names(&self) -> impl Iterator<Item = (NodeIndex, &Node, &Inode)> {
        let nodes = self.nodes.iter().enumerate().filter(|(_, node)| node.first);
        nodes.map(|(index, node)| (index, node, self.inode(node)))
    }

    /// Where all chunks lie, each place once, in order.
    pub(super) fn places(&self) -> Vec<ChunkPlace> {
        let mut places: Vec<_> = self.inodes.iter().flat_map(|inode| inode.chunks.iter().copied()).collect();
        places.sort_unstable();
        places.dedup();
        places
    }

    /// Numbers blobs by first use; returns their old numbers in the new order.
    pub(super) fn number_blobs(&mut self) -> Vec<u32> {
        let mut order = Vec::new();
        let mut numbers = HashMap::new();
        for place in self.inodes.iter_mut().flat_map(|inode| inode.chunks.iter_mut()) {
            place.blob = *numbers.entry(place.blob).or_insert_with(|| {
                order.push(place.blob);
                order.len() as u32 - 1
            });
        }
        order
    }

    /// Regular files, each once however many names it has.
    pub(super) fn files(&self) -> impl Iterator<Item = &Inode> {
        self.inodes.iter().filter(|inode| inode.kind == Kind::File)
    }
}

#[derive(Debug)]
struct Entry {
    inode: InodeIndex,
    children: BTreeMap<Vec<u8>, EntryIndex>,
}

/// A tree under construction. What is removed from it stays in memory until it is finished.
#[derive(Debug)]
pub(super) struct Draft {
    entries: Vec<Entry>,
    pub(super) inodes: Vec<Inode>,
}

impl Draft {
    /// The root directory.
    pub(super) const ROOT: EntryIndex = 0;

    /// A tree that is only a root.
    pub(super) fn new(root: Inode) -> Self {
        Self { entries: vec![Entry { inode: 0, children: BTreeMap::new() }], inodes: vec![root] }
    }

    /// Names that were ever made.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn inode_index(&self, entry: EntryIndex) -> InodeIndex {
        self.entries[entry].inode
    }

    pub(super) fn inode(&self, entry: EntryIndex) -> &Inode {
        &self.inodes[self.entries[entry].inode]
    }

    pub(super) fn is_directory(&self, entry: EntryIndex) -> bool {
        self.inode(entry).kind == Kind::Directory
    }

    pub(super) fn child(&self, directory: EntryIndex, name: &[u8]) -> Option<EntryIndex> {
        self.entries[directory].children.get(name).copied()
    }

    pub(super) fn add_inode(&mut self, inode: Inode) -> InodeIndex {
        self.inodes.push(inode);
        self.inodes.len() - 1
    }

    /// Gives an inode a name in a directory. A directory over a directory takes its place and keeps what it holds;
    /// anything else replaces what had the name, with everything below.
    pub(super) fn put(&mut self, directory: EntryIndex, name: &[u8], inode: InodeIndex) -> EntryIndex {
        let is_directory = self.inodes[inode].kind == Kind::Directory;
        let old = self.child(directory, name).filter(|old| is_directory && self.is_directory(*old));
        if let Some(old) = old {
            self.entries[old].inode = inode;
            return old;
        }
        let entry = self.entries.len();
        self.entries.push(Entry { inode, children: BTreeMap::new() });
        self.entries[directory].children.insert(name.to_vec(), entry);
        entry
    }

    /// Replaces the attributes of the root.
    pub(super) fn put_root(&mut self, inode: InodeIndex) {
        self.entries[Self::ROOT].inode = inode;
    }

    /// All names that the root leads to.
    pub(super) fn reachable(&self) -> Vec<EntryIndex> {
        let mut found = vec![Self::ROOT];
        let mut next = 0;
        while let Some(entry) = found.get(next) {
            found.extend(self.entries[*entry].children.values());
            next += 1;
        }
        found
    }

    /// Lets a name lead to another inode.
    pub(super) fn redirect(&mut self, entry: EntryIndex, inode: InodeIndex) {
        self.entries[entry].inode = inode;
    }

    /// Takes a name away; nothing where there is none.
    pub(super) fn remove(&mut self, directory: EntryIndex, name: &[u8]) {
        self.entries[directory].children.remove(name);
    }

    /// Empties a directory.
    pub(super) fn clear(&mut self, directory: EntryIndex) {
        self.entries[directory].children.clear();
    }

    /// The finished tree: names breadth first, links counted, inodes without a name dropped.
    pub(super) fn finish(self) -> Tree {
        let Self { mut entries, inodes } = self;
        let mut inodes: Vec<Option<Inode>> = inodes.into_iter().map(Some).collect();
        let mut numbers: Vec<Option<InodeIndex>> = vec![None; inodes.len()];
        let mut tree = Tree { nodes: Vec::new(), inodes: Vec::new() };
        let mut queue = VecDeque::from([Self::ROOT]);
        tree.add(&mut inodes, &mut numbers, Vec::new(), 0, entries[Self::ROOT].inode);
        let mut next = 0;
        while let Some(entry) = queue.pop_front() {
            let start = tree.nodes.len();
            for (name, child) in std::mem::take(&mut entries[entry].children) {
                tree.add(&mut inodes, &mut numbers, name, next, entries[child].inode);
                queue.push_back(child);
            }
            tree.nodes[next].children = start..tree.nodes.len();
            next += 1;
        }
        tree
    }
}

impl Tree {
    /// Appends a name, and its inode if this is the first name of it.
    fn add(
        &mut self,
        inodes: &mut [Option<Inode>],
        numbers: &mut [Option<InodeIndex>],
        name: Vec<u8>,
        parent: NodeIndex,
        inode: InodeIndex,
    ) {
        let (number, first) = match (inodes[inode].take(), numbers[inode]) {
            (Some(inode), _) => (self.number(inode), true),
            (None, Some(number)) if self.inodes[number].kind != Kind::File => {
                (self.number(self.inodes[number].clone()), true)
            }
            (None, Some(number)) => (number, false),
            (None, None) => unreachable!("an inode is taken when it is numbered"),
        };
        numbers[inode] = Some(number);
        let is_directory = self.inodes[number].kind == Kind::Directory;
        self.inodes[number].nlink = match (is_directory, first) {
            (true, _) => 2,
            (false, true) => 1,
            (false, false) => self.inodes[number].nlink + 1,
        };
        if is_directory && !self.nodes.is_empty() {
            let parent = self.nodes[parent].inode;
            self.inodes[parent].nlink += 1;
        }
        self.nodes.push(Node { name, parent, inode: number, first, children: 0..0 });
    }

    fn number(&mut self, inode: Inode) -> InodeIndex {
        self.inodes.push(inode);
        self.inodes.len() - 1
    }
}

/// Number of the prefix and the rest of an xattr's name, if the format knows the prefix.
pub(super) fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, suffix) =
        layout::XATTR_PREFIXES.into_iter().find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))?;
    (suffix.is_empty() == layout::is_whole_xattr_name(index)).then_some((index, suffix))
}

/// Bytes of one attribute on disk.
fn xattr_len(name: &[u8], value: &[u8]) -> u64 {
    let suffix = split_xattr(name).map_or(name, |(_, suffix)| suffix);
    (4 + suffix.len() as u64 + value.len() as u64).next_multiple_of(4)
}

/// The inode's `xattr_icount`: 0 for none, else 1 plus the attributes' bytes / 4.
pub(super) fn xattr_count(xattrs: &[Xattr]) -> u64 {
    if xattrs.is_empty() {
        return 0;
    }
    1 + xattrs.iter().map(|(name, value)| xattr_len(name, value)).sum::<u64>() / 4
}

/// What is wrong with attributes that the format cannot hold.
pub(super) fn check_xattrs(xattrs: &[Xattr]) -> Result<(), String> {
    let count = xattr_count(xattrs);
    if count > u64::from(u16::MAX) || xattrs.iter().any(|(_, value)| value.len() > usize::from(u16::MAX)) {
        return Err(format!("its xattrs are too large ({} of at most 262136 bytes)", count * 4));
    }
    match xattrs.iter().find(|(name, _)| name.len() > layout::MAX_NAME || name.contains(&0)) {
        Some((name, _)) => {
            Err(format!("its xattr {:?} is no name of at most 255 bytes", String::from_utf8_lossy(name)))
        }
        None => Ok(()),
    }
}

/// The type in `st_mode`.
pub(super) fn type_bits(kind: Kind) -> u32 {
    match kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice => 0o020_000,
        Kind::Directory => 0o040_000,
        Kind::BlockDevice => 0o060_000,
        Kind::File => 0o100_000,
        Kind::Symlink => 0o120_000,
        Kind::Socket => 0o140_000,
    }
}

/// The kernel's `new_encode_dev`.
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xFF) | (major << 8) | ((minor & !0xFF) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_encoded_as_the_kernel_does() {
        for (major, minor, expected) in [(1, 3, 0x103), (8, 0, 0x800), (259, 0x12345, 0x1231_0345)] {
            assert_eq!(encode_device(major, minor), expected, "{major}:{minor}");
        }
    }

    #[test]
    fn xattr_names_are_split_at_known_prefixes_only() {
        assert_eq!(split_xattr(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr(b"security.capability"), Some((6, &b"capability"[..])));
        for name in [&b"system.posix_acl_accessory"[..], b"system.nfs4_acl", b"user.", b"btrfs.compression", b""] {
            assert_eq!(split_xattr(name), None, "{name:?}");
        }
    }

    fn leaf(mode: u32) -> Inode {
        Inode { kind: Kind::from_mode(mode).unwrap(), mode, ..Inode::implied_directory() }
    }

    #[test]
    fn a_finished_tree_is_breadth_first_with_counted_links() {
        let mut draft = Draft::new(Inode::implied_directory());
        let file = draft.add_inode(leaf(0o100_644));
        let link = draft.add_inode(leaf(0o120_777));
        let directory = draft.add_inode(Inode::implied_directory());
        let b = draft.put(Draft::ROOT, b"b", directory);
        for name in [&b"y"[..], b"x"] {
            draft.put(b, name, file);
            draft.put(b, &[name, b"-link"].concat(), link);
        }
        draft.put(Draft::ROOT, b"a", file);
        draft.put(Draft::ROOT, b"gone", file);
        draft.remove(Draft::ROOT, b"gone");
        let tree = draft.finish();
        let names: Vec<_> = tree.nodes.iter().map(|node| String::from_utf8_lossy(&node.name)).collect();
        assert_eq!(names, ["", "a", "b", "x", "x-link", "y", "y-link"]);
        let links: Vec<_> = tree.inodes.iter().map(|inode| inode.nlink).collect();
        assert_eq!(links, [3, 3, 2, 1, 1]);
        assert_eq!((tree.nodes[0].children.clone(), tree.nodes[2].children.clone()), (1..3, 3..7));
    }

    #[test]
    fn only_a_directory_over_a_directory_keeps_what_was_below() {
        let mut draft = Draft::new(Inode::implied_directory());
        let directory = draft.add_inode(Inode::implied_directory());
        let other = draft.add_inode(Inode { uid: 7, ..Inode::implied_directory() });
        let file = draft.add_inode(leaf(0o100_644));
        let entry = draft.put(Draft::ROOT, b"d", directory);
        draft.put(entry, b"f", file);
        assert_eq!(draft.put(Draft::ROOT, b"d", other), entry);
        assert!(draft.child(entry, b"f").is_some());
        draft.put(Draft::ROOT, b"d", file);
        let entry = draft.put(Draft::ROOT, b"d", directory);
        assert_eq!(draft.child(entry, b"f"), None);
    }
}
