//! One name of a RAFS v5 image with all that follows its record.

use std::ops::Range;

use super::disk::{HAS_XATTRS, InodeRecord, UNIT};
use crate::bootstrap::{At, BootstrapError, Kind, slice, view};
use crate::builder::tree::{self, Inode, Xattr};
use crate::layout::{self, ChunkRecord};

/// A record whose parts lie in the file.
#[derive(Debug)]
pub(super) struct Record<'a> {
    pub(super) at: At,
    pub(super) fixed: &'a InodeRecord,
    pub(super) kind: Kind,
    pub(super) name: &'a [u8],
    pub(super) target: &'a [u8],
    xattrs: &'a [u8],
    /// Where its chunk records lie.
    chunks: Range<u64>,
    /// Bytes of record and parts.
    pub(super) len: u64,
}

impl<'a> Record<'a> {
    /// Reads the record at an offset.
    pub(super) fn read(bytes: &'a [u8], offset: u64) -> Result<Self, BootstrapError> {
        let at = At::new("inode", offset);
        let fixed: &InodeRecord = view(bytes, at)?;
        let mode = fixed.mode.get();
        let kind = Kind::from_mode(mode).ok_or_else(|| at.invalid(format!("mode {mode:#o} has no file type")))?;
        let mut end = offset + size_of::<InodeRecord>() as u64;
        let mut part = |structure, len: u64| {
            let part = slice(bytes, At::new(structure, end), len)?;
            end += len.next_multiple_of(UNIT);
            Ok::<_, BootstrapError>(part)
        };
        let name = part("name", fixed.name_len.get().into())?;
        let target = part("link target", fixed.target_len.get().into())?;
        let xattrs = if fixed.flags.get() & HAS_XATTRS == 0 {
            &[]
        } else {
            let size = part("xattrs", UNIT)?;
            let size = size.iter().rev().fold(0, |size, byte| size << 8 | u64::from(*byte));
            at.require(size <= bytes.len() as u64, || format!("{size} bytes of xattrs"))?;
            part("xattrs", size)?
        };
        let chunks = if kind == Kind::File { u64::from(fixed.children.get()) } else { 0 };
        let chunks = end..end + chunks * size_of::<ChunkRecord>() as u64;
        slice(bytes, At::new("chunk records", chunks.start), chunks.end - chunks.start)?;
        let len = chunks.end - offset;
        Ok(Self { at, fixed, kind, name, target, xattrs, chunks, len })
    }

    /// Its chunks, each with its place in the file.
    pub(super) fn chunks(
        &self,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = Result<(At, &'a ChunkRecord), BootstrapError>> {
        self.chunks.clone().step_by(size_of::<ChunkRecord>()).map(move |offset| {
            let at = At::new("chunk record", offset);
            view(bytes, at).map(|record| (at, record))
        })
    }

    /// The inode without its chunks. `owner` replaces the stated one in images without owners.
    pub(super) fn inode(&self, owner: Option<(u32, u32)>) -> Result<Inode, BootstrapError> {
        let fixed = self.fixed;
        let (uid, gid) = owner.unwrap_or((fixed.uid.get(), fixed.gid.get()));
        let len = self.target.len() as u64;
        let link_fits = (1..=layout::MAX_TARGET).contains(&len) && !self.target.contains(&0);
        self.at.require(self.kind != Kind::Symlink || link_fits, || format!("a link of {len} bytes"))?;
        let nanoseconds = fixed.mtime_nsec.get();
        self.at.require(nanoseconds < 1_000_000_000, || format!("{nanoseconds} nanoseconds"))?;
        let is_device = matches!(self.kind, Kind::CharDevice | Kind::BlockDevice);
        Ok(Inode {
            kind: self.kind,
            mode: fixed.mode.get(),
            uid,
            gid,
            size: match self.kind {
                Kind::File => fixed.size.get(),
                Kind::Symlink => len,
                _ => 0,
            },
            rdev: if is_device { fixed.rdev.get() } else { 0 },
            mtime: (fixed.mtime.get() as i64, nanoseconds),
            xattrs: self.parse_xattrs()?,
            target: if self.kind == Kind::Symlink { self.target.to_vec() } else { Vec::new() },
            ..Inode::implied_directory()
        })
    }

    fn parse_xattrs(&self) -> Result<Vec<Xattr>, BootstrapError> {
        let (mut xattrs, mut rest): (Vec<Xattr>, _) = (Vec::new(), self.xattrs);
        while let Some((len, after)) = rest.split_first_chunk() {
            let pair = after.split_at_checked(u32::from_le_bytes(*len) as usize);
            let (pair, after) = pair.ok_or_else(|| self.at.invalid("an xattr that ends behind the others"))?;
            let end = pair.iter().position(|byte| *byte == 0);
            let end = end.ok_or_else(|| self.at.invalid("an xattr whose name does not end"))?;
            xattrs.push((pair[..end].to_vec(), pair[end + 1..].to_vec()));
            rest = after;
        }
        xattrs.sort_unstable();
        let known = xattrs.iter().all(|(name, _)| tree::split_xattr(name).is_some());
        let distinct = xattrs.windows(2).all(|pair| pair[0].0 != pair[1].0);
        self.at.require(rest.is_empty() && known && distinct, || {
            "xattrs that are cut off, of an unknown kind or have one name".into()
        })?;
        tree::check_xattrs(&xattrs).map_err(|problem| self.at.invalid(problem))?;
        Ok(xattrs)
    }
}
