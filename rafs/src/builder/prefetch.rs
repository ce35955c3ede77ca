//! The prefetch table of an image: which names of its tree a list means.

use std::collections::HashSet;

use super::tree::{ChunkPlace, InodeIndex, NodeIndex, Tree};
use crate::bootstrap::Kind;
use crate::prefetch::{Hint, Name, PrefetchList};

/// What a list means in a tree.
#[derive(Debug, Default)]
pub(super) struct Prefetched {
    /// Names of files and directories in the order of the list, no inode twice.
    pub(super) nodes: Vec<NodeIndex>,
    /// Lines that mean no file and no directory.
    pub(super) unmatched: Vec<String>,
}

impl Prefetched {
    /// Finds what is listed. Links are not followed; where several names match one line, byte order decides.
    pub(super) fn find(tree: &Tree, list: &PrefetchList) -> Self {
        let (mut found, mut seen) = (Self::default(), HashSet::new());
        for hint in list.hints() {
            let nodes = matching(tree, hint);
            let nodes: Vec<_> = nodes.into_iter().filter(|node| is_readable(tree, *node)).collect();
            if nodes.is_empty() {
                found.unmatched.push(hint.to_string());
            }
            found.nodes.extend(nodes.into_iter().filter(|node| seen.insert(tree.nodes[*node].inode)));
        }
        found
    }

    /// What the table lists.
    pub(super) fn inodes(&self, tree: &Tree) -> Vec<InodeIndex> {
        self.nodes.iter().map(|node| tree.nodes[*node].inode).collect()
    }

    /// The files that are meant, and then all others, each inode by one name.
    pub(super) fn files_first(&self, tree: &Tree) -> Vec<NodeIndex> {
        let (mut seen, mut files) = (HashSet::new(), Vec::new());
        for node in &self.nodes {
            files_below(tree, *node, &mut seen, &mut files);
        }
        let others = tree.first_names().map(|(node, ..)| node);
        files.extend(others.filter(|node| is_file(tree, *node) && !seen.contains(&tree.nodes[*node].inode)));
        files
    }
}

/// The chunks that a list means, in its order, each place once.
pub(super) fn chunks(tree: &Tree, list: &PrefetchList) -> Vec<ChunkPlace> {
    let (mut seen, mut chunks) = (HashSet::new(), Vec::new());
    for hint in list.hints() {
        let (mut below, mut files) = (HashSet::new(), Vec::new());
        for node in matching(tree, hint) {
            files_below(tree, node, &mut below, &mut files);
        }
        for file in files {
            let of_file = &tree.inode(&tree.nodes[file]).chunks;
            let meant = match hint.chunk {
                Some(number) => usize::try_from(number).ok().and_then(|number| of_file.get(number..=number)),
                None => Some(&of_file[..]),
            };
            chunks.extend(meant.unwrap_or_default().iter().copied().filter(|place| seen.insert(*place)));
        }
    }
    chunks
}

/// A file, or all below a directory, level by level; what was seen is passed over.
fn files_below(tree: &Tree, node: NodeIndex, seen: &mut HashSet<InodeIndex>, files: &mut Vec<NodeIndex>) {
    let mut level = vec![node];
    while !level.is_empty() {
        level.retain(|node| seen.insert(tree.nodes[*node].inode));
        files.extend(level.iter().copied().filter(|node| is_file(tree, *node)));
        level = level.iter().flat_map(|node| tree.nodes[*node].children.clone()).collect();
    }
}

/// All names that a line means.
fn matching(tree: &Tree, hint: &Hint) -> Vec<NodeIndex> {
    hint.names
        .iter()
        .fold(vec![0], |nodes, name| nodes.into_iter().flat_map(|node| children(tree, node, name)).collect())
}

fn children(tree: &Tree, node: NodeIndex, name: &Name) -> Vec<NodeIndex> {
    let range = tree.nodes[node].children.clone();
    let start = range.start;
    let children = &tree.nodes[range];
    match name {
        // Names lie in byte order.
        Name::Exact(exact) => {
            let position = children.binary_search_by(|child| child.name.as_slice().cmp(exact));
            position.map(|position| start + position).into_iter().collect()
        }
        pattern => {
            (start..).zip(children).filter(|(_, child)| pattern.matches(&child.name)).map(|(at, _)| at).collect()
        }
    }
}

fn is_file(tree: &Tree, node: NodeIndex) -> bool {
    tree.inode(&tree.nodes[node]).kind == Kind::File
}

fn is_readable(tree: &Tree, node: NodeIndex) -> bool {
    matches!(tree.inode(&tree.nodes[node]).kind, Kind::File | Kind::Directory)
}
