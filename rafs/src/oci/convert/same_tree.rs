//! Whether two bootstraps stand for the same tree: a digest over all that a tar would hold, content by its chunks.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use crate::{Bootstrap, BootstrapError, Inode, Kind, Nid, builder::overlay};

/// A tree, in short.
pub(super) struct SameTree {
    /// Over names, attributes, links and the digests of chunks, in the order of names.
    pub(super) digest: [u8; 32],
    /// The first path that would be a whiteout in the tar of a layer.
    pub(super) unfit: Option<String>,
}

impl SameTree {
    /// Walks a tree. Memory: a path for each file with several names.
    pub(super) fn of(image: &Bootstrap) -> Result<Self, BootstrapError> {
        let root = image.inode(image.root())?;
        let mut walk = Walk { image, hasher: Sha256::new(), first_names: HashMap::new(), unfit: None };
        walk.node(b"", &root)?;
        let mut stack = vec![(Vec::new(), root.entries())];
        while let Some((directory, entries)) = stack.last_mut() {
            let Some(entry) = entries.next() else {
                stack.pop();
                continue;
            };
            let entry = entry?;
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let path = [directory, &b"/"[..], entry.name].concat();
            let inode = image.inode(entry.nid)?;
            if entry.name.starts_with(overlay::WHITEOUT) || overlay::is_device_whiteout(&inode) {
                walk.unfit.get_or_insert_with(|| String::from_utf8_lossy(&path).into_owned());
            }
            walk.node(&path, &inode)?;
            if entry.kind == Kind::Directory {
                stack.push((path, inode.entries()));
            }
        }
        Ok(Self { digest: walk.hasher.finalize().into(), unfit: walk.unfit })
    }
}

struct Walk<'a> {
    image: &'a Bootstrap,
    hasher: Sha256,
    first_names: HashMap<Nid, Vec<u8>>,
    unfit: Option<String>,
}

impl Walk<'_> {
    /// Each part with its length, so that no two trees give the same bytes.
    fn part(&mut self, bytes: &[u8]) {
        self.hasher.update((bytes.len() as u64).to_le_bytes());
        self.hasher.update(bytes);
    }

    fn node(&mut self, path: &[u8], inode: &Inode<'_>) -> Result<(), BootstrapError> {
        self.part(path);
        if inode.kind() == Kind::File && inode.nlink() > 1 {
            if let Some(first) = self.first_names.get(&inode.nid()).cloned() {
                self.part(&first);
                return Ok(());
            }
            self.first_names.insert(inode.nid(), path.to_vec());
        }
        let (seconds, nanoseconds) = inode.mtime();
        for number in [inode.mode(), inode.uid(), inode.gid(), inode.rdev(), nanoseconds] {
            self.hasher.update(number.to_le_bytes());
        }
        self.hasher.update(seconds.to_le_bytes());
        let mut xattrs: Vec<_> = inode.xattrs().collect();
        xattrs.sort();
        self.hasher.update((xattrs.len() as u64).to_le_bytes());
        for (name, value) in xattrs {
            self.part(&name);
            self.part(value);
        }
        match inode.kind() {
            Kind::Symlink => {
                let target = inode.target()?;
                self.part(target);
            }
            Kind::File => {
                self.hasher.update(inode.size().to_le_bytes());
                for chunk in inode.chunks() {
                    let digest = self.image.chunk(chunk.id).map(|chunk| chunk.digest.bytes);
                    self.hasher.update(digest.unwrap_or_default());
                }
            }
            _ => {}
        }
        Ok(())
    }
}
