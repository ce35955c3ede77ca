//! The files of blob bytes. Knows names and offsets, not what is in them.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::{self, IoSliceMut, Read, Write},
    num::NonZeroUsize,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use lru::LruCache;
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use shoal_proto::{BlobId, HashList};

use super::{StoreError, lock::DirLock};
use crate::index::BlobKey;

/// The name of a blob's hash list in its folder.
const LIST: &str = "list";

/// One sparse file per variant. A data directory in the daemon; in tests a double that loses what was not synced.
pub(super) trait Disk: Send + Sync {
    /// Makes an empty file, in place of whatever is there, and makes the file (not what is written to it later)
    /// durable.
    fn create(&self, key: BlobKey) -> io::Result<()>;

    /// Removes the file, if it is there.
    fn remove(&self, key: BlobKey) -> io::Result<()>;

    /// The variants that have a file.
    fn keys(&self) -> io::Result<Vec<BlobKey>>;

    /// Length of the file; `None` when there is none.
    fn len(&self, key: BlobKey) -> io::Result<Option<u64>>;

    /// Bytes that the file takes up on disk, which its holes do not; 0 when there is none.
    fn allocated(&self, key: BlobKey) -> io::Result<u64>;

    /// Bytes of the file system that may still be written.
    fn free(&self) -> io::Result<u64>;

    /// Writes all of `bytes` at `offset`, or fails with any part of it written.
    fn write(&self, key: BlobKey, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads exactly `len` bytes.
    fn read(&self, key: BlobKey, offset: u64, len: usize) -> io::Result<Vec<u8>>;

    /// As [`read`](Self::read), but `None` if that would have to wait for the device.
    fn read_at_once(&self, key: BlobKey, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>>;

    /// Makes all that was written to the file durable. After an error nobody knows what of it is.
    fn sync(&self, key: BlobKey) -> io::Result<()>;

    /// Keeps the blob's hash list beside its file, with which it goes; durable on return. Fails where there is no file.
    fn put_list(&self, key: BlobKey, list: &[u8]) -> io::Result<()>;

    /// The hash list that was kept, if there is one.
    fn list(&self, key: BlobKey) -> io::Result<Option<Vec<u8>>>;
}

/// `<data_dir>/blobs`.
pub(super) struct DataDir {
    blobs: PathBuf,
    /// Files that are open, the least recently used first to go. Held for look-ups, not during IO.
    files: Mutex<LruCache<BlobKey, Arc<File>>>,
    /// Here, because the last to use the data directory are the handles of its blobs.
    _lock: DirLock,
}

impl DataDir {
    pub(super) fn open(data_dir: &Path, open_files: usize, lock: DirLock) -> Result<Self, StoreError> {
        let blobs = data_dir.join("blobs");
        fs::create_dir_all(&blobs).map_err(|source| StoreError::io(format!("making {}", blobs.display()), source))?;
        let files = LruCache::sparse(NonZeroUsize::new(open_files).unwrap_or(NonZeroUsize::MIN));
        Ok(Self { blobs, files: Mutex::new(files), _lock: lock })
    }

    fn folder(&self, key: BlobKey) -> PathBuf {
        self.blobs.join(folder_name(key))
    }

    fn file(&self, key: BlobKey) -> io::Result<Arc<File>> {
        if let Some(file) = self.files().get(&key) {
            return Ok(file.clone());
        }
        let file = OpenOptions::new().read(true).write(true).open(self.folder(key).join("encoded"))?;
        let file = Arc::new(file);
        self.files().put(key, file.clone());
        Ok(file)
    }

    fn files(&self) -> std::sync::MutexGuard<'_, LruCache<BlobKey, Arc<File>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Disk for DataDir {
    fn create(&self, key: BlobKey) -> io::Result<()> {
        self.files().pop(&key);
        let folder = self.folder(key);
        fs::create_dir_all(&folder)?;
        match fs::remove_file(folder.join(LIST)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        File::create(folder.join("encoded"))?.sync_all()?;
        File::open(&folder)?.sync_all()?;
        File::open(&self.blobs)?.sync_all()
    }

    fn remove(&self, key: BlobKey) -> io::Result<()> {
        let removed = fs::remove_dir_all(self.folder(key));
        // After it, for whoever reads meanwhile may open the file once more, and an open file takes up its room.
        self.files().pop(&key);
        match removed {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            outcome => outcome,
        }
    }

    fn keys(&self) -> io::Result<Vec<BlobKey>> {
        let names = fs::read_dir(&self.blobs)?.map(|entry| Ok(parse_folder_name(&entry?.file_name())));
        names.filter_map(io::Result::transpose).collect()
    }

    fn len(&self, key: BlobKey) -> io::Result<Option<u64>> {
        match fs::metadata(self.folder(key).join("encoded")) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn allocated(&self, key: BlobKey) -> io::Result<u64> {
        // By the open file if there is one: this is asked after every write.
        let open = self.files().peek(&key).cloned();
        let metadata = match open {
            Some(file) => file.metadata(),
            None => fs::metadata(self.folder(key).join("encoded")),
        };
        match metadata {
            Ok(metadata) => Ok(allocated(&metadata)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn free(&self) -> io::Result<u64> {
        let system = rustix::fs::statvfs(&self.blobs)?;
        Ok(system.f_bavail.saturating_mul(system.f_frsize))
    }

    fn write(&self, key: BlobKey, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file(key)?.write_all_at(bytes, offset)
    }

    fn read(&self, key: BlobKey, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.file(key)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn read_at_once(&self, key: BlobKey, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
        read_at_once(&*self.file(key)?, offset, len)
    }

    fn sync(&self, key: BlobKey) -> io::Result<()> {
        self.file(key)?.sync_data()
    }

    fn put_list(&self, key: BlobKey, list: &[u8]) -> io::Result<()> {
        let folder = self.folder(key);
        let mut file = tempfile::NamedTempFile::new_in(&folder)?;
        file.write_all(list)?;
        file.as_file().sync_all()?;
        file.persist(folder.join(LIST)).map_err(|error| error.error)?;
        File::open(&folder)?.sync_all()
    }

    fn list(&self, key: BlobKey) -> io::Result<Option<Vec<u8>>> {
        match File::open(self.folder(key).join(LIST)) {
            Ok(file) => {
                let mut list = Vec::new();
                file.take(HashList::MAX_ENCODED).read_to_end(&mut list)?;
                Ok(Some(list))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Reads exactly `len` bytes; `None` if that would have to wait for the device.
pub(crate) fn read_at_once(file: &File, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; len];
    match preadv2(file, &mut [IoSliceMut::new(&mut bytes)], offset, ReadWriteFlags::NOWAIT) {
        // A part of it, when the rest is not in memory, or not in the file: who waits will see.
        Ok(read) => Ok((read == len).then_some(bytes)),
        // Not in memory; or the file system cannot tell.
        Err(Errno::AGAIN | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Bytes that a file takes up on disk.
pub(super) fn allocated(metadata: &fs::Metadata) -> u64 {
    // Of 512 bytes whatever the file system's own blocks are: stat(2).
    metadata.blocks().saturating_mul(512)
}

/// The name of a variant's folder.
pub(super) fn folder_name(key: BlobKey) -> String {
    match key.variant {
        0 => key.blob.to_string(),
        variant => format!("{}.{variant}", key.blob),
    }
}

/// `None` for what is not a folder of ours.
pub(super) fn parse_folder_name(name: &OsStr) -> Option<BlobKey> {
    let name = name.to_str()?;
    let (blob, variant) = name.split_once('.').unwrap_or((name, "0"));
    let key = BlobKey { blob: blob.parse::<BlobId>().ok()?, variant: variant.parse().ok()? };
    (folder_name(key) == name).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_names_round_trip() {
        for variant in [0, 1, 15, u32::MAX] {
            let key = BlobKey { blob: BlobId::new([0xab; 32]), variant };
            assert_eq!(parse_folder_name(OsStr::new(&folder_name(key))), Some(key));
        }
        let hex = "ab".repeat(32);
        for strange in ["", "lost+found", &hex[1..], &format!("{hex}.0"), &format!("{hex}.01"), &format!("{hex}.x")] {
            assert_eq!(parse_folder_name(OsStr::new(strange)), None, "{strange}");
        }
    }
}
