//! Where an image goes, and how its files appear there: complete, or not at all.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

use super::{BuildError, bootstrap};

/// Where an image goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Output<'a> {
    /// The file of the bootstrap; none where it is wanted in the blob alone.
    pub bootstrap: Option<&'a Path>,
    /// The blob.
    pub blob: BlobTarget<'a>,
}

/// Where a blob goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobTarget<'a> {
    /// Into a directory, made if missing, under its id.
    Dir(&'a Path),
    /// To this path. What is there and is no regular file, a FIFO for instance, is written from front to back while the blob
    /// is made; its reader sees an end also where the build fails. Opening a FIFO waits for its reader.
    File(&'a Path),
    /// Nowhere: whoever wants the image has its blob already, as it may be with a [tar](super::Builder::build_tarfs).
    Nowhere,
}

impl<'a> Output<'a> {
    /// A bootstrap and a directory of blobs.
    pub fn files(bootstrap: &'a Path, blob_dir: &'a Path) -> Self {
        Self { bootstrap: Some(bootstrap), blob: BlobTarget::Dir(blob_dir) }
    }
}

/// Bytes of a blob that are sent to the disk together while more are made. A blob appears once it is on the disk, and what is
/// left to the end is waited for.
const SYNC_BYTES: u64 = 64 << 20;

/// A blob that grows at its end.
pub(super) struct BlobFile {
    place: PathBuf,
    sink: BufWriter<Sink>,
    /// Where it was when it was last sent to the disk, and who does that.
    synced: u64,
    syncing: Option<JoinHandle<io::Result<()>>>,
    /// Its name if it is not named by its sha256.
    path: Option<PathBuf>,
    hasher: Sha256,
    len: u64,
}

enum Sink {
    /// Gets its name when it is complete.
    Temporary(tempfile::NamedTempFile),
    /// Whoever reads it has read it.
    Stream(File),
    /// It is hashed and counted.
    Nothing,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Temporary(file) => file.write(bytes),
            Self::Stream(file) => file.write(bytes),
            Self::Nothing => Ok(bytes.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Temporary(file) => file.flush(),
            Self::Stream(file) => file.flush(),
            Self::Nothing => Ok(()),
        }
    }
}

impl BlobFile {
    pub(super) fn new(target: BlobTarget<'_>) -> Result<Self, BuildError> {
        let (place, sink, path) = match target {
            BlobTarget::Dir(dir) => {
                std::fs::create_dir_all(dir).map_err(BuildError::io("make", dir))?;
                (dir, Sink::Temporary(temporary(dir, 0o644)?), None)
            }
            BlobTarget::File(path) if is_stream(path) => {
                let file = File::options().write(true).open(path);
                (path, Sink::Stream(file.map_err(BuildError::io("open", path))?), Some(path))
            }
            BlobTarget::File(path) => (path, Sink::Temporary(temporary(parent(path), 0o644)?), Some(path)),
            BlobTarget::Nowhere => (Path::new(""), Sink::Nothing, None),
        };
        let sink = BufWriter::with_capacity(1 << 20, sink);
        Ok(Self {
            place: place.to_owned(),
            sink,
            synced: 0,
            syncing: None,
            path: path.map(Path::to_owned),
            hasher: Sha256::new(),
            len: 0,
        })
    }

    /// Where it will be, for errors.
    pub(super) fn place(&self) -> &Path {
        &self.place
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The sha256 of the bytes so far.
    pub(super) fn sha256(&self) -> [u8; 32] {
        self.hasher.clone().finalize().into()
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.hasher.update(bytes);
        self.sink.write_all(bytes).map_err(BuildError::io("write the blob in", &self.place))?;
        self.len += bytes.len() as u64;
        if self.len - self.synced >= SYNC_BYTES && self.syncing.as_ref().is_none_or(JoinHandle::is_finished) {
            self.sync().map_err(BuildError::io("sync the blob in", &self.place))?;
        }
        Ok(())
    }

    /// Begins to send to the disk what is written, once what was begun before has ended.
    fn sync(&mut self) -> io::Result<()> {
        self.end_sync()?;
        self.synced = self.len;
        if let Sink::Temporary(file) = self.sink.get_ref() {
            let file = file.as_file().try_clone()?;
            // Where there is no thread for it, all is left to the end.
            self.syncing = thread::Builder::new().spawn(move || file.sync_data()).ok();
        }
        Ok(())
    }

    /// The system tells only once that it could not write something.
    fn end_sync(&mut self) -> io::Result<()> {
        match self.syncing.take() {
            Some(syncing) => syncing.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked"))),
            None => Ok(()),
        }
    }

    /// Gives the file its name: the sha256 of its bytes.
    pub(super) fn finish(self) -> Result<BlobId, BuildError> {
        let id = BlobId::new(self.sha256());
        self.finish_as(id)
    }

    /// Gives the file this name.
    pub(super) fn finish_as(mut self, id: BlobId) -> Result<BlobId, BuildError> {
        self.end_sync().map_err(BuildError::io("sync the blob in", &self.place))?;
        let path = self.path.unwrap_or_else(|| self.place.join(id.to_string()));
        match self.sink.into_inner().map_err(|error| BuildError::io("write", &path)(error.into_error()))? {
            Sink::Temporary(file) => persist(file, &path)?,
            // Its end is what its reader waits for.
            Sink::Stream(file) => drop(file),
            Sink::Nothing => {}
        }
        Ok(id)
    }
}

/// Whether there is something that cannot be replaced by a file of this name without whoever holds it missing out.
fn is_stream(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir())
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A new file in `dir` that is deleted unless it is given its name.
fn temporary(dir: &Path, mode: u32) -> Result<tempfile::NamedTempFile, BuildError> {
    let file = tempfile::Builder::new()
        .prefix(".shoal-")
        .permissions(std::fs::Permissions::from_mode(mode))
        .tempfile_in(dir);
    file.map_err(BuildError::io("make a file in", dir))
}

/// Syncs a file and gives it its name.
fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<(), BuildError> {
    file.as_file().sync_all().map_err(BuildError::io("sync", path))?;
    file.persist(path).map_err(|error| BuildError::io("write", path)(error.error))?;
    Ok(())
}

/// Writes a bootstrap, for its owner alone if it has the key of a blob.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let mut file = temporary(parent(path), if bootstrap::has_keys(bytes) { 0o600 } else { 0o644 })?;
    file.write_all(bytes).map_err(BuildError::io("write", path))?;
    persist(file, path)
}
