//! The tree of an image of tar layers, as a runtime would unpack them, with the digest of each file.
//!
//! Plain and slow on purpose: a map from paths, changed entry by entry. Directories that no layer describes have no
//! attributes to compare.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Read},
};

use serde::Serialize;

use super::Problems;
use crate::{
    ArchiveError, ArchiveLimits, BlobDirReader, Bootstrap, BootstrapError, Inode, Kind, Nid,
    archive::{Archive, Member, MemberKind},
    chain,
};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// What the format of images has a place for.
const XATTRS: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];

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

/// Layers applied so far.
#[derive(Default)]
pub(super) struct SourceTree {
    /// By path without a slash in front; the root is empty.
    names: BTreeMap<Vec<u8>, Name>,
    nodes: Vec<Node>,
    layer: u32,
}

struct Name {
    node: usize,
    /// The layer that put it there.
    layer: u32,
}

struct Node {
    kind: Kind,
    attributes: Option<Attributes>,
    size: u64,
    content: Option<blake3::Hash>,
    target: Vec<u8>,
    device: (u32, u32),
}

#[derive(Debug, PartialEq, Eq)]
struct Attributes {
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl SourceTree {
    /// Puts a layer, decompressed, over those below it.
    pub(super) fn apply(&mut self, tar: impl Read) -> Result<(), ArchiveError> {
        self.layer += 1;
        let mut archive = Archive::new(tar, ArchiveLimits::default());
        let mut links = Vec::new();
        while let Some(member) = archive.next()? {
            if self.nodes.len() as u64 >= ArchiveLimits::default().names {
                return Err(archive.too_large("names", ArchiveLimits::default().names));
            }
            let path = path(&member.path).ok_or_else(|| archive.invalid("a name that leads out of the image"))?;
            let MemberKind::Node(kind) = member.kind else {
                let target =
                    path_of_link(&member).ok_or_else(|| archive.invalid("a link that leads out of the image"))?;
                if !self.link(&path, &target) {
                    links.push((path, target));
                }
                continue;
            };
            let mut node = Node::of(&member, kind);
            if kind == Kind::File {
                let place = archive.place().to_owned();
                let hash = hash(archive.content(&member));
                node.content = Some(hash.map_err(|source| Archive::<&[u8]>::read_error(&place, source))?);
            }
            self.put(&path, &member, node);
        }
        for (path, target) in links {
            if !self.link(&path, &target) {
                return Err(archive.invalid(format!("a hard link to {:?}, which is not there", show(&target))));
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &[u8], member: &Member, node: Node) {
        let (parent, name) = split(path);
        if name == OPAQUE {
            return self.clear(parent);
        }
        if let Some(gone) = name.strip_prefix(WHITEOUT) {
            return self.remove_older(&join(parent, gone));
        }
        if node.kind == Kind::CharDevice && node.device == (0, 0) {
            return self.remove_older(path);
        }
        let opaque = |(name, value): &(Vec<u8>, Vec<u8>)| name == OVERLAY_OPAQUE && value == b"y";
        if node.kind == Kind::Directory && member.xattrs.iter().any(opaque) {
            self.clear(path);
        }
        self.insert(path, node);
    }

    fn insert(&mut self, path: &[u8], node: Node) {
        let keeps_children = node.kind == Kind::Directory;
        self.nodes.push(node);
        self.name(path, self.nodes.len() - 1, keeps_children);
    }

    fn name(&mut self, path: &[u8], node: usize, keeps_children: bool) {
        let (parent, _) = split(path);
        let is_directory = |tree: &Self, path: &[u8]| {
            tree.names.get(path).is_some_and(|name| tree.nodes[name.node].kind == Kind::Directory)
        };
        if !path.is_empty() && !is_directory(self, parent) {
            self.insert(parent, Node::implied());
        }
        if !(keeps_children && is_directory(self, path)) {
            for path in self.below(path) {
                self.names.remove(&path);
            }
        }
        self.names.insert(path.to_vec(), Name { node, layer: self.layer });
    }

    /// Another name of a file. `false` when there is no such file yet.
    fn link(&mut self, path: &[u8], target: &[u8]) -> bool {
        let Some(node) = self.names.get(target).map(|name| name.node) else { return false };
        self.name(path, node, false);
        true
    }

    /// Takes away what lower layers have in a directory.
    fn clear(&mut self, directory: &[u8]) {
        for path in self.below(directory) {
            self.names.retain_newer(&path, self.layer);
        }
    }

    /// Takes away a name of a lower layer with all below it.
    fn remove_older(&mut self, path: &[u8]) {
        self.clear(path);
        if self.below(path).is_empty() {
            self.names.retain_newer(path, self.layer);
        }
    }

    fn below(&self, directory: &[u8]) -> Vec<Vec<u8>> {
        let start = join(directory, b"");
        let names = self.names.range(start.clone()..).take_while(|(path, _)| path.starts_with(&start));
        names.map(|(path, _)| path.clone()).filter(|path| !path.is_empty()).collect()
    }

    /// Compares with a tree of an image, down to the bytes of files.
    pub(super) fn compare(
        &self,
        bootstrap: &Bootstrap,
        reader: &BlobDirReader,
        problems: &mut Problems,
    ) -> Result<ComparedTree, BootstrapError> {
        let mut comparison = Comparison {
            source: self,
            bootstrap,
            reader,
            problems,
            files: HashMap::new(),
            nodes: HashMap::new(),
            compared: ComparedTree::default(),
        };
        let mut found = BTreeMap::new();
        let mut directories = vec![(Vec::new(), bootstrap.root())];
        found.insert(Vec::new(), bootstrap.root());
        while let Some((path, nid)) = directories.pop() {
            for entry in bootstrap.inode(nid)?.entries() {
                let entry = entry?;
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let child = join(&path, entry.name);
                if entry.kind == Kind::Directory {
                    directories.push((child.clone(), entry.nid));
                }
                found.insert(child, entry.nid);
            }
        }
        for path in self.names.keys().filter(|path| !path.is_empty() && !found.contains_key(*path)) {
            comparison.problem(path, "the source has it, the image does not");
        }
        for (path, nid) in &found {
            comparison.node(path, *nid)?;
        }
        Ok(comparison.compared)
    }
}

/// Removal by age.
trait Names {
    fn retain_newer(&mut self, path: &[u8], layer: u32);
}

impl Names for BTreeMap<Vec<u8>, Name> {
    fn retain_newer(&mut self, path: &[u8], layer: u32) {
        if self.get(path).is_some_and(|name| name.layer < layer) {
            self.remove(path);
        }
    }
}

impl Node {
    fn implied() -> Self {
        let (target, device) = (Vec::new(), (0, 0));
        Self { kind: Kind::Directory, attributes: None, size: 0, content: None, target, device }
    }

    fn of(member: &Member, kind: Kind) -> Self {
        let kept = |(name, _): &&(Vec<u8>, Vec<u8>)| {
            XATTRS.iter().any(|prefix| name.starts_with(prefix)) && name != OVERLAY_OPAQUE
        };
        let attributes = Attributes {
            mode: member.mode,
            owner: (member.uid, member.gid),
            mtime: member.mtime,
            xattrs: member.xattrs.iter().filter(kept).cloned().collect(),
        };
        Self {
            kind,
            attributes: Some(attributes),
            size: member.size,
            content: None,
            target: if kind == Kind::Symlink { member.link.clone() } else { Vec::new() },
            device: member.device,
        }
    }
}

struct Comparison<'a> {
    source: &'a SourceTree,
    bootstrap: &'a Bootstrap,
    reader: &'a BlobDirReader,
    problems: &'a mut Problems,
    /// Nodes of the source by the image's files: names of one file must be names of one file there too.
    files: HashMap<Nid, usize>,
    nodes: HashMap<usize, Nid>,
    compared: ComparedTree,
}

impl Comparison<'_> {
    fn problem(&mut self, path: &[u8], problem: impl Into<String>) {
        self.problems.add(format!("/{}", show(path)), problem);
    }

    fn node(&mut self, path: &[u8], nid: Nid) -> Result<(), BootstrapError> {
        self.compared.names += 1;
        let inode = self.bootstrap.inode(nid)?;
        let Some(name) = self.source.names.get(path) else {
            if !path.is_empty() {
                self.problem(path, "the image has it, the source does not");
            }
            return Ok(());
        };
        let node = &self.source.nodes[name.node];
        if inode.kind() != node.kind {
            self.problem(path, format!("it is a {:?}, in the source a {:?}", inode.kind(), node.kind));
            return Ok(());
        }
        if let Some(expected) = &node.attributes {
            let found = attributes(&inode);
            if found != *expected {
                self.problem(path, format!("it has {found:?}, in the source {expected:?}"));
            }
        }
        let device = (rustix::fs::major(inode.rdev().into()), rustix::fs::minor(inode.rdev().into()));
        match node.kind {
            Kind::Symlink if inode.target()? != node.target => self.problem(path, "its target is another one"),
            Kind::CharDevice | Kind::BlockDevice if device != node.device => {
                self.problem(path, format!("it is device {device:?}, in the source {:?}", node.device));
            }
            Kind::File => self.file(path, &inode, name.node),
            _ => {}
        }
        Ok(())
    }

    fn file(&mut self, path: &[u8], inode: &Inode<'_>, node: usize) {
        let first = (self.files.get(&inode.nid()).copied(), self.nodes.get(&node).copied());
        match first {
            (Some(known), Some(nid)) if known == node && nid == inode.nid() => return,
            (None, None) => {}
            _ => self.problem(path, "its hard links are others than in the source"),
        }
        self.files.insert(inode.nid(), node);
        self.nodes.insert(node, inode.nid());
        self.compared.files += 1;
        self.compared.bytes += inode.size();
        let mut hasher = blake3::Hasher::new();
        for chunk in inode.chunks() {
            match self.reader.read(chunk.id) {
                Ok(bytes) => drop(hasher.update(&bytes)),
                Err(error) => return self.problem(path, chain(&error)),
            }
        }
        let source = &self.source.nodes[node];
        if inode.size() != source.size || Some(hasher.finalize()) != source.content {
            self.problem(path, format!("its {} bytes are not the {} of the source", inode.size(), source.size));
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

fn hash(mut content: impl Read) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match content.read(&mut buffer)? {
            0 => return Ok(hasher.finalize()),
            read => hasher.update(&buffer[..read]),
        };
    }
}

/// A path without dots and doubled slashes; `None` if it leads up.
fn path(text: &[u8]) -> Option<Vec<u8>> {
    let names: Vec<_> = text.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    (!names.contains(&&b".."[..])).then(|| names.join(&b'/'))
}

fn path_of_link(member: &Member) -> Option<Vec<u8>> {
    path(&member.link)
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// With a slash in between, unless the directory is the root.
fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}
