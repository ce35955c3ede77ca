//! What this node answers to others: pieces and objects that are here, and, as a home, those that it first has to get.
//!
//! A piece is named by its fingerprint, so what is sent is what the asker's image means by it, whichever image brought
//! it here. Only a home reads the registry for others (a seed peer, or without seed peers a node that has the image),
//! only registries that its configuration lists, and only with its own credentials. A node with much to send names others
//! that received the same a moment ago, so that what everyone wants at once does not go through one uplink.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use shoal_proto::{Asked, BlobId, Contact, Fingerprint, ObjectId, ObjectKind, PeerId, Priority, Request};
use shoal_rafs::oci::Source;
use shoal_scheduler::{Admission, Ask, BlobKey, Event, Item, Origin as WantOrigin, Tracker};

use crate::{
    contacts::Contacts,
    data::{AnswerSender, PeerContext, SendError, Service},
    driver::{Clock, DriverHandle, Fetched, Stake},
    images::{ImageBlob, Images},
    mounts::blocking,
    plain::{self, PlainBlob},
    starts::CollectedStarts,
    store::ObjectFile,
};

/// What an asker is told to expect while the registry is being read.
const REGISTRY_ETA: Duration = Duration::from_secs(1);
/// What an object, or a piece of an image that is not loaded yet, counts as: a chunk of the usual size.
const UNKNOWN_SIZE: u64 = 1 << 20;
/// Most bytes of an object that is read at the registry for others, who say what it is: whatever is larger they read themselves.
const MAX_FOR_OTHERS: u64 = 256 << 20;
/// Bytes of an object that are read, and wait for room, at a time.
const OBJECT_PART: u64 = 1 << 20;

/// The data plane's service.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub images: Images,
    pub driver: DriverHandle,
    /// Registries that this node reads for others; `*` is any.
    pub registries: Vec<String>,
    /// Locked for a look-up or a note.
    pub tracker: Arc<Mutex<Tracker>>,
    pub clock: Clock,
    pub contacts: Contacts,
    /// What is known of starts of images.
    pub starts: CollectedStarts,
    pub runtime: tokio::runtime::Handle,
}

impl Service for Server {
    fn handle(&self, peer: PeerContext, request: Request, answers: AnswerSender) {
        let server = self.clone();
        self.runtime.spawn(async move {
            tracing::trace!(peer = %peer.peer, ?request, "asked");
            // An asker that has gone, or cancelled, ends the answer: there is nobody to tell.
            let _ = server.admit(peer.peer, request, answers).await;
        });
    }
}

/// The asker is gone, or what was being sent.
struct Gone;

impl From<SendError> for Gone {
    fn from(_: SendError) -> Self {
        Self
    }
}

/// An answer that was admitted: counts its bytes as being sent until it is dropped.
struct Upload<'a> {
    server: &'a Server,
    ask: Ask,
    /// Whose sending nobody remembers is no alternate for others.
    is_remembered: bool,
    admitted: bool,
}

impl<'a> Upload<'a> {
    fn admit(server: &'a Server, ask: Ask, is_remembered: bool) -> Result<Self, Busy> {
        match lock(&server.tracker).admit(server.clock.now(), ask) {
            Admission::Serve => Ok(Self { server, ask, is_remembered, admitted: true }),
            Admission::Busy { retry_after, alternates } => Err(Busy { retry_after, alternates }),
        }
    }

    /// What is to be sent has so many bytes, which was not known when it was admitted.
    fn admit_again(&mut self, bytes: u64) -> Result<(), Busy> {
        self.end();
        self.ask.bytes = bytes;
        *self = Self::admit(self.server, self.ask, self.is_remembered)?;
        Ok(())
    }

    /// So many bytes of a piece, the last ones, have left.
    fn sent(&self, piece: u32, bytes: u64) {
        metrics::counter!("shoal_served_bytes_total").increment(bytes);
        if self.is_remembered {
            let item = Item { piece, ..self.ask.first };
            lock(&self.server.tracker).sent(self.server.clock.now(), self.ask.peer, item, bytes);
        }
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.admitted) {
            lock(&self.server.tracker).ended(self.ask.peer, self.ask.bytes);
        }
    }
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Others are served.
struct Busy {
    retry_after: Duration,
    alternates: Vec<PeerId>,
}

fn lock(tracker: &Mutex<Tracker>) -> MutexGuard<'_, Tracker> {
    tracker.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Server {
    async fn admit(&self, peer: PeerId, request: Request, mut answers: AnswerSender) -> Result<(), Gone> {
        let (first, bytes) = self.measure(&request.what);
        let Request { priority, lacks, source: home, .. } = request;
        let ask = Ask { peer, first, bytes: bytes.unwrap_or(0), priority, lacks, home };
        let answered = match Upload::admit(self, ask, bytes.is_some()) {
            Ok(mut upload) => self.answer(request, &mut answers, &mut upload).await,
            Err(busy) => Err(busy.into()),
        };
        match answered {
            Ok(()) => Ok(answers.end().await?),
            Err(Stop::Gone) => Err(Gone),
            Err(Stop::Busy(Busy { retry_after, alternates })) => {
                let contact = |peer| Contact { peer, addresses: self.contacts.addresses(peer) };
                Ok(answers.busy(retry_after, alternates.into_iter().map(contact).collect()).await?)
            }
            Err(Stop::NotMyHome(members)) => Ok(answers.not_my_home(members).await?),
            Err(Stop::CannotSource(reason)) => Ok(answers.cannot_source(reason).await?),
        }
    }

    /// The first piece that is asked for, and the encoded bytes of all of them, as the asker's image states them; none of what nobody
    /// is sent to others for.
    fn measure(&self, what: &Asked) -> (Item, Option<u64>) {
        match what {
            // Few who were given a list have verified it, and nobody gives a trace on.
            Asked::Object { id, kind: ObjectKind::HashList | ObjectKind::StartTrace } => {
                (Item { blob: BlobKey::from(*id), piece: 0 }, None)
            }
            Asked::Object { id, .. } => {
                let bytes = self.images.stored_len(*id).unwrap_or(UNKNOWN_SIZE);
                (Item { blob: BlobKey::from(*id), piece: 0 }, Some(bytes))
            }
            Asked::Pieces { bootstrap, blob: id, first, fingerprints, .. } => {
                let blob = self.images.described(*bootstrap, *id);
                let size = |piece| blob.as_ref().map_or(UNKNOWN_SIZE, |blob| blob.encoded_len(piece) as u64);
                let bytes = (*first..).take(fingerprints.len()).map(size).sum();
                (Item { blob: BlobKey::from(*id), piece: *first }, Some(bytes))
            }
        }
    }

    async fn answer(
        &self,
        request: Request,
        answers: &mut AnswerSender,
        upload: &mut Upload<'_>,
    ) -> Result<(), Stop> {
        let image = Source::new(&request.image.registry, &request.image.repository);
        let image = image.map_err(|error| Stop::CannotSource(crate::chain(&error)))?;
        let manifest = match &request.what {
            Asked::Pieces { manifest, .. } => *manifest,
            Asked::Object { .. } => None,
        };
        let (priority, source, deadline) = (request.priority, request.source, request.deadline);
        let wish = Wish { image, manifest, priority, source, deadline };
        match request.what {
            Asked::Object { id, kind: ObjectKind::HashList } => {
                self.hash_list(&wish, BlobId::new(*id.as_bytes()), answers, upload).await
            }
            Asked::Object { id, kind: ObjectKind::StartTrace } => self.start_trace(id, answers, upload).await,
            Asked::Object { id, kind } => self.object(&wish, id, kind, answers, upload).await,
            Asked::Pieces { bootstrap, blob, first, fingerprints, .. } => {
                self.pieces(&wish, bootstrap, blob, first, &fingerprints, answers, upload).await
            }
        }
    }

    async fn object(
        &self,
        wish: &Wish,
        id: ObjectId,
        kind: ObjectKind,
        answers: &mut AnswerSender,
        upload: &mut Upload<'_>,
    ) -> Result<(), Stop> {
        if let Some(object) = self.images.opened(id).await {
            return send_object(answers, upload, object).await;
        }
        if !wish.source {
            return Ok(answers.not_have(0).await?);
        }
        self.allows(&wish.image)?;
        let stake = self.images.know_object(&wish.image, id, kind, MAX_FOR_OTHERS).await;
        self.driver.home_duty(whole(&stake)).await.map_err(Stop::NotMyHome)?;
        answers.pending(REGISTRY_ETA).await?;
        let fetched = self.images.fetch_object(&wish.image, id, kind, MAX_FOR_OTHERS, WantOrigin::ForPeer);
        let fetched = answers.patiently(REGISTRY_ETA, fetched).await?;
        let bytes = fetched.map_err(|error| Stop::CannotSource(error.to_string()))?;
        upload.admit_again(bytes.len() as u64)?;
        match self.images.opened(id).await {
            Some(object) => {
                drop(bytes);
                send_object(answers, upload, object).await
            }
            // There was no room to keep it.
            None => send(answers, upload, 0, bytes).await,
        }
    }

    /// The list of a blob that this node has verified; as its home, after reading all of it.
    async fn hash_list(
        &self,
        wish: &Wish,
        blob: BlobId,
        answers: &mut AnswerSender,
        upload: &Upload<'_>,
    ) -> Result<(), Stop> {
        let plain = self.images.plain();
        let known = match plain.verified(&wish.image, blob).await {
            Some(known) => known,
            None if !wish.source => return Ok(answers.not_have(0).await?),
            None => {
                self.allows(&wish.image)?;
                let stake = plain.know_list(&wish.image, blob).await;
                self.driver.home_duty(whole(&stake)).await.map_err(Stop::NotMyHome)?;
                self.learn(wish, blob, answers).await?
            }
        };
        if !known.is_verified() {
            // It is on its way here as well, by the list of another.
            return Err(Stop::CannotSource("this node has a list of the blob that it has not verified yet".into()));
        }
        send(answers, upload, 0, known.list().clone()).await
    }

    /// What starts of the image with this bootstrap layer touched first, as far as this node was told.
    async fn start_trace(
        &self,
        layer: ObjectId,
        answers: &mut AnswerSender,
        upload: &Upload<'_>,
    ) -> Result<(), Stop> {
        let starts = self.starts.clone();
        match blocking(move || starts.of(layer)).await {
            Some(trace) => send(answers, upload, 0, trace).await,
            None => Ok(answers.not_have(0).await?),
        }
    }

    /// The list of a plain blob, for others.
    async fn learn(&self, wish: &Wish, blob: BlobId, answers: &mut AnswerSender) -> Result<Arc<PlainBlob>, Stop> {
        answers.pending(REGISTRY_ETA).await?;
        let learning = self.images.plain().learn(&wish.image, blob, WantOrigin::ForPeer);
        let learned = answers.patiently(REGISTRY_ETA, learning).await?;
        learned.map_err(|error| Stop::CannotSource(crate::chain(&error)))
    }

    #[allow(clippy::too_many_arguments, reason = "what was asked for, who asked, and where the answer goes")]
    async fn pieces(
        &self,
        wish: &Wish,
        layer: ObjectId,
        blob: BlobId,
        first: u32,
        fingerprints: &[Fingerprint],
        answers: &mut AnswerSender,
        upload: &Upload<'_>,
    ) -> Result<(), Stop> {
        let mut missing = Vec::new();
        for (piece, fingerprint) in (first..).zip(fingerprints) {
            match self.images.blob_agreeing(blob, piece, fingerprint) {
                Some(here) if here.handle.is_present(piece) => {
                    // Room first, then the bytes: what waits for a slow network waits on the disk.
                    answers.reserve(here.encoded_len(piece)).await?;
                    match read(here, piece).await {
                        Some(bytes) => send(answers, upload, piece, bytes).await?,
                        None => missing.push((piece, *fingerprint)),
                    }
                }
                _ => missing.push((piece, *fingerprint)),
            }
        }
        if wish.source && !missing.is_empty() {
            return self.source(wish, layer, blob, missing, answers, upload).await;
        }
        for (piece, _) in missing {
            answers.not_have(piece).await?;
        }
        Ok(())
    }

    /// As the home: gets what is missing, and passes each piece on as soon as it has verified.
    async fn source(
        &self,
        wish: &Wish,
        layer: ObjectId,
        blob: BlobId,
        missing: Vec<(u32, Fingerprint)>,
        answers: &mut AnswerSender,
        upload: &Upload<'_>,
    ) -> Result<(), Stop> {
        self.allows(&wish.image)?;
        let loaded = if plain::is_plain(layer, blob) {
            Some(self.learn(wish, blob, answers).await?.blob.clone())
        } else {
            answers.pending(REGISTRY_ETA).await?;
            let image = match wish.manifest {
                // Of an encrypted layer it has the key. It may lead to another layer; what is asked for is then not there.
                Some(manifest) => self.images.by_manifest(&wish.image, manifest).await.map(|named| named.image),
                None => self.images.by_layer(&wish.image, layer, MAX_FOR_OTHERS).await,
            };
            image.map_err(|error| Stop::CannotSource(crate::chain(&error)))?.blob(blob).cloned()
        };
        let mut wanted = FuturesUnordered::new();
        for (piece, fingerprint) in missing {
            match &loaded {
                Some(loaded) if loaded.agrees(piece, &fingerprint) => {
                    let item = Item { blob: loaded.key, piece };
                    self.driver.home_duty(item).await.map_err(Stop::NotMyHome)?;
                    wanted.push(self.get(wish, loaded.clone(), piece));
                }
                _ => answers.not_have(piece).await?,
            }
        }
        while let Some((piece, got)) = answers.patiently(REGISTRY_ETA, wanted.next()).await? {
            match got.map_err(Stop::CannotSource)? {
                Some(bytes) => send(answers, upload, piece, bytes).await?,
                None => answers.not_have(piece).await?,
            }
        }
        Ok(())
    }

    async fn get(&self, wish: &Wish, blob: ImageBlob, piece: u32) -> (u32, Result<Option<Bytes>, String>) {
        let item = Item { blob: blob.key, piece };
        let got = self.driver.want(item, wish.priority, wish.deadline, WantOrigin::ForPeer).await;
        match got {
            // There was no room for it, which is no reason for the asker to go without.
            Ok(Fetched::Piece { unkept: Some(bytes), .. }) => (piece, Ok(Some(bytes))),
            Ok(_) => {
                let bytes = read(blob, piece).await;
                if bytes.is_none() {
                    self.driver.event(Event::Lost { item }).await;
                }
                (piece, Ok(bytes))
            }
            Err(error) => (piece, Err(error.to_string())),
        }
    }

    fn allows(&self, source: &Source) -> Result<(), Stop> {
        may_read(&self.registries, source).map_err(|why| Stop::CannotSource(why.into()))
    }
}

/// Whether a node that reads `registries` for others reads this one.
///
/// # Errors
/// It does not; with the reason.
pub(crate) fn may_read(registries: &[String], source: &Source) -> Result<(), &'static str> {
    if source.is_layout() {
        // A folder of this host: whoever names one would choose what this node reads.
        return Err("a folder is not a registry");
    }
    let listed = registries.iter().any(|one| one == "*" || one == source.registry());
    if listed { Ok(()) } else { Err("this node does not read that registry for others") }
}

/// An object or a list as an item.
fn whole(stake: &Stake) -> Item {
    Item { blob: stake.key(), piece: 0 }
}

/// Why an answer ends before all that was asked for is answered.
enum Stop {
    /// The asker is gone, or what was being sent.
    Gone,
    /// It is to come again, or to ask others.
    Busy(Busy),
    /// These are home, not this node.
    NotMyHome(Vec<PeerId>),
    /// The registry cannot or may not be read.
    CannotSource(String),
}

impl From<SendError> for Stop {
    fn from(_: SendError) -> Self {
        Self::Gone
    }
}

impl From<Busy> for Stop {
    fn from(busy: Busy) -> Self {
        Self::Busy(busy)
    }
}

async fn send(answers: &mut AnswerSender, upload: &Upload<'_>, piece: u32, bytes: Bytes) -> Result<(), Stop> {
    let length = bytes.len() as u64;
    answers.send_data(piece, bytes).await?;
    upload.sent(piece, length);
    Ok(())
}

/// Sends an object part by part: as little of it is in memory as of a piece, whoever asks.
async fn send_object(answers: &mut AnswerSender, upload: &Upload<'_>, object: ObjectFile) -> Result<(), Stop> {
    let (total, mut offset) = (object.len(), 0);
    let object = Arc::new(object);
    loop {
        let length = OBJECT_PART.min(total - offset) as usize;
        answers.reserve(length).await?;
        let reading = object.clone();
        let bytes = blocking(move || reading.read(offset, length)).await.map_err(|error| {
            tracing::warn!("cannot read an object from the store: {error}");
            Stop::Gone
        })?;
        answers.send_part(0, total, offset, bytes).await?;
        offset += length as u64;
        if offset == total {
            upload.sent(0, total);
            return Ok(());
        }
    }
}

/// What a request says beside what it asks for.
struct Wish {
    image: Source,
    /// The image's manifest, where its bootstrap layer is encrypted.
    manifest: Option<ObjectId>,
    priority: Priority,
    source: bool,
    deadline: Duration,
}

/// The encoded bytes of a piece that is here.
async fn read(blob: ImageBlob, piece: u32) -> Option<Bytes> {
    if !blob.handle.is_present(piece) {
        return None;
    }
    match tokio::task::spawn_blocking(move || blob.handle.read(piece)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            tracing::warn!("cannot read piece {piece} from the store: {}", crate::chain(&error));
            None
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_reads_listed_registries_and_never_a_folder() {
        let source = |registry: &str| Source::new(registry, "app").unwrap();
        let (listed, any) = (["r.example:5000".to_owned()], ["*".to_owned()]);
        assert!(may_read(&listed, &source("r.example:5000")).is_ok());
        assert!(may_read(&listed, &source("r.example")).is_err());
        assert!(may_read(&any, &source("other.example")).is_ok());
        assert!(may_read(&any, &Source::layout(std::path::Path::new("/etc")).unwrap()).is_err());
        assert!(may_read(&[], &source("r.example")).is_err());
    }
}
