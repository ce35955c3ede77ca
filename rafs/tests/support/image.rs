//! The facts of a tree as its image tells them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use shoal_rafs::{BlobDirReader, Bootstrap, BuildOptions, BuildReport, Builder, Inode, Kind, Nid, extents};

use super::Facts;

/// An image on disk with its parts opened.
pub struct Built {
    pub report: BuildReport,
    pub image: Bootstrap,
    pub reader: BlobDirReader,
    pub boot: PathBuf,
    pub blobs: PathBuf,
}

pub fn build(source: &Path, work: &Path, options: BuildOptions) -> Built {
    std::fs::create_dir_all(work).unwrap();
    let (boot, blobs) = (work.join("boot"), work.join("blobs"));
    let report = Builder::new(options).build(source, &boot, &blobs).unwrap();
    let image = Bootstrap::open(&boot).unwrap();
    let reader = BlobDirReader::open(&image, &blobs).unwrap();
    Built { report, image, reader, boot, blobs }
}

/// All names of an image with what they lead to, the root as the empty path.
pub fn walk(image: &Bootstrap) -> BTreeMap<PathBuf, Nid> {
    let mut found = BTreeMap::from([(PathBuf::new(), image.root())]);
    let mut directories = vec![(PathBuf::new(), image.root())];
    while let Some((path, nid)) = directories.pop() {
        for entry in image.inode(nid).unwrap().entries() {
            let entry = entry.unwrap();
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let path = path.join(OsStr::from_bytes(entry.name));
            if entry.kind == Kind::Directory {
                directories.push((path.clone(), entry.nid));
            }
            found.insert(path, entry.nid);
        }
    }
    found
}

/// The content of a file, or the first error.
pub fn content(inode: &Inode<'_>, reader: &BlobDirReader) -> Result<Vec<u8>, shoal_rafs::ChunkError> {
    let mut content = Vec::new();
    for extent in extents(inode, 0, inode.size()) {
        let bytes = reader.read(extent.chunk)?;
        content.extend_from_slice(&bytes[extent.offset_in_chunk as usize..][..extent.len as usize]);
    }
    Ok(content)
}

pub fn facts(image: &Bootstrap, reader: &BlobDirReader) -> BTreeMap<PathBuf, Facts> {
    let nids = walk(image);
    let mut names: BTreeMap<Nid, Vec<PathBuf>> = BTreeMap::new();
    for (path, nid) in &nids {
        names.entry(*nid).or_default().push(path.clone());
    }
    let fact = |nid| {
        let inode = image.inode(nid).unwrap();
        let names = &names[&nid];
        let file = inode.kind() == Kind::File;
        if file {
            assert_eq!(inode.nlink() as usize, names.len());
        }
        Facts {
            mode: inode.mode(),
            uid: inode.uid(),
            gid: inode.gid(),
            mtime: (inode.mtime().0, inode.mtime().1.into()),
            rdev: decode_device(inode.rdev()),
            content: file.then(|| {
                let content = content(&inode, reader).unwrap();
                (inode.size(), *blake3::hash(&content).as_bytes())
            }),
            target: (inode.kind() == Kind::Symlink).then(|| inode.target().unwrap().to_vec()),
            xattrs: inode.xattrs().map(|(name, value)| (name, value.to_vec())).collect(),
            names: if file && names.len() > 1 { names.clone() } else { Vec::new() },
        }
    };
    nids.iter().map(|(path, nid)| (path.clone(), fact(*nid))).collect()
}

fn decode_device(dev: u32) -> u64 {
    rustix::fs::makedev((dev & 0xF_FF00) >> 8, (dev & 0xFF) | ((dev >> 12) & 0xF_FF00))
}
