//! What an image wants read before anybody asks for it, in the order of its prefetch table. Pure.

use std::collections::{HashMap, HashSet};

use crate::bootstrap::{Bootstrap, BootstrapError, Kind, Metadata, Nid};
use crate::source::ChunkId;

mod list;

pub(crate) use list::{Hint, Name, lines};
pub use list::{PrefetchList, PrefetchListError};

impl Metadata {
    /// The regular files of the prefetch table, each once and in order. A directory stands for all that is below it, in
    /// the order of the tree, level by level; a table that names the root alone stands for everything.
    ///
    /// # Errors
    /// Something that it leads to cannot be read.
    pub fn prefetch_files(&self) -> Result<Vec<Nid>, BootstrapError> {
        let mut seen = HashSet::new();
        let mut files = Vec::new();
        for listed in self.prefetch()? {
            let mut level = vec![listed];
            while !level.is_empty() {
                let mut below = Vec::new();
                for nid in level {
                    // Once is enough, also for whole directories.
                    if !seen.insert(nid) {
                        continue;
                    }
                    let look = self.look();
                    let inode = look.inode(nid)?;
                    if inode.kind() == Kind::File {
                        files.push(nid);
                    }
                    for entry in inode.entries() {
                        let entry = entry?;
                        below.extend((entry.name != b"." && entry.name != b"..").then_some(entry.nid));
                    }
                }
                level = below;
            }
        }
        Ok(files)
    }

    /// The chunks of [`prefetch_files`](Self::prefetch_files), each once, in order.
    ///
    /// # Errors
    /// As there.
    pub fn prefetch_chunks(&self) -> Result<Vec<ChunkId>, BootstrapError> {
        let mut seen = HashSet::new();
        let mut chunks = Vec::new();
        for nid in self.prefetch_files()? {
            let look = self.look();
            let of_file = look.inode(nid)?.chunks().map(|chunk| chunk.id);
            chunks.extend(of_file.filter(|id| seen.insert(*id)));
        }
        Ok(chunks)
    }

    /// The paths from the root of the inodes that are asked for, each by its first name in the order of the tree; that of
    /// the root is empty.
    pub(crate) fn paths(&self, wanted: &HashSet<Nid>) -> Result<HashMap<Nid, Vec<u8>>, BootstrapError> {
        let mut paths = HashMap::new();
        self.walk(self.root(), Vec::new(), |path: &Vec<u8>, entry| {
            let is_wanted = wanted.contains(&entry.nid);
            if !is_wanted && entry.kind != Kind::Directory {
                return Vec::new();
            }
            let path = [path, &b"/"[..], entry.name].concat();
            if is_wanted {
                paths.entry(entry.nid).or_insert_with(|| path.clone());
            }
            path
        })?;
        if wanted.contains(&self.root()) {
            paths.insert(self.root(), Vec::new());
        }
        Ok(paths)
    }

    /// The paths that the prefetch table lists, in order.
    pub(crate) fn prefetch_paths(&self) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let listed = self.prefetch()?;
        let paths = self.paths(&listed.iter().copied().collect())?;
        Ok(listed.iter().filter_map(|nid| paths.get(nid).cloned()).collect())
    }
}

impl Bootstrap {
    /// See [`Metadata::prefetch_files`].
    ///
    /// # Errors
    /// None, as it is verified.
    pub fn prefetch_files(&self) -> Result<Vec<Nid>, BootstrapError> {
        Metadata::from(self.clone()).prefetch_files()
    }

    /// See [`Metadata::prefetch_chunks`].
    ///
    /// # Errors
    /// None, as it is verified.
    pub fn prefetch_chunks(&self) -> Result<Vec<ChunkId>, BootstrapError> {
        Metadata::from(self.clone()).prefetch_chunks()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::builder::{BuildOptions, Builder};

    /// An image of `a/{x,y}`, `b` and `c`, the last two with equal content, and a prefetch table.
    fn image(dir: &Path, listed: &[&str]) -> Bootstrap {
        let source = dir.join("source");
        fs::create_dir_all(source.join("a/sub")).unwrap();
        for (name, byte) in [("a/x", 1), ("a/sub/y", 2), ("b", 3), ("c", 3)] {
            fs::write(source.join(name), [byte; 0x1800]).unwrap();
        }
        let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
        let list = PrefetchList::exact(listed.iter().map(|path| path.as_bytes()));
        Builder::new(options).prefetch(list).build(&source, &dir.join("boot"), &dir.join("blobs")).unwrap();
        Bootstrap::open(&dir.join("boot")).unwrap()
    }

    fn find(image: &Bootstrap, path: &str) -> Nid {
        path.split('/')
            .filter(|name| !name.is_empty())
            .fold(image.root(), |nid, name| image.inode(nid).unwrap().lookup(name.as_bytes()).unwrap().unwrap())
    }

    #[test]
    fn directories_stand_for_their_files_and_each_comes_once() {
        for (listed, expected) in [
            (&["c", "a", "b"][..], &["c", "a/x", "a/sub/y", "b"][..]),
            (&["a/sub/y", "a", "a/sub"], &["a/sub/y", "a/x"]),
            (&[""], &["b", "c", "a/x", "a/sub/y"]),
            (&[], &[]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let image = image(dir.path(), listed);
            let expected: Vec<_> = expected.iter().map(|path| find(&image, path)).collect();
            assert_eq!(image.prefetch_files().unwrap(), expected, "{listed:?}");
        }
    }

    #[test]
    fn shared_chunks_come_once() {
        let dir = tempfile::tempdir().unwrap();
        let image = image(dir.path(), &["c", "b", "a/x"]);
        let of = |path| image.inode(find(&image, path)).unwrap().chunks().map(|chunk| chunk.id).collect::<Vec<_>>();
        assert_eq!(image.prefetch_chunks().unwrap(), [of("c"), of("a/x")].concat());
    }
}
