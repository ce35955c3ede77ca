//! The store: chunk bytes and objects on disk, verified on the way in.
//!
//! ```text
//! <data_dir>/lock                        flock; pid and name of the process that owns the directory
//! <data_dir>/index/                      RocksDB, see `index`
//! <data_dir>/objects/<digest>            manifests, bootstrap layers, chunk tables: whole, or not there; time: last use
//! <data_dir>/blobs/<id>/encoded          sparse, byte for byte the registry's blob where present; variant 0. Of a gzip layer that
//!                                        is read as it is: its pieces, one behind the other
//! <data_dir>/blobs/<id>/list             the hash list of a blob that no image describes, once the whole was verified
//! <data_dir>/blobs/<id>.<variant>/encoded    the same blob as other images describe it
//! <data_dir>/decoded/<id>                the decoded form of a blob, sparse: whole, or not there; time: last use
//! <data_dir>/decoded/.filling-<id>       the same while a mount has it that is filled as it is read
//! ```
//!
//! **Present and durable.** A piece is *present* once [`BlobHandle::write`] returns: in the page cache, to be read
//! and served. A thread makes present pieces *durable* about once a second: it syncs the files, then marks the pieces
//! in one synced batch of the index. No read or write waits for that. Whoever opens the store trusts what is durable
//! and nothing else, so a crash at any point loses at most the last seconds and never makes something false.
//!
//! **Variants.** Whoever may push one image may write anything about a blob into its bootstrap. Images that agree
//! about a blob, piece for piece, share its file; one that disagrees gets a file of its own, so neither can poison
//! the other. What an image says is recorded when it is opened, before any byte is there.
//!
//! **Decoded forms** are what the kernel mounts without a daemon, and what is read over FUSE where there is one. One is made of a
//! complete blob, under a name that says what must be in it, so images share one exactly when they name the same pieces of the blob.
//!
//! **Eviction.** With a limit on its size, or on what it leaves free, the store lets go what was used longest ago, a whole
//! blob or object at a time, but never what a [`Hold`] is on. Where nothing may go, and on a full disk, a piece is refused
//! with [`StoreError::Full`]: use it without keeping it. Room that comes back is used again at once.
//!
//! **What is not done here.** No decoding and no digests of chunks: only bytes that
//! [`PieceTable::decode`](shoal_rafs::PieceTable::decode) has accepted may be written, and whoever reads them
//! decodes, and thereby verifies, them again: a disk may lie. No fetching, no policy. All calls are synchronous and
//! touch the disk: asynchronous code calls them from a blocking thread. Threads may call anything at the same time.

mod blobs;
mod disk;
mod error;
mod eviction;
mod flusher;
mod handle;
mod holdings;
mod limits;
mod lock;
mod records;
mod spool;
mod upkeep;
mod variant;
mod whole_files;

use std::{
    fmt,
    fs::File,
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use shoal_proto::{BlobId, DecodedId, Digest, ObjectId};
use shoal_rafs::PieceTable;

use crate::index::RocksIndex;
use blobs::Blobs;
use disk::DataDir;
use flusher::Flusher;
use holdings::Holding;
use lock::DirLock;
use whole_files::WholeFiles;

pub(crate) use disk::read_at_once;

pub use crate::index::{BlobKey, ChunkPlace};
pub use error::StoreError;
pub use eviction::Evicted;
pub use handle::BlobHandle;
pub use holdings::{Footprint, Hold};
pub use limits::StoreLimits;
pub use records::{LayerRecord, MountRecord, PinRecord};
pub use spool::Spool;
pub(crate) use whole_files::ObjectFile;

/// How a store behaves.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Time between two rounds of making present pieces durable: what a crash may lose. Default 1 s.
    pub flush_interval: Duration,
    /// Most blob files kept open, at least 1. Default 128.
    pub open_files: usize,
    /// Most variants kept of one blob, at least 1. When another is needed, the one that was opened longest ago and is
    /// not open now goes. Default 16.
    pub variants_per_blob: u32,
    /// How large the store may become. Default: as large as the disk.
    pub limits: StoreLimits,
}

impl Default for StoreOptions {
    fn default() -> Self {
        let limits = StoreLimits::default();
        Self { flush_interval: Duration::from_secs(1), open_files: 128, variants_per_blob: 16, limits }
    }
}

/// What a store holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Variants of blobs.
    pub blobs: u64,
    /// Pieces that are present.
    pub pieces: u64,
    /// Their encoded bytes.
    pub bytes: u64,
    /// Objects.
    pub objects: u64,
    /// What blobs, objects and decoded forms take up on disk, in whole blocks and without the holes; the index is not counted.
    pub disk_bytes: u64,
}

/// A variant of a blob, as it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptBlob {
    /// Which.
    pub key: BlobKey,
    /// What it takes up on disk.
    pub disk_bytes: u64,
    /// When it was last used, in seconds since 1970.
    pub last_use: u64,
    /// Whether a [`Hold`] is on it.
    pub held: bool,
}

/// A data directory, owned by this process. Cheap to clone; the directory is free for another owner when the last
/// clone and the last [`BlobHandle`] are gone.
#[derive(Clone)]
pub struct Store {
    // First, so that the thread has ended when the rest goes.
    flusher: Arc<Flusher>,
    blobs: Arc<Blobs>,
    /// On what recorded mounts and pins need.
    recorded: Arc<Mutex<Vec<Hold>>>,
    data_dir: PathBuf,
}

impl Store {
    /// Opens a data directory, making it if need be, and takes ownership of it.
    ///
    /// A damaged index is put aside and an empty one begun; what it vouched for is removed. Dropping the store
    /// without [`close`](Self::close) is like a crash: present pieces that are not durable are forgotten.
    pub fn open(data_dir: &Path, options: StoreOptions) -> Result<Self, StoreError> {
        let lock = DirLock::acquire(data_dir)?;
        let files = WholeFiles::open(data_dir)?;
        let index = RocksIndex::open(&data_dir.join("index"))?;
        let disk = DataDir::open(data_dir, options.open_files, lock)?;
        let blobs = Blobs::open(Box::new(index), Box::new(disk), files, &options)?;
        let needs = records::list(&*blobs.records)?.into_iter().map(|mount| mount.needs);
        let needs = needs.chain(records::list_pins(&*blobs.records)?.into_iter().map(|pin| pin.needs));
        let recorded = Arc::new(Mutex::new(needs.map(|needs| blobs.holdings.hold(needs)).collect()));
        let flusher = Arc::new(Flusher::start(&blobs, options.flush_interval)?);
        Ok(Self { flusher, blobs, recorded, data_dir: data_dir.to_owned() })
    }

    /// The bytes of a blob as one image describes it: the first variant that agrees with `table` about every piece
    /// that both name, or a new one. Images that agree share the variant, and each learns what the others wrote.
    ///
    /// On a full disk it is not recorded, and its pieces are not kept, until there is room. Fails with
    /// [`StoreError::TooManyVariants`].
    pub fn open_blob(&self, table: &Arc<PieceTable>) -> Result<BlobHandle, StoreError> {
        self.blobs.open_blob(table)
    }

    /// As [`open_blob`](Self::open_blob), but makes and records nothing: `None` if no variant agrees.
    pub fn existing_blob(&self, table: &Arc<PieceTable>) -> Result<Option<BlobHandle>, StoreError> {
        self.blobs.existing_blob(table)
    }

    /// What is kept, over all blobs and variants, whether an image that names it is open or not.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        self.blobs.usage()
    }

    /// The blobs that are kept.
    pub fn kept_blobs(&self) -> Vec<KeptBlob> {
        self.blobs.kept_blobs()
    }

    /// How large the store may become.
    pub fn limits(&self) -> StoreLimits {
        self.blobs.limits()
    }

    /// Keeps other limits from now on. What is above the new marks goes in the background, as what grows above them does.
    pub fn adjust(&self, limits: StoreLimits) {
        self.blobs.adjust(limits);
    }

    /// Keeps what `footprint` names, if it is here or once it is, until the hold is dropped.
    pub fn hold(&self, footprint: Footprint) -> Hold {
        self.blobs.holdings.hold(footprint)
    }

    /// Mounts and pins that were recorded when the store was opened hold from now on what they need themselves. Until then
    /// the store holds it for them.
    pub fn records_restored(&self) {
        self.recorded.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Evicts what `footprint` names, but what is held or being written.
    pub fn evict(&self, footprint: &Footprint) -> Result<Evicted, StoreError> {
        self.blobs.evict(footprint)
    }

    /// Evicts everything, but what is held or being written.
    pub fn evict_all(&self) -> Result<Evicted, StoreError> {
        self.blobs.evict_all()
    }

    /// From now on calls `tell` with each blob that was evicted, for whatever reason. It must not call the store, nor wait.
    /// There is one such function for a store; a second one is not taken.
    pub fn on_evicted(&self, tell: impl Fn(BlobKey) + Send + Sync + 'static) {
        // See above.
        let _ = self.blobs.on_evicted.set(Box::new(tell));
    }

    /// The hash lists that were kept of a blob. What the disk has made of them is for the caller to find out: a table by which
    /// [`existing_blob`](Self::existing_blob) finds nothing is wrong.
    pub fn lists(&self, blob: &BlobId) -> Result<Vec<Bytes>, StoreError> {
        self.blobs.lists(blob)
    }

    /// A nameless file for bytes that are not verified yet, with room for `len` of them.
    pub fn spool(&self, len: u64) -> Result<Spool, StoreError> {
        Spool::open(self.blobs.clone(), &self.data_dir, len)
    }

    /// Where a chunk with this digest is durable, in whatever blob, and the encoded bytes of the piece that holds it.
    pub fn find_digest(&self, digest: &Digest) -> Result<Option<(ChunkPlace, Range<u64>)>, StoreError> {
        self.blobs.find_digest(digest)
    }

    /// The bytes of a place that [`find_digest`](Self::find_digest) gave, unless they have gone since. They are as trusted
    /// as any others in the store: verify them when decoding.
    pub fn read_place(&self, key: BlobKey, encoded: Range<u64>) -> Result<Option<Bytes>, StoreError> {
        self.blobs.read_place(key, encoded)
    }

    /// Keeps an object, once its sha256 has been checked. Durable on return. [`StoreError::Full`] as for a piece.
    pub fn put_object(&self, id: ObjectId, bytes: &[u8]) -> Result<(), StoreError> {
        self.blobs.put_object(id, bytes)
    }

    /// An object, verified again. One that was damaged on disk is removed and is `None`.
    pub fn object(&self, id: ObjectId) -> Result<Option<Bytes>, StoreError> {
        self.blobs.holdings.used(Holding::Object(id));
        self.inspect_object(id)
    }

    /// As [`object`](Self::object), but does not count as use when it comes to what was used longest ago.
    pub fn inspect_object(&self, id: ObjectId) -> Result<Option<Bytes>, StoreError> {
        self.blobs.files.read_object(id)
    }

    /// An object, verified again, to be read part by part. One that was damaged on disk is removed and is `None`.
    pub(crate) fn object_file(&self, id: ObjectId) -> Result<Option<ObjectFile>, StoreError> {
        self.blobs.holdings.used(Holding::Object(id));
        self.blobs.files.open_object(id)
    }

    /// Bytes of an object that is kept, without reading it.
    pub(crate) fn object_len(&self, id: ObjectId) -> Option<u64> {
        std::fs::metadata(self.object_path(id)).ok().map(|metadata| metadata.len())
    }

    /// The file of an object, to be read in place and not verified again. It counts as used.
    pub fn open_object(&self, id: ObjectId) -> io::Result<File> {
        self.blobs.holdings.used(Holding::Object(id));
        File::open(self.object_path(id))
    }

    /// Whether an object is kept, without reading it.
    pub fn has_object(&self, id: ObjectId) -> bool {
        self.blobs.files.object_path(id).exists()
    }

    /// All objects that are kept.
    pub fn object_ids(&self) -> Vec<ObjectId> {
        self.blobs.files.object_ids()
    }

    /// The file of an object, whether it is kept or not. It must not be changed.
    pub fn object_path(&self, id: ObjectId) -> PathBuf {
        self.blobs.files.object_path(id)
    }

    /// The file with a decoded form, if it is kept: with all of it, as it was verified when it was written. It must not be
    /// changed, and counts as used.
    pub fn decoded(&self, id: DecodedId) -> Option<PathBuf> {
        self.blobs.holdings.used(Holding::Decoded(id));
        self.inspect_decoded(id)
    }

    /// As [`decoded`](Self::decoded), but does not count as use.
    pub fn inspect_decoded(&self, id: DecodedId) -> Option<PathBuf> {
        Some(self.blobs.files.decoded_path(id)).filter(|path| path.exists())
    }

    /// The file of a decoded form, open, if it is kept; it counts as used. For one read: who kept it longer would keep the room of a
    /// form that is evicted. What was written was verified. Looks into memory only, but for the first time.
    pub(crate) fn decoded_file(&self, id: DecodedId) -> Option<Arc<File>> {
        let file = self.blobs.files.decoded_file(id)?;
        self.blobs.holdings.used(Holding::Decoded(id));
        Some(file)
    }

    /// Keeps a decoded form of at most `len` bytes on disk. The caller's `fill` writes it to an empty file; what it writes has
    /// been verified. Durable on return.
    ///
    /// # Errors
    /// Those of `fill`, with nothing kept. [`StoreError::Full`] as for a piece.
    pub fn put_decoded<E: From<StoreError>>(
        &self,
        id: DecodedId,
        len: u64,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<(), E> {
        self.blobs.put_decoded(id, len, fill)
    }

    /// Where decoded forms lie, whole or being filled.
    pub fn decoded_folder(&self) -> PathBuf {
        self.data_dir.join("decoded")
    }

    /// Makes a sparse file of `len` bytes in which a decoded form is filled under a mount, in place of an earlier one, which
    /// stays what it is for those that have it open. A [hold](Self::hold) keeps it. What is written to it must have been verified.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn begin_filling(&self, id: DecodedId, len: u64) -> Result<File, StoreError> {
        self.blobs.files.begin_filling(id, len)
    }

    /// The file in which a decoded form is being filled, or was by an earlier owner: then nothing is known of what is in it.
    pub fn filling(&self, id: DecodedId) -> Option<PathBuf> {
        Some(self.blobs.files.filling_path(id)).filter(|path| path.exists())
    }

    /// Has `len` verified bytes written to a file that is being filled, for which others may have to go.
    ///
    /// # Errors
    /// [`StoreError::Full`] as for a piece, and what the disk says to `write`.
    pub fn fill(
        &self,
        id: DecodedId,
        len: u64,
        write: impl FnOnce() -> std::io::Result<()>,
    ) -> Result<(), StoreError> {
        self.blobs.fill(id, len, write)
    }

    /// A decoded form was filled, and synced: from now on it is kept.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn finish_filling(&self, id: DecodedId) -> Result<(), StoreError> {
        self.blobs.files.finish_filling(id)
    }

    /// Gives up a file that was being filled. Whoever has it open goes on with it.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn give_up_filling(&self, id: DecodedId) -> Result<(), StoreError> {
        self.blobs.files.remove_filling(id)
    }

    /// The same for all that nobody needs.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn give_up_fillings(&self) -> Result<(), StoreError> {
        self.blobs.files.remove_fillings()
    }

    /// Whether `len` more bytes fit into the store's limits and on the disk with nothing evicted for them.
    pub fn has_room(&self, len: u64) -> bool {
        self.blobs.has_room(len)
    }

    /// A decoded form turned out to be damaged: it is removed. Mounts that have it go on with it.
    pub fn drop_decoded(&self, id: DecodedId) -> Result<(), StoreError> {
        self.blobs.files.remove(Holding::Decoded(id)).map(drop)
    }

    /// Records a mount, in place of an earlier one at the same path. Durable on return.
    pub fn put_mount(&self, record: &MountRecord) -> Result<(), StoreError> {
        records::put(&*self.blobs.records, record)
    }

    /// Forgets the mount at a path, if there is one. Durable on return.
    pub fn remove_mount(&self, mountpoint: &Path) -> Result<(), StoreError> {
        records::remove(&*self.blobs.records, mountpoint)
    }

    /// All recorded mounts, by path. Records that a program of another version wrote and this one cannot read are
    /// left out, and logged.
    pub fn mounts(&self) -> Result<Vec<MountRecord>, StoreError> {
        records::list(&*self.blobs.records)
    }

    /// Records what a bootstrap layer unpacks to.
    pub fn put_layer(&self, layer: ObjectId, record: &LayerRecord) -> Result<(), StoreError> {
        records::put_layer(&*self.blobs.records, layer, record)
    }

    /// What a bootstrap layer unpacks to, if it was recorded; its objects may have been evicted since.
    pub fn layer(&self, layer: ObjectId) -> Result<Option<LayerRecord>, StoreError> {
        records::layer(&*self.blobs.records, layer)
    }

    /// Records a pin, in place of an earlier one of the same reference. Durable on return; it takes a
    /// [`hold`](Self::hold) to make it true.
    pub fn put_pin(&self, record: &PinRecord) -> Result<(), StoreError> {
        records::put_pin(&*self.blobs.records, record)
    }

    /// Forgets the pin of a reference, if there is one. Durable on return.
    pub fn remove_pin(&self, reference: &str) -> Result<(), StoreError> {
        records::remove_pin(&*self.blobs.records, reference)
    }

    /// All recorded pins, by reference, also those that have ended. Unreadable ones as for [`mounts`](Self::mounts).
    pub fn pins(&self) -> Result<Vec<PinRecord>, StoreError> {
        records::list_pins(&*self.blobs.records)
    }

    /// Removes what the index still says of blobs that were evicted before a crash.
    pub fn tidy(&self) -> Result<(), StoreError> {
        self.blobs.tidy()
    }

    /// Makes everything durable that is present now. Returns the number of pieces that were not before.
    pub fn flush(&self) -> Result<u64, StoreError> {
        self.blobs.flush()
    }

    /// Refuses further writes, ends the background thread and makes everything durable.
    pub fn close(&self) -> Result<(), StoreError> {
        self.blobs.refuse_writes();
        self.flusher.stop();
        self.blobs.settle()
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;
