//! Objects: files named by the sha256 of all their bytes, written whole or not at all.

use std::{
    fs::{self, File, Metadata},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shoal_proto::ObjectId;

use super::{
    StoreError,
    disk::allocated,
    holdings::{Holding, Holdings},
};

/// Files being written start like this, so that the next owner of the directory can remove what a crash left.
const UNFINISHED: &str = ".unfinished-";

/// The folder of objects. When one was last used is the time of its file.
pub(super) struct Objects {
    dir: PathBuf,
    holdings: Arc<Holdings>,
}

impl Objects {
    pub(super) fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let dir = data_dir.join("objects");
        let opening = |source| StoreError::io(format!("opening {}", dir.display()), source);
        fs::create_dir_all(&dir).map_err(opening)?;
        let holdings = Arc::new(Holdings::default());
        for entry in fs::read_dir(&dir).map_err(opening)? {
            let entry = entry.map_err(opening)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(UNFINISHED) {
                fs::remove_file(entry.path()).map_err(opening)?;
            } else if let Ok(id) = name.parse() {
                let metadata = entry.metadata().map_err(opening)?;
                holdings.found(Holding::Object(id), allocated(&metadata), last_use(&metadata));
            }
        }
        Ok(Self { dir, holdings })
    }

    /// What the store keeps, of which this knows the objects.
    pub(super) fn holdings(&self) -> &Arc<Holdings> {
        &self.holdings
    }

    pub(super) fn put(&self, id: ObjectId, bytes: &[u8]) -> Result<(), StoreError> {
        let found = identify(bytes);
        if found != id {
            return Err(StoreError::WrongObject { id, found });
        }
        if self.metadata(id).is_some_and(|found| found.len() == bytes.len() as u64) {
            return Ok(());
        }
        self.write(id, bytes).map_err(|source| StoreError::io(format!("object {id}"), source))?;
        let metadata = self.metadata(id);
        self.holdings.sized(Holding::Object(id), metadata.as_ref().map_or(0, allocated));
        Ok(())
    }

    /// All objects.
    pub(super) fn ids(&self) -> Vec<ObjectId> {
        let kept = self.holdings.all().into_iter();
        kept.filter_map(|(holding, ..)| if let Holding::Object(id) = holding { Some(id) } else { None }).collect()
    }

    pub(super) fn read(&self, id: ObjectId) -> Result<Option<Bytes>, StoreError> {
        let path = self.path(id);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::io(format!("reading object {id}"), source)),
        };
        if identify(&bytes) == id {
            return Ok(Some(bytes.into()));
        }
        tracing::warn!(object = %id, "damaged on disk: removed");
        self.remove(id)?;
        Ok(None)
    }

    /// Somebody uses the object, when it comes to what was used longest ago.
    pub(super) fn used(&self, id: ObjectId) {
        self.holdings.used(Holding::Object(id));
    }

    /// Removes an object, if it is there; gives the bytes that it took up.
    pub(super) fn remove(&self, id: ObjectId) -> Result<u64, StoreError> {
        match fs::remove_file(self.path(id)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io(format!("removing object {id}"), source))
            }
            _ => Ok(self.holdings.gone(Holding::Object(id))),
        }
    }

    /// Notes for the next opening when an object was last used.
    pub(super) fn record_use(&self, id: ObjectId, seconds: u64) {
        let time = UNIX_EPOCH + Duration::from_secs(seconds);
        let noted = File::options().write(true).open(self.path(id)).and_then(|file| file.set_modified(time));
        if let Err(error) = noted {
            tracing::debug!(object = %id, "when it was used is not noted: {error}");
        }
    }

    pub(super) fn has(&self, id: ObjectId) -> bool {
        self.metadata(id).is_some()
    }

    fn metadata(&self, id: ObjectId) -> Option<Metadata> {
        fs::metadata(self.path(id)).ok()
    }

    fn path(&self, id: ObjectId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    fn write(&self, id: ObjectId, bytes: &[u8]) -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(&self.dir)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(self.path(id)).map_err(|error| error.error)?;
        File::open(&self.dir)?.sync_all()
    }
}

/// Seconds since 1970.
fn last_use(metadata: &Metadata) -> u64 {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn identify(bytes: &[u8]) -> ObjectId {
    ObjectId::new(Sha256::digest(bytes).into())
}
