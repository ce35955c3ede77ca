//! The index over RocksDB, set up small: a node has 50 MB for everything while idle.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBCompressionType, ErrorKind, IteratorMode,
    LogLevel, Options, PrefixRange, ReadOptions, WriteBatch, WriteOptions,
};
use shoal_proto::{BlobId, Digest, ObjectId};

use super::{BlobKey, Change, ChunkPlace, IndexError, PieceRecord, Records, Survives, VariantRecord, keys};

/// The layout that this program writes, and the latest that it reads.
pub const SCHEMA_VERSION: u32 = 1;

const META: &str = "meta";
const BLOBS: &str = "blobs";
const PIECES: &str = "pieces";
const DIGESTS: &str = "digests";
const MOUNTS: &str = "mounts";
const PINS: &str = "pins";
const LAYERS: &str = "layers";
const FAMILIES: [&str; 7] = [META, BLOBS, PIECES, DIGESTS, MOUNTS, PINS, LAYERS];

const SCHEMA: &[u8] = b"schema";

/// A column family's memory table is flushed at this size, and all of them together at twice it.
const WRITE_BUFFER_BYTES: usize = 2 << 20;
/// Shared by all column families, index and filter blocks included.
const BLOCK_CACHE_BYTES: usize = 4 << 20;
const WAL_BYTES: u64 = 8 << 20;
const OPEN_FILES: i32 = 64;

/// Most removals in one batch, which is held in memory.
const REMOVALS_PER_BATCH: usize = 8192;

/// A file of this name in the index's folder says that reading it found damage. RocksDB takes no notice of it.
const DAMAGED: &str = "DAMAGED";

/// The index of a data directory.
pub struct RocksIndex {
    db: DB,
}

impl RocksIndex {
    /// Opens the index in a folder, or begins one.
    ///
    /// A damaged one is renamed to `<folder>.damaged` (in place of an earlier one) and an empty one begun. Not all
    /// damage shows on opening: what is found later fails that call, and the next opening begins anew. An index with
    /// a newer schema, and a disk that cannot be read or written, are errors.
    pub fn open(path: &Path) -> Result<Self, IndexError> {
        let opening = |source| failed("opening", source);
        let damage = match families_of(path) {
            Ok(Some(families)) => match Self::open_families(path, families) {
                Err(source) if is_damage(&source) => source.into_string(),
                outcome => return outcome.map_err(opening)?.check_schema(),
            },
            Ok(None) => "found when it was last read, or it has lost the file that names its version".to_owned(),
            Err(source) if is_damage(&source) => source.into_string(),
            Err(source) => return Err(opening(source)),
        };
        tracing::error!(path = %path.display(), damage, "the index is damaged: beginning an empty one");
        put_aside(path).map_err(|source| IndexError::Damaged { path: path.into(), source })?;
        Self::open_families(path, BTreeSet::new()).map_err(opening)?.check_schema()
    }

    fn open_families(path: &Path, mut families: BTreeSet<String>) -> Result<Self, rocksdb::Error> {
        let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
        families.extend(FAMILIES.map(str::to_owned));
        let families = families.into_iter().map(|name| ColumnFamilyDescriptor::new(name, family_options(&cache)));
        Ok(Self { db: DB::open_cf_descriptors(&database_options(), path, families)? })
    }

    fn check_schema(self) -> Result<Self, IndexError> {
        let Some(value) = self.get(META, SCHEMA)? else {
            let written = self.db.put_cf(self.family(META), SCHEMA, SCHEMA_VERSION.to_be_bytes());
            return written.map(|()| self).map_err(|source| failed("writing to", source));
        };
        let found = <[u8; 4]>::try_from(&value[..]).map_err(|_| malformed(META, SCHEMA))?;
        match u32::from_be_bytes(found) {
            SCHEMA_VERSION => Ok(self),
            found => Err(IndexError::NewerSchema { found, known: SCHEMA_VERSION }),
        }
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("open_families opens every family of FAMILIES")
    }

    fn get(&self, family: &'static str, key: &[u8]) -> Result<Option<Vec<u8>>, IndexError> {
        self.db.get_cf(self.family(family), key).map_err(|source| self.unreadable(source))
    }

    /// Calls `each` for every record whose key starts with `prefix`, in order. `None` from it means malformed.
    fn scan(
        &self,
        family: &'static str,
        prefix: &[u8],
        mut each: impl FnMut(&[u8], &[u8]) -> Option<()>,
    ) -> Result<(), IndexError> {
        let mut options = ReadOptions::default();
        options.set_iterate_range(PrefixRange(prefix));
        for record in self.db.iterator_cf_opt(self.family(family), options, IteratorMode::Start) {
            let (key, value) = record.map_err(|source| self.unreadable(source))?;
            each(&key, &value).ok_or_else(|| malformed(family, &key))?;
        }
        Ok(())
    }

    /// A whole family of records that mean nothing here.
    fn texts(&self, family: &'static str) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError> {
        let mut texts = BTreeMap::new();
        self.scan(family, &[], |key, value| {
            texts.insert(key.to_vec(), value.to_vec());
            Some(())
        })?;
        Ok(texts)
    }

    /// Leaves word for the next opening when the files are damaged.
    fn unreadable(&self, source: rocksdb::Error) -> IndexError {
        if is_damage(&source) {
            let marked = fs::write(self.db.path().join(DAMAGED), source.as_ref());
            let marked = marked.is_ok();
            tracing::error!(error = %source, marked, "the index is damaged; a restart begins an empty one");
        }
        failed("reading", source)
    }

    fn add(&self, batch: &mut WriteBatch, change: &Change) {
        match change {
            Change::Variant(key, record) => {
                batch.put_cf(self.family(BLOBS), keys::blob_key(*key), keys::variant_value(record));
            }
            Change::DropVariant(key) => {
                let key = keys::blob_key(*key);
                batch.delete_cf(self.family(BLOBS), key);
                // Every piece number but the last, and the last.
                let (from, to) = ([&key[..], &[0; 4]].concat(), [&key[..], &[0xff; 4]].concat());
                batch.delete_range_cf(self.family(PIECES), &from, &to);
                batch.delete_cf(self.family(PIECES), &to);
            }
            Change::Piece(key, piece, record) => {
                batch.put_cf(self.family(PIECES), keys::piece_key(*key, *piece), keys::piece_value(record));
            }
            Change::Digest(digest, place) => {
                batch.put_cf(self.family(DIGESTS), keys::digest_key(digest), keys::place_value(place));
            }
            Change::Mount(path, record) => batch.put_cf(self.family(MOUNTS), path, record),
            Change::DropMount(path) => batch.delete_cf(self.family(MOUNTS), path),
            Change::Pin(reference, record) => batch.put_cf(self.family(PINS), reference, record),
            Change::DropPin(reference) => batch.delete_cf(self.family(PINS), reference),
            Change::Layer(layer, record) => batch.put_cf(self.family(LAYERS), layer.as_bytes(), record),
        }
    }
}

impl Records for RocksIndex {
    fn variants(&self, blob: &BlobId) -> Result<BTreeMap<u32, VariantRecord>, IndexError> {
        let mut variants = BTreeMap::new();
        self.scan(BLOBS, blob.as_bytes(), |key, value| {
            variants.insert(keys::parse_blob_key(key)?.variant, keys::parse_variant(value)?);
            Some(())
        })?;
        Ok(variants)
    }

    fn all(&self) -> Result<Vec<(BlobKey, VariantRecord)>, IndexError> {
        let mut all = Vec::new();
        self.scan(BLOBS, &[], |key, value| {
            all.push((keys::parse_blob_key(key)?, keys::parse_variant(value)?));
            Some(())
        })?;
        Ok(all)
    }

    fn pieces(&self, key: BlobKey) -> Result<BTreeMap<u32, PieceRecord>, IndexError> {
        let mut pieces = BTreeMap::new();
        self.scan(PIECES, &keys::blob_key(key), |key, value| {
            pieces.insert(keys::parse_piece_key(key)?.1, keys::parse_piece(value)?);
            Some(())
        })?;
        Ok(pieces)
    }

    fn piece(&self, key: BlobKey, piece: u32) -> Result<Option<PieceRecord>, IndexError> {
        let key = keys::piece_key(key, piece);
        let value = self.get(PIECES, &key)?;
        value.map(|value| keys::parse_piece(&value).ok_or_else(|| malformed(PIECES, &key))).transpose()
    }

    fn place(&self, digest: &Digest) -> Result<Option<ChunkPlace>, IndexError> {
        let key = keys::digest_key(digest);
        let value = self.get(DIGESTS, &key)?;
        value.map(|value| keys::parse_place(&value).ok_or_else(|| malformed(DIGESTS, &key))).transpose()
    }

    fn forget_places(&self, gone: &dyn Fn(BlobKey) -> bool) -> Result<(), IndexError> {
        let mut batch = WriteBatch::default();
        let mut outcome = Ok(());
        self.scan(DIGESTS, &[], |key, value| {
            if gone(keys::parse_place(value)?.key) {
                batch.delete_cf(self.family(DIGESTS), key);
            }
            if batch.len() >= REMOVALS_PER_BATCH && outcome.is_ok() {
                outcome = self.db.write(std::mem::take(&mut batch));
            }
            Some(())
        })?;
        outcome.and_then(|()| self.db.write(batch)).map_err(|source| failed("writing to", source))
    }

    fn mounts(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError> {
        self.texts(MOUNTS)
    }

    fn pins(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, IndexError> {
        self.texts(PINS)
    }

    fn layer(&self, layer: ObjectId) -> Result<Option<Vec<u8>>, IndexError> {
        self.get(LAYERS, layer.as_bytes())
    }

    fn commit(&self, changes: &[Change], survives: Survives) -> Result<(), IndexError> {
        let mut batch = WriteBatch::default();
        for change in changes {
            self.add(&mut batch, change);
        }
        let mut options = WriteOptions::default();
        options.set_sync(survives == Survives::PowerCut);
        self.db.write_opt(batch, &options).map_err(|source| failed("writing to", source))
    }
}

fn failed(action: &'static str, source: rocksdb::Error) -> IndexError {
    IndexError::Database { action, source }
}

fn malformed(family: &'static str, key: &[u8]) -> IndexError {
    IndexError::Malformed { family, key: hex::encode(key) }
}

/// The column families in a folder, also those of a newer program, without which RocksDB would not open it; none when
/// there is no index yet. `None` for a damaged one: it is marked, or has files and not the one that every index has;
/// RocksDB would take that for a new index and replay whatever log it finds in it.
fn families_of(path: &Path) -> Result<Option<BTreeSet<String>>, rocksdb::Error> {
    if path.join(DAMAGED).exists() {
        return Ok(None);
    }
    if path.join("CURRENT").exists() {
        return Ok(Some(DB::list_cf(&database_options(), path)?.into_iter().collect()));
    }
    let empty = fs::read_dir(path).map_or(true, |mut entries| entries.next().is_none());
    Ok(empty.then(BTreeSet::new))
}

/// Whether the files contradict each other, rather than the disk having failed.
fn is_damage(error: &rocksdb::Error) -> bool {
    let missing = || error.as_ref().contains("No such file or directory");
    error.kind() == ErrorKind::Corruption || (error.kind() == ErrorKind::IOError && missing())
}

fn put_aside(path: &Path) -> std::io::Result<()> {
    let mut aside = path.as_os_str().to_owned();
    aside.push(".damaged");
    match fs::remove_dir_all(&aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::rename(path, &aside)
}

fn database_options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_db_write_buffer_size(2 * WRITE_BUFFER_BYTES);
    options.set_max_total_wal_size(WAL_BYTES);
    options.set_max_open_files(OPEN_FILES);
    options.set_max_file_opening_threads(1);
    options.set_max_background_jobs(2);
    options.set_log_level(LogLevel::Warn);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

fn family_options(cache: &Cache) -> Options {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_cache_index_and_filter_blocks(true);
    blocks.set_bloom_filter(10.0, false);
    let mut options = Options::default();
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    options.set_max_write_buffer_number(2);
    // Digests and fingerprints do not compress.
    options.set_compression_type(DBCompressionType::None);
    options
}
