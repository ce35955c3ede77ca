//! Objects: files named by the sha256 of all their bytes, written whole or not at all.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shoal_proto::ObjectId;

use super::StoreError;

/// Files being written start like this, so that the next owner of the directory can remove what a crash left.
const UNFINISHED: &str = ".unfinished-";

/// The folder of objects.
pub(super) struct Objects {
    dir: PathBuf,
}

impl Objects {
    pub(super) fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let dir = data_dir.join("objects");
        let opening = |source| StoreError::io(format!("opening {}", dir.display()), source);
        fs::create_dir_all(&dir).map_err(opening)?;
        for entry in fs::read_dir(&dir).map_err(opening)? {
            let entry = entry.map_err(opening)?;
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                fs::remove_file(entry.path()).map_err(opening)?;
            }
        }
        Ok(Self { dir })
    }

    pub(super) fn put(&self, id: ObjectId, bytes: &[u8]) -> Result<(), StoreError> {
        let found = identify(bytes);
        if found != id {
            return Err(StoreError::WrongObject { id, found });
        }
        if self.size(id) == Some(bytes.len() as u64) {
            return Ok(());
        }
        self.write(id, bytes).map_err(|source| StoreError::io(format!("object {id}"), source))
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
        fs::remove_file(&path).map_err(|source| StoreError::io(format!("removing damaged object {id}"), source))?;
        Ok(None)
    }

    pub(super) fn has(&self, id: ObjectId) -> bool {
        self.size(id).is_some()
    }

    fn size(&self, id: ObjectId) -> Option<u64> {
        fs::metadata(self.path(id)).ok().map(|metadata| metadata.len())
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

fn identify(bytes: &[u8]) -> ObjectId {
    ObjectId::new(Sha256::digest(bytes).into())
}
