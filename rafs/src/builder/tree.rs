//! The source directory as a list of nodes: breadth first, names in byte order.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::ops::Range;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{BuildError, MAX_NOTES};
use crate::bootstrap::Kind;
use crate::layout;

/// Position of a node in [`Tree::nodes`]; the root is 0.
pub(super) type NodeIndex = usize;

/// Full name and value of an extended attribute.
pub(super) type Xattr = (Vec<u8>, Vec<u8>);

/// One name in the tree.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) name: Vec<u8>,
    pub(super) parent: NodeIndex,
    pub(super) kind: Kind,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Bytes of a file or of a link's target, 0 for the others.
    pub(super) size: u64,
    /// In the 32-bit form of the kernel; 0 unless a device.
    pub(super) rdev: u32,
    pub(super) mtime: (i64, u32),
    /// Sorted by name.
    pub(super) xattrs: Vec<Xattr>,
    pub(super) target: Vec<u8>,
    /// Another name, earlier in the list, of the same file.
    pub(super) first_name: Option<NodeIndex>,
    pub(super) nlink: u32,
    pub(super) children: Range<NodeIndex>,
    /// What tells whether a file changed.
    pub(super) version: Version,
}

/// Identity and version of a file on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    dev: u64,
    ino: u64,
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Version {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// How `now` differs, in words.
    pub(super) fn difference(&self, now: &Self) -> Option<String> {
        if (self.dev, self.ino) != (now.dev, now.ino) {
            return Some("another file has its name".into());
        }
        if self.size != now.size {
            return Some(format!("it had {} bytes and has {}", self.size, now.size));
        }
        (self != now).then(|| "it was written to".into())
    }
}

/// All nodes of a source directory.
#[derive(Debug)]
pub(super) struct Tree {
    source: PathBuf,
    pub(super) nodes: Vec<Node>,
    /// Chunk indexes of each file that has content, filled by the chunker.
    pub(super) chunks: HashMap<NodeIndex, Vec<u32>>,
    pub(super) notes: Vec<String>,
}

impl Tree {
    /// Reads a directory with everything below it.
    pub(super) fn scan(source: &Path) -> Result<Self, BuildError> {
        // The root may be given through a link; links inside are content.
        let metadata = fs::metadata(source).map_err(BuildError::io("read", source))?;
        if !metadata.is_dir() {
            let what = "the source of an image must be a directory".into();
            return Err(BuildError::Unsupported { path: source.to_owned(), what });
        }
        let source = fs::canonicalize(source).map_err(BuildError::io("read", source))?;
        let mut tree = Self { source, nodes: Vec::new(), chunks: HashMap::new(), notes: Vec::new() };
        let root = tree.node(tree.source.clone(), Vec::new(), 0, &metadata)?;
        tree.nodes.push(root);
        let mut first_names = HashMap::new();
        let mut next = 0;
        while next < tree.nodes.len() {
            if tree.nodes[next].kind == Kind::Directory {
                tree.scan_directory(next, &mut first_names)?;
            }
            next += 1;
        }
        Ok(tree)
    }

    fn scan_directory(
        &mut self,
        directory: NodeIndex,
        first_names: &mut HashMap<(u64, u64), NodeIndex>,
    ) -> Result<(), BuildError> {
        let path = self.path(directory);
        let failed = || BuildError::io("read directory", &path);
        let entries = fs::read_dir(&path).map_err(failed())?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_vec()));
        let mut names = names.collect::<Result<Vec<_>, _>>().map_err(failed())?;
        names.sort_unstable();
        let start = self.nodes.len();
        for name in names {
            let path = path.join(OsStr::from_bytes(&name));
            let metadata = fs::symlink_metadata(&path).map_err(BuildError::io("read", &path))?;
            let mut node = self.node(path, name, directory, &metadata)?;
            if node.kind == Kind::File && metadata.nlink() > 1 {
                let first = *first_names.entry((metadata.dev(), metadata.ino())).or_insert(self.nodes.len());
                if first < self.nodes.len() {
                    node.first_name = Some(first);
                    self.nodes[first].nlink += 1;
                }
            }
            if node.kind == Kind::Directory {
                self.nodes[directory].nlink += 1;
            }
            self.nodes.push(node);
        }
        self.nodes[directory].children = start..self.nodes.len();
        Ok(())
    }

    fn node(
        &mut self,
        path: PathBuf,
        name: Vec<u8>,
        parent: NodeIndex,
        metadata: &Metadata,
    ) -> Result<Node, BuildError> {
        let mode = metadata.mode();
        let unsupported = |what: String| BuildError::Unsupported { path: path.clone(), what };
        let kind =
            Kind::from_mode(mode).ok_or_else(|| unsupported(format!("unknown file type in mode {mode:#o}")))?;
        let target = match kind {
            Kind::Symlink => {
                fs::read_link(&path).map_err(BuildError::io("read link", &path))?.into_os_string().into_vec()
            }
            _ => Vec::new(),
        };
        if target.len() as u64 > layout::MAX_TARGET {
            return Err(unsupported(format!("its target of {} bytes is longer than 4096", target.len())));
        }
        let xattrs = self.xattrs(&path)?;
        Ok(Node {
            name,
            parent,
            kind,
            mode,
            uid: metadata.uid(),
            gid: metadata.gid(),
            size: match kind {
                Kind::File => metadata.size(),
                Kind::Symlink => target.len() as u64,
                _ => 0,
            },
            rdev: match kind {
                Kind::CharDevice | Kind::BlockDevice => encode_device(metadata.rdev()),
                _ => 0,
            },
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
            xattrs,
            target,
            first_name: None,
            nlink: if kind == Kind::Directory { 2 } else { 1 },
            children: 0..0,
            version: Version::of(metadata),
        })
    }

    /// Attributes that the format can hold, sorted; the others are noted.
    fn xattrs(&mut self, path: &Path) -> Result<Vec<Xattr>, BuildError> {
        let names = match xattr::list(path) {
            Ok(names) => names,
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => {
                return Ok(vec![]);
            }
            Err(error) => return Err(BuildError::io("list the xattrs of", path)(error)),
        };
        let mut xattrs = Vec::new();
        for name in names {
            if split_xattr(name.as_bytes()).is_none() {
                self.note(format!("{}: xattr {} was left out", path.display(), name.display()));
                continue;
            }
            let value = xattr::get(path, &name).map_err(BuildError::io("read an xattr of", path))?;
            // Gone since it was listed: as if it had never been there.
            let Some(value) = value else { continue };
            xattrs.push((name.into_vec(), value));
        }
        xattrs.sort_unstable();
        let count = xattr_count(&xattrs);
        if count > u64::from(u16::MAX) || xattrs.iter().any(|(_, value)| value.len() > usize::from(u16::MAX)) {
            let what = format!("its xattrs are too large ({} of at most 262136 bytes)", count * 4);
            return Err(BuildError::Unsupported { path: path.to_owned(), what });
        }
        Ok(xattrs)
    }

    fn note(&mut self, note: String) {
        if self.notes.len() < MAX_NOTES {
            self.notes.push(note);
        }
    }

    /// Regular files, each once however many names it has.
    pub(super) fn files(&self) -> impl Iterator<Item = (NodeIndex, &Node)> {
        let nodes = self.nodes.iter().enumerate();
        nodes.filter(|(_, node)| node.kind == Kind::File && node.first_name.is_none())
    }

    /// Where a node lies on disk.
    pub(super) fn path(&self, mut index: NodeIndex) -> PathBuf {
        let mut names = Vec::new();
        while index != 0 {
            names.push(self.nodes[index].name.as_slice());
            index = self.nodes[index].parent;
        }
        let mut path = self.source.clone();
        path.extend(names.into_iter().rev().map(OsStr::from_bytes));
        path
    }
}

/// Number of the prefix and the rest of an xattr's name, if the format knows the prefix.
pub(super) fn split_xattr(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, suffix) =
        layout::XATTR_PREFIXES.into_iter().find_map(|(index, prefix)| Some((index, name.strip_prefix(prefix)?)))?;
    (suffix.is_empty() == layout::is_whole_xattr_name(index)).then_some((index, suffix))
}

/// Bytes of one attribute on disk.
pub(super) fn xattr_len(name: &[u8], value: &[u8]) -> u64 {
    let suffix = split_xattr(name).map_or(name, |(_, suffix)| suffix);
    (4 + suffix.len() as u64 + value.len() as u64).next_multiple_of(4)
}

/// The inode's `xattr_icount`: 0 for none, else 1 plus the attributes' bytes / 4.
pub(super) fn xattr_count(xattrs: &[Xattr]) -> u64 {
    if xattrs.is_empty() {
        return 0;
    }
    1 + xattrs.iter().map(|(name, value)| xattr_len(name, value)).sum::<u64>() / 4
}

/// The kernel's `new_encode_dev`.
fn encode_device(dev: u64) -> u32 {
    let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
    (minor & 0xFF) | (major << 8) | ((minor & !0xFF) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_encoded_as_the_kernel_does() {
        for (major, minor, expected) in [(1, 3, 0x103), (8, 0, 0x800), (259, 0x12345, 0x1231_0345)] {
            assert_eq!(encode_device(rustix::fs::makedev(major, minor)), expected, "{major}:{minor}");
        }
    }

    #[test]
    fn xattr_names_are_split_at_known_prefixes_only() {
        assert_eq!(split_xattr(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(split_xattr(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(split_xattr(b"security.capability"), Some((6, &b"capability"[..])));
        for name in [&b"system.posix_acl_accessory"[..], b"system.nfs4_acl", b"user.", b"btrfs.compression", b""] {
            assert_eq!(split_xattr(name), None, "{name:?}");
        }
    }
}
