//! Answering: what a peer may ask of this node at a time, and the sender through which a service answers.
//!
//! The frames of an answer are written by the service's own task through [`AnswerSender`], which waits when the
//! network does. Beside it one task per request, [`serve`], listens for the asker to lose interest, and afterwards
//! sees to it that the last bytes leave within a time. A peer that reads too slowly loses its answer, never the
//! server its memory: bytes that are read and not acknowledged count against an allowance of the peer and one of
//! all peers ([`Budget`]). Limits of rates are kept here too, piece by piece: who waits for one is
//! told to be patient, and takes its node for slow and not for dead.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use shoal_proto::{Asked, Contact, Data, MAX_CONTACTS, MAX_REASON, Message, PeerId, Priority, Request, Role, Status};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Closing, Shared,
    frames::{FrameReader, FrameWriter, Urgency, WriteFailed},
    ledger::Ledger,
    link::{Link, Using},
    slots::{Budget, Room, Slot},
    throttle::Throttle,
};

/// How long a stream may stay open before the request is there.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one frame, and afterwards the rest of an answer, may wait for a peer that does not read.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// When a peer may come again after a refusal for lack of places.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How often an asker is told to be patient: one that hears nothing for half a second begins to look elsewhere.
const PENDING_INTERVAL: Duration = Duration::from_millis(400);
/// What an asker is told to expect while a limit holds its answer up.
const LIMITED_ETA: Duration = Duration::from_secs(1);
/// Bytes that pass the limits at a time: pieces go out whole, since in the midst of one nobody can be told to be patient. What is
/// longer than almost any piece goes out in parts of it.
const PASSES: usize = 4 << 20;

/// Answers what peers ask.
pub trait Service: Send + Sync + 'static {
    /// Takes a request over. Must not block: what takes time is spawned. Dropping `answers` tells the asker that it
    /// failed.
    fn handle(&self, peer: PeerContext, request: Request, answers: AnswerSender);
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerContext {
    /// Its identity, proved.
    pub peer: PeerId,
    /// Its role, as its membership has it.
    pub role: Role,
    /// Its zone, as its membership has it.
    pub zone: String,
}

/// Why an answer goes no further.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The asker has lost interest, or is gone.
    #[error("cancelled by the peer")]
    Cancelled,
    /// The asker reads too slowly.
    #[error("the peer does not read")]
    Stalled,
    /// The service's answer is none to this request.
    #[error("no answer to this request: {0}")]
    Wrong(String),
}

/// Sends the answer to one request.
#[derive(Debug)]
pub struct AnswerSender {
    request: u64,
    priority: Priority,
    ledger: Ledger,
    budget: Budget,
    upload: Arc<Throttle>,
    /// Of the peer's allowance, and of everybody's.
    room: Option<(Room, Room)>,
    cancelled: CancellationToken,
    link: Arc<Link>,
    open: Option<Open>,
}

/// What an answer under way holds; goes back to [`serve`] when the service is done with it.
#[derive(Debug)]
struct Open {
    frames: FrameWriter,
    back: oneshot::Sender<FrameWriter>,
}

impl Open {
    fn give_back(self) {
        // Nobody waits for it once the connection has ended.
        let _ = self.back.send(self.frames);
    }
}

impl AnswerSender {
    /// Becomes cancelled when the asker loses interest or is gone.
    pub fn cancelled(&self) -> &CancellationToken {
        &self.cancelled
    }

    /// Waits until there is room in memory for `length` bytes of an answer, which the next
    /// [`AnswerSender::send_data`] uses. To be called before the bytes are read. Prefetch waits longer than
    /// on-demand.
    ///
    /// # Errors
    /// [`SendError::Cancelled`] if the asker loses interest meanwhile.
    pub async fn reserve(&mut self, length: usize) -> Result<(), SendError> {
        self.room = None;
        let rooms = async {
            let own = self.link.budget().room(length, self.priority).await;
            (own, self.budget.room(length, self.priority).await)
        };
        tokio::select! {
            biased;
            () = self.cancelled.cancelled() => Err(SendError::Cancelled),
            rooms = rooms => {
                self.room = Some(rooms);
                Ok(())
            }
        }
    }

    /// Waits for what is on its way here, and tells the asker every now and then that it is, to be there after `eta`.
    ///
    /// # Errors
    /// [`SendError`]; `coming` is dropped then.
    pub async fn patiently<T>(&mut self, eta: Duration, coming: impl Future<Output = T>) -> Result<T, SendError> {
        let mut coming = std::pin::pin!(coming);
        loop {
            tokio::select! {
                biased;
                () = self.cancelled.cancelled() => return Err(SendError::Cancelled),
                come = &mut coming => return Ok(come),
                () = sleep(PENDING_INTERVAL) => self.pending(eta).await?,
            }
        }
    }

    /// Waits until the limits of this peer and of all let `length` more bytes out; at the start of a piece patiently.
    async fn pass(&mut self, length: usize, start: bool) -> Result<(), SendError> {
        let (link, all, length, priority) = (self.link.clone(), self.upload.clone(), length as u64, self.priority);
        let passing = async move {
            link.upload().pass(length, priority).await;
            all.pass(length, priority).await;
        };
        if start {
            return self.patiently(LIMITED_ETA, passing).await;
        }
        tokio::select! {
            biased;
            () = self.cancelled.cancelled() => Err(SendError::Cancelled),
            () = passing => Ok(()),
        }
    }

    /// Sends a whole piece, or an object as piece 0, when the limits allow it. Returns when the network has taken it over.
    ///
    /// # Errors
    /// [`SendError`]; then nothing more can be sent.
    pub async fn send_data(&mut self, piece: u32, bytes: Bytes) -> Result<(), SendError> {
        let total = bytes.len() as u64;
        self.send_part(piece, total, 0, bytes).await
    }

    /// Sends a part of a piece, or of an object as piece 0, that has `total` bytes: the parts of one come one behind the other, and
    /// nothing between them. Whatever is too large to be in memory whole is sent so.
    ///
    /// # Errors
    /// [`SendError`]; then nothing more can be sent.
    pub async fn send_part(&mut self, piece: u32, total: u64, start: u64, bytes: Bytes) -> Result<(), SendError> {
        if self.room.is_none() {
            self.reserve(bytes.len()).await?;
        }
        let bytes = match self.room.take() {
            Some((own, all)) => own.keep(all.keep(bytes)),
            None => bytes,
        };
        let most = self.open.as_ref().ok_or(SendError::Cancelled)?.frames.part();
        let mut offset = 0;
        loop {
            if offset % PASSES == 0 {
                self.pass(PASSES.min(bytes.len() - offset), start == 0 && offset == 0).await?;
            }
            let part = bytes.slice(offset..bytes.len().min(offset + most));
            let length = part.len();
            let (request, offset_here) = (self.request, start + offset as u64);
            let data = Data { request, piece, total, offset: offset_here, length: length as u32 };
            self.send(&Message::Data(data), part).await?;
            self.link.count_sent(length as u64);
            offset += length;
            if offset == bytes.len() {
                return Ok(());
            }
        }
    }

    /// Says that this node does not hold the piece under the fingerprint asked for.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn not_have(&mut self, piece: u32) -> Result<(), SendError> {
        self.send(&Message::NotHave { request: self.request, piece }, Bytes::new()).await
    }

    /// Asks for patience; may be repeated.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn pending(&mut self, eta: Duration) -> Result<(), SendError> {
        self.send(&Message::Pending { request: self.request, eta }, Bytes::new()).await
    }

    /// Sends the asker away for a while, or to others, of whom it hears [`MAX_CONTACTS`] at most.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn busy(self, retry_after: Duration, mut alternates: Vec<Contact>) -> Result<(), SendError> {
        alternates.truncate(MAX_CONTACTS);
        let request = self.request;
        self.last(&Message::Busy { request, retry_after, alternates }).await
    }

    /// Says that this node is not home to what was asked for.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn not_my_home(self, mut members: Vec<PeerId>) -> Result<(), SendError> {
        members.truncate(MAX_CONTACTS);
        let request = self.request;
        self.last(&Message::NotMyHome { request, members }).await
    }

    /// Says that this node may not or cannot read the registry.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn cannot_source(self, mut reason: String) -> Result<(), SendError> {
        reason.truncate(reason.floor_char_boundary(MAX_REASON));
        let request = self.request;
        self.last(&Message::CannotSource { request, reason }).await
    }

    /// Ends the answer: complete if every piece was answered, otherwise failed.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn end(self) -> Result<(), SendError> {
        let status = if self.ledger.complete().is_ok() { Status::Complete } else { Status::Failed };
        self.end_with(status).await
    }

    /// Ends the answer because this node's policy forbids it.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn refuse(self) -> Result<(), SendError> {
        self.end_with(Status::Refused).await
    }

    async fn end_with(self, status: Status) -> Result<(), SendError> {
        let request = self.request;
        self.last(&Message::End { request, status }).await
    }

    async fn last(mut self, message: &Message) -> Result<(), SendError> {
        self.send(message, Bytes::new()).await?;
        if let Some(mut open) = self.open.take() {
            open.frames.finish();
            open.give_back();
        }
        Ok(())
    }

    async fn send(&mut self, message: &Message, payload: Bytes) -> Result<(), SendError> {
        self.ledger.check(message).map_err(|e| SendError::Wrong(e.to_string()))?;
        let open = self.open.as_mut().ok_or(SendError::Cancelled)?;
        let write = timeout(STALL_TIMEOUT, open.frames.write(message, payload));
        let failed = tokio::select! {
            biased;
            () = self.cancelled.cancelled() => SendError::Cancelled,
            written = write => match written {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(WriteFailed::Codec(error))) => SendError::Wrong(error.to_string()),
                Ok(Err(_)) => SendError::Cancelled,
                Err(_) => SendError::Stalled,
            },
        };
        // Half of it may be on its way.
        self.abandon(if failed == SendError::Cancelled { Status::Cancelled } else { Status::Failed });
        Err(failed)
    }

    fn abandon(&mut self, why: Status) {
        if let Some(mut open) = self.open.take() {
            open.frames.reset(why);
            open.give_back();
        }
    }
}

impl Drop for AnswerSender {
    fn drop(&mut self) {
        self.abandon(Status::Failed);
    }
}

/// Serves one request: the first message that `asked` gives, to be answered through `answers`.
pub(super) async fn serve(shared: Arc<Shared>, link: Arc<Link>, mut answers: FrameWriter, mut asked: FrameReader) {
    let request = match timeout(REQUEST_TIMEOUT, asked.next()).await {
        Ok(Ok(Some(Message::Request(request)))) => request,
        Ok(Ok(Some(_))) => return link.close(Closing::Violation, "a stream that does not start with a request"),
        Ok(Ok(None)) => return link.close(Closing::Violation, "a stream without a request"),
        Ok(Err(error)) if error.is_violation() => return link.close(Closing::Violation, &error.to_string()),
        Ok(Err(_)) => return,
        Err(_) => return answers.reset(Status::Failed),
    };
    answers.set_urgency(match request.priority {
        Priority::OnDemand => Urgency::OnDemand,
        Priority::Prefetch => Urgency::Bulk,
    });
    let Some(held) = hold(&shared, &link, request.priority) else {
        let busy = Message::Busy { request: request.id, retry_after: RETRY_AFTER, alternates: Vec::new() };
        // The asker may have gone; nothing more is said to it.
        let _ = timeout(STALL_TIMEOUT, answers.write(&busy, Bytes::new())).await;
        return answers.finish();
    };
    answer(&shared, &link, request, answers, asked).await;
    drop(held);
}

/// What a request occupies until its last byte is acknowledged.
type Held = (Slot, Slot, Using);

fn hold(shared: &Shared, link: &Arc<Link>, priority: Priority) -> Option<Held> {
    let own = link.slot(priority)?;
    Some((own, shared.slots.take(priority)?, link.using()))
}

async fn answer(shared: &Arc<Shared>, link: &Arc<Link>, request: Request, frames: FrameWriter, asked: FrameReader) {
    let (first, pieces) = match &request.what {
        Asked::Pieces { first, fingerprints, .. } => (*first, fingerprints.len()),
        Asked::Object { .. } => (0, 1),
    };
    let cancelled = CancellationToken::new();
    let _cancel_when_done = cancelled.clone().drop_guard();
    let taken = frames.taken();
    let (back, mut returned) = oneshot::channel();
    let answers = AnswerSender {
        request: request.id,
        priority: request.priority,
        ledger: Ledger::new(request.id, first, vec![u64::MAX; pieces]),
        budget: shared.budget.clone(),
        upload: shared.upload.clone(),
        room: None,
        cancelled: cancelled.clone(),
        link: link.clone(),
        open: Some(Open { frames, back }),
    };
    let admitted = link.admitted();
    let peer = PeerContext { peer: admitted.peer, role: admitted.role, zone: admitted.zone.clone() };
    let id = request.id;
    shared.service.handle(peer, request, answers);
    let returned = tokio::select! {
        frames = &mut returned => frames,
        () = taken => { cancelled.cancel(); returned.await }
        () = cancel_asked(link, id, asked) => { cancelled.cancel(); returned.await }
    };
    // The sender always hands them back, whatever became of the answer.
    if let Ok(mut frames) = returned
        && timeout(STALL_TIMEOUT, frames.taken()).await.is_err()
    {
        frames.reset(Status::Failed);
    }
}

/// Resolves when the asker takes its request back; a request may be followed by nothing else.
async fn cancel_asked(link: &Link, id: u64, mut frames: FrameReader) {
    match frames.next().await {
        Ok(None) => std::future::pending().await,
        Ok(Some(Message::Cancel { request })) if request == id => {}
        Ok(Some(_)) => link.close(Closing::Violation, "something else than a cancel after a request"),
        Err(error) if error.is_violation() => link.close(Closing::Violation, &error.to_string()),
        Err(_) => {}
    }
}
