//! From an image back to a tar equal to its source.
//!
//! Depth first, names in byte order, directories before what they hold, the first name of a file with its content and
//! the others as hard links to it. PAX records carry what the plain header cannot: long names and targets, xattrs
//! (`SCHILY.xattr.*`, as GNU tar and libarchive read them), nanoseconds and times before 1970. Sockets have no place in
//! a tar and are noted in the report. ACLs are xattrs like any other: restore with `--xattrs --xattrs-include='*'`, without
//! `--acls`.

use std::collections::HashMap;
use std::io::{self, Write};

use serde::Serialize;

use crate::blob_dir::BlobDirReader;
use crate::bootstrap::{Bootstrap, BootstrapError, Entry, Inode, Kind, Nid};
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
    let mut unpacker =
        Unpacker { bootstrap, reader, output, first_names: HashMap::new(), report: UnpackReport::default() };
    unpacker.run()?;
    Ok(unpacker.report)
}

struct Unpacker<'a, W> {
    bootstrap: &'a Bootstrap,
    reader: &'a BlobDirReader,
    output: W,
    /// Paths of files that have several names.
    first_names: HashMap<Nid, Vec<u8>>,
    report: UnpackReport,
}

impl<W: Write> Unpacker<'_, W> {
    fn run(&mut self) -> Result<(), UnpackError> {
        let bootstrap = self.bootstrap;
        let root = bootstrap.inode(bootstrap.root())?;
        self.entry(b"./", &root)?;
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
            self.entry(&path, &inode)?;
            if kind == Kind::Directory {
                stack.push((path, inode.entries()));
            }
        }
        // The end of a tar: two blocks of zeroes.
        self.output.write_all(&[0; 1024])?;
        Ok(self.output.flush()?)
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
        header::write(&mut self.output, path, inode.target()?, inode)?;
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
