//! Reads images with `nydus-rafs`: tree, attributes, and content through its blob cache, which verifies chunks.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use fuse_backend_rs::api::filesystem::ZeroCopyWriter;
use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use nydus_api::ConfigV2;
use nydus_rafs::metadata::{RafsInode, RafsInodeWalkAction, RafsSuper};
use nydus_storage::device::BlobDevice;

/// What an image says of one name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Path from the root, which itself is the empty path.
    pub path: PathBuf,
    /// The same for all names of a file.
    pub ino: u64,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// In Linux's 32-bit form.
    pub rdev: u32,
    /// Content of a file.
    pub content: Option<Vec<u8>>,
    /// Target of a link.
    pub target: Option<Vec<u8>>,
    /// Names and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An image that was opened.
pub struct Image {
    tree: RafsSuper,
    device: BlobDevice,
    // The cache must not outlive its folder.
    _cache: tempfile::TempDir,
}

impl Image {
    /// Opens a bootstrap whose blobs lie in `blob_dir`. Chunks are verified when they are read.
    pub fn open(bootstrap: &Path, blob_dir: &Path) -> Result<Self> {
        let cache = tempfile::tempdir()?;
        let config: ConfigV2 = serde_json::from_value(configuration(bootstrap, blob_dir, cache.path())?)?;
        config.internal.set_blob_accessible(true);
        let config = Arc::new(config);
        let (tree, _) = RafsSuper::load_from_file(bootstrap, config.clone(), false).context("load")?;
        let device = BlobDevice::new(&config, &tree.superblock.get_blob_infos()).context("blobs")?;
        if tree.meta.has_inlined_chunk_digest() {
            tree.superblock.set_blob_device(device.clone());
        }
        Ok(Self { tree, device, _cache: cache })
    }

    /// Everything that the image holds.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        let mut nodes = Vec::new();
        let mut left = vec![(PathBuf::new(), self.tree.superblock.root_ino())];
        while let Some((path, ino)) = left.pop() {
            let inode = self.tree.get_inode(ino, false)?;
            if inode.is_dir() {
                inode.walk_children_inodes(0, &mut |_, name: OsString, ino, _| {
                    if name != "." && name != ".." {
                        left.push((path.join(name), ino));
                    }
                    Ok(RafsInodeWalkAction::Continue)
                })?;
            }
            nodes.push(self.node(&path, &*inode).with_context(|| path.display().to_string())?);
        }
        Ok(nodes)
    }

    /// Inodes of the prefetch table.
    pub fn prefetch(&self, bootstrap: &Path) -> Result<Vec<u32>> {
        let mut reader: nydus_rafs::RafsIoReader = Box::new(std::fs::File::open(bootstrap)?);
        Ok(self.tree.get_prefetched_inos(&mut reader)?)
    }

    fn node(&self, path: &Path, inode: &dyn RafsInode) -> Result<Node> {
        let attributes = inode.get_attr();
        let xattrs = inode.get_xattrs()?.into_iter().map(|name| {
            let value = inode.get_xattr(OsString::from_vec(name.clone()).as_os_str())?;
            Ok((name, value.context("an xattr without value")?))
        });
        Ok(Node {
            path: path.to_owned(),
            ino: attributes.ino,
            mode: attributes.mode,
            uid: attributes.uid,
            gid: attributes.gid,
            mtime: (attributes.mtime as i64, attributes.mtimensec.into()),
            rdev: if inode.is_blkdev() || inode.is_chrdev() { inode.rdev() } else { 0 },
            content: inode.is_reg().then(|| self.content(inode)).transpose()?,
            target: inode.is_symlink().then(|| inode.get_symlink()).transpose()?.map(|t| t.as_bytes().to_vec()),
            xattrs: xattrs.collect::<Result<_>>()?,
        })
    }

    fn content(&self, inode: &dyn RafsInode) -> Result<Vec<u8>> {
        let mut content = Buffer(Vec::new());
        // Read as a mount would, piece by piece.
        for offset in (0..inode.size()).step_by(1 << 20) {
            let len = (inode.size() - offset).min(1 << 20);
            for mut part in inode.alloc_bio_vecs(&self.device, offset, len as usize, true)? {
                self.device.read_to(&mut content, &mut part)?;
            }
        }
        anyhow::ensure!(content.0.len() as u64 == inode.size(), "{} of {} bytes", content.0.len(), inode.size());
        Ok(content.0)
    }
}

/// What their reader and their daemon are told of an image: where its blobs lie, where decoded chunks may be kept, and that chunks
/// are to be verified.
pub fn configuration(bootstrap: &Path, blob_dir: &Path, cache: &Path) -> Result<serde_json::Value> {
    // Tars are not cached: it reads them where the cache would be. Their images have blocks of 512 bytes.
    let superblock = std::fs::read(bootstrap)?.get(1024..1037).map(<[u8]>::to_vec).unwrap_or_default();
    let tars = superblock.starts_with(&0xE0F5_E1E2_u32.to_le_bytes()) && superblock[12] == 9;
    let work_dir = if tars { blob_dir } else { cache };
    Ok(serde_json::json!({
        "version": 2,
        "id": bootstrap.display().to_string(),
        "backend": { "type": "localfs", "localfs": { "dir": blob_dir } },
        "cache": { "type": "filecache", "validate": true, "filecache": { "work_dir": work_dir } },
        "rafs": { "mode": "direct", "validate": false, "enable_xattr": true },
    }))
}

/// Where their device puts what it reads.
struct Buffer(Vec<u8>);

impl Write for Buffer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ZeroCopyWriter for Buffer {
    fn write_from(&mut self, file: &mut dyn FileReadWriteVolatile, count: usize, offset: u64) -> io::Result<usize> {
        let mut bytes = vec![0; count];
        // SAFETY: the slice is used for this call only, and nothing else touches `bytes` meanwhile.
        let slice = unsafe { FileVolatileSlice::from_raw_ptr(bytes.as_mut_ptr(), count) };
        let read = file.read_at_volatile(slice, offset)?;
        self.0.extend_from_slice(&bytes[..read]);
        Ok(read)
    }

    fn available_bytes(&self) -> usize {
        1 << 20
    }
}
