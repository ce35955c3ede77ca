//! What is a file of its own, written whole or not at all: objects, named by the sha256 of all their bytes, and decoded
//! forms of blobs, named by what they must be. When one was last used is the time of its file.

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shoal_proto::{DecodedId, ObjectId};

use super::{
    StoreError,
    blobs::lock,
    disk::allocated,
    holdings::{Holding, Holdings},
};

/// Files being written start like this, so that the next owner of the directory can remove what a crash left.
const UNFINISHED: &str = ".unfinished-";

/// Decoded forms that are being filled under a mount start like this. Nothing is trusted of what the next owner of the
/// directory finds in one; but a mount may have it open, and ask for what it has not read yet.
const FILLING: &str = ".filling-";

/// Bytes that are in memory while a file is hashed.
const HASHED_AT_A_TIME: usize = 256 << 10;

/// The folders of such files.
pub(super) struct WholeFiles {
    objects: PathBuf,
    decoded: PathBuf,
    holdings: Arc<Holdings>,
    /// The decoded forms that are whole, each with its file once somebody reads it here: what is removed must not stay open, or it
    /// would go on to take up its room. Locked for a look-up, and to open a file.
    whole: Mutex<HashMap<DecodedId, Option<Arc<File>>>>,
}

impl WholeFiles {
    pub(super) fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let (objects, decoded) = (data_dir.join("objects"), data_dir.join("decoded"));
        let holdings = Arc::new(Holdings::default());
        let opening = |dir: &Path, source| StoreError::io(format!("opening {}", dir.display()), source);
        let object = |name: &str| Some(Holding::Object(name.parse().ok()?));
        find(&objects, &holdings, object).map_err(|source| opening(&objects, source))?;
        let form = |name: &str| Some(Holding::Decoded(name.strip_prefix(FILLING).unwrap_or(name).parse().ok()?));
        find(&decoded, &holdings, form).map_err(|source| opening(&decoded, source))?;
        let forms = holdings.all().into_iter().filter_map(|(holding, ..)| match holding {
            Holding::Decoded(id) if decoded.join(id.to_string()).exists() => Some((id, None)),
            _ => None,
        });
        let whole = Mutex::new(forms.collect());
        Ok(Self { objects, decoded, holdings, whole })
    }

    /// What the store keeps, of which this knows the whole files.
    pub(super) fn holdings(&self) -> &Arc<Holdings> {
        &self.holdings
    }

    pub(super) fn put_object(&self, id: ObjectId, bytes: &[u8]) -> Result<(), StoreError> {
        let found = identify(bytes);
        if found != id {
            return Err(StoreError::WrongObject { id, found });
        }
        let path = self.object_path(id);
        if fs::metadata(&path).is_ok_and(|found| found.len() == bytes.len() as u64) {
            return Ok(());
        }
        let written = write(&self.objects, &path, |file| file.write_all(bytes));
        written.map_err(|source| StoreError::io(format!("object {id}"), source))?;
        self.measure(Holding::Object(id), &path);
        Ok(())
    }

    /// Makes a decoded form, which is there once `fill` has written all of it.
    pub(super) fn put_decoded<E: From<StoreError>>(
        &self,
        id: DecodedId,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<(), E> {
        let path = self.decoded_path(id);
        let mut outcome = Ok(());
        let written = write(&self.decoded, &path, |file| {
            outcome = fill(file);
            outcome.as_ref().map(drop).map_err(|_| io::ErrorKind::Other.into())
        });
        outcome?;
        written.map_err(|source| StoreError::io(format!("decoded form {id}"), source))?;
        self.is_whole(id, &path);
        Ok(())
    }

    /// A decoded form to be read, if it is whole. Looks into memory but for the first time.
    pub(super) fn decoded_file(&self, id: DecodedId) -> Option<Arc<File>> {
        let mut whole = lock(&self.whole);
        let slot = whole.get_mut(&id)?;
        if slot.is_none() {
            *slot = Some(Arc::new(File::open(self.decoded_path(id)).ok()?));
        }
        slot.clone()
    }

    fn is_whole(&self, id: DecodedId, path: &Path) {
        self.measure(Holding::Decoded(id), path);
        lock(&self.whole).insert(id, None);
    }

    /// Makes an empty file of `len` bytes in which a decoded form is to be filled, in place of an earlier one, which stays
    /// what it is for those that have it open.
    pub(super) fn begin_filling(&self, id: DecodedId, len: u64) -> Result<File, StoreError> {
        self.remove_filling(id)?;
        let path = self.filling_path(id);
        let made = File::options().read(true).write(true).create_new(true).open(&path);
        let made = made.and_then(|file| file.set_len(len).map(|()| file));
        let file = made.map_err(|source| StoreError::io(format!("making {}", path.display()), source))?;
        self.grew(id);
        Ok(file)
    }

    /// Takes note of what a file that is being filled takes up now.
    pub(super) fn grew(&self, id: DecodedId) {
        self.measure(Holding::Decoded(id), &self.filling_path(id));
    }

    /// The file is whole, verified and synced: from now on it is the decoded form.
    pub(super) fn finish_filling(&self, id: DecodedId) -> Result<(), StoreError> {
        let path = self.decoded_path(id);
        let renamed = fs::rename(self.filling_path(id), &path).and_then(|()| File::open(&self.decoded)?.sync_all());
        renamed.map_err(|source| StoreError::io(format!("decoded form {id}"), source))?;
        self.is_whole(id, &path);
        Ok(())
    }

    /// Removes a file that was being filled, if there is one. Whoever has it open goes on with it.
    pub(super) fn remove_filling(&self, id: DecodedId) -> Result<(), StoreError> {
        delete(&self.filling_path(id))?;
        // There may be a whole one beside it.
        match self.decoded_path(id).exists() {
            true => self.measure(Holding::Decoded(id), &self.decoded_path(id)),
            false => drop(self.holdings.gone(Holding::Decoded(id))),
        }
        Ok(())
    }

    /// Removes the files that were being filled and that nobody needs.
    pub(super) fn remove_fillings(&self) -> Result<(), StoreError> {
        let decoded = self.holdings.all().into_iter().filter_map(|(holding, ..)| match holding {
            Holding::Decoded(id) if !self.holdings.is_needed(holding) => Some(id),
            _ => None,
        });
        decoded.into_iter().try_for_each(|id| self.remove_filling(id))
    }

    pub(super) fn filling_path(&self, id: DecodedId) -> PathBuf {
        self.decoded.join(format!("{FILLING}{id}"))
    }

    /// All objects.
    pub(super) fn object_ids(&self) -> Vec<ObjectId> {
        let kept = self.holdings.all().into_iter();
        kept.filter_map(|(holding, ..)| if let Holding::Object(id) = holding { Some(id) } else { None }).collect()
    }

    pub(super) fn read_object(&self, id: ObjectId) -> Result<Option<Bytes>, StoreError> {
        let bytes = match fs::read(self.object_path(id)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::io(format!("reading object {id}"), source)),
        };
        if identify(&bytes) == id {
            return Ok(Some(bytes.into()));
        }
        tracing::warn!(object = %id, "damaged on disk: removed");
        self.remove(Holding::Object(id))?;
        Ok(None)
    }

    /// An object, to be read part by part: all of it is verified before. One that was damaged is removed and is `None`.
    pub(super) fn open_object(&self, id: ObjectId) -> Result<Option<ObjectFile>, StoreError> {
        let failed = |source| StoreError::io(format!("reading object {id}"), source);
        let file = match File::open(self.object_path(id)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        let (mut hasher, mut buffer, mut len) = (Sha256::new(), vec![0; HASHED_AT_A_TIME], 0);
        loop {
            let read = (&file).read(&mut buffer).map_err(failed)?;
            if read == 0 {
                break;
            }
            hasher.update(&buffer[..read]);
            len += read as u64;
        }
        if ObjectId::new(hasher.finalize().into()) == id {
            return Ok(Some(ObjectFile { file, len }));
        }
        tracing::warn!(object = %id, "damaged on disk: removed");
        self.remove(Holding::Object(id))?;
        Ok(None)
    }

    /// Removes one, if it is there, or being filled; gives the bytes that it took up.
    pub(super) fn remove(&self, holding: Holding) -> Result<u64, StoreError> {
        let Some(path) = self.path(holding) else { return Ok(0) };
        if let Holding::Decoded(id) = holding {
            lock(&self.whole).remove(&id);
            delete(&self.filling_path(id))?;
        }
        delete(&path)?;
        Ok(self.holdings.gone(holding))
    }

    /// Notes for the next opening when one was last used.
    pub(super) fn record_use(&self, holding: Holding, seconds: u64) {
        let Some(path) = self.path(holding) else { return };
        let time = UNIX_EPOCH + Duration::from_secs(seconds);
        let noted = File::options().write(true).open(&path).and_then(|file| file.set_modified(time));
        if let Err(error) = noted {
            tracing::debug!(path = %path.display(), "when it was used is not noted: {error}");
        }
    }

    pub(super) fn object_path(&self, id: ObjectId) -> PathBuf {
        self.objects.join(id.to_string())
    }

    pub(super) fn decoded_path(&self, id: DecodedId) -> PathBuf {
        self.decoded.join(id.to_string())
    }

    /// The file, if it is one of these.
    fn path(&self, holding: Holding) -> Option<PathBuf> {
        match holding {
            Holding::Object(id) => Some(self.object_path(id)),
            Holding::Decoded(id) => Some(self.decoded_path(id)),
            Holding::Blob(_) => None,
        }
    }

    fn measure(&self, holding: Holding, path: &Path) {
        self.holdings.sized(holding, fs::metadata(path).as_ref().map_or(0, allocated));
    }
}

/// An object that is open, and was whole when it was opened.
#[derive(Debug)]
pub(crate) struct ObjectFile {
    file: File,
    len: u64,
}

impl ObjectFile {
    /// Bytes of it.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// So many bytes of it from a place on. Blocks.
    pub(crate) fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes.into())
    }
}

/// Removes a file, if it is there.
fn delete(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(StoreError::io(format!("removing {}", path.display()), source))
        }
        _ => Ok(()),
    }
}

/// Makes a folder if need be, removes what is unfinished, and takes note of what is there.
fn find(dir: &Path, holdings: &Holdings, parse: impl Fn(&str) -> Option<Holding>) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(UNFINISHED) {
            fs::remove_file(entry.path())?;
        } else if name.strip_prefix(FILLING).is_some_and(|whole| dir.join(whole).exists()) {
            // The whole one is what is counted.
        } else if let Some(holding) = parse(&name) {
            let metadata = entry.metadata()?;
            holdings.found(holding, allocated(&metadata), last_use(&metadata));
        }
    }
    Ok(())
}

/// Makes a file that is there, durably, once `fill` has written it.
fn write(dir: &Path, path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(dir)?;
    fill(file.as_file_mut())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(dir)?.sync_all()
}

/// Seconds since 1970.
fn last_use(metadata: &Metadata) -> u64 {
    let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn identify(bytes: &[u8]) -> ObjectId {
    ObjectId::new(Sha256::digest(bytes).into())
}
