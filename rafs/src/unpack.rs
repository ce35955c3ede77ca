//! From an image back to a tar equal to its source.
//!
//! Depth first, names in byte order, directories before what they hold, the first name of a file with its content and
//! the others as hard links to it. PAX records carry what the plain header cannot: long names and targets, xattrs
//! (`SCHILY.xattr.*`, as GNU tar and libarchive read them), nanoseconds and times before 1970. Sockets have no place in
//! a tar and are noted in the report. ACLs are xattrs like any other: restore with `--xattrs --xattrs-include='*'`, without
//! `--acls`.
//!
//! A layer takes away from lower ones what the tar of a layer takes away: what overlayfs uses for that becomes what OCI uses.

use std::collections::HashMap;
use std::io::{self, Write};

use serde::Serialize;

use crate::blob_dir::BlobDirReader;
use crate::bootstrap::{Bootstrap, BootstrapError, Entry, Inode, Kind, Nid};
use crate::builder::overlay;
use crate::source::ChunkError;

mod header;

/// Longest path in a tar: a tree that is deeper was not made to be unpacked.
const MAX_PATH: usize = 64 << 10;

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct UnpackReport {
    /// Entries of the tar.
    pub entries: u64,
    /// Bytes of file content.
    pub bytes: u64,
    /// Paths of sockets, which were left out.
    pub sockets: Vec<String>,
}

/// Why unpacking ended.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The bootstrap is wrong.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// A chunk could not be read or is not what the image names.
    #[error("{path}")]
    Chunk {
        /// The file that needs it.
        path: String,
        /// Which chunk and why.
        #[source]
        source: ChunkError,
    },
    /// A path is too long.
    #[error("the path {path}... has more than {MAX_PATH} bytes")]
    Path {
        /// Its start.
        path: String,
    },
    /// The output could not be written.
    #[error("cannot write the tar")]
    Write(#[from] io::Error),
}

/// Writes an image as a tar. `reader` must be that of the same bootstrap.
pub fn unpack(
    bootstrap: &Bootstrap,
    reader: &BlobDirReader,
    output: impl Write,
) -> Result<UnpackReport, UnpackError> {
    Unpacker::new(bootstrap, reader, output, false).run()
}

/// Like [`unpack`], as a layer of an OCI image: a device 0:0 becomes a file `.wh.NAME`, a directory with the xattr
/// `trusted.overlay.opaque` of `y` has a file `.wh..wh..opq` in its place, and there is no entry for a root that nobody has
/// described, as that would change the root below.
pub fn unpack_layer(
    bootstrap: &Bootstrap,
    reader: &BlobDirReader,
    output: impl Write,
) -> Result<UnpackReport, UnpackError> {
    Unpacker::new(bootstrap, reader, output, true).run()
}

struct Unpacker<'a, W> {
    bootstrap: &'a Bootstrap,
    reader: &'a BlobDirReader,
    output: W,
    /// Whether it becomes a layer over others.
    layer: bool,
    /// Paths of files that have several names.
    first_names: HashMap<Nid, Vec<u8>>,
    report: UnpackReport,
}

impl<'a, W: Write> Unpacker<'a, W> {
    fn new(bootstrap: &'a Bootstrap, reader: &'a BlobDirReader, output: W, layer: bool) -> Self {
        let report = UnpackReport::default();
        Self { bootstrap, reader, output, layer, first_names: HashMap::new(), report }
    }

    fn run(mut self) -> Result<UnpackReport, UnpackError> {
        let bootstrap = self.bootstrap;
        let root = bootstrap.inode(bootstrap.root())?;
        if !self.layer || !is_implied(&root) {
            self.entry(b"./", &root)?;
        }
        if self.layer && overlay::is_opaque(&root) {
            self.whiteout(overlay::OPAQUE, &root)?;
        }
        let mut stack = vec![(Vec::new(), root.entries())];
        while let Some((directory, entries)) = stack.last_mut() {
            let Some(entry) = entries.next() else {
                stack.pop();
                continue;
            };
            let Entry { name, nid, kind } = entry?;
            if name == b"." || name == b".." {
                continue;
            }
            let slash: &[u8] = if kind == Kind::Directory { b"/" } else { b"" };
            let path = [directory, name, slash].concat();
            if path.len() > MAX_PATH {
                return Err(UnpackError::Path { path: String::from_utf8_lossy(&path[..200]).into_owned() });
            }
            let inode = bootstrap.inode(nid)?;
            if self.layer && overlay::is_device_whiteout(&inode) {
                self.whiteout(&[directory, overlay::WHITEOUT, name].concat(), &inode)?;
                continue;
            }
            self.entry(&path, &inode)?;
            if self.layer && overlay::is_opaque(&inode) {
                self.whiteout(&[&path, overlay::OPAQUE].concat(), &inode)?;
            }
            if kind == Kind::Directory {
                stack.push((path, inode.entries()));
            }
        }
        // The end of a tar: two blocks of zeroes.
        self.output.write_all(&[0; 1024])?;
        self.output.flush()?;
        Ok(self.report)
    }

    /// An empty file that takes something away, with the owner and the time of what stands for it in the image.
    fn whiteout(&mut self, path: &[u8], inode: &Inode<'_>) -> Result<(), UnpackError> {
        self.report.entries += 1;
        Ok(header::write_empty_file(&mut self.output, path, inode)?)
    }

    fn entry(&mut self, path: &[u8], inode: &Inode<'_>) -> Result<(), UnpackError> {
        if inode.kind() == Kind::Socket {
            self.report.sockets.push(String::from_utf8_lossy(path).into_owned());
            return Ok(());
        }
        self.report.entries += 1;
        if inode.kind() == Kind::File && inode.nlink() > 1 {
            if let Some(first) = self.first_names.get(&inode.nid()) {
                return Ok(header::write_hard_link(&mut self.output, path, first, inode)?);
            }
            self.first_names.insert(inode.nid(), path.to_vec());
        }
        let left_out = if self.layer { Some(overlay::OVERLAY_OPAQUE) } else { None };
        header::write(&mut self.output, path, inode.target()?, inode, left_out)?;
        if inode.kind() == Kind::File { self.content(path, inode) } else { Ok(()) }
    }

    fn content(&mut self, path: &[u8], inode: &Inode<'_>) -> Result<(), UnpackError> {
        for chunk in inode.chunks() {
            let bytes = self
                .reader
                .read(chunk.id)
                .map_err(|source| UnpackError::Chunk { path: String::from_utf8_lossy(path).into_owned(), source })?;
            self.output.write_all(&bytes)?;
            self.report.bytes += bytes.len() as u64;
        }
        let padding = inode.size().next_multiple_of(512) - inode.size();
        Ok(self.output.write_all(&[0; 512][..padding as usize])?)
    }
}

/// Whether a directory has the attributes of one that nobody has described.
fn is_implied(directory: &Inode<'_>) -> bool {
    let plain = directory.mode() & 0o7777 == 0o755 && (directory.uid(), directory.gid()) == (0, 0);
    plain && directory.mtime() == (0, 0) && directory.xattrs().next().is_none()
}
