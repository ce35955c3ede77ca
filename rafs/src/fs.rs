//! The file system as FUSE asks for it: parse, delegate, reply. Errors become error numbers here and nowhere else.
//!
//! An image never changes, so the kernel may keep every answer for ever: names (also those that do not exist),
//! attributes, links, directories, pages. Files are opened without asking. What is left to do here is the first look
//! at each name and the first read of each page. Metadata is answered from the bootstrap, wherever that is; reads go to the
//! [`ChunkSource`] and are answered by whichever thread delivers the last chunk, so that no FUSE thread ever waits.
//!
//! Permissions, POSIX ACLs included, are checked by the kernel. Writes do not get here: the mount is read-only.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fuser::{
    AccessFlags, Errno, FileAttr, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};

use crate::bootstrap::{BootstrapError, Inode, Kind, Look, Metadata};
use crate::latency::Latencies;
use crate::source::ChunkSource;
use crate::trace::Trace;

mod attr;
mod positions;
mod read;

use attr::Numbers;
use positions::Positions;

/// How long the kernel may keep answers: 136 years.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Inode numbers are never used again for something else.
const GENERATION: Generation = Generation(0);
/// Largest read request: what kernels allow by default. It bounds what one request holds in memory.
const MAX_READ: u32 = 1 << 20;
/// Reads of pages that the kernel may have under way at a time, for all readers together: each waits for the network.
const MAX_BACKGROUND: u16 = 256;

/// What the image offers the kernel, each if the kernel knows it.
const CAPABILITIES: [InitFlags; 12] = [
    InitFlags::FUSE_ASYNC_READ,
    InitFlags::FUSE_ASYNC_DIO,
    InitFlags::FUSE_MAX_PAGES,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_NO_OPEN_SUPPORT,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    // Inodes can be found by number: overlayfs keeps inode numbers across copy-up with it.
    InitFlags::FUSE_EXPORT_SUPPORT,
    InitFlags::FUSE_POSIX_ACL,
];

/// What the owner of a mount and its file system know of each other.
#[derive(Debug, Default)]
pub(crate) struct MountState {
    /// Read requests so far.
    pub(crate) reads: AtomicU64,
    /// Bytes given to the kernel.
    pub(crate) bytes: AtomicU64,
    /// Reads that ended with EIO.
    pub(crate) errors: AtomicU64,
    /// How long each read waited for its answer.
    pub(crate) latencies: Latencies,
    /// The process is about to end, and another will go on with the mount.
    pub(crate) leaving: AtomicBool,
}

/// A mounted image.
pub(crate) struct ImageFs {
    metadata: Metadata,
    source: Arc<dyn ChunkSource>,
    /// The image's name in log lines.
    name: Arc<str>,
    state: Arc<MountState>,
    trace: Option<Arc<Trace>>,
    numbers: Numbers,
    positions: Positions,
    /// Anyone may look, so requests need no uid: containers with user namespaces can map owners.
    idmap: bool,
    no_open: bool,
    no_opendir: bool,
}

impl ImageFs {
    pub(crate) fn new(
        metadata: Metadata,
        source: Arc<dyn ChunkSource>,
        name: Arc<str>,
        state: Arc<MountState>,
        trace: Option<Arc<Trace>>,
        idmap: bool,
    ) -> Self {
        let (numbers, positions) = (Numbers::new(metadata.root()), Positions::default());
        Self { metadata, source, name, state, trace, numbers, positions, idmap, no_open: false, no_opendir: false }
    }

    fn inode<'l>(&self, look: &'l Look<'_>, ino: INodeNo) -> Result<Inode<'l>, Errno> {
        look.inode(self.numbers.nid(ino)).map_err(|error| self.errno(ino, &error))
    }

    fn attributes(&self, inode: &Inode<'_>) -> FileAttr {
        attr::attributes(inode, self.numbers.ino(inode.nid()))
    }

    /// Whatever is wrong with a bootstrap that was mounted, the reader cannot mend it.
    fn errno(&self, ino: INodeNo, error: &BootstrapError) -> Errno {
        tracing::error!(image = %self.name, inode = ino.0, "cannot read metadata: {error}");
        if matches!(error, BootstrapError::UnknownInode { .. }) { Errno::ESTALE } else { Errno::EIO }
    }

    /// The inode that a name leads to.
    fn find<'l>(&self, look: &'l Look<'_>, parent: INodeNo, name: &OsStr) -> Result<Option<Inode<'l>>, Errno> {
        let parent_inode = self.inode(look, parent)?;
        // Asked of anything, not only of directories, when the kernel has an inode's number and nothing else.
        if name.as_bytes() == b"." {
            return Ok(Some(parent_inode));
        }
        if parent_inode.kind() != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let found = parent_inode.lookup(name.as_bytes());
        let nid = found.map_err(|error| self.errno(parent, &error))?;
        nid.map(|nid| self.inode(look, self.numbers.ino(nid))).transpose()
    }

    /// Gives `add` the entries of a directory from `offset` on, with what the kernel is to send to continue behind
    /// each, until it is full.
    fn list(
        &self,
        ino: INodeNo,
        offset: u64,
        mut add: impl FnMut(&Inode<'_>, u64, &OsStr) -> bool,
    ) -> Result<(), Errno> {
        let look = self.metadata.look();
        let directory = self.inode(&look, ino)?;
        if directory.kind() != Kind::Directory {
            return Err(Errno::ENOTDIR);
        }
        let mut entries = directory.entries_near(offset, self.positions.last(ino));
        let mut next = offset;
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|error| self.errno(ino, &error))?;
            let inode = self.inode(&look, self.numbers.ino(entry.nid))?;
            next = next.saturating_add(1);
            if add(&inode, next, OsStr::from_bytes(entry.name)) {
                self.positions.note(ino, entries.start());
                break;
            }
        }
        Ok(())
    }
}

impl Filesystem for ImageFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        let idmap = Some(InitFlags::FUSE_ALLOW_IDMAP).filter(|_| self.idmap);
        for capability in CAPABILITIES.into_iter().chain(idmap).filter(|capability| offered.contains(*capability)) {
            let refused = |flags| io::Error::other(format!("the kernel offers {flags:?} and refuses it"));
            config.add_capabilities(capability).map_err(refused)?;
        }
        self.no_open = offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT);
        self.no_opendir = offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT);
        let refused = |nearest| io::Error::other(format!("requests of {MAX_READ} bytes are refused for {nearest}"));
        config.set_max_write(MAX_READ).map_err(refused)?;
        let refused = |nearest| io::Error::other(format!("{MAX_BACKGROUND} requests are refused for {nearest}"));
        config.set_max_background(MAX_BACKGROUND).map_err(refused)?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let look = self.metadata.look();
        match self.find(&look, parent, name) {
            Ok(Some(inode)) => reply.entry(&FOR_EVER, &self.attributes(&inode), GENERATION),
            // Rather than ENOENT, which the kernel would not keep.
            Ok(None) => reply.entry(&FOR_EVER, &attr::absent(), GENERATION),
            Err(errno) => reply.error(errno),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.inode(&self.metadata.look(), ino) {
            Ok(inode) => reply.attr(&FOR_EVER, &self.attributes(&inode)),
            Err(errno) => reply.error(errno),
        }
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        let look = self.metadata.look();
        let target = self.inode(&look, ino).and_then(|inode| match inode.kind() {
            Kind::Symlink => inode.target().map_err(|error| self.errno(ino, &error)),
            _ => Err(Errno::EINVAL),
        });
        match target {
            Ok(target) => reply.data(target),
            Err(errno) => reply.error(errno),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.no_open {
            // The kernel does not ask again, for any file, and keeps pages from one open to the next.
            return reply.error(Errno::ENOSYS);
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let look = self.metadata.look();
        let inode = match self.inode(&look, ino) {
            Ok(inode) if inode.kind() == Kind::File => inode,
            Ok(_) => return reply.error(Errno::EINVAL),
            Err(errno) => return reply.error(errno),
        };
        let (state, name, nid) = (Arc::clone(&self.state), Arc::clone(&self.name), inode.nid());
        let asked = Instant::now();
        state.reads.fetch_add(1, Relaxed);
        if let Some(trace) = &self.trace {
            trace.read(nid, offset, size.into());
        }
        read::read(&*self.source, &inode, offset, size.into(), move |outcome| match outcome {
            Ok(data) => {
                state.bytes.fetch_add(data.len() as u64, Relaxed);
                state.latencies.note(asked.elapsed());
                reply.data(data);
            }
            // Neither answered nor dropped, which would answer it: the kernel asks whoever comes after us.
            Err(_) if state.leaving.load(Relaxed) => std::mem::forget(reply),
            Err(error) => {
                state.errors.fetch_add(1, Relaxed);
                tracing::error!(image = %name, inode = nid.0, offset, size, "cannot read: {error}");
                reply.error(Errno::EIO);
            }
        });
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if self.no_opendir {
            return reply.error(Errno::ENOSYS);
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.list(ino, offset, |inode, next, name| {
            reply.add(self.numbers.ino(inode.nid()), next, attr::file_type(inode.kind()), name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let listed = self.list(ino, offset, |inode, next, name| {
            let attributes = self.attributes(inode);
            reply.add(attributes.ino, next, name, &FOR_EVER, &attributes, GENERATION)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let blocks = self.metadata.blobs().iter().map(|blob| blob.decoded_size / 4096).sum();
        reply.statfs(blocks, 0, 0, self.metadata.inode_count(), 0, 4096, 255, 4096);
    }

    fn getxattr(&self, _: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let look = self.metadata.look();
        // Of one that is broken nobody knows the name: it may be an ACL, and the kernel would take it for absent.
        let value = self.inode(&look, ino).and_then(|inode| {
            let mut value = None;
            for xattr in inode.raw_xattrs() {
                let xattr = xattr.map_err(|error| self.errno(ino, &error))?;
                if value.is_none() && xattr.is_named(name.as_bytes()) {
                    value = Some(xattr.value);
                }
            }
            value.ok_or(Errno::ENODATA)
        });
        match value {
            Ok(value) => sized(value, size, reply),
            Err(errno) => reply.error(errno),
        }
    }

    fn listxattr(&self, _: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let look = self.metadata.look();
        let names = self.inode(&look, ino).and_then(|inode| {
            let mut names = Vec::new();
            for xattr in inode.raw_xattrs() {
                names.extend(xattr.map_err(|error| self.errno(ino, &error))?.name());
                names.push(0);
            }
            Ok(names)
        });
        match names {
            Ok(names) => sized(&names, size, reply),
            Err(errno) => reply.error(errno),
        }
    }

    fn access(&self, _: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        // The kernel checks modes itself and does not ask.
        match self.inode(&self.metadata.look(), ino) {
            Ok(_) if mask.contains(AccessFlags::W_OK) => reply.error(Errno::EROFS),
            Ok(_) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    // Nothing to do for these. The kernel does not ask again after ENOSYS.

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        // Files have no holes that the format would tell of.
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}

/// Answers a caller that has room for `size` bytes, or with 0 asks how much it needs.
fn sized(value: &[u8], size: u32, reply: ReplyXattr) {
    match size as usize {
        0 => reply.size(value.len() as u32),
        room if room < value.len() => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}
