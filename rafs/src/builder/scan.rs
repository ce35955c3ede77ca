//! The source directory as a tree, and what tells whether a file in it changes while it is read.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::tree::{self, Draft, EntryIndex, Inode, InodeIndex, NodeIndex, Tree, Xattr};
use super::{BuildError, Notes};
use crate::bootstrap::Kind;
use crate::layout;

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

    /// Fails if what has the path is another version by now.
    pub(super) fn check(&self, path: &Path, now: &Metadata) -> Result<(), BuildError> {
        match self.difference(&Self::of(now)) {
            Some(what) => Err(BuildError::Changed { path: path.to_owned(), what }),
            None => Ok(()),
        }
    }

    /// How `now` differs, in words.
    fn difference(&self, now: &Self) -> Option<String> {
        if (self.dev, self.ino) != (now.dev, now.ino) {
            return Some("another file has its name".into());
        }
        if self.size != now.size {
            return Some(format!("it had {} bytes and has {}", self.size, now.size));
        }
        (self != now).then(|| "it was written to".into())
    }
}

/// A directory with everything below it.
#[derive(Debug)]
pub(super) struct Scanned {
    source: PathBuf,
    pub(super) tree: Tree,
}

impl Scanned {
    /// Where a node lies on disk.
    pub(super) fn path(&self, mut index: NodeIndex) -> PathBuf {
        let mut names = Vec::new();
        while index != 0 {
            names.push(self.tree.nodes[index].name.as_slice());
            index = self.tree.nodes[index].parent;
        }
        let mut path = self.source.clone();
        path.extend(names.into_iter().rev().map(OsStr::from_bytes));
        path
    }
}

/// Reads a directory with everything below it, but not the content of files.
pub(super) fn scan(source: &Path, notes: &mut Notes) -> Result<Scanned, BuildError> {
    // The root may be given through a link; links inside are content.
    let metadata = fs::metadata(source).map_err(BuildError::io("read", source))?;
    if !metadata.is_dir() {
        let what = "it is no directory".into();
        return Err(BuildError::Unsupported { path: source.to_owned(), what });
    }
    let source = fs::canonicalize(source).map_err(BuildError::io("read", source))?;
    let root = inode(&source, &metadata, notes)?;
    let mut scan = Scan {
        draft: Draft::new(root),
        notes,
        directories: VecDeque::from([(Draft::ROOT, source.clone())]),
        first_names: HashMap::new(),
    };
    while let Some((directory, path)) = scan.directories.pop_front() {
        scan.directory(directory, &path)?;
    }
    Ok(Scanned { source, tree: scan.draft.finish() })
}

struct Scan<'a> {
    draft: Draft,
    notes: &'a mut Notes,
    /// Directories to read.
    directories: VecDeque<(EntryIndex, PathBuf)>,
    /// Files with several names, by device and inode number.
    first_names: HashMap<(u64, u64), InodeIndex>,
}

impl Scan<'_> {
    fn directory(&mut self, directory: EntryIndex, path: &Path) -> Result<(), BuildError> {
        let failed = || BuildError::io("read directory", path);
        let entries = fs::read_dir(path).map_err(failed())?;
        let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_vec()));
        let mut names = names.collect::<Result<Vec<_>, _>>().map_err(failed())?;
        names.sort_unstable();
        for name in names {
            self.name(directory, path.join(OsStr::from_bytes(&name)), &name)?;
        }
        // A name that came or went meanwhile may or may not have been listed.
        let now = fs::symlink_metadata(path).map_err(failed())?;
        self.draft.inode(directory).version.map_or(Ok(()), |version| version.check(path, &now))
    }

    fn name(&mut self, directory: EntryIndex, path: PathBuf, name: &[u8]) -> Result<(), BuildError> {
        let metadata = fs::symlink_metadata(&path).map_err(BuildError::io("read", &path))?;
        let key = (metadata.dev(), metadata.ino());
        let shared = metadata.is_file() && metadata.nlink() > 1;
        if let Some(first) = self.first_names.get(&key).filter(|_| shared) {
            self.draft.put(directory, name, *first);
            return Ok(());
        }
        let inode = self.draft.add_inode(inode(&path, &metadata, self.notes)?);
        if shared {
            self.first_names.insert(key, inode);
        }
        let entry = self.draft.put(directory, name, inode);
        if metadata.is_dir() {
            self.directories.push_back((entry, path));
        }
        Ok(())
    }
}

fn inode(path: &Path, metadata: &Metadata, notes: &mut Notes) -> Result<Inode, BuildError> {
    let mode = metadata.mode();
    let unsupported = |what: String| BuildError::Unsupported { path: path.to_owned(), what };
    let kind = Kind::from_mode(mode).ok_or_else(|| unsupported(format!("unknown file type in mode {mode:#o}")))?;
    let target = match kind {
        Kind::Symlink => fs::read_link(path).map_err(BuildError::io("read link", path))?.into_os_string().into_vec(),
        _ => Vec::new(),
    };
    if target.len() as u64 > layout::MAX_TARGET {
        return Err(unsupported(format!("its target of {} bytes is longer than 4096", target.len())));
    }
    let xattrs = xattrs(path, notes)?;
    tree::check_xattrs(&xattrs).map_err(unsupported)?;
    Ok(Inode {
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
            Kind::CharDevice | Kind::BlockDevice => {
                tree::encode_device(rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()))
            }
            _ => 0,
        },
        mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
        xattrs,
        target,
        chunks: Vec::new(),
        nlink: 0,
        version: Some(Version::of(metadata)),
    })
}

/// Attributes that the format can hold, sorted; the others are noted.
fn xattrs(path: &Path, notes: &mut Notes) -> Result<Vec<Xattr>, BuildError> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::OPNOTSUPP.raw_os_error()) => return Ok(vec![]),
        Err(error) => return Err(BuildError::io("list the xattrs of", path)(error)),
    };
    let mut xattrs = Vec::new();
    for name in names {
        if tree::split_xattr(name.as_bytes()).is_none() {
            notes.add(|| format!("{}: xattr {} was left out", path.display(), name.display()));
            continue;
        }
        let value = xattr::get(path, &name).map_err(BuildError::io("read an xattr of", path))?;
        // Gone since it was listed: as if it had never been there.
        let Some(value) = value else { continue };
        xattrs.push((name.into_vec(), value));
    }
    xattrs.sort_unstable();
    Ok(xattrs)
}
