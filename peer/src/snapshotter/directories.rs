//! The snapshots on disk.
//!
//! ```text
//! <data_dir>/snapshots/<id>/snapshot.json   what is known of the snapshot, replaced as a whole; JSON
//! <data_dir>/snapshots/<id>/fs              its files, or the place where a lazy image is mounted
//! <data_dir>/snapshots/<id>/native          a place where the lazy image is mounted natively, once it can be
//! <data_dir>/snapshots/<id>/work            overlayfs's scratch space, for active snapshots
//! ```
//!
//! A snapshot exists as long as its record does: it is the last thing that is made and the first that goes. So a crash at
//! any point leaves whole snapshots, and directories without a record, which are [orphans](Directories::orphans). A directory with
//! a record that cannot be read is neither: it is left as it is, for whoever can mend it. The
//! record lies with the files, and not in the store's index: the index may be begun anew when it is damaged, because the
//! store is a cache, whereas files that a container wrote are nowhere else.
//!
//! All of it blocks.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File, Permissions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use shoal_snapshots::{Kind, Snapshot, SnapshotId, Usage};

use super::SnapshotError;

/// Name of the record in a snapshot's directory.
const RECORD: &str = "snapshot.json";
/// Most bytes of a record: its labels and names, escaped.
const MAX_RECORD: u64 = 2 << 20;
/// Bytes of a block of `st_blocks`; see stat(3type).
const BLOCK_BYTES: u64 = 512;

/// User and group of a directory.
pub(super) type Owner = (u32, u32);

/// What lies there.
#[derive(Debug, Default)]
pub(super) struct Loaded {
    pub(super) snapshots: Vec<Snapshot>,
    /// Directories with a record that cannot be read, and why.
    pub(super) unreadable: Vec<(SnapshotId, SnapshotError)>,
}

/// `<data_dir>/snapshots`.
#[derive(Debug, Clone)]
pub(super) struct Directories {
    root: PathBuf,
}

impl Directories {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Makes the root, and reads all records.
    pub(super) fn load(&self) -> Result<Loaded, SnapshotError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.root).map_err(io_error("make", &self.root))?;
        let mut loaded = Loaded::default();
        for id in self.ids()? {
            match self.read(id) {
                Ok(snapshot) => loaded.snapshots.extend(snapshot),
                Err(error) => loaded.unreadable.push((id, error)),
            }
        }
        Ok(loaded)
    }

    /// The snapshot's files.
    pub(super) fn fs(&self, id: SnapshotId) -> PathBuf {
        self.path(id).join("fs")
    }

    /// Where a lazy image is mounted natively, beside its first mount.
    pub(super) fn native(&self, id: SnapshotId) -> PathBuf {
        self.path(id).join("native")
    }

    /// Makes that place, if it is not there.
    pub(super) fn make_native(&self, id: SnapshotId) -> Result<(), SnapshotError> {
        let native = self.native(id);
        match make_dir(&native, 0o755) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            made => made.map_err(io_error("make", &native)),
        }
    }

    /// Overlayfs's scratch space.
    pub(super) fn work(&self, id: SnapshotId) -> PathBuf {
        self.path(id).join("work")
    }

    /// Makes the directories of a new snapshot, which belong to `owner`, and its record. What cannot be finished is
    /// taken away again.
    pub(super) fn create(&self, snapshot: &Snapshot, owner: Option<Owner>) -> Result<(), SnapshotError> {
        let dir = self.path(snapshot.id);
        DirBuilder::new().mode(0o700).create(&dir).map_err(io_error("make", &dir))?;
        let make = || {
            make_dir(&self.fs(snapshot.id), 0o755)?;
            if snapshot.kind == Kind::Active {
                make_dir(&self.work(snapshot.id), 0o711)?;
            }
            if let Some((user, group)) = owner {
                std::os::unix::fs::lchown(self.fs(snapshot.id), Some(user), Some(group))?;
            }
            self.write(snapshot)?;
            File::open(&self.root)?.sync_all()
        };
        make().map_err(|error| {
            self.delete(snapshot.id);
            io_error("fill", &dir)(error)
        })
    }

    /// Replaces the record of a snapshot. Durable on return.
    pub(super) fn record(&self, snapshot: &Snapshot) -> Result<(), SnapshotError> {
        self.write(snapshot).map_err(io_error("write the record in", &self.path(snapshot.id)))
    }

    fn write(&self, snapshot: &Snapshot) -> io::Result<()> {
        let dir = self.path(snapshot.id);
        let mut file = tempfile::Builder::new().prefix(".record").tempfile_in(&dir)?;
        serde_json::to_writer(io::BufWriter::new(file.as_file_mut()), snapshot)?;
        file.as_file_mut().flush()?;
        file.as_file().sync_all()?;
        file.persist(dir.join(RECORD)).map_err(|error| error.error)?;
        File::open(dir)?.sync_all()
    }

    /// Takes the record away, and with it the snapshot. Durable on return.
    pub(super) fn unrecord(&self, id: SnapshotId) -> Result<(), SnapshotError> {
        let dir = self.path(id);
        let removed = fs::remove_file(dir.join(RECORD)).and_then(|()| File::open(&dir)?.sync_all());
        removed.map_err(io_error("remove the record in", &dir))
    }

    /// Removes a directory without a record. What cannot be removed now is an orphan, to be tried again.
    pub(super) fn delete(&self, id: SnapshotId) {
        match fs::remove_dir_all(self.path(id)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!("cannot remove {} yet: {error}", self.path(id).display());
            }
            _ => {}
        }
    }

    /// Directories of snapshots that `exists` knows nothing of.
    pub(super) fn orphans(&self, exists: impl Fn(SnapshotId) -> bool) -> Result<Vec<SnapshotId>, SnapshotError> {
        Ok(self.ids()?.into_iter().filter(|id| !exists(*id)).collect())
    }

    /// Whose `path`, a directory of a snapshot, is.
    pub(super) fn owner(path: &Path) -> Result<Owner, SnapshotError> {
        let metadata = fs::symlink_metadata(path).map_err(io_error("look at", path))?;
        Ok((metadata.uid(), metadata.gid()))
    }

    /// Disk that the snapshot's files take. What goes away meanwhile does not count.
    pub(super) fn usage(&self, id: SnapshotId) -> Result<Usage, SnapshotError> {
        let root = self.fs(id);
        let mut usage = Usage::default();
        let mut linked = BTreeSet::new();
        let mut pending = vec![root.clone()];
        while let Some(path) = pending.pop() {
            let metadata = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != root => continue,
                metadata => metadata.map_err(io_error("look at", &path))?,
            };
            if metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert((metadata.dev(), metadata.ino())) {
                continue;
            }
            usage.inodes += 1;
            usage.bytes += metadata.blocks() * BLOCK_BYTES;
            if metadata.is_dir() {
                match fs::read_dir(&path) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    entries => {
                        for entry in entries.map_err(io_error("list", &path))? {
                            pending.push(entry.map_err(io_error("list", &path))?.path());
                        }
                    }
                }
            }
        }
        Ok(usage)
    }

    fn path(&self, id: SnapshotId) -> PathBuf {
        self.root.join(id.to_string())
    }

    /// The numbers that there are directories for. Names that are no numbers are none of ours.
    fn ids(&self) -> Result<Vec<SnapshotId>, SnapshotError> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(io_error("list", &self.root))? {
            let name = entry.map_err(io_error("list", &self.root))?.file_name();
            let id = name.to_str().and_then(|name| name.parse().ok().filter(|id: &u64| id.to_string() == name));
            ids.extend(id.map(SnapshotId));
        }
        Ok(ids)
    }

    /// The record in a directory; none in an orphan.
    fn read(&self, id: SnapshotId) -> Result<Option<Snapshot>, SnapshotError> {
        let path = self.path(id).join(RECORD);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(io_error("open", &path))?,
        };
        let mut bytes = Vec::new();
        file.take(MAX_RECORD).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        let snapshot: Snapshot = serde_json::from_slice(&bytes).map_err(|e| io_error("read", &path)(e.into()))?;
        if snapshot.id == id {
            return Ok(Some(snapshot));
        }
        Err(io_error("read", &path)(io::Error::other(format!("it is about snapshot {}", snapshot.id))))
    }
}

/// Makes a directory with this mode, whatever the umask: `fs` is the root that users in a container see.
fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use shoal_snapshots::{Backing, Labels};

    use super::*;

    fn snapshot(id: u64) -> Snapshot {
        Snapshot {
            id: SnapshotId(id),
            name: format!("default/{id}/\"\u{1}\""),
            parent: String::new(),
            kind: Kind::Active,
            backing: Backing::Lazy { image: "localhost/a".into() },
            labels: Labels::from([("a".into(), "b".into())]),
            created: SystemTime::now(),
            updated: SystemTime::UNIX_EPOCH,
            usage: Usage { inodes: 1, bytes: 2 },
        }
    }

    #[test]
    fn a_snapshot_is_there_as_long_as_its_record() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path().join("snapshots"));
        let load = || {
            let Loaded { snapshots, unreadable } = directories.load().unwrap();
            assert!(unreadable.is_empty(), "{unreadable:?}");
            snapshots
        };
        assert_eq!(load(), []);
        let (one, two) = (snapshot(1), Snapshot { kind: Kind::View, ..snapshot(20) });
        directories.create(&one, None).unwrap();
        directories.create(&two, Some((rustix::process::getuid().as_raw(), 0))).unwrap_or_default();
        let mut loaded = load();
        loaded.sort_by_key(|snapshot| snapshot.id);
        assert_eq!(loaded, [one.clone(), two]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directories.fs(one.id)), mode(&directories.work(one.id))), (0o755, 0o711));
        assert!(!directories.work(SnapshotId(20)).exists(), "a view is not written");

        let renamed = Snapshot { name: "committed".into(), ..one };
        directories.record(&renamed).unwrap();
        directories.unrecord(SnapshotId(20)).unwrap();
        assert_eq!(load(), [renamed]);
        assert_eq!(directories.orphans(|id| id == SnapshotId(1)).unwrap(), [SnapshotId(20)]);
        directories.delete(SnapshotId(20));
        assert_eq!(directories.orphans(|id| id == SnapshotId(1)).unwrap(), []);
        assert!(directories.create(&snapshot(1), None).is_err(), "the number is taken");
        assert_eq!(load().len(), 1);
    }

    #[test]
    fn a_damaged_record_is_named_and_the_others_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path().to_owned());
        directories.create(&snapshot(3), None).unwrap();
        directories.create(&snapshot(4), None).unwrap();
        let record = dir.path().join("3").join(RECORD);
        let text = fs::read_to_string(&record).unwrap();
        let newer = text.replace("\"id\":3", "\"id\":3,\"newer\":1");
        for damaged in [text.replace("\"id\":3", "\"id\":4"), text[1..].to_owned(), newer, String::new()] {
            fs::write(&record, damaged).unwrap();
            let Loaded { snapshots, unreadable } = directories.load().unwrap();
            assert_eq!(snapshots.iter().map(|snapshot| snapshot.id).collect::<Vec<_>>(), [SnapshotId(4)]);
            let [(SnapshotId(3), error)] = &unreadable[..] else { panic!("{unreadable:?}") };
            let error = crate::chain(error);
            assert!(error.contains("3/snapshot.json"), "{error}");
        }
    }

    #[test]
    fn usage_counts_each_inode_once() {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories::new(dir.path().to_owned());
        directories.create(&snapshot(1), None).unwrap();
        let fs_dir = directories.fs(SnapshotId(1));
        let empty = directories.usage(SnapshotId(1)).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::create_dir(fs_dir.join("d")).unwrap();
        fs::write(fs_dir.join("d/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(fs_dir.join("d/file"), fs_dir.join("link")).unwrap();
        std::os::unix::fs::symlink("/", fs_dir.join("root")).unwrap();
        let full = directories.usage(SnapshotId(1)).unwrap();
        assert_eq!(full.inodes, 4);
        assert!((100_000..300_000).contains(&(full.bytes - empty.bytes)), "{full:?}");
    }
}
