//! The one walk over the whole tree, when a bootstrap is parsed.
//!
//! Ends for any input: a directory is entered once, and the inodes together may not claim more bytes than the file has,
//! which bounds the entries, indexes and xattrs that are looked at.

use std::collections::VecDeque;

use super::chunks::Indexed;
use super::error::At;
use super::image::{Content, Image};
use super::inode::{Entry, Inode, Kind};
use super::{BootstrapError, Nid};
use crate::layout::MAX_NAME;

/// What the walk found.
#[derive(Debug)]
pub(super) struct Walked {
    /// One bit per nid.
    reached: Vec<u64>,
    pub(super) inodes: u64,
    pub(super) names: u64,
    /// What files say of their chunks, where no chunk table tells.
    pub(super) indexed: Vec<Indexed>,
}

impl Walked {
    pub(super) fn reached(&self, nid: Nid) -> bool {
        let word = usize::try_from(nid.0 / 64).ok().and_then(|word| self.reached.get(word));
        word.is_some_and(|word| word & (1 << (nid.0 % 64)) != 0)
    }

    /// Marks an inode; whether it was new. `nid` lies in the file.
    fn reach(&mut self, nid: Nid) -> bool {
        let new = !self.reached(nid);
        if new {
            self.reached[(nid.0 / 64) as usize] |= 1 << (nid.0 % 64);
            self.inodes += 1;
        }
        new
    }
}

/// Verifies everything that the root leads to.
pub(super) fn walk(image: &Image, content: &Content, root: Nid) -> Result<Walked, BootstrapError> {
    let size = image.source.size();
    let words = size as usize / 32 / 64 + 1;
    let mut walk = Walk {
        image,
        content,
        walked: Walked { reached: vec![0; words], inodes: 0, names: 1, indexed: Vec::new() },
        unclaimed: size,
        directories: VecDeque::new(),
    };
    let inode = Inode::decode(image, root)?;
    inode.at().require(inode.kind() == Kind::Directory, || format!("the root is a {:?}", inode.kind()))?;
    walk.enter(&inode)?;
    walk.directories.push_back((root, root));
    while let Some((directory, parent)) = walk.directories.pop_front() {
        walk.directory(directory, parent)?;
    }
    Ok(walk.walked)
}

struct Walk<'a> {
    image: &'a Image,
    content: &'a Content,
    walked: Walked,
    /// Bytes of the file that no inode has claimed yet.
    unclaimed: u64,
    /// Directories to read, each with its parent.
    directories: VecDeque<(Nid, Nid)>,
}

impl<'a> Walk<'a> {
    fn directory(&mut self, nid: Nid, parent: Nid) -> Result<(), BootstrapError> {
        let inode = Inode::decode(self.image, nid)?;
        let mut previous: Option<&'a [u8]> = None;
        let mut dots = 0;
        for number in 0..inode.directory_blocks() {
            let block = inode.directory_block(number)?;
            for position in 0..block.count() {
                let at = block.at(position);
                let entry = block.entry(position)?;
                let name = entry.name;
                at.require(previous.is_none_or(|previous| previous < name), || {
                    format!("name {:?} is out of order", String::from_utf8_lossy(name))
                })?;
                previous = Some(name);
                let expected = match name {
                    b"." => nid,
                    b".." => parent,
                    _ => {
                        self.entry(at, &entry, nid)?;
                        continue;
                    }
                };
                let right = entry.nid == expected && entry.kind == Kind::Directory;
                at.require(right, || format!("{:?} leads to {}", String::from_utf8_lossy(name), entry.nid))?;
                dots += 1;
            }
        }
        inode.at().require(dots == 2, || "a directory without . and ..".into())
    }

    fn entry(&mut self, at: At, entry: &Entry<'_>, directory: Nid) -> Result<(), BootstrapError> {
        let inode = Inode::decode(self.image, entry.nid)?;
        at.require(inode.kind() == entry.kind, || format!("a {:?} according to the name", entry.kind))?;
        self.walked.names += 1;
        let new = !self.walked.reached(entry.nid);
        if entry.kind == Kind::Directory {
            at.require(new, || format!("directory {} has a name elsewhere", entry.nid))?;
            self.directories.push_back((entry.nid, directory));
        }
        if new { self.enter(&inode) } else { Ok(()) }
    }

    /// Verifies an inode that is seen for the first time.
    fn enter(&mut self, inode: &Inode<'a>) -> Result<(), BootstrapError> {
        self.walked.reach(inode.nid());
        let left = self.unclaimed.checked_sub(inode.claimed_bytes());
        self.unclaimed = left.ok_or_else(|| inode.at().invalid("the inodes claim more bytes than the file has"))?;
        for xattr in inode.raw_xattrs() {
            xattr?;
        }
        match inode.kind() {
            Kind::Symlink => inode.target().map(drop),
            Kind::File => self.chunks(inode),
            _ => Ok(()),
        }
    }

    fn chunks(&mut self, inode: &Inode<'_>) -> Result<(), BootstrapError> {
        for number in 0..inode.chunk_count() {
            let at = inode.chunk_at(number);
            let chunk = inode.chunk(number).ok_or_else(|| at.invalid("it names no blob"))?;
            let blobs = self.content.blobs.len();
            at.require((chunk.id.blob as usize) < blobs, || format!("blob {} of {blobs}", chunk.id.blob))?;
            if !self.content.chunks.have_digests() {
                self.walked.indexed.push((at, chunk));
                continue;
            }
            let record = self.content.chunk(chunk.id).map(|named| named.chunk);
            let record = record.ok_or_else(|| {
                at.invalid(format!("chunk {} of blob {} is unknown", chunk.id.index, chunk.id.blob))
            })?;
            at.require(record.decoded_offset == chunk.decoded_offset, || {
                format!("decoded offset {}, {} in the chunk table", chunk.decoded_offset, record.decoded_offset)
            })?;
            at.require(record.decoded_len == chunk.decoded_len, || {
                format!("{} bytes of the file, {} in the chunk table", chunk.decoded_len, record.decoded_len)
            })?;
        }
        Ok(())
    }
}

/// Whether a directory may have such an entry.
pub(crate) fn is_name(name: &[u8]) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && !name.contains(&b'/') && !name.contains(&0)
}
