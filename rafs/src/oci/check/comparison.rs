//! The tree of an image next to that of its source, down to the bytes of all files.

use std::collections::HashMap;

use serde::Serialize;

use super::{
    Problems,
    source_tree::{Attributes, ROOT, SourceTree, show},
};
use crate::{BlobDirReader, Bootstrap, BootstrapError, Inode, Kind, Nid, chain};

/// How much of a tree was compared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ComparedTree {
    /// Names.
    pub names: u64,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Compares a source with the tree of an image. Of what one of them lacks, or has as something else, nothing below is
/// looked at.
pub(super) fn compare(
    source: &SourceTree,
    bootstrap: &Bootstrap,
    reader: &BlobDirReader,
    problems: &mut Problems,
) -> Result<ComparedTree, BootstrapError> {
    let (files, nodes) = Default::default();
    let compared = ComparedTree::default();
    let mut comparison = Comparison { source, reader, problems, path: Vec::new(), files, nodes, compared };
    comparison.node(ROOT, &bootstrap.inode(bootstrap.root())?)?;
    comparison.missing(ROOT, &bootstrap.inode(bootstrap.root())?)?;
    let mut open = vec![(ROOT, 0, bootstrap.inode(bootstrap.root())?.entries())];
    while let Some((directory, length, entries)) = open.last_mut() {
        comparison.path.truncate(*length);
        let Some(entry) = entries.next() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        if entry.name == b"." || entry.name == b".." {
            continue;
        }
        comparison.path.push(b'/');
        comparison.path.extend_from_slice(entry.name);
        let Some(name) = source.child(*directory, entry.name) else {
            comparison.problem("the image has it, the source does not");
            continue;
        };
        let inode = bootstrap.inode(entry.nid)?;
        if comparison.node(name, &inode)? && inode.kind() == Kind::Directory {
            comparison.missing(name, &inode)?;
            open.push((name, comparison.path.len(), inode.entries()));
        }
    }
    Ok(comparison.compared)
}

struct Comparison<'a> {
    source: &'a SourceTree,
    reader: &'a BlobDirReader,
    problems: &'a mut Problems,
    /// Of what is being compared; empty for the root.
    path: Vec<u8>,
    /// Nodes of the source by the image's files: names of one file must be names of one file there too.
    files: HashMap<Nid, usize>,
    nodes: HashMap<usize, Nid>,
    compared: ComparedTree,
}

impl Comparison<'_> {
    fn problem(&mut self, problem: impl Into<String>) {
        let place = if self.path.is_empty() { "/".to_owned() } else { show(&self.path) };
        self.problems.add(place, problem);
    }

    /// Tells which names of a directory the image does not have.
    fn missing(&mut self, directory: usize, inode: &Inode<'_>) -> Result<(), BootstrapError> {
        let length = self.path.len();
        for name in self.source.children(directory) {
            if inode.lookup(name)?.is_none() {
                self.path.push(b'/');
                self.path.extend_from_slice(name);
                self.problem("the source has it, the image does not");
                self.path.truncate(length);
            }
        }
        Ok(())
    }

    /// Compares what one name leads to. Whether it is of the same kind.
    fn node(&mut self, name: usize, inode: &Inode<'_>) -> Result<bool, BootstrapError> {
        self.compared.names += 1;
        let node = self.source.node(name);
        if inode.kind() != node.kind {
            self.problem(format!("it is a {:?}, in the source a {:?}", inode.kind(), node.kind));
            return Ok(false);
        }
        if let Some(expected) = &node.attributes {
            let found = attributes(inode);
            if found != *expected {
                self.problem(format!("it has {found:?}, in the source {expected:?}"));
            }
        }
        let device = (rustix::fs::major(inode.rdev().into()), rustix::fs::minor(inode.rdev().into()));
        match node.kind {
            Kind::Symlink if inode.target()? != node.target => self.problem("its target is another one"),
            Kind::CharDevice | Kind::BlockDevice if device != node.device => {
                self.problem(format!("it is device {device:?}, in the source {:?}", node.device));
            }
            Kind::File => self.file(inode, name),
            _ => {}
        }
        Ok(true)
    }

    fn file(&mut self, inode: &Inode<'_>, name: usize) {
        let node = self.source.node_number(name);
        let first = (self.files.get(&inode.nid()).copied(), self.nodes.get(&node).copied());
        match first {
            (Some(known), Some(nid)) if known == node && nid == inode.nid() => return,
            (None, None) => {}
            _ => self.problem("its hard links are others than in the source"),
        }
        self.files.insert(inode.nid(), node);
        self.nodes.insert(node, inode.nid());
        self.compared.files += 1;
        self.compared.bytes += inode.size();
        let mut hasher = blake3::Hasher::new();
        for chunk in inode.chunks() {
            match self.reader.read(chunk.id) {
                Ok(bytes) => drop(hasher.update(&bytes)),
                Err(error) => return self.problem(chain(&error)),
            }
        }
        let source = self.source.node(name);
        if inode.size() != source.size || Some(hasher.finalize()) != source.content {
            self.problem(format!("its {} bytes are not the {} of the source", inode.size(), source.size));
        }
    }
}

fn attributes(inode: &Inode<'_>) -> Attributes {
    Attributes {
        mode: inode.mode() & 0o7777,
        owner: (inode.uid(), inode.gid()),
        mtime: inode.mtime(),
        xattrs: inode.xattrs().map(|(name, value)| (name, value.to_vec())).collect(),
    }
}
