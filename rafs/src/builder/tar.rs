//! An archive as the source of an image: its entries in order, the later over the earlier, as if it were extracted.
//!
//! Unlike an extraction nothing is followed: a name must stay below the root by itself, and what lies above it must be
//! directories. A hard link may name a file that comes later, in a layer also one of another layer. Whiteouts are ordinary
//! entries.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use super::tree::{self, Draft, EntryIndex, Inode, InodeIndex, Xattr};
use super::{ArchiveLimits, BuildError, ForeignLink, LayerNotes, Notes};
use crate::archive::{Archive, ArchiveError, Member, MemberKind};
use crate::bootstrap::Kind;
use crate::layout;

/// Longest name of an entry, as in what `unpack` writes.
const MAX_PATH: usize = 64 << 10;

/// Reads an archive into a tree. `store` takes the content of each file, under its number in the tree. With `layer` what it
/// leaves to lower layers is noted there.
pub(super) fn read<R: Read>(
    archive: &mut Archive<R>,
    name: &Path,
    limits: ArchiveLimits,
    notes: &mut Notes,
    layer: Option<&mut LayerNotes>,
    mut store: impl FnMut(&mut Archive<R>, &Member, InodeIndex) -> Result<(), BuildError>,
) -> Result<Draft, BuildError> {
    let failed = |source| BuildError::Archive { archive: name.to_owned(), source };
    let draft = Draft::new(Inode::implied_directory());
    let mut tar = Tar { draft, links: BTreeMap::new(), implied: BTreeSet::from([Vec::new()]), notes };
    while let Some(member) = archive.next().map_err(failed)? {
        let added = tar.add(&member).map_err(|problem| failed(archive.invalid(problem)))?;
        if tar.draft.len() as u64 > limits.names {
            return Err(failed(archive.too_large("names", limits.names)));
        }
        if let Some(inode) = added.filter(|_| member.size > 0) {
            store(archive, &member, inode)?;
        }
    }
    let foreign = tar.resolve_links(layer.is_some()).map_err(failed)?;
    if let Some(layer) = layer {
        *layer = LayerNotes { implied: tar.implied, links: foreign };
    }
    Ok(tar.draft)
}

/// A hard link to a name that was not there yet.
struct Link {
    path: Vec<u8>,
    target: Vec<u8>,
}

struct Tar<'a> {
    draft: Draft,
    /// By the inode that stands for what they will lead to.
    links: BTreeMap<InodeIndex, Link>,
    /// Paths of directories that no entry describes.
    implied: BTreeSet<Vec<u8>>,
    notes: &'a mut Notes,
}

impl Tar<'_> {
    /// Adds an entry to the tree; returns the inode if its content is to be stored.
    fn add(&mut self, member: &Member) -> Result<Option<InodeIndex>, String> {
        let path = components(&member.path)?;
        let Some((name, parents)) = path.split_last() else {
            let MemberKind::Node(Kind::Directory) = member.kind else {
                return Err("the root must be a directory".into());
            };
            let root = self.inode(member, Kind::Directory)?;
            let root = self.draft.add_inode(root);
            self.draft.put_root(root);
            self.implied.remove(&Vec::new());
            return Ok(None);
        };
        let parent = self.parent(parents)?;
        let kind = match member.kind {
            MemberKind::HardLink => return self.link(member, parent, name).map(|()| None),
            MemberKind::Node(kind) => kind,
        };
        let inode = self.inode(member, kind)?;
        let inode = self.draft.add_inode(inode);
        self.draft.put(parent, name, inode);
        self.implied.remove(&path.join(&b'/'));
        Ok((kind == Kind::File).then_some(inode))
    }

    /// The directory that holds an entry; what is missing of it is made.
    fn parent(&mut self, names: &[&[u8]]) -> Result<EntryIndex, String> {
        let mut directory = Draft::ROOT;
        for (depth, name) in names.iter().enumerate() {
            directory = match self.draft.child(directory, name) {
                Some(entry) if self.draft.is_directory(entry) => entry,
                Some(_) => {
                    let path = names[..=depth].join(&b'/');
                    return Err(format!("{:?} above it is no directory", String::from_utf8_lossy(&path)));
                }
                None => {
                    let inode = self.draft.add_inode(Inode::implied_directory());
                    self.implied.insert(names[..=depth].join(&b'/'));
                    self.draft.put(directory, name, inode)
                }
            };
        }
        Ok(directory)
    }

    fn link(&mut self, member: &Member, parent: EntryIndex, name: &[u8]) -> Result<(), String> {
        let target = components(&member.link).map_err(|problem| format!("as the target of a link, {problem}"))?;
        match self.find(&target) {
            Some(entry) if self.draft.is_directory(entry) => Err("a hard link to a directory".into()),
            Some(entry) if !self.links.contains_key(&self.draft.inode_index(entry)) => {
                let inode = self.draft.inode_index(entry);
                self.draft.put(parent, name, inode);
                Ok(())
            }
            // Not there yet, or a link itself that leads to what is not.
            _ => {
                let placeholder = Inode { kind: Kind::File, ..Inode::implied_directory() };
                let inode = self.draft.add_inode(placeholder);
                self.draft.put(parent, name, inode);
                self.links.insert(inode, Link { path: member.path.clone(), target: member.link.clone() });
                Ok(())
            }
        }
    }

    fn find(&self, path: &[&[u8]]) -> Option<EntryIndex> {
        path.iter().try_fold(Draft::ROOT, |entry, name| self.draft.child(entry, name))
    }

    /// Leads links whose target came later to it. Those whose target never came are an error, or with `foreign` are taken
    /// out of the tree and returned, in the order of the archive.
    fn resolve_links(&mut self, foreign: bool) -> Result<Vec<ForeignLink>, ArchiveError> {
        if self.links.is_empty() {
            return Ok(Vec::new());
        }
        let (mut resolved, mut missing) = (BTreeMap::new(), BTreeSet::new());
        // What another entry replaced since is not among these, and need not lead anywhere.
        for entry in self.draft.reachable() {
            let inode = self.draft.inode_index(entry);
            if let Some(link) = self.links.get(&inode) {
                let failed = |problem| ArchiveError::Invalid {
                    place: format!("entry {:?}", String::from_utf8_lossy(&link.path)),
                    problem,
                };
                match self.resolve(inode, &mut resolved).map_err(failed)? {
                    Some(target) => self.draft.redirect(entry, target),
                    None if foreign => drop(missing.insert(inode)),
                    None => {
                        let target = String::from_utf8_lossy(&link.target);
                        return Err(failed(format!("its target {target:?} is no file of the archive")));
                    }
                }
            }
        }
        Ok(missing.into_iter().filter_map(|inode| self.take_out(inode)).collect())
    }

    /// Removes the name of a link; returns it with its target.
    fn take_out(&mut self, placeholder: InodeIndex) -> Option<ForeignLink> {
        let link = self.links.get(&placeholder)?;
        // Both were looked at when the link was added.
        let (path, target) = (components(&link.path).ok()?, components(&link.target).ok()?);
        let (name, parents) = path.split_last()?;
        let parent = self.find(parents)?;
        self.draft.remove(parent, name);
        Some(ForeignLink { path: path.join(&b'/'), target: target.join(&b'/') })
    }

    /// What a placeholder stands for, if it is there; the way may lead over others. Each step is taken once for all
    /// links.
    fn resolve(
        &self,
        placeholder: InodeIndex,
        resolved: &mut BTreeMap<InodeIndex, Option<InodeIndex>>,
    ) -> Result<Option<InodeIndex>, String> {
        let (mut current, mut passed) = (placeholder, Vec::new());
        let found = loop {
            let Some(link) = self.links.get(&current) else { break Some(current) };
            if let Some(target) = resolved.get(&current) {
                break *target;
            }
            if passed.len() > self.links.len() {
                return Err("a hard link that leads back to itself".into());
            }
            passed.push(current);
            let Some(target) = components(&link.target).ok().and_then(|target| self.find(&target)) else {
                break None;
            };
            if self.draft.is_directory(target) {
                return Err("a hard link to a directory".into());
            }
            current = self.draft.inode_index(target);
        };
        resolved.extend(passed.into_iter().map(|placeholder| (placeholder, found)));
        Ok(found)
    }

    fn inode(&mut self, member: &Member, kind: Kind) -> Result<Inode, String> {
        let target = if kind == Kind::Symlink { member.link.clone() } else { Vec::new() };
        let len = target.len() as u64;
        if kind == Kind::Symlink && (!(1..=layout::MAX_TARGET).contains(&len) || target.contains(&0)) {
            return Err(format!("a symbolic link of {len} bytes, it may have 1 to 4096 other than NUL"));
        }
        let xattrs = self.xattrs(member);
        tree::check_xattrs(&xattrs)?;
        Ok(Inode {
            kind,
            mode: tree::type_bits(kind) | member.mode,
            uid: member.uid,
            gid: member.gid,
            size: if kind == Kind::Symlink { len } else { member.size },
            rdev: tree::encode_device(member.device.0, member.device.1),
            mtime: member.mtime,
            xattrs,
            target,
            ..Inode::implied_directory()
        })
    }

    /// Attributes that the format can hold; the others are noted.
    fn xattrs(&mut self, member: &Member) -> Vec<Xattr> {
        let (kept, left_out): (Vec<_>, Vec<_>) =
            member.xattrs.iter().cloned().partition(|(name, _)| tree::split_xattr(name).is_some());
        for (name, _) in left_out {
            let (path, name) = (String::from_utf8_lossy(&member.path), String::from_utf8_lossy(&name));
            self.notes.add(|| format!("{path}: xattr {name} was left out"));
        }
        kept
    }
}

/// The names of a path below the root; none for the root itself.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.is_empty() {
        return Err("an empty name".into());
    }
    if path.len() > MAX_PATH {
        return Err(format!("a name of {} bytes, at most {MAX_PATH} are taken", path.len()));
    }
    let text = || String::from_utf8_lossy(path);
    if path.starts_with(b"/") {
        return Err(format!("{:?} is absolute, names must be relative to the root of the image", text()));
    }
    let names: Vec<_> = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b".")).collect();
    if names.contains(&&b".."[..]) {
        return Err(format!("{:?} leads up and possibly out of the image", text()));
    }
    match names.iter().find(|name| name.len() > layout::MAX_NAME || name.contains(&0)) {
        Some(name) => Err(format!("a name of {} bytes, it may have 1 to 255 other than NUL", name.len())),
        None => Ok(names),
    }
}
