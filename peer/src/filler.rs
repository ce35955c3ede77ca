//! Native mounts of incomplete images: the kernel's EROFS driver reads decoded forms that are sparse files, and this fills them as it
//! reads.
//!
//! ```text
//!   reader ── EROFS ── marked file: may this range be read? ──> group ── keeper ──Event──> Line ── Filler
//!                                                                          |                         | chunks of the range
//!      bytes <── EROFS <── file <──────────── write, verified ─────────────|───────────────────── Filling ── Reader: store,
//!                                                                          '<──────Answer──── Line <─┘        nodes, registry
//! ```
//!
//! - A file is marked before the driver opens it, and unmarked when all of it is verified and written. Nothing else takes a mark
//!   away: that a mount has gone does not mean that nobody has its files open, overlayfs keeps them. A file that is given up is
//!   deleted, and its mark goes with its last user.
//! - What is in a file counts for nothing until this process has written it: after a restart every chunk is written again when it is
//!   asked for, of the same verified bytes. So nothing has to be recorded, and a crash can make nothing false.
//! - The files are written through descriptors that raise no events: one that was opened before the mark, or that of an event.
//! - Reads are never given what is not there: they wait, or end with EIO. That takes somebody who has the group open: this process and
//!   the keeper. See docs/mounts.md for what happens when one of them dies, or both.

mod filling;
mod line;
mod probe;

use std::{
    collections::HashMap,
    fs::{self, File, Metadata},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use shoal_keeper::{Client, ClientError, Event, Group};
use shoal_proto::DecodedId;
use tokio::runtime::Handle;

use self::{filling::Filling, line::Line};
use crate::{
    handover::Handover,
    images::{Image, NamedImage},
    native::{self, NativeFiles},
    node::Node,
    reader::Reader,
    store::StoreError,
};

pub(crate) use self::filling::Figures;

/// How often it is looked whether a file that an event is about is known by now.
const LOOK: Duration = Duration::from_millis(100);
/// How long files of mounts that were taken away may take to be closed when the daemon ends.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Why the files of an incomplete image cannot be filled as they are read.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// See [`probe`].
    #[error(transparent)]
    Probe(#[from] probe::ProbeError),
    /// Nobody would have the group if this process died.
    #[error("there is no keeper to guard what has not been read yet")]
    Unguarded,
    /// The keeper does not do it.
    #[error("the keeper cannot guard it")]
    Keeper(#[from] ClientError),
    /// The kernel takes no mark.
    #[error("cannot mark a file")]
    Mark(#[source] io::Error),
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// No thread.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
}

/// Fills files. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Filler(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: Arc<Node>,
    handover: Arc<Handover>,
    group: Arc<Group>,
    runtime: Handle,
    line: Line,
    /// Locked for look-ups, and while files are made and marked.
    table: Mutex<Table>,
}

/// A file as the kernel tells it from others: device and inode.
type FileId = (u64, u64);

#[derive(Debug, Default)]
struct Table {
    /// Those that the next mount of an image shares.
    current: HashMap<DecodedId, Arc<Filling>>,
    /// All that somebody may have open.
    files: HashMap<FileId, Arc<Filling>>,
}

/// The files of one mount that are being filled. Before it is told that it [is mounted](Self::mounted) it gives them up when it is
/// dropped.
#[derive(Debug)]
pub(crate) struct Fills {
    filler: Filler,
    fillings: Vec<Arc<Filling>>,
    mounted: AtomicBool,
    given_up: AtomicBool,
}

impl Filler {
    /// Takes over what an earlier daemon has left with the keeper. Otherwise, where that is `wanted`, makes sure that it would
    /// work here and begins anew. Blocks.
    ///
    /// # Errors
    /// See [`FillError`].
    pub(crate) fn open(
        node: Arc<Node>,
        handover: Arc<Handover>,
        runtime: Handle,
        wanted: bool,
    ) -> Result<Option<Self>, FillError> {
        let left = Client::connect(handover.socket()).and_then(|mut keeper| keeper.group());
        // Daemon and keeper may have been killed at once.
        let left =
            left.and_then(|left| left.map_or_else(|| shoal_keeper::held(handover.socket()), |left| Ok(Some(left))));
        let group = match left {
            Ok(Some(group)) => {
                unmark_whole(&node, &group)?;
                group
            }
            _ if !wanted => return Ok(None),
            // A keeper of an earlier version knows nothing of groups.
            Err(error) => return Err(error.into()),
            Ok(None) => {
                probe::probe(&node.store.decoded_folder())?;
                Group::new().map_err(probe::ProbeError::Kernel)?
            }
        };
        let (group, line, table) = (Arc::new(group), Line::default(), Mutex::default());
        Ok(Some(Self(Arc::new(Inner { node, handover, group, runtime, line, table }))))
    }

    /// Has the keeper guard the group, and answers from now on. Events of files that nobody knows wait for a while. Blocks.
    ///
    /// # Errors
    /// [`FillError::Keeper`], and no thread.
    pub(crate) fn serve(&self) -> Result<(), FillError> {
        let first = self.0.connect()?;
        let inner = self.0.clone();
        let serve = move || inner.serve(first);
        thread::Builder::new().name("shoal-filler".into()).spawn(serve).map(drop).map_err(FillError::Thread)
    }

    /// Whether the files of a mount that an earlier daemon has made have been marked since. Otherwise nobody had the group for a
    /// while, and readers of the mount may have been given zeros. To be asked before they are [adopted](Self::adopt). Blocks.
    ///
    /// # Errors
    /// The files cannot be looked at.
    pub(crate) fn has_guarded(&self, image: &Image) -> Result<bool, FillError> {
        let store = &self.0.node.store;
        let marked = self.0.group.marked().map_err(FillError::Mark)?;
        let table = self.0.lock();
        for &id in image.native_names().decoded() {
            let Some(path) = store.filling(id) else {
                // Given up with another mount of it that was not guarded, unless it is whole.
                if store.decoded(id).is_none() {
                    return Ok(false);
                }
                continue;
            };
            let metadata = fs::metadata(path).map_err(FillError::Mark)?;
            let guarded = match table.files.get(&id_of(&metadata)) {
                Some(filling) => filling.was_guarded(),
                None => marked.contains(&metadata.ino()),
            };
            if !guarded {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The files for a native mount of an image: empty ones for what is not decoded, which are marked. What it needs is to be held.
    /// Blocks.
    ///
    /// # Errors
    /// See [`FillError`]. What was made goes again.
    pub(crate) fn begin(&self, reader: &Reader) -> Result<(NativeFiles, Fills), FillError> {
        if !self.0.line.is_open() {
            return Err(FillError::Unguarded);
        }
        let (image, store) = (reader.image(), &self.0.node.store);
        let names = image.native_names();
        native::put_bootstrap(store, image)?;
        let mut fills = self.fills();
        let mut blobs = Vec::new();
        let mut table = self.0.lock();
        table.forget_unmarked(&self.0.group);
        for (place, &id) in names.decoded().iter().enumerate() {
            if let Some(path) = store.decoded(id) {
                blobs.push(path);
                continue;
            }
            let filling = match table.current.get(&id) {
                Some(filling) => filling.clone(),
                None => {
                    let file = store.begin_filling(id, image.blobs[place].table.decoded_form_len())?;
                    // The file is opened before it is marked, so this descriptor raises no events.
                    self.0.group.mark(file.as_fd()).map_err(FillError::Mark)?;
                    let filling = self.0.filling(reader, place, id);
                    let file_id = file_id(&file).map_err(FillError::Mark)?;
                    filling.write_through(Arc::new(file));
                    table.insert(file_id, filling.clone());
                    filling
                }
            };
            filling.used();
            fills.fillings.push(filling);
            blobs.push(store.filling(id).or_else(|| store.decoded(id)).unwrap_or_default());
        }
        drop(table);
        Ok((NativeFiles { bootstrap: names.bootstrap_path(store), blobs }, fills))
    }

    /// The files of a mount that an earlier daemon has made. Blocks.
    ///
    /// # Errors
    /// See [`FillError`].
    pub(crate) fn adopt(&self, reader: &Reader) -> Result<Fills, FillError> {
        let store = &self.0.node.store;
        let names = reader.image().native_names();
        let mut fills = self.fills();
        let mut table = self.0.lock();
        for (place, &id) in names.decoded().iter().enumerate() {
            let (path, whole) = match (store.filling(id), store.decoded(id)) {
                (Some(path), _) => (path, false),
                (None, Some(path)) => (path, true),
                (None, None) => continue,
            };
            let file = File::open(&path).map_err(FillError::Mark)?;
            let file_id = file_id(&file).map_err(FillError::Mark)?;
            let filling = match table.files.get(&file_id) {
                Some(filling) => filling.clone(),
                None if whole => {
                    // It was filled, and asks no more; somebody may wait all the same.
                    let filling = self.0.filling(reader, place, id);
                    filling.is_whole();
                    table.files.insert(file_id, filling.clone());
                    filling
                }
                None => {
                    let filling = self.0.filling(reader, place, id);
                    if !self.0.group.marked().map_err(FillError::Mark)?.contains(&file_id.1) {
                        filling.was_not_guarded();
                    }
                    self.0.group.mark(file.as_fd()).map_err(FillError::Mark)?;
                    table.insert(file_id, filling.clone());
                    filling
                }
            };
            filling.used();
            fills.fillings.push(filling);
        }
        drop(table);
        Ok(fills)
    }

    fn fills(&self) -> Fills {
        Fills {
            filler: self.clone(),
            fillings: Vec::new(),
            mounted: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
        }
    }

    /// Answers no more. The keeper goes on to guard what somebody may still read; if there is nothing it is told so. Blocks.
    pub(crate) fn close(&self) {
        let inner = &self.0;
        let deadline = Instant::now() + CLOSE_LIMIT;
        let mut left = inner.marks();
        // Files of what was unmounted are closed a moment later.
        while left != Some(0) && inner.lock().current.is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
            inner.lock().forget_unmarked(&inner.group);
            left = inner.marks();
        }
        let guarded = inner.line.close();
        if left == Some(0) {
            let released = Client::connect(inner.handover.socket()).and_then(|mut keeper| keeper.release());
            if let Err(error) = released {
                tracing::debug!("the keeper may still guard a group: {}", crate::chain(&error));
            }
        } else if !guarded {
            // Whoever ends last leaves somebody behind.
            let handed = inner.handover.start_keeper().map_err(ClientError::from).and_then(|()| inner.guard());
            if let Err(error) = handed {
                tracing::error!("nobody guards what was not read of native mounts: {}", crate::chain(&error));
            }
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn filling(&self, reader: &Reader, place: usize, id: DecodedId) -> Arc<Filling> {
        Filling::new(self.node.store.clone(), self.group.clone(), self.runtime.clone(), reader, place, id)
    }

    /// Has the keeper guard the group, if it does not.
    fn guard(&self) -> Result<(), ClientError> {
        let mut keeper = Client::connect(self.handover.socket())?;
        match keeper.group()? {
            Some(_) => Ok(()),
            None => keeper.guard(&self.group),
        }
    }

    /// Files that are marked; none if that cannot be told.
    fn marks(&self) -> Option<usize> {
        self.group.marked().ok().map(|inodes| inodes.len())
    }

    /// Sees to an event.
    fn handle(self: &Arc<Self>, event: Event, answer: impl FnOnce(bool) + Send + 'static) {
        let Event { file, offset, len } = event;
        let file = Arc::new(File::from(file));
        let id = match file_id(&file) {
            Ok(id) => id,
            Err(error) => {
                tracing::error!("a read is denied, its file cannot be told: {error}");
                return answer(false);
            }
        };
        if let Some(filling) = self.known(id) {
            return filling.ensure(file, offset, len, answer);
        }
        // A mount of an earlier daemon that has not been taken over yet, or one that nobody knows any more.
        let inner = self.clone();
        self.runtime.spawn(async move {
            let deadline = Instant::now() + inner.node.deadline;
            loop {
                tokio::time::sleep(LOOK).await;
                match inner.known(id) {
                    Some(filling) => return filling.ensure(file, offset, len, answer),
                    None if Instant::now() > deadline => {
                        tracing::error!(inode = id.1, "a read is denied: nobody knows what is missing of the file");
                        return answer(false);
                    }
                    None => {}
                }
            }
        });
    }

    fn known(&self, file: FileId) -> Option<Arc<Filling>> {
        self.lock().files.get(&file).cloned()
    }
}

impl Table {
    fn insert(&mut self, file: FileId, filling: Arc<Filling>) {
        self.current.insert(filling.id(), filling.clone());
        self.files.insert(file, filling);
    }

    /// Forgets files that were given up and that nobody has open any more: their marks have gone.
    fn forget_unmarked(&mut self, group: &Group) {
        let Ok(marked) = group.marked() else { return };
        self.files.retain(|(_, inode), filling| !filling.is_over() || marked.contains(inode));
    }
}

impl Fills {
    /// Whether something may be missing.
    pub(crate) fn is_any(&self) -> bool {
        self.fillings.iter().any(|filling| !filling.is_complete())
    }

    /// The driver has the files: they are not given up by the way.
    pub(crate) fn mounted(&self) {
        self.mounted.store(true, Relaxed);
    }

    /// The mount has gone. Whoever has its files open is served as long as this process lives. Said twice it does no harm.
    pub(crate) fn give_up(&self) {
        if self.given_up.swap(true, Relaxed) {
            return;
        }
        let mut table = self.filler.0.lock();
        for filling in self.fillings.iter().filter(|filling| filling.unused()) {
            let id = filling.id();
            if table.current.get(&id).is_some_and(|current| Arc::ptr_eq(current, filling)) {
                table.current.remove(&id);
                filling.give_up();
            }
        }
        table.forget_unmarked(&self.filler.0.group);
    }

    /// What was asked for and given.
    pub(crate) fn figures(&self) -> Figures {
        self.fillings.iter().map(|filling| filling.figures()).sum()
    }

    /// Fills what is missing of files that have been read from, as far as it is in the store. Ends when it is not.
    pub(crate) async fn complete(&self) {
        for filling in &self.fillings {
            filling.complete().await;
        }
    }
}

impl Drop for Fills {
    fn drop(&mut self) {
        if !*self.mounted.get_mut() {
            self.give_up();
        }
    }
}

/// Whether the file of some blob of an image is, or was by an earlier daemon, being filled.
pub(crate) fn is_filling(node: &Node, NamedImage { image, .. }: &NamedImage) -> bool {
    image.native_names().decoded().iter().any(|id| node.store.filling(*id).is_some())
}

/// Fills the rest of what a mount needs once it is in the store for as long as `after`. To be dropped with its mount.
pub(crate) async fn complete(image: Arc<Image>, fills: Arc<Fills>, after: Duration) {
    while fills.is_any() {
        tokio::time::sleep(after.max(Duration::from_secs(1))).await;
        if image.is_complete() {
            fills.complete().await;
        }
    }
}

/// Decoded forms that are whole ask nobody, also if the earlier daemon was killed before it took their marks away.
fn unmark_whole(node: &Node, group: &Group) -> Result<(), FillError> {
    for entry in fs::read_dir(node.store.decoded_folder()).map_err(FillError::Mark)? {
        let entry = entry.map_err(FillError::Mark)?;
        if entry.file_name().to_string_lossy().parse::<DecodedId>().is_ok() {
            let file = File::open(entry.path()).map_err(FillError::Mark)?;
            group.unmark(file.as_fd()).map_err(FillError::Mark)?;
        }
    }
    Ok(())
}

fn file_id(file: &File) -> io::Result<FileId> {
    Ok(id_of(&file.metadata()?))
}

fn id_of(metadata: &Metadata) -> FileId {
    (metadata.dev(), metadata.ino())
}
