//! Directory blocks: entries in order, and binary search by name.

use std::cmp::Ordering;

use zerocopy::FromBytes;

use super::error::At;
use super::inode::{Entry, Inode, Kind};
use super::walk::is_name;
use super::{BootstrapError, Nid};
use crate::layout::{DIRENT, Dirent};

/// One block of a directory: an array of entries, then their names back to back.
#[derive(Debug, Clone, Copy)]
pub(super) struct Block<'a> {
    offset: u64,
    bytes: &'a [u8],
    count: usize,
}

impl<'a> Block<'a> {
    pub(super) fn new(offset: u64, bytes: &'a [u8]) -> Result<Self, BootstrapError> {
        let at = At::new("directory block", offset);
        let Ok((first, _)) = Dirent::ref_from_prefix(bytes) else {
            return Err(at.invalid(format!("{} bytes are too short for an entry", bytes.len())));
        };
        let names = usize::from(first.name_offset.get());
        let valid = names > 0 && names.is_multiple_of(DIRENT as usize) && names < bytes.len();
        at.require(valid, || format!("the first name is at {names} of {} bytes", bytes.len()))?;
        Ok(Self { offset, bytes, count: names / DIRENT as usize })
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn at(&self, number: usize) -> At {
        At::new("directory entry", self.offset + number as u64 * DIRENT)
    }

    fn dirent(&self, number: usize) -> Result<&'a Dirent, BootstrapError> {
        let bytes = self.bytes.get(number * DIRENT as usize..).unwrap_or(&[]);
        let dirent = Dirent::ref_from_prefix(bytes).map(|(dirent, _)| dirent);
        dirent.map_err(|_| self.at(number).invalid("it ends behind its block"))
    }

    pub(super) fn entry(&self, number: usize) -> Result<Entry<'a>, BootstrapError> {
        let at = self.at(number);
        let dirent = self.dirent(number)?;
        let start = usize::from(dirent.name_offset.get());
        let last = number + 1 == self.count;
        let end = if last { self.bytes.len() } else { self.dirent(number + 1)?.name_offset.get().into() };
        let name = self.bytes.get(start..end).filter(|_| start >= self.count * DIRENT as usize);
        let name = name.ok_or_else(|| at.invalid(format!("its name lies at {start}..{end}")))?;
        let name = match name.iter().position(|byte| *byte == 0) {
            Some(end) if last => &name[..end],
            _ => name,
        };
        at.require(is_name(name), || format!("name {:?}", String::from_utf8_lossy(name)))?;
        let kind = Kind::from_dirent_type(dirent.file_type);
        let kind = kind.ok_or_else(|| at.invalid(format!("unknown file type {}", dirent.file_type)))?;
        Ok(Entry { name, nid: Nid(dirent.nid.get()), kind })
    }
}

/// Where a block of a directory begins, for whoever goes on in the middle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct BlockStart {
    /// Number of the block.
    block: u64,
    /// Entries before it.
    entries: u64,
}

/// Entries of all blocks in order. Ends after the first error.
#[derive(Debug)]
pub(crate) struct Entries<'a> {
    inode: Inode<'a>,
    block: u64,
    current: Option<Block<'a>>,
    /// Where that is.
    start: BlockStart,
    next: usize,
    skip: u64,
}

impl<'a> Entries<'a> {
    /// Without the first `skip` of them. Blocks before `near` are not looked at if those are among them.
    pub(super) fn new(inode: Inode<'a>, skip: u64, near: BlockStart) -> Self {
        let start = if near.entries <= skip { near } else { BlockStart::default() };
        Self { inode, block: start.block, current: None, start, next: 0, skip: skip - start.entries }
    }

    /// The block of the last entry.
    #[cfg(feature = "mount")]
    pub(crate) fn start(&self) -> BlockStart {
        self.start
    }

    fn advance(&mut self) -> Result<Option<Entry<'a>>, BootstrapError> {
        loop {
            if let Some(block) = self.current.filter(|block| self.next < block.count()) {
                self.next += 1;
                return block.entry(self.next - 1).map(Some);
            }
            if self.block >= self.inode.directory_blocks() {
                return Ok(None);
            }
            let before = self.current.map_or(0, |block| block.count() as u64);
            self.start = BlockStart { block: self.block, entries: self.start.entries + before };
            let block = self.inode.directory_block(self.block)?;
            self.block += 1;
            self.next = self.skip.min(block.count() as u64) as usize;
            self.skip -= self.next as u64;
            self.current = Some(block);
        }
    }
}

impl<'a> Iterator for Entries<'a> {
    type Item = Result<Entry<'a>, BootstrapError>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.advance().transpose();
        if !matches!(entry, Some(Ok(_))) {
            self.current = None;
            self.block = u64::MAX;
        }
        entry
    }
}

/// Finds a name: first its block by the first names, then its entry.
pub(super) fn lookup(inode: &Inode<'_>, name: &[u8]) -> Result<Option<Nid>, BootstrapError> {
    let (mut low, mut high) = (0, inode.directory_blocks());
    while low < high {
        let middle = low + (high - low) / 2;
        if inode.directory_block(middle)?.entry(0)?.name <= name {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let Some(number) = low.checked_sub(1) else { return Ok(None) };
    let block = inode.directory_block(number)?;
    let (mut low, mut high) = (0, block.count());
    while low < high {
        let middle = low + (high - low) / 2;
        let entry = block.entry(middle)?;
        match entry.name.cmp(name) {
            Ordering::Equal => return Ok(Some(entry.nid)),
            Ordering::Less => low = middle + 1,
            Ordering::Greater => high = middle,
        }
    }
    Ok(None)
}
