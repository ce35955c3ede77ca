//! One fetch: asks a peer or the registry for a run of pieces or an object, verifies what comes, stores it, and reports
//! each outcome to the scheduler's loop. What this node has as part of another blob (the version of an image before this
//! one) is asked of nobody.
//!
//! Nothing that has not verified leaves this module: [`Target::accept`] is the only way into the store.

mod accept;
mod registry;
mod target;

use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt;
use shoal_proto::{
    Asked, BlobId, FEATURE_HASH_LISTS, HashList, ImageSource, ObjectId, ObjectKind, PeerId, Priority, Request,
};
use shoal_rafs::oci::Source;
use shoal_scheduler::{BlobKey, Event, Failure, Item, RequestId};
use tokio::sync::mpsc;

use self::accept::{Rejected, accept_piece};
pub(crate) use self::target::{BlobTarget, ListTarget, ObjectTarget, Target};
use crate::{
    contacts::{Contacts, Fault},
    data::{Answer, AnswerError, AnswerStream, Budget, DataPlane, Room, Throttle},
    driver::{Command, Fetched},
    origin,
    store::{ChunkPlace, Store},
    traffic::{Provenance, Traffic},
};

/// Most bytes of an object: a bootstrap layer of a few million files is below it.
pub(crate) const MAX_OBJECT: u64 = 1 << 30;

/// Bytes of objects that may be on their way here at a time. One that is larger comes alone.
pub(crate) const OBJECT_ROOM: u32 = 256 << 20;
/// The registry is asked how large an object is that may be larger than this.
const LARGE_OBJECT: u64 = 16 << 20;

/// How often the scheduler hears at most that a piece is still coming in.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(100);
/// Who is given up after so long a silence is to blame for it: it is what the scheduler grants for a piece that somebody waits for,
/// twice. Who is given up sooner was only not the first.
const SILENCE: Duration = Duration::from_secs(1);

/// Whom to ask.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fetch {
    /// A peer.
    Peer(PeerQuestion),
    /// The registry.
    Registry,
}

/// Whom to ask, and what to say beside what is wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PeerQuestion {
    pub peer: PeerId,
    /// It is asked as the home.
    pub source: bool,
    /// How long we shall wait.
    pub deadline: Duration,
    /// Thousandths of the blob that are missing here.
    pub lacks: u16,
}

/// What fetches share. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    pub commands: mpsc::WeakSender<Command>,
    pub data: Option<DataPlane>,
    pub origin: origin::Origin,
    pub store: Store,
    pub contacts: Contacts,
    pub traffic: Arc<Traffic>,
    /// The limit of the registry for blobs that are read whole: of how much that is, the scheduler knows nothing.
    pub whole_reads: Arc<Throttle>,
    /// For objects that come, which are in memory whole; see [`OBJECT_ROOM`].
    pub objects: Budget,
}

impl Fetcher {
    /// Dials `peer` where it was last seen. The outcome is an event of the data plane.
    pub(crate) fn connect(&self, peer: PeerId) {
        if let Some(data) = &self.data {
            data.connect(peer, &self.contacts.addresses(peer));
        }
    }

    /// Closes the connection to `peer` and refuses it for `time`.
    pub(crate) fn ban(&self, peer: PeerId, time: Duration, reason: &str) {
        tracing::warn!(%peer, "banned for {} s: {reason}", time.as_secs());
        self.contacts.ban(peer, time, reason);
        if let Some(data) = &self.data {
            data.ban(peer, time);
        }
    }

    /// Carries one request of the scheduler out. Cancel safe: what has verified is kept, the rest is dropped.
    pub(crate) fn run(
        &self,
        request: RequestId,
        blob: BlobKey,
        target: Target,
        pieces: Vec<u32>,
        priority: Priority,
        how: Fetch,
    ) -> impl Future<Output = ()> + Send + use<> {
        let fetch = Running { fetcher: self.clone(), request, blob, target, priority };
        async move {
            let runs = fetch.take_over(pieces).await;
            let _room = fetch.room(how).await;
            match how {
                _ if runs.is_empty() => {}
                Fetch::Peer(question) => fetch.ask_peer(question, &runs.concat()).await,
                Fetch::Registry => {
                    for run in runs {
                        fetch.read_registry(&run).await;
                    }
                }
            }
            fetch.report(Event::Finished { request }).await;
        }
    }
}

/// An answer that a peer owes. When it is dropped before it has ended, the scheduler has given it up.
struct Awaited<'a> {
    contacts: &'a Contacts,
    peer: PeerId,
    /// Since when the next part is waited for; nothing while none is.
    heard: Option<Instant>,
}

impl Awaited<'_> {
    /// The next part of the answer. What happens until it is called again is not the peer's doing.
    async fn next(&mut self, answers: &mut AnswerStream) -> Option<Result<Answer, AnswerError>> {
        self.heard = Some(Instant::now());
        let next = answers.next().await;
        self.heard = None;
        next
    }
}

impl Drop for Awaited<'_> {
    fn drop(&mut self) {
        if let Some(silence) = self.heard.map(|heard| heard.elapsed()).filter(|silence| *silence >= SILENCE) {
            let detail = format!("silent for {:.1} s while it owed an answer", silence.as_secs_f64());
            self.contacts.fault(self.peer, Fault::Stall, &detail);
        }
    }
}

/// One request of the scheduler, under way.
#[derive(Clone)]
struct Running {
    fetcher: Fetcher,
    request: RequestId,
    blob: BlobKey,
    target: Target,
    priority: Priority,
}

impl Running {
    /// Takes over the pieces that are here as part of other blobs. Gives the runs that are left between them: a read of the
    /// registry from the first to the last would bring all that lies between once more.
    async fn take_over(&self, pieces: Vec<u32>) -> Vec<Vec<u32>> {
        let Target::Blob(blob) = &self.target else { return vec![pieces] };
        let (looking, store) = (blob.clone(), self.fetcher.store.clone());
        let look =
            move || pieces.into_iter().map(|piece| (piece, looking.elsewhere(&store, piece))).collect::<Vec<_>>();
        let found = tokio::task::spawn_blocking(look)
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        let mut runs = vec![Vec::new()];
        for (piece, place) in found {
            let taken_over = match place {
                Some(place) => self.copy(blob, piece, place).await,
                None => false,
            };
            match runs.last_mut() {
                Some(run) if !taken_over => run.push(piece),
                _ => runs.push(Vec::new()),
            }
        }
        runs.retain(|run| !run.is_empty());
        runs
    }

    /// Takes over one piece; false when what lies there is something else after all, or encoded otherwise.
    async fn copy(&self, blob: &Arc<BlobTarget>, piece: u32, (place, encoded): (ChunkPlace, Range<u64>)) -> bool {
        let (length, from) = (encoded.end - encoded.start, place.key);
        let (blob, store) = (blob.clone(), self.fetcher.store.clone());
        let copy = move || {
            let bytes = store.read_place(place.key, encoded).map_err(|e| crate::chain(&e))?;
            let bytes = bytes.ok_or_else(|| "it has gone".to_owned())?;
            accept_piece(&blob, piece, bytes, Provenance::Local).map_err(|e| e.to_string())
        };
        match tokio::task::spawn_blocking(copy).await.unwrap_or_else(|panic| Err(panic.to_string())) {
            Ok((fetched, chunks)) => {
                self.fetcher.traffic.piece(Provenance::Local, length, chunks);
                self.send(Command::Found { item: self.item(piece), fetched }).await;
                true
            }
            Err(why) => {
                tracing::debug!(blob = %BlobId::new(self.blob.id), piece, "not taken over from {:?}: {why}", from.blob);
                false
            }
        }
    }

    /// Room for an object, as far as is known how large it is. Whoever is to be asked is not to blame for the wait.
    async fn room(&self, how: Fetch) -> Option<Room> {
        let Target::Object(object) = &self.target else { return None };
        let size = match how {
            Fetch::Registry if object.limit > LARGE_OBJECT && object.kind == ObjectKind::Blob => {
                let size = self.fetcher.origin.registry().blob_size(&object.source, object.id).await;
                // What cannot be read says so when it is read.
                size.ok().flatten().filter(|size| *size > 0)
            }
            _ => None,
        };
        let bytes = size.map_or(object.limit, |size| size.min(object.limit));
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut room = std::pin::pin!(self.fetcher.objects.room(bytes, self.priority));
        loop {
            match tokio::time::timeout(PROGRESS_INTERVAL, &mut room).await {
                Ok(room) => return Some(room),
                Err(_) => self.report(Event::Progress { request: self.request }).await,
            }
        }
    }

    async fn ask_peer(&self, question: PeerQuestion, pieces: &[u32]) {
        let PeerQuestion { peer, source, deadline, lacks } = question;
        let Some(data) = &self.fetcher.data else {
            return self.failed(Failure::Transport).await;
        };
        if self.target.is_plain() && !data.has_feature(peer, FEATURE_HASH_LISTS) {
            // To a peer of an earlier version a question for a list is a violation, and one for pieces has it look for an image.
            return self.report(Event::CannotSource { request: self.request }).await;
        }
        for (asked, image, limits) in self.questions(pieces) {
            let request = Request {
                // The data plane numbers the requests of a connection.
                id: 0,
                image,
                what: asked,
                priority: self.priority,
                source,
                deadline,
                lacks,
            };
            match data.request(peer, request, limits).await {
                Ok(answers) => self.take_answers(peer, source, answers).await,
                Err(error) => {
                    tracing::debug!(%peer, "request failed: {error}");
                    return self.failed(Failure::Transport).await;
                }
            }
        }
    }

    /// What to ask a peer for `pieces`, image by image, with the greatest length that each answer may have.
    fn questions(&self, pieces: &[u32]) -> Vec<(Asked, ImageSource, Vec<u64>)> {
        let blob = match &self.target {
            Target::Object(object) => {
                let asked = Asked::Object { id: object.id, kind: object.kind };
                return vec![(asked, on_the_wire(&object.source), vec![object.limit])];
            }
            Target::List(list) => {
                let id = ObjectId::new(*list.blob.as_bytes());
                let asked = Asked::Object { id, kind: ObjectKind::HashList };
                return vec![(asked, on_the_wire(&list.source), vec![HashList::MAX_ENCODED])];
            }
            Target::Blob(blob) => blob,
        };
        let mut questions: Vec<(Asked, ImageSource, Vec<u64>)> = Vec::new();
        for &number in pieces {
            let Some((named, piece)) = blob.naming(number) else { continue };
            let length = piece.encoded().end - piece.encoded().start;
            if let Some((Asked::Pieces { bootstrap, first, fingerprints, .. }, _, limits)) = questions.last_mut()
                && *bootstrap == named.bootstrap
                && u64::from(*first) + fingerprints.len() as u64 == u64::from(number)
            {
                fingerprints.push(piece.fingerprint());
                limits.push(length);
            } else {
                let asked = Asked::Pieces {
                    bootstrap: named.bootstrap,
                    blob: named.table.blob(),
                    first: number,
                    fingerprints: vec![piece.fingerprint()],
                    manifest: named.manifest,
                };
                questions.push((asked, on_the_wire(&named.source), vec![length]));
            }
        }
        questions
    }

    async fn take_answers(&self, peer: PeerId, source: bool, mut answers: AnswerStream) {
        let request = self.request;
        let mut awaited = Awaited { contacts: &self.fetcher.contacts, peer, heard: None };
        let from = Provenance::from(self.fetcher.contacts.role(peer));
        let mut heard = Instant::now();
        while let Some(answer) = awaited.next(&mut answers).await {
            let event = match answer {
                Ok(Answer::Data { piece, bytes }) => {
                    if self.take(piece, bytes, from, Some(peer)).await {
                        continue;
                    }
                    // The rest of what a liar says is not worth hearing.
                    return self.failed(Failure::WrongBytes).await;
                }
                Ok(Answer::Progress) if heard.elapsed() < PROGRESS_INTERVAL => continue,
                Ok(Answer::Progress) => {
                    heard = Instant::now();
                    Event::Progress { request }
                }
                Ok(Answer::NotHave { piece }) => {
                    if !source {
                        let detail = format!("has not got piece {piece} of {}", BlobId::new(self.blob.id));
                        self.fetcher.contacts.fault(peer, Fault::BrokenPromise, &detail);
                    }
                    Event::NotHave { request, item: self.item(piece) }
                }
                Ok(Answer::Pending { eta }) => Event::Pending { request, eta },
                Ok(Answer::Busy { retry_after, alternates }) => {
                    let peers = alternates.iter().map(|contact| contact.peer).collect();
                    alternates.into_iter().for_each(|contact| self.fetcher.contacts.heard_of(contact));
                    Event::Busy { request, retry_after, alternates: peers }
                }
                Ok(Answer::NotMyHome { members }) => Event::NotMyHome { request, members },
                Ok(Answer::CannotSource { reason }) => {
                    tracing::info!(%peer, "cannot source: {reason}");
                    Event::CannotSource { request }
                }
                Err(error) => {
                    tracing::debug!(%peer, "answer broke off: {error}");
                    return self.failed(Failure::Transport).await;
                }
            };
            self.report(event).await;
        }
    }

    /// Verifies, stores and reports one piece or object; false when it is wrong.
    async fn take(&self, piece: u32, bytes: Bytes, from: Provenance, giver: Option<PeerId>) -> bool {
        let (length, item) = (bytes.len() as u64, self.item(piece));
        if let Target::List(list) = &self.target {
            if let Err(error) = HashList::parse(&bytes) {
                tracing::warn!(blob = %list.blob, ?from, "rejected: {error}");
                self.fetcher.traffic.rejected(length, 0);
                return false;
            }
            self.fetcher.traffic.object(from, length);
            let fetched = Fetched::List { bytes, giver };
            self.send(Command::Delivered { request: self.request, item, bytes: length, fetched }).await;
            return true;
        }
        let accepted = self.target.clone().accept(self.fetcher.store.clone(), piece, bytes, from).await;
        match self.noted(piece, length, from, accepted) {
            Ok(delivered) => {
                self.send(delivered).await;
                true
            }
            Err(Wrong) => false,
        }
    }

    /// Counts what was made of a piece or an object, and gives what the scheduler is to be told of it.
    fn noted(
        &self,
        piece: u32,
        length: u64,
        from: Provenance,
        accepted: Result<(Fetched, u64), Rejected>,
    ) -> Result<Command, Wrong> {
        match accepted {
            Ok((fetched, chunks)) => {
                match fetched {
                    Fetched::Object { .. } => self.fetcher.traffic.object(from, length),
                    _ => self.fetcher.traffic.piece(from, length, chunks),
                }
                Ok(Command::Delivered { request: self.request, item: self.item(piece), bytes: length, fetched })
            }
            Err(rejected) => {
                tracing::warn!(blob = %BlobId::new(self.blob.id), piece, ?from, "rejected: {rejected}");
                self.fetcher.traffic.rejected(length, rejected.chunks);
                Err(Wrong)
            }
        }
    }

    fn item(&self, piece: u32) -> Item {
        Item { blob: self.blob, piece }
    }

    async fn failed(&self, reason: Failure) {
        self.report(Event::Failed { request: self.request, reason }).await;
    }

    async fn report(&self, event: Event) {
        self.send(Command::Event(event)).await;
    }

    async fn send(&self, command: Command) {
        if let Some(commands) = self.fetcher.commands.upgrade() {
            // The loop is gone when the node stops; then nobody cares.
            let _ = commands.send(command).await;
        }
    }
}

/// It was rejected.
struct Wrong;

/// What a peer is told of where an image's bytes come from.
pub(crate) fn on_the_wire(source: &Source) -> ImageSource {
    ImageSource { registry: source.registry().to_owned(), repository: source.repository().to_owned() }
}
