//! An OCI image layout folder, read and written with the same operations as a registry.
//!
//! ```text
//! DIR/oci-layout             {"imageLayoutVersion": "1.0.0"}; also the lock that writers of index.json hold
//! DIR/index.json             manifests, tagged by org.opencontainers.image.ref.name
//! DIR/blobs/sha256/<hex>     everything else, manifests too
//! ```
//!
//! Files appear under their names whole and synced, or not at all. A reader may run beside any number of writers. All
//! but reading blobs is synchronous: writers wait for the disk and for each other.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read, Write},
    ops::Range,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shoal_proto::ObjectId;
use tempfile::NamedTempFile;

use super::{BlobStream, Descriptor, Reference, RegistryError, blob_file};

/// The annotation that carries the tag.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Content of the file `oci-layout`.
const MARKER: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// Media type of index.json.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Largest index.json that is read.
pub(super) const MAX_INDEX: u64 = 64 << 20;
/// Bytes copied at once.
const COPY_BYTES: usize = 256 * 1024;

/// A folder in OCI image layout. Opening does nothing; it is made by the first write.
#[derive(Debug, Clone)]
pub struct Layout {
    dir: PathBuf,
}

/// A manifest or an index that index.json names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutEntry {
    /// Digest and size.
    pub manifest: Descriptor,
    /// Its media type.
    pub media_type: String,
    /// The annotation `org.opencontainers.image.ref.name`. Shoal writes a plain tag; others also write `repo:tag`.
    pub tag: Option<String>,
}

impl Layout {
    /// The layout in a folder.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where a blob is, or would be.
    pub fn blob_path(&self, id: ObjectId) -> PathBuf {
        self.dir.join("blobs/sha256").join(id.to_string())
    }

    /// All entries of the index, in its order.
    pub fn entries(&self) -> Result<Vec<LayoutEntry>, RegistryError> {
        self.index()?.iter().map(|entry| self.entry(entry)).collect()
    }

    /// The entries as they are: what others wrote into them is kept when the index is written again.
    fn index(&self) -> Result<Vec<Value>, RegistryError> {
        let path = self.dir.join("index.json");
        let read = RegistryError::io(format!("cannot read {}", path.display()));
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.broken("no index.json: not an OCI layout".to_owned()),
            _ => RegistryError::Io { what: format!("cannot open {}", path.display()), source: error },
        })?;
        let mut bytes = Vec::new();
        file.take(MAX_INDEX + 1).read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 > MAX_INDEX {
            return Err(RegistryError::TooLarge { what: path.display().to_string(), limit: MAX_INDEX });
        }
        let mut index: Value =
            serde_json::from_slice(&bytes).map_err(|error| self.broken(format!("index.json: {error}")))?;
        match index.get_mut("manifests").map(Value::take) {
            Some(Value::Array(entries)) => Ok(entries),
            _ => Err(self.broken("index.json: no list of manifests".to_owned())),
        }
    }

    fn entry(&self, entry: &Value) -> Result<LayoutEntry, RegistryError> {
        let text = |key: &str| entry.get(key).and_then(Value::as_str);
        let id = text("digest").and_then(|digest| digest.strip_prefix("sha256:")).and_then(|hex| hex.parse().ok());
        match (id, entry.get("size").and_then(Value::as_u64), text("mediaType")) {
            (Some(id), Some(size), Some(media_type)) => Ok(LayoutEntry {
                manifest: Descriptor { id, size },
                media_type: media_type.to_owned(),
                tag: ref_name(entry).map(str::to_owned),
            }),
            _ => Err(self.broken("index.json: an entry has no sha256 digest, size or media type".to_owned())),
        }
    }

    /// Digest and size of the manifest or index with this tag. Without a tag it is the only one, else `latest`.
    pub fn resolve(&self, reference: &Reference) -> Result<(ObjectId, u64), RegistryError> {
        if let Some(id) = reference.digest() {
            let size = self.blob_size(id)?;
            return size.map(|size| (id, size)).ok_or(RegistryError::NotFound { what: reference.to_string() });
        }
        let entries = self.entries()?;
        let entry = match (reference.tag(), &entries[..]) {
            (None, [only]) => Some(only),
            (tag, entries) => {
                let tag = tag.unwrap_or("latest");
                entries.iter().find(|entry| entry.tag.as_deref() == Some(tag))
            }
        };
        let entry = entry.ok_or_else(|| RegistryError::NotFound { what: reference.to_string() })?;
        Ok((entry.manifest.id, entry.manifest.size))
    }

    /// The size of a blob, or `None` when it is not there.
    pub fn blob_size(&self, id: ObjectId) -> Result<Option<u64>, RegistryError> {
        blob_file::size(&self.blob_path(id))
    }

    /// A whole blob, verified at the end, or a range of it.
    pub async fn blob(&self, id: ObjectId, range: Option<Range<u64>>) -> Result<BlobStream, RegistryError> {
        blob_file::open(&self.blob_path(id), id, range).await
    }

    /// Stores bytes under their digest.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<ObjectId, RegistryError> {
        let id = ObjectId::new(Sha256::digest(bytes).into());
        if self.blob_size(id)?.is_none() {
            self.create()?;
            let path = self.blob_path(id);
            write_atomically(&path, |file| file.write_all(bytes))
                .map_err(RegistryError::io(format!("cannot write {}", path.display())))?;
        }
        Ok(id)
    }

    /// Stores a copy of a file, which must have this digest.
    pub fn put_blob_file(&self, id: ObjectId, file: &Path) -> Result<(), RegistryError> {
        self.create()?;
        blob_file::put(&self.blob_path(id), id, file)
    }

    /// A file to write a blob to whose bytes come from afar. It goes away unless it is [kept](Self::keep).
    pub(super) fn incoming(&self) -> Result<NamedTempFile, RegistryError> {
        self.create()?;
        let file = temporary(&self.dir.join("blobs/sha256"), |_| Ok(()));
        file.map_err(RegistryError::io(format!("cannot make a file in {}", self.dir.display())))
    }

    /// Gives a complete and verified blob its name.
    pub(super) fn keep(&self, file: NamedTempFile, id: ObjectId) -> Result<(), RegistryError> {
        let path = self.blob_path(id);
        let kept = file.as_file().sync_all().and_then(|()| Ok(file.persist(&path).map(drop)?));
        kept.map_err(RegistryError::io(format!("cannot write {}", path.display())))
    }

    /// Stores a manifest and points the tag to it. Without a tag the index names it by its digest alone.
    pub fn put_manifest(&self, tag: Option<&str>, media_type: &str, bytes: &[u8]) -> Result<ObjectId, RegistryError> {
        let id = self.put_blob(bytes)?;
        let what = || format!("cannot update the index of {}", self.dir.display());
        // Released when the file is closed, also by a crash.
        let lock = File::open(self.dir.join("oci-layout")).map_err(RegistryError::io(what()))?;
        lock.lock().map_err(RegistryError::io(what()))?;
        let mut entries = self.index()?;
        let digest = format!("sha256:{id}");
        entries.retain(|entry| match tag {
            Some(_) => ref_name(entry) != tag,
            None => ref_name(entry).is_some() || entry.get("digest").and_then(Value::as_str) != Some(&digest),
        });
        let mut entry = json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() });
        if let Some(tag) = tag {
            entry["annotations"] = json!({ REF_NAME: tag });
        }
        entries.push(entry);
        self.write_index(&entries).map_err(RegistryError::io(what()))?;
        Ok(id)
    }

    fn write_index(&self, entries: &[Value]) -> io::Result<()> {
        let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": entries });
        write_atomically(&self.dir.join("index.json"), |file| Ok(serde_json::to_writer(file, &index)?))
    }

    /// Makes the folder, if it is not there, with an empty index.
    pub fn create(&self) -> Result<(), RegistryError> {
        let make = || {
            fs::create_dir_all(self.dir.join("blobs/sha256"))?;
            let marker = self.dir.join("oci-layout");
            if !marker.exists() {
                // Never replaced: a second file of that name would be a second lock.
                match temporary(&self.dir, |file| file.write_all(MARKER))?.persist_noclobber(&marker) {
                    Err(error) if error.error.kind() != io::ErrorKind::AlreadyExists => return Err(error.error),
                    _ => {}
                }
            }
            // Two makers must not overwrite an index that has entries already.
            let lock = File::open(marker)?;
            lock.lock()?;
            if self.dir.join("index.json").exists() { Ok(()) } else { self.write_index(&[]) }
        };
        make().map_err(RegistryError::io(format!("cannot make a layout in {}", self.dir.display())))
    }

    fn broken(&self, reason: String) -> RegistryError {
        RegistryError::Layout { dir: self.dir.display().to_string(), reason }
    }
}

fn ref_name(entry: &Value) -> Option<&str> {
    entry.get("annotations")?.get(REF_NAME)?.as_str()
}

pub(super) fn copy_hashed(from: &mut impl Read, to: &mut impl Write) -> io::Result<ObjectId> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; COPY_BYTES];
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(ObjectId::new(hasher.finalize().into())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read?,
        };
        hasher.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
    }
}

/// Writes a file beside `path`, syncs it and gives it that name.
pub(super) fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let dir = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    temporary(dir, write)?.persist(path)?;
    File::open(dir)?.sync_all()
}

/// A synced file without a lasting name; it goes away unless it is given one.
fn temporary(dir: &Path, write: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<NamedTempFile> {
    let mut file =
        tempfile::Builder::new().prefix(".tmp-").permissions(Permissions::from_mode(0o644)).tempfile_in(dir)?;
    write(file.as_file_mut())?;
    file.as_file().sync_all()?;
    Ok(file)
}
