//! Records: what stays of a converted layer.
//!
//! A record is a line of JSON with what the layer says of those below it, and behind it the bootstrap of the layer alone
//! and the chunk table of its blob, in the form of a bootstrap layer. Its key is a digest over the source layer and all
//! that decides what becomes of it, so that a record is found only by who would make the same.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use flate2::Compression;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use shoal_proto::{BlobId, ObjectId};
use tempfile::TempDir;

use crate::{
    Blob, Bootstrap, BuildOptions, Encryption, ForeignLink, LayerNotes,
    oci::{Descriptor, LayerLimits, bootstrap_layer::write_packed, read_bootstrap_layer},
};

/// In every key: another form of records, or a builder whose images are not to be mixed with older ones, has another.
const VERSION: &str = "shoal layer record 1";

/// The same for indexes over gzip layers.
const INDEX_VERSION: &str = "shoal layer index 1";

/// How names of what is not finished begin.
const WORK: &str = ".work-";

/// What a record is found by, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key(String);

impl Key {
    /// For a source layer with this digest, whose tar has the digest `diff_id`, and the dictionary that it is built with.
    pub(super) fn new(
        (layer, diff_id): (ObjectId, ObjectId),
        build: &BuildOptions,
        dictionary: Option<ObjectId>,
    ) -> Self {
        // All of them, so that a new one is not forgotten; threads and limits decide how and not what is built.
        let &BuildOptions {
            compressor,
            algorithm,
            chunk_size,
            level,
            batch_size,
            inline_meta,
            toc,
            encryption,
            threads: _,
            limits: _,
        } = build;
        let codec = format!("{compressor} {level:?}\n{algorithm:?}\n{chunk_size} {batch_size:?}");
        let dictionary = dictionary.map(|id| format!("{id}\n")).unwrap_or_default();
        let encrypted = if encryption == Encryption::None { "" } else { "encrypted\n" };
        let text = format!("{VERSION}\n{layer}\n{diff_id}\n{codec}\n{inline_meta} {toc}\n{dictionary}{encrypted}");
        Self(ObjectId::new(Sha256::digest(text).into()).to_string())
    }
}

impl Key {
    /// For an index over this layer: of what decides how layers are converted, the size of chunks alone counts.
    pub(super) fn of_index(layer: ObjectId, diff_id: ObjectId, build: &BuildOptions) -> Self {
        let text = format!("{INDEX_VERSION}\n{layer}\n{diff_id}\n{}\n", build.chunk_size);
        Self(ObjectId::new(Sha256::digest(text).into()).to_string())
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A converted layer.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) bootstrap: Bootstrap,
    /// The chunk tables of its blobs; not for an index, which is one.
    pub(super) tables: BTreeMap<BlobId, Bytes>,
    /// What it leaves to the layers below.
    pub(super) notes: LayerNotes,
    /// Of its blobs, those of the dictionary. At most one is its own.
    pub(super) earlier: BTreeSet<BlobId>,
    /// That it was converted because no index can be made over it.
    pub(super) unindexable: bool,
}

/// The first line: paths in hexadecimal, since they may hold any byte.
#[derive(Serialize, Deserialize)]
struct Head {
    implied: Vec<String>,
    links: Vec<(String, String)>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    earlier: Vec<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unindexable: bool,
}

impl From<&Record> for Head {
    fn from(Record { notes, earlier, unindexable, .. }: &Record) -> Self {
        let links = notes.links.iter().map(|link| (hex::encode(&link.path), hex::encode(&link.target)));
        Self {
            implied: notes.implied.iter().map(hex::encode).collect(),
            links: links.collect(),
            earlier: earlier.iter().map(BlobId::to_string).collect(),
            unindexable: *unindexable,
        }
    }
}

impl Head {
    fn notes(&self) -> Result<LayerNotes, hex::FromHexError> {
        let link = |(path, target): &(String, String)| {
            Ok(ForeignLink { path: hex::decode(path)?, target: hex::decode(target)? })
        };
        let links = self.links.iter().map(link);
        let implied = self.implied.iter().map(hex::decode);
        Ok(LayerNotes { implied: implied.collect::<Result<_, _>>()?, links: links.collect::<Result<_, _>>()? })
    }
}

impl Record {
    /// Reads the form in which records are kept. `None` for anything that is no record: it is then made again.
    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        let line = bytes.iter().position(|byte| *byte == b'\n')?;
        let head: Head = serde_json::from_slice(&bytes[..line]).ok()?;
        let notes = head.notes().ok()?;
        let layer = read_bootstrap_layer(&bytes[line + 1..], &LayerLimits::default()).ok()?;
        let bootstrap = Bootstrap::parse(layer.bootstrap).ok()?;
        let earlier: BTreeSet<BlobId> = head.earlier.iter().map(|id| id.parse().ok()).collect::<Option<_>>()?;
        let own = bootstrap.blobs().iter().filter(|blob| !earlier.contains(&blob.id)).count();
        let described = bootstrap.blobs().iter().filter(|blob| blob.meta.is_none()).map(|blob| blob.id);
        let described: BTreeSet<BlobId> = described.collect();
        let complete = own <= 1 && described.iter().eq(layer.chunk_tables.keys());
        let tables = layer.chunk_tables;
        complete.then_some(Self { bootstrap, tables, notes, earlier, unindexable: head.unindexable })
    }

    pub(super) fn write(&self, mut out: impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut out, &Head::from(self))?;
        out.write_all(b"\n")?;
        // Level 1: in most cases nobody but this machine ever sees it.
        write_packed(self.bootstrap.as_bytes(), &self.tables, None, (out, Compression::fast())).map(drop)
    }

    /// The layer's own blob; for an index, that is the meta blob.
    pub(super) fn blob(&self) -> Option<Descriptor> {
        self.bootstrap.blobs().iter().find(|blob| !self.earlier.contains(&blob.id)).map(stored)
    }

    /// Whether the layer stays what it is.
    pub(super) fn is_index(&self) -> bool {
        self.bootstrap.blobs().iter().any(|blob| blob.meta.is_some())
    }
}

/// What the target must have for a blob to be read, beside the layers of the source: the blob, or the meta blob.
pub(super) fn stored(blob: &Blob) -> Descriptor {
    let (id, size) = blob.meta.map_or((blob.id, blob.encoded_size), |meta| (meta.id, meta.size));
    Descriptor { id: ObjectId::new(*id.as_bytes()), size }
}

/// The records of this machine, and room to work in.
///
/// Any number of conversions share a folder. Each holds a lock; who finds nobody else at work removes what a conversion
/// that was killed has left.
#[derive(Debug)]
pub(super) struct Records {
    dir: PathBuf,
    _lock: Option<File>,
    /// The folder, if it goes away with the conversion.
    temporary: Option<TempDir>,
}

impl Records {
    /// In a folder of its own if none is given.
    pub(super) fn open(dir: Option<&Path>) -> io::Result<Self> {
        match dir {
            Some(dir) => {
                fs::create_dir_all(dir)?;
                let lock = File::create(dir.join("lock"))?;
                if lock.try_lock().is_ok() {
                    remove_leftovers(dir)?;
                }
                lock.lock_shared()?;
                Ok(Self { dir: dir.to_owned(), _lock: Some(lock), temporary: None })
            }
            None => {
                let temporary = TempDir::with_prefix("shoal-convert-")?;
                Ok(Self { dir: temporary.path().to_owned(), _lock: None, temporary: Some(temporary) })
            }
        }
    }

    /// A folder for the time in which a layer is built. It goes away by itself.
    pub(super) fn work(&self) -> io::Result<TempDir> {
        TempDir::with_prefix_in(WORK, &self.dir)
    }

    pub(super) fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{key}.record"))
    }

    /// The record, if there is a sound one.
    pub(super) fn load(&self, key: &Key) -> Option<Record> {
        Record::read(&fs::read(self.path(key)).ok()?)
    }

    /// Keeps a record, whole or not at all.
    pub(super) fn store(&self, key: &Key, record: &Record) -> io::Result<()> {
        // That of an encrypted layer has its key.
        let mode = if record.bootstrap.is_encrypted() { 0o600 } else { 0o644 };
        let builder = || {
            let mut builder = tempfile::Builder::new();
            builder.prefix(WORK).permissions(Permissions::from_mode(mode)).tempfile_in(&self.dir)
        };
        let mut file = builder()?;
        record.write(io::BufWriter::new(file.as_file_mut()))?;
        if self.temporary.is_some() {
            file.persist(self.path(key))?;
            return Ok(());
        }
        file.as_file().sync_all()?;
        file.persist(self.path(key))?;
        File::open(&self.dir)?.sync_all()
    }
}

fn remove_leftovers(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(WORK) {
            let path = entry.path();
            if entry.file_type()?.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Builder;

    fn record(dir: &Path) -> Record {
        let source = dir.join("source");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("file"), "content").unwrap();
        let bootstrap = dir.join("bootstrap");
        let built = Builder::new(BuildOptions::default()).build(&source, &bootstrap, dir).unwrap();
        let id = built.blob.unwrap();
        let table = crate::chunk_table_file(&dir.join(id.to_string())).unwrap();
        let notes = LayerNotes {
            implied: BTreeSet::from([Vec::new(), b"a\xff\n".to_vec()]),
            links: vec![ForeignLink { path: b"b".to_vec(), target: b"c/d".to_vec() }],
        };
        let (bootstrap, tables) = (Bootstrap::open(&bootstrap).unwrap(), [(id, table.into())].into());
        Record { bootstrap, tables, notes, earlier: BTreeSet::new(), unindexable: false }
    }

    #[test]
    fn what_is_kept_is_found_again() {
        let dir = TempDir::new().unwrap();
        let record = record(dir.path());
        let records = Records::open(Some(&dir.path().join("state"))).unwrap();
        let key =
            |layer| Key::new((ObjectId::new([layer; 32]), ObjectId::new([0; 32])), &BuildOptions::default(), None);
        assert!(records.load(&key(1)).is_none());
        records.store(&key(1), &record).unwrap();
        let found = records.load(&key(1)).unwrap();
        assert_eq!((found.notes, found.tables), (record.notes.clone(), record.tables.clone()));
        assert_eq!(found.bootstrap.as_bytes(), record.bootstrap.as_bytes());
        assert!(records.load(&key(2)).is_none());
        let other = BuildOptions { level: Some(4), ..BuildOptions::default() };
        let layer = (ObjectId::new([1; 32]), ObjectId::new([0; 32]));
        assert_ne!(Key::new(layer, &other, None), key(1));
        let with_dictionary = Key::new(layer, &BuildOptions::default(), Some(ObjectId::new([9; 32])));
        assert_ne!(with_dictionary, key(1));
        // All of it is in the dictionary's blob: it has none of its own.
        let id = record.bootstrap.blobs()[0].id;
        records.store(&key(4), &Record { earlier: [id].into(), ..record.clone() }).unwrap();
        let found = records.load(&key(4)).unwrap();
        assert_eq!((found.blob(), found.earlier), (None, [id].into()));
        // A table is missing: no record.
        records.store(&key(3), &Record { tables: BTreeMap::new(), ..record }).unwrap();
        assert!(records.load(&key(3)).is_none());
    }

    #[test]
    fn leftovers_go_when_nobody_is_at_work() {
        let dir = TempDir::new().unwrap();
        let left = dir.path().join(".work-left");
        fs::create_dir(&left).unwrap();
        let first = Records::open(Some(dir.path())).unwrap();
        assert!(!left.exists());
        let at_work = first.work().unwrap();
        let second = Records::open(Some(dir.path())).unwrap();
        assert!(at_work.path().exists());
        drop((first, second));
        assert!(Records::open(Some(dir.path())).unwrap().work().is_ok());
        assert!(!at_work.path().exists());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_damaged_record_never_panics(at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<prop::sample::Index>()) {
            let dir = TempDir::new().unwrap();
            let mut bytes = Vec::new();
            record(dir.path()).write(&mut bytes).unwrap();
            prop_assert!(Record::read(&bytes).is_some());
            prop_assert!(Record::read(&bytes[..cut.index(bytes.len() - 1)]).is_none());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let _ = Record::read(&bytes);
        }
    }
}
