//! One file that is being filled: which chunks are in it, who waits for which.

use std::{
    collections::HashMap,
    fs::File,
    iter::Sum,
    ops::Range,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use bytes::Bytes;
use shoal_keeper::Group;
use shoal_proto::{Bitfield, DecodedId, Priority};
use shoal_rafs::{ChunkId, ChunkSource, Latencies, ReadTimes};
use tokio::{runtime::Handle, sync::oneshot};

use crate::{images::ImageBlob, reader::Reader, store::Store};

/// A chunk of the file.
#[derive(Debug, Clone, Copy)]
struct Place {
    offset: u64,
    len: u32,
    /// Index in the blob's chunk table.
    index: u32,
}

impl Place {
    fn end(&self) -> u64 {
        self.offset + u64::from(self.len)
    }
}

/// See the module. It outlives its mount for as long as somebody may read the file.
#[derive(Debug)]
pub(super) struct Filling {
    id: DecodedId,
    blob: ImageBlob,
    /// Position of the blob in the image.
    position: u32,
    /// In order.
    places: Vec<Place>,
    reader: Reader,
    store: Store,
    group: Arc<Group>,
    runtime: Handle,
    /// Locked for look-ups and for changes in memory.
    state: Mutex<State>,
    events: AtomicU64,
    event_bytes: AtomicU64,
    denied: AtomicU64,
    latencies: Latencies,
}

#[derive(Debug)]
struct State {
    /// By place: what this process has written.
    filled: Bitfield,
    /// By place: what is being filled, and what waits for it.
    waiting: HashMap<u32, Vec<Arc<Job>>>,
    /// Raises no events. None while nobody has read from a file that an earlier process has made, and once it is given up: it
    /// would keep a deleted file alive.
    writer: Option<Arc<File>>,
    /// Where the last event ended: the next one that begins there reads in a row.
    last_end: u64,
    users: u32,
    complete: bool,
    given_up: bool,
    /// Nobody would have asked for it before this process marked it.
    unguarded: bool,
}

/// What a file has been asked for.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Figures {
    /// Questions of the kernel.
    pub(crate) events: u64,
    /// Bytes that they were about.
    pub(crate) bytes: u64,
    /// Those that ended with EIO.
    pub(crate) denied: u64,
    /// What the others took.
    pub(crate) times: ReadTimes,
}

impl Sum for Figures {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |mut sum, one| {
            sum.events += one.events;
            sum.bytes += one.bytes;
            sum.denied += one.denied;
            sum.times += one.times;
            sum
        })
    }
}

/// An event, or whatever else waits for several chunks.
struct Job(Mutex<JobState>);

struct JobState {
    left: usize,
    failed: bool,
    done: Option<Box<dyn FnOnce(bool) + Send>>,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").finish_non_exhaustive()
    }
}

impl Job {
    fn new(left: usize, done: impl FnOnce(bool) + Send + 'static) -> Arc<Self> {
        Arc::new(Self(Mutex::new(JobState { left, failed: false, done: Some(Box::new(done)) })))
    }

    /// One of the chunks is there, or will not be.
    fn one(&self, filled: bool) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.left -= 1;
        state.failed |= !filled;
        // The first that fails decides.
        let ends = state.left == 0 || state.failed;
        let (allow, done) = (!state.failed, state.done.take_if(|_| ends));
        drop(state);
        if let Some(done) = done {
            done(allow);
        }
    }
}

impl Filling {
    pub(super) fn new(
        store: Store,
        group: Arc<Group>,
        runtime: Handle,
        reader: &Reader,
        position: usize,
        id: DecodedId,
    ) -> Arc<Self> {
        let blob = reader.image().blobs[position].clone();
        let chunks = blob.table.pieces().flat_map(|(_, piece)| piece.chunks());
        let place = |chunk: &shoal_rafs::Chunk| Place {
            offset: chunk.decoded_offset,
            len: chunk.decoded_len,
            index: chunk.index,
        };
        let places: Vec<_> = chunks.map(place).collect();
        let state = State {
            filled: Bitfield::new(places.len() as u32),
            waiting: HashMap::new(),
            writer: None,
            last_end: 0,
            users: 0,
            complete: false,
            given_up: false,
            unguarded: false,
        };
        Arc::new(Self {
            id,
            blob,
            position: position as u32,
            places,
            reader: reader.clone(),
            store,
            group,
            runtime,
            state: Mutex::new(state),
            events: AtomicU64::new(0),
            event_bytes: AtomicU64::new(0),
            denied: AtomicU64::new(0),
            latencies: Latencies::default(),
        })
    }

    pub(super) fn id(&self) -> DecodedId {
        self.id
    }

    /// Uses a descriptor that raises no events, unless there is one already.
    pub(super) fn write_through(&self, file: Arc<File>) {
        let mut state = self.lock();
        if state.writer.is_none() && !state.given_up && !state.complete {
            state.writer = Some(file);
        }
    }

    /// Nothing is missing of it.
    pub(super) fn is_whole(&self) {
        let mut state = self.lock();
        state.complete = true;
        state.writer = None;
    }

    /// It was made by an earlier process, and had no mark.
    pub(super) fn was_not_guarded(&self) {
        self.lock().unguarded = true;
    }

    pub(super) fn was_guarded(&self) -> bool {
        !self.lock().unguarded
    }

    pub(super) fn is_complete(&self) -> bool {
        self.lock().complete
    }

    /// Whether it may be forgotten once nobody has it open.
    pub(super) fn is_over(&self) -> bool {
        let state = self.lock();
        state.complete || state.given_up
    }

    /// One more mount has it.
    pub(super) fn used(&self) {
        self.lock().users += 1;
    }

    /// One mount less has it; true if it was the last.
    pub(super) fn unused(&self) -> bool {
        let mut state = self.lock();
        state.users = state.users.saturating_sub(1);
        state.users == 0
    }

    /// No mount needs it any more. It is deleted, and still filled for those that have it open.
    pub(super) fn give_up(&self) {
        {
            let mut state = self.lock();
            if state.complete {
                return;
            }
            state.given_up = true;
            state.writer = None;
        }
        if let Err(error) = self.store.give_up_filling(self.id) {
            tracing::warn!("{}", crate::chain(&error));
        }
    }

    pub(super) fn figures(&self) -> Figures {
        let [events, bytes, denied] =
            [&self.events, &self.event_bytes, &self.denied].map(|counter| counter.load(Relaxed));
        Figures { events, bytes, denied, times: self.latencies.times() }
    }

    /// Sees to it that a range is in the file, and then says whether it is: now, or from another thread. `file` raises no events.
    pub(super) fn ensure(
        self: &Arc<Self>,
        file: Arc<File>,
        offset: u64,
        len: u64,
        done: impl FnOnce(bool) + Send + 'static,
    ) {
        self.events.fetch_add(1, Relaxed);
        self.event_bytes.fetch_add(len, Relaxed);
        self.write_through(file.clone());
        let range = self.places_in(offset, offset.saturating_add(len));
        let (this, asked) = (self.clone(), Instant::now());
        let counted = move |allow: bool| {
            if allow {
                this.latencies.note(asked.elapsed());
            } else {
                this.denied.fetch_add(1, Relaxed);
            }
            done(allow);
        };
        let ahead = range.end;
        let in_a_row = std::mem::replace(&mut self.lock().last_end, offset.saturating_add(len)) == offset;
        self.fill(&file, range, counted);
        // What lies behind, if it takes no more than decoding: the reader has others fetched ahead of it.
        if in_a_row && self.places.get(ahead as usize).is_some_and(|place| self.is_at_hand(*place)) {
            self.fill(&file, ahead..ahead + 1, |_| {});
        }
    }

    /// The places that have bytes in a range.
    fn places_in(&self, start: u64, end: u64) -> Range<u32> {
        let first = self.places.partition_point(|place| place.end() <= start);
        let behind = self.places.partition_point(|place| place.offset < end);
        first as u32..behind.max(first) as u32
    }

    fn is_at_hand(&self, place: Place) -> bool {
        let piece = self.blob.table.piece_of_chunk(place.index);
        piece.is_some_and(|piece| self.blob.handle.is_present(piece))
    }

    /// Has places filled that are not, and then says whether they are.
    fn fill(self: &Arc<Self>, file: &Arc<File>, places: Range<u32>, done: impl FnOnce(bool) + Send + 'static) {
        let mut state = self.lock();
        let missing: Vec<u32> =
            if state.complete { Vec::new() } else { places.filter(|place| !state.filled.contains(*place)).collect() };
        if missing.is_empty() {
            drop(state);
            return done(true);
        }
        let job = Job::new(missing.len(), done);
        let mut begun = Vec::new();
        for place in missing {
            let waiting = state.waiting.entry(place).or_insert_with(|| {
                begun.push(place);
                Vec::new()
            });
            waiting.push(job.clone());
        }
        drop(state);
        for place in begun {
            self.get(file.clone(), place);
        }
    }

    /// Gets a chunk and writes it.
    fn get(self: &Arc<Self>, file: Arc<File>, place: u32) {
        let (this, runtime) = (self.clone(), self.runtime.clone());
        let chunk = ChunkId { blob: self.position, index: self.places[place as usize].index };
        let reply = move |outcome: Result<Bytes, shoal_rafs::ChunkError>| {
            // Writing may wait for the disk, which whoever brings a chunk must not.
            runtime.spawn_blocking(move || {
                let written =
                    outcome.map_err(|error| error.to_string()).and_then(|bytes| this.write(&file, place, &bytes));
                if let Err(error) = &written {
                    tracing::error!(blob = %this.blob.table.blob(), "a read ends with an error: {error}");
                }
                this.got(&file, place, written.is_ok());
            });
        };
        self.reader.read(chunk, Priority::OnDemand, Box::new(reply));
    }

    fn write(&self, file: &File, place: u32, bytes: &Bytes) -> Result<(), String> {
        let Place { offset, len, .. } = self.places[place as usize];
        if bytes.len() != len as usize {
            return Err(format!("a chunk of {len} bytes has {}", bytes.len()));
        }
        let write = || file.write_all_at(bytes, offset);
        let given_up = self.lock().given_up;
        match given_up {
            // It is no part of the store any more.
            true => write().map_err(|error| error.to_string()),
            false => self.store.fill(self.id, u64::from(len), write).map_err(|error| crate::chain(&error)),
        }
    }

    fn got(self: &Arc<Self>, file: &File, place: u32, filled: bool) {
        let (jobs, full) = {
            let mut state = self.lock();
            let new = filled && state.filled.insert(place);
            (state.waiting.remove(&place).unwrap_or_default(), new && state.filled.is_full())
        };
        jobs.iter().for_each(|job| job.one(filled));
        if full {
            self.finish(file);
        }
    }

    /// All of it is there, verified: it becomes what the store has of the blob, and asks no more.
    fn finish(&self, file: &File) {
        if let Err(error) = file.sync_all() {
            // Nobody knows what of it the disk has, so nothing counts as filled.
            tracing::error!("a decoded form was not written, and is filled again: {error}");
            let mut state = self.lock();
            state.filled = Bitfield::new(self.places.len() as u32);
            return;
        }
        let kept = !self.lock().given_up;
        match kept.then(|| self.store.finish_filling(self.id)) {
            Some(Ok(())) => tracing::info!(blob = %self.blob.table.blob(), "decoded while it was read"),
            // Its mounts are served all the same; the next daemon fills it once more.
            Some(Err(error)) => tracing::error!("a decoded form is not kept: {}", crate::chain(&error)),
            None => {}
        }
        match self.group.unmark(file.as_fd()) {
            Ok(()) => self.is_whole(),
            Err(error) => tracing::error!("a file goes on to ask: {error}"),
        }
    }

    /// Fills what is missing of it and in the store, one chunk after the other.
    pub(super) async fn complete(self: &Arc<Self>) {
        for place in 0..self.places.len() as u32 {
            let Some(writer) = self.lock().writer.clone() else { return };
            let (said, heard) = oneshot::channel();
            self.fill(&writer, place..place + 1, move |filled| {
                // Who does not hear has been dropped.
                let _ = said.send(filled);
            });
            if heard.await != Ok(true) {
                return;
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
