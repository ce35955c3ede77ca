//! Inodes, decoded from the bootstrap's bytes when asked for.

use std::ops::Range;

use super::directory::{self, Block, BlockStart, Entries};
use super::error::At;
use super::image::Image;
use super::xattr;
use super::{BootstrapError, Nid};
use crate::layout::{self, ChunkIndex, CompactInode, ExtendedInode, data_layout};
use crate::source::ChunkId;

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

impl Kind {
    /// From the type bits of a mode.
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o010_000 => Self::Fifo,
            0o020_000 => Self::CharDevice,
            0o040_000 => Self::Directory,
            0o060_000 => Self::BlockDevice,
            0o100_000 => Self::File,
            0o120_000 => Self::Symlink,
            0o140_000 => Self::Socket,
            _ => return None,
        })
    }

    /// The file type of a directory entry.
    pub(crate) fn dirent_type(self) -> u8 {
        match self {
            Self::File => 1,
            Self::Directory => 2,
            Self::CharDevice => 3,
            Self::BlockDevice => 4,
            Self::Fifo => 5,
            Self::Socket => 6,
            Self::Symlink => 7,
        }
    }

    pub(super) fn from_dirent_type(file_type: u8) -> Option<Self> {
        use Kind::{BlockDevice, CharDevice, Directory, Fifo, File, Socket, Symlink};
        [File, Directory, CharDevice, BlockDevice, Fifo, Socket, Symlink]
            .into_iter()
            .find(|kind| kind.dirent_type() == file_type)
    }
}

/// A name in a directory. `.` and `..` are entries like any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Any bytes but `/` and NUL, 1 to 255 of them.
    pub name: &'a [u8],
    /// What it leads to.
    pub nid: Nid,
    /// What that is.
    pub kind: Kind,
}

/// One chunk of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef {
    /// Which chunk.
    pub id: ChunkId,
    /// Its decoded bytes: the chunk size, or less for the last of a file.
    pub decoded_len: u32,
    /// Where it starts in the blob's decoded address space.
    pub decoded_offset: u64,
}

/// An inode. Cheap to copy; borrows the bootstrap.
#[derive(Debug, Clone, Copy)]
pub struct Inode<'a> {
    image: &'a Image,
    nid: Nid,
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
    size: u64,
    nlink: u32,
    ino: u32,
    mtime: (i64, u32),
    u: u32,
    layout: u16,
    /// Offset of the inode.
    offset: u64,
    /// What lies behind the inode's fixed part.
    xattrs: &'a [u8],
    /// Offset of the first byte behind the xattrs.
    end: u64,
}

impl<'a> Inode<'a> {
    /// Decodes the inode and checks that all its parts lie in the file; says nothing about their content.
    pub(super) fn decode(image: &'a Image, nid: Nid) -> Result<Self, BootstrapError> {
        let offset = image.inode_offset(nid);
        let at = At::new("inode", offset.unwrap_or(u64::MAX));
        let offset = offset.ok_or_else(|| at.invalid(format!("nid {nid} lies behind the file")))?;
        let format = u16::from_le_bytes([image.view::<[u8; 2]>(at)?[0], image.view::<[u8; 2]>(at)?[1]]);
        at.require(format & !0xF == 0, || format!("format {format:#x}"))?;
        let fields = if format & 1 == 0 { compact(image.view(at)?) } else { extended(image.view(at)?) };
        let xattr_offset = offset + if format & 1 == 0 { layout::COMPACT_INODE } else { layout::EXTENDED_INODE };
        let xattr_len = match u64::from(fields.xattr_count.get()) {
            0 => 0,
            count => layout::XATTR_HEADER + 4 * (count - 1),
        };
        let mode = u32::from(fields.mode.get());
        let kind = Kind::from_mode(mode).ok_or_else(|| at.invalid(format!("mode {mode:#o} has no file type")))?;
        let (uid, gid) = image.owners.unwrap_or((fields.uid.get(), fields.gid.get()));
        let mtime = (fields.mtime.get() as i64, fields.mtime_nsec.get());
        at.require(mtime.1 < 1_000_000_000, || format!("{} nanoseconds", mtime.1))?;
        let xattrs = image.slice(At::new("xattrs", xattr_offset), xattr_len)?;
        let inode = Self {
            image,
            nid,
            kind,
            mode,
            uid,
            gid,
            size: fields.size.get(),
            nlink: fields.nlink.get(),
            ino: fields.ino.get(),
            mtime,
            u: fields.u.get(),
            layout: (format >> 1) & 7,
            offset,
            xattrs,
            end: xattr_offset + xattr_len,
        };
        inode.check_data()?;
        Ok(inode)
    }

    fn check_data(&self) -> Result<(), BootstrapError> {
        let at = self.at();
        let (kind, layout, size) = (self.kind, self.layout, self.size);
        let fits = match kind {
            Kind::File => layout == data_layout::CHUNKED,
            Kind::Directory | Kind::Symlink => layout == data_layout::PLAIN || layout == data_layout::INLINE,
            _ => matches!(layout, data_layout::PLAIN | data_layout::INLINE | data_layout::CHUNKED),
        };
        at.require(fits, || format!("data layout {layout} of a {kind:?}"))?;
        match kind {
            Kind::File => self.check_chunk_header(),
            Kind::Directory => {
                at.require(size > 0, || "an empty directory lacks even . and ..".into())?;
                self.check_blocks()
            }
            Kind::Symlink => {
                at.require((1..=layout::MAX_TARGET).contains(&size), || format!("a symlink of {size} bytes"))?;
                // Blocks of tars are shorter than targets. Upstream's builder writes one thing over the other then.
                let tail = self.inline_tail();
                at.require(tail == 0 || tail == size, || format!("a symlink of {size} bytes in two places"))?;
                self.check_blocks()
            }
            _ => Ok(()),
        }
    }

    fn check_chunk_header(&self) -> Result<(), BootstrapError> {
        let at = self.at();
        at.require(self.u & !0x1F == layout::CHUNK_INDEXES, || format!("chunk header {:#x}", self.u))?;
        let bits = (self.u & 0x1F) + self.image.block.trailing_zeros();
        let chunk_size = u64::from(self.image.chunk_size);
        // A file whose chunks are consecutive may state one chunk that covers it all: the kernel then reads one index.
        let whole = self.size.checked_next_power_of_two().map(u64::trailing_zeros);
        let fits =
            self.size == 0 || bits == chunk_size.trailing_zeros() || (self.size > chunk_size && whole == Some(bits));
        at.require(fits, || format!("chunks of 2^{bits} bytes in a file of {}", self.size))?;
        let len = self.chunk_count().checked_mul(layout::CHUNK_INDEX);
        let len = len.ok_or_else(|| at.invalid(format!("a file of {} bytes", self.size)))?;
        self.image.require(At::new("chunk indexes", self.indexes_offset()), len)
    }

    fn check_blocks(&self) -> Result<(), BootstrapError> {
        let tail = self.inline_tail();
        let at = At::new("inline data", self.end);
        self.image.require(at, tail)?;
        at.require(tail == 0 || self.end % self.image.block + tail <= self.image.block, || {
            format!("{tail} bytes cross a block border")
        })?;
        self.image.require(At::new("data blocks", self.blocks_offset()), self.size - tail)
    }

    /// Bytes after the inode that belong to its data.
    fn inline_tail(&self) -> u64 {
        if self.layout == data_layout::INLINE { self.size % self.image.block } else { 0 }
    }

    fn blocks_offset(&self) -> u64 {
        // Without whole blocks the address means nothing; 0 is always in the file.
        if self.size == self.inline_tail() { 0 } else { u64::from(self.u) * self.image.block }
    }

    fn indexes_offset(&self) -> u64 {
        self.end.next_multiple_of(layout::CHUNK_INDEX)
    }

    /// Bytes of the bootstrap that this inode says it owns. In an honest image no two inodes own the same byte.
    pub(super) fn claimed_bytes(&self) -> u64 {
        let data = match self.kind {
            Kind::File => self.chunk_count() * layout::CHUNK_INDEX,
            Kind::Directory | Kind::Symlink => self.size,
            _ => 0,
        };
        self.end - self.offset + data
    }

    /// The parts of the bootstrap that it owns, and what they are called.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Range<u64>, &'static str)> + use<'a> {
        let (fixed, data) = (
            self.offset..self.end,
            match self.kind {
                Kind::File => {
                    let start = self.indexes_offset();
                    [(start..start + self.chunk_count() * layout::CHUNK_INDEX, "chunk indexes"), (0..0, "")]
                }
                Kind::Directory | Kind::Symlink => {
                    let (tail, start) = (self.inline_tail(), self.blocks_offset());
                    [(self.end..self.end + tail, "inline data"), (start..start + self.size - tail, "data blocks")]
                }
                _ => [(0..0, ""), (0..0, "")],
            },
        );
        [(fixed, "inode")].into_iter().chain(data).filter(|(range, _)| !range.is_empty())
    }

    /// Whether the kernel is told that the file is one run of its blob, so that it looks at the first index only.
    pub(crate) fn is_one_run_for_the_kernel(&self) -> bool {
        let bits = (self.u & 0x1F) + self.image.block.trailing_zeros();
        self.kind == Kind::File && self.size > 0 && bits != self.image.chunk_size.trailing_zeros()
    }

    pub(super) fn at(&self) -> At {
        At::new("inode", self.offset)
    }

    /// The bytes of one block of a directory, shorter for the last.
    fn data_block(&self, number: u64) -> Result<(u64, &'a [u8]), BootstrapError> {
        let start = number * self.image.block;
        let left = self.size.checked_sub(start).ok_or_else(|| self.at().invalid("a block behind its end"))?;
        let inline = self.layout == data_layout::INLINE && left < self.image.block;
        let offset = if inline { self.end } else { self.blocks_offset() + start };
        Ok((offset, self.image.slice(At::new("data blocks", offset), left.min(self.image.block))?))
    }

    pub(super) fn directory_blocks(&self) -> u64 {
        if self.kind == Kind::Directory { self.size.div_ceil(self.image.block) } else { 0 }
    }

    pub(super) fn directory_block(&self, number: u64) -> Result<Block<'a>, BootstrapError> {
        let (offset, bytes) = self.data_block(number)?;
        Block::new(offset, bytes)
    }

    /// Where it lies, unique within the image.
    pub fn nid(&self) -> Nid {
        self.nid
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Type and permission bits, as in `st_mode`.
    pub fn mode(&self) -> u32 {
        self.mode
    }

    /// Owner.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Group.
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// Bytes of a file or of a link's target; bytes of its entries for a directory.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Names of a file; 2 plus subdirectories for a directory. As stored, not counted.
    pub fn nlink(&self) -> u32 {
        self.nlink
    }

    /// Device number in Linux's 32-bit form (`new_encode_dev`); 0 for what is no device.
    pub fn rdev(&self) -> u32 {
        if matches!(self.kind, Kind::CharDevice | Kind::BlockDevice) { self.u } else { 0 }
    }

    /// Modification time: seconds since 1970 and nanoseconds.
    pub fn mtime(&self) -> (i64, u32) {
        self.mtime
    }

    /// The builder's sequence number.
    pub fn ino(&self) -> u32 {
        self.ino
    }

    /// Entries of a directory in the order of their bytes, `.` and `..` included; nothing for other kinds.
    pub fn entries(&self) -> impl Iterator<Item = Result<Entry<'a>, BootstrapError>> + use<'a> {
        self.entries_from(0)
    }

    /// Like [`entries`](Self::entries), without the first `skip` of them. Skips whole blocks at once.
    pub fn entries_from(&self, skip: u64) -> impl Iterator<Item = Result<Entry<'a>, BootstrapError>> + use<'a> {
        self.entries_near(skip, BlockStart::default())
    }

    /// Like [`entries_from`](Self::entries_from), for whoever has been in the middle before.
    pub(crate) fn entries_near(&self, skip: u64, near: BlockStart) -> Entries<'a> {
        Entries::new(*self, skip, near)
    }

    /// Finds a name in a directory; `None` in what is none.
    pub fn lookup(&self, name: &[u8]) -> Result<Option<Nid>, BootstrapError> {
        directory::lookup(self, name)
    }

    /// Target of a symbolic link: 1 to 4096 bytes without NUL; empty for other kinds.
    pub fn target(&self) -> Result<&'a [u8], BootstrapError> {
        if self.kind != Kind::Symlink {
            return Ok(&[]);
        }
        // In one place, as was seen when it was decoded.
        let offset = if self.inline_tail() > 0 { self.end } else { self.blocks_offset() };
        let target = self.image.slice(At::new("data blocks", offset), self.size)?;
        self.at().require(!target.contains(&0), || "a symlink whose target has a NUL".into())?;
        Ok(target)
    }

    /// Full names and values of the xattrs, in stored order, up to the first that is broken: in a [`Bootstrap`](super::Bootstrap)
    /// none is.
    pub fn xattrs(&self) -> impl Iterator<Item = (Vec<u8>, &'a [u8])> + use<'a> {
        self.raw_xattrs().map_while(Result::ok).map(|xattr| (xattr.name(), xattr.value))
    }

    /// Value of one xattr.
    pub fn xattr(&self, name: &[u8]) -> Option<&'a [u8]> {
        self.raw_xattrs().map_while(Result::ok).find(|xattr| xattr.is_named(name)).map(|xattr| xattr.value)
    }

    pub(crate) fn raw_xattrs(&self) -> xattr::Xattrs<'a> {
        xattr::Xattrs::new(self.end - self.xattrs.len() as u64, self.xattrs)
    }

    /// Number of chunks of a file; 0 for other kinds.
    pub fn chunk_count(&self) -> u64 {
        if self.kind == Kind::File { self.size.div_ceil(self.image.chunk_size.into()) } else { 0 }
    }

    /// The chunk that holds the bytes from `number` x chunk size on.
    pub fn chunk(&self, number: u64) -> Option<ChunkRef> {
        if number >= self.chunk_count() {
            return None;
        }
        let at = At::new("chunk index", self.indexes_offset() + number * layout::CHUNK_INDEX);
        let index: &ChunkIndex = self.image.view(at).ok()?;
        let chunk_size = u64::from(self.image.chunk_size);
        let mixed = u32::from(index.mixed.get());
        Some(ChunkRef {
            id: ChunkId {
                blob: (mixed & 0xFF).checked_sub(1)?,
                index: (mixed >> 8) << 16 | u32::from(index.index_low.get()),
            },
            decoded_len: chunk_size.min(self.size - number * chunk_size) as u32,
            decoded_offset: u64::from(index.block.get()) * self.image.block,
        })
    }

    /// All chunks of a file in order.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkRef> + use<'a> {
        let inode = *self;
        (0..inode.chunk_count()).map_while(move |number| inode.chunk(number))
    }

    /// Size of every chunk but the last.
    pub(crate) fn chunk_size(&self) -> u32 {
        self.image.chunk_size
    }

    pub(super) fn chunk_at(&self, number: u64) -> At {
        At::new("chunk index", self.indexes_offset() + number * layout::CHUNK_INDEX)
    }
}

fn extended(inode: &ExtendedInode) -> ExtendedInode {
    *inode
}

/// A compact inode as if it were extended. It has no time and, as upstream writes it, no device number.
fn compact(inode: &CompactInode) -> ExtendedInode {
    ExtendedInode {
        format: inode.format,
        xattr_count: inode.xattr_count,
        mode: inode.mode,
        reserved: 0.into(),
        size: u64::from(inode.size.get()).into(),
        u: inode.u,
        ino: inode.ino,
        uid: u32::from(inode.uid.get()).into(),
        gid: u32::from(inode.gid.get()).into(),
        mtime: 0.into(),
        mtime_nsec: 0.into(),
        nlink: u32::from(inode.nlink.get()).into(),
        reserved2: [0; 16],
    }
}
