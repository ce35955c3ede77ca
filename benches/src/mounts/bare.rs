//! The least that the FUSE library can do: files of the same names and sizes, from memory. What the kernel has of it in its page
//! cache is read as fast as anything can be over FUSE.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, UNIX_EPOCH},
};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use shoal::command::Failure;

use super::Image;

/// How long the kernel may keep answers.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Largest read request, and what all files are made of.
static CONTENT: [u8; 1 << 20] = [0; 1 << 20];

/// A mount of it, which ends when this is dropped.
pub(super) struct Mounted {
    root: PathBuf,
    _session: BackgroundSession,
}

impl Mounted {
    /// Mounts files as an image has them, in `folder`.
    pub(super) fn new(image: &Image, folder: &Path) -> Result<Self, Failure> {
        let root = folder.join("bare");
        fs::create_dir_all(&root)?;
        let mut config = Config::default();
        config.mount_options = vec![MountOption::RO, MountOption::NoAtime, MountOption::FSName("bare".into())];
        config.n_threads = Some(4);
        config.clone_fd = true;
        let files = Files::of(image)?;
        Ok(Self { _session: fuser::spawn_mount(files, &root, &config)?, root })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }
}

enum Node {
    Folder(BTreeMap<OsString, INodeNo>),
    File(u64),
}

/// Nodes by number; the first is the root's.
struct Files(Vec<Node>);

impl Files {
    fn of(image: &Image) -> Result<Self, Failure> {
        let mut files = Self(vec![Node::Folder(BTreeMap::new())]);
        for name in &image.names {
            let mut place = INodeNo::ROOT;
            for folder in name.parent().into_iter().flat_map(Path::iter) {
                place = files.enter(place, folder, || Node::Folder(BTreeMap::new()));
            }
            let size = image.source.join(name).metadata()?.len();
            files.enter(place, name.file_name().unwrap_or_default(), || Node::File(size));
        }
        Ok(files)
    }

    /// The node of a name, made if there is none.
    fn enter(&mut self, folder: INodeNo, name: &OsStr, make: impl FnOnce() -> Node) -> INodeNo {
        let next = INodeNo(self.0.len() as u64 + 1);
        let found = match self.0.get_mut(folder.0 as usize - 1) {
            Some(Node::Folder(names)) => *names.entry(name.to_owned()).or_insert(next),
            _ => next,
        };
        if found == next {
            self.0.push(make());
        }
        found
    }

    fn node(&self, ino: INodeNo) -> Option<&Node> {
        self.0.get((ino.0 as usize).checked_sub(1)?)
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        let (kind, size, perm) = match self.node(ino)? {
            Node::Folder(_) => (FileType::Directory, 0, 0o755),
            Node::File(size) => (FileType::RegularFile, *size, 0o644),
        };
        Some(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [InitFlags::FUSE_ASYNC_READ, InitFlags::FUSE_MAX_PAGES, InitFlags::FUSE_NO_OPEN_SUPPORT];
        for capability in wanted {
            // Without it, it is as good as this kernel lets it be.
            let _ = config.add_capabilities(capability);
        }
        let _ = config.set_max_write(CONTENT.len() as u32);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = match self.node(parent) {
            Some(Node::Folder(names)) => names.get(name).and_then(|ino| self.attributes(*ino)),
            _ => None,
        };
        match found {
            Some(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: fuser::ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // The kernel opens without asking from now on.
        reply.error(Errno::ENOSYS);
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
        match self.node(ino) {
            Some(Node::File(len)) => {
                let left = len.saturating_sub(offset).min(size.into()) as usize;
                reply.data(&CONTENT[..left.min(CONTENT.len())]);
            }
            _ => reply.error(Errno::EINVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_sizes() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::write(folder.path().join("a/b"), [0; 7]).unwrap();
        fs::write(folder.path().join("a/c"), []).unwrap();
        let image = Image {
            tag: "test",
            source: folder.path().to_owned(),
            files: super::super::Files { bootstrap: PathBuf::new(), blobs: Vec::new() },
            names: ["a/b", "a/c"].map(PathBuf::from).to_vec(),
        };
        let files = Files::of(&image).unwrap();
        let sizes: Vec<_> = (1..=4).map(|ino| files.attributes(INodeNo(ino)).unwrap().size).collect();
        assert_eq!((sizes.as_slice(), files.0.len()), (&[0, 0, 7, 0][..], 4));
        assert!(files.attributes(INodeNo(5)).is_none() && files.attributes(INodeNo(0)).is_none());
    }
}
