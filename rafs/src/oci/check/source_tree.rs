//! The tree of an image of tar layers, as a runtime would unpack them, with the digest of each file.
//!
//! Plain on purpose: names in maps, changed entry by entry, with nothing of the builder but the reader of tars. A layer is
//! a stranger's: names are bounded, nothing here calls itself, and a name is kept once, not with each name below it.
//!
//! Directories that no layer describes have no attributes to compare. One that a layer has files in and does not describe, and
//! that is a symbolic link in a lower layer, takes the place of the link, with the attributes of the directory that the
//! link led to: so runtimes do that unpack each layer for itself, for overlayfs.

use std::{
    collections::BTreeMap,
    io::{self, Read},
};

use crate::{
    ArchiveError, ArchiveLimits, Kind,
    archive::{Archive, Member, MemberKind},
    layout,
};

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OVERLAY_OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// What the format of images has a place for.
const XATTRS: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];
/// Longest name of an entry with all directories, as for the builder.
const MAX_PATH: usize = 64 << 10;
/// Most symbolic links on one way, as for the kernel.
const MAX_LINKS: usize = 40;

/// Position of the root.
pub(super) const ROOT: usize = 0;

/// Layers applied so far.
pub(super) struct SourceTree {
    /// What is taken away stays here until the end; nothing leads to it.
    names: Vec<Name>,
    nodes: Vec<Node>,
    layer: u32,
}

/// A name in its directory.
struct Name {
    node: usize,
    /// The layer that put it there.
    layer: u32,
    /// The last layer that put it or a name below it there.
    touched: u32,
    children: BTreeMap<Box<[u8]>, usize>,
}

/// What one or more names lead to.
pub(super) struct Node {
    pub(super) kind: Kind,
    pub(super) attributes: Option<Attributes>,
    pub(super) size: u64,
    pub(super) content: Option<blake3::Hash>,
    pub(super) target: Vec<u8>,
    pub(super) device: (u32, u32),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) owner: (u32, u32),
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Default for SourceTree {
    fn default() -> Self {
        let root = Name { node: 0, layer: 0, touched: 0, children: BTreeMap::new() };
        Self { names: vec![root], nodes: vec![Node::directory(None)], layer: 0 }
    }
}

impl SourceTree {
    /// Puts a layer, decompressed, over those below it.
    pub(super) fn apply(&mut self, tar: impl Read) -> Result<(), ArchiveError> {
        self.layer += 1;
        let limits = ArchiveLimits::default();
        let mut archive = Archive::new(tar, limits);
        let mut links = Vec::new();
        while let Some(member) = archive.next()? {
            if self.names.len() as u64 >= limits.names {
                return Err(archive.too_large("names", limits.names));
            }
            let path = components(&member.path).map_err(|problem| archive.invalid(problem))?;
            let MemberKind::Node(kind) = member.kind else {
                let target = components(&member.link).map_err(|problem| archive.invalid(problem))?;
                if !self.link(&path, &target) {
                    links.push((path.join(&b'/'), member.link.clone()));
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
            // Both were looked at when they came.
            let (path, target) = (components(&path).unwrap_or_default(), components(&target).unwrap_or_default());
            if !self.link(&path, &target) {
                let target = target.join(&b'/');
                return Err(archive.invalid(format!("a hard link to {:?}, which is no file", show(&target))));
            }
        }
        Ok(())
    }

    pub(super) fn node(&self, name: usize) -> &Node {
        &self.nodes[self.names[name].node]
    }

    /// Equal for two names of one file.
    pub(super) fn node_number(&self, name: usize) -> usize {
        self.names[name].node
    }

    pub(super) fn child(&self, directory: usize, name: &[u8]) -> Option<usize> {
        self.names[directory].children.get(name).copied()
    }

    /// The names in a directory.
    pub(super) fn children(&self, directory: usize) -> impl Iterator<Item = &[u8]> {
        self.names[directory].children.keys().map(|name| &**name)
    }

    fn put(&mut self, path: &[&[u8]], member: &Member, node: Node) {
        let Some((name, parents)) = path.split_last() else {
            if is_opaque(member) {
                self.clear(ROOT);
            }
            self.nodes.push(node);
            self.names[ROOT].node = self.nodes.len() - 1;
            return;
        };
        let parent = self.directory(parents);
        if *name == OPAQUE {
            return self.clear(parent);
        }
        if let Some(gone) = name.strip_prefix(WHITEOUT) {
            return self.remove_older(parent, gone);
        }
        if node.kind == Kind::CharDevice && node.device == (0, 0) {
            return self.remove_older(parent, name);
        }
        if node.kind == Kind::Directory
            && is_opaque(member)
            && let Some(old) = self.child(parent, name)
        {
            self.clear(old);
        }
        self.nodes.push(node);
        self.name(parent, name, self.nodes.len() - 1);
    }

    /// Gives a node a name. A directory over a directory keeps what it holds.
    fn name(&mut self, directory: usize, name: &[u8], node: usize) -> usize {
        let layer = self.layer;
        let is_directory = self.nodes[node].kind == Kind::Directory;
        if is_directory && let Some(old) = self.child(directory, name).filter(|old| self.is_directory(*old)) {
            self.names[old] =
                Name { node, layer, touched: layer, children: std::mem::take(&mut self.names[old].children) };
            return old;
        }
        self.names.push(Name { node, layer, touched: layer, children: BTreeMap::new() });
        let new = self.names.len() - 1;
        self.names[directory].children.insert(name.into(), new);
        new
    }

    /// Another name of a file. `false` when there is no such file yet.
    fn link(&mut self, path: &[&[u8]], target: &[&[u8]]) -> bool {
        let target = target.iter().try_fold(ROOT, |name, next| self.child(name, next));
        let (Some(target), Some((name, parents))) = (target, path.split_last()) else { return false };
        if self.is_directory(target) {
            return false;
        }
        let node = self.names[target].node;
        let parent = self.directory(parents);
        self.name(parent, name, node);
        true
    }

    fn is_directory(&self, name: usize) -> bool {
        self.node(name).kind == Kind::Directory
    }

    /// The directory of an entry; what is missing of it is made.
    fn directory(&mut self, path: &[&[u8]]) -> usize {
        let mut way = vec![ROOT];
        for name in path {
            let at = way.last().copied().unwrap_or(ROOT);
            self.names[at].touched = self.layer;
            let found = self.child(at, name);
            if let Some(directory) = found.filter(|found| self.is_directory(*found)) {
                way.push(directory);
                continue;
            }
            let led = found.and_then(|found| self.led(&way, found));
            match (found, led) {
                // A link of the layer itself is followed.
                (Some(link), Some(led)) if self.names[link].layer == self.layer => way = led,
                (_, led) => {
                    let led = led.and_then(|way| way.last().copied());
                    let attributes = led.and_then(|directory| self.node(directory).attributes.clone());
                    self.nodes.push(Node::directory(attributes));
                    way.push(self.name(at, name, self.nodes.len() - 1));
                }
            }
        }
        let at = way.last().copied().unwrap_or(ROOT);
        self.names[at].touched = self.layer;
        at
    }

    /// The way from the root to the directory that a symbolic link in the last directory of `way` leads to, if it does.
    fn led(&self, way: &[usize], link: usize) -> Option<Vec<usize>> {
        let (mut way, mut next, mut links) = (way.to_vec(), Some(link), 0);
        let mut rest: Vec<&[u8]> = Vec::new();
        loop {
            if let Some(name) = next {
                let node = self.node(name);
                match node.kind {
                    Kind::Directory => way.push(name),
                    Kind::Symlink if links < MAX_LINKS => {
                        links += 1;
                        if node.target.starts_with(b"/") {
                            way.truncate(1);
                        }
                        rest.extend(node.target.split(|byte| *byte == b'/').rev());
                    }
                    _ => return None,
                }
            }
            next = match rest.pop() {
                None => return Some(way),
                Some(b"" | b".") => None,
                Some(b"..") => {
                    way.truncate(way.len().max(2) - 1);
                    None
                }
                Some(name) => Some(self.child(*way.last()?, name)?),
            };
        }
    }

    /// Takes away what lower layers have in a directory.
    fn clear(&mut self, directory: usize) {
        let mut directories = vec![directory];
        while let Some(at) = directories.pop() {
            let mut children = std::mem::take(&mut self.names[at].children);
            children.retain(|_, child| self.names[*child].touched == self.layer);
            for child in children.values().copied() {
                self.undescribe(child);
                directories.push(child);
            }
            self.names[at].children = children;
        }
    }

    /// A directory of a lower layer that holds something of this one is what it would be without the former.
    fn undescribe(&mut self, name: usize) {
        if self.names[name].layer < self.layer {
            self.nodes.push(Node::directory(None));
            (self.names[name].node, self.names[name].layer) = (self.nodes.len() - 1, self.layer);
        }
    }

    /// Takes away a name of a lower layer with all below it.
    fn remove_older(&mut self, directory: usize, name: &[u8]) {
        let Some(child) = self.child(directory, name) else { return };
        if self.names[child].touched < self.layer {
            self.names[directory].children.remove(name);
            return;
        }
        self.clear(child);
        self.undescribe(child);
    }
}

impl Node {
    fn directory(attributes: Option<Attributes>) -> Self {
        let (target, device) = (Vec::new(), (0, 0));
        Self { kind: Kind::Directory, attributes, size: 0, content: None, target, device }
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

fn is_opaque(directory: &Member) -> bool {
    directory.xattrs.iter().any(|(name, value)| name == OVERLAY_OPAQUE && value == b"y")
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

/// The names of a path without dots and doubled slashes; it must not lead up.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.len() > MAX_PATH {
        return Err(format!("a name of {} bytes, at most {MAX_PATH} are taken", path.len()));
    }
    let names: Vec<_> = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    if names.contains(&&b".."[..]) {
        return Err("a name that leads out of the image".into());
    }
    match names.iter().find(|name| name.len() > layout::MAX_NAME) {
        Some(name) => Err(format!("a name of {} bytes, it may have 255", name.len())),
        None => Ok(names),
    }
}

pub(super) fn show(path: &[u8]) -> String {
    String::from_utf8_lossy(path).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use tar::{EntryType, Header};

    use super::*;

    /// Type, name in PAX records, link.
    fn layer(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (kind, path, link) in entries {
            archive.append_pax_extensions([("path", path.as_bytes()), ("linkpath", link.as_bytes())]).unwrap();
            let mut header = Header::new_ustar();
            header.set_entry_type(*kind);
            header.set_mode(if *kind == EntryType::Directory { 0o711 } else { 0o640 });
            header.set_path("x").unwrap();
            header.set_size(0);
            header.set_cksum();
            archive.append(&header, &b""[..]).unwrap();
        }
        archive.into_inner().unwrap()
    }

    fn find(tree: &SourceTree, path: &str) -> Option<usize> {
        path.split('/').try_fold(ROOT, |name, next| tree.child(name, next.as_bytes()))
    }

    fn mode(tree: &SourceTree, path: &str) -> Option<u32> {
        tree.node(find(tree, path).unwrap()).attributes.as_ref().map(|attributes| attributes.mode)
    }

    const FILE: EntryType = EntryType::Regular;
    const DIR: EntryType = EntryType::Directory;
    const LINK: EntryType = EntryType::Symlink;

    #[test]
    fn deep_and_long_names_are_no_danger() {
        let mut tree = SourceTree::default();
        let deep = "a/".repeat(MAX_PATH / 2 - 1) + "f";
        tree.apply(&layer(&[(FILE, &deep, "")])[..]).unwrap();
        assert_eq!(tree.names.len(), MAX_PATH / 2 + 1);
        assert!(find(&tree, &deep).is_some());
        tree.apply(&layer(&[(FILE, ".wh.a", "")])[..]).unwrap();
        assert!(find(&tree, "a").is_none());
        // What a PAX record may hold.
        for (path, problem) in [
            ("a/".repeat((2 << 20) - 64), "at most 65536 are taken"),
            ("a".repeat(256), "256 bytes, it may have 255"),
            ("a/../../f".to_owned(), "out of the image"),
        ] {
            let error = crate::chain(&tree.apply(&layer(&[(FILE, &path, "")])[..]).unwrap_err());
            assert!(error.contains(problem), "{error}");
            let error = tree.apply(&layer(&[(EntryType::Link, "f", &path)])[..]);
            assert!(crate::chain(&error.unwrap_err()).contains(problem));
        }
    }

    /// By containerd 1.6 with its overlayfs snapshotter.
    #[test]
    fn a_directory_that_is_not_described_takes_the_place_of_a_link_below() {
        let mut tree = SourceTree::default();
        let lower = [
            (DIR, "usr", ""),
            (DIR, "usr/lib", ""),
            (FILE, "usr/lib/base", ""),
            (LINK, "lib", "usr/lib"),
            (LINK, "up", "usr/../lib"),
            (LINK, "abs", "/up/."),
            (LINK, "loop", "loop"),
            (LINK, "gone", "usr/none"),
        ];
        tree.apply(&layer(&lower)[..]).unwrap();
        let upper = ["lib/x", "up/x", "abs/x", "loop/x", "gone/x"].map(|path| (FILE, path, ""));
        tree.apply(&layer(&upper)[..]).unwrap();
        for (path, attributes) in [("lib", Some(0o711)), ("up", None), ("abs", None), ("loop", None), ("gone", None)]
        {
            assert!(find(&tree, &format!("{path}/x")).is_some() && find(&tree, &format!("{path}/base")).is_none());
            if path == "lib" || path == "loop" || path == "gone" {
                assert_eq!(mode(&tree, path), attributes, "{path}");
            }
        }
        // Of the same layer it is followed.
        let own = [(LINK, "own", "usr/lib"), (FILE, "own/y", "")];
        tree.apply(&layer(&own)[..]).unwrap();
        assert!(find(&tree, "usr/lib/y").is_some() && find(&tree, "own/y").is_none());
    }

    #[test]
    fn what_a_layer_takes_away_is_of_lower_ones() {
        let mut tree = SourceTree::default();
        let lower = [(DIR, "d", ""), (DIR, "d/e", ""), (FILE, "d/e/old", ""), (FILE, "d/old", ""), (DIR, "w", "")];
        tree.apply(&layer(&lower)[..]).unwrap();
        let upper = [(FILE, "d/e/new", ""), (FILE, "d/.wh..wh..opq", ""), (FILE, "w/x", ""), (FILE, ".wh.w", "")];
        tree.apply(&layer(&upper)[..]).unwrap();
        assert!(find(&tree, "d/old").is_none() && find(&tree, "d/e/old").is_none());
        assert!(find(&tree, "d/e/new").is_some() && find(&tree, "w/x").is_some());
        assert_eq!((mode(&tree, "d"), mode(&tree, "d/e"), mode(&tree, "w")), (Some(0o711), None, None));
    }
}
