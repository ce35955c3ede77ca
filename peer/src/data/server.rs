//! Answering: what a peer may ask of this node at a time, and the sender through which a service answers.
//!
//! The frames of an answer are written by the service's own task through [`AnswerSender`], which waits when the
//! network does. Beside it one task per request, [`serve`], listens for the asker to lose interest, and afterwards
//! sees to it that the last bytes leave within a time. A peer that reads too slowly loses its answer, never the
//! server its memory: bytes that are read and not acknowledged count against an allowance of the peer and one of
//! all peers ([`Budget`]).

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use quinn::{SendStream, VarInt};
use shoal_proto::{
    Asked, Contact, Data, MAX_CONTACTS, MAX_PAYLOAD, MAX_REASON, Message, PeerId, Priority, Request, Role, Status,
};
use tokio::{sync::oneshot, time::timeout};
use tokio_util::sync::CancellationToken;

use super::{
    Closing, Shared,
    frames::{self, FrameReader},
    ledger::Ledger,
    link::{Link, Using},
    slots::{Budget, Room, Slot},
};

/// How long a stream may stay open before the request is there.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long one frame, and afterwards the rest of an answer, may wait for a peer that does not read.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// When a peer may come again after a refusal for lack of places.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// Code of streams that are given up.
const GIVEN_UP: VarInt = VarInt::from_u32(1);
/// QUIC priority of on-demand answers; prefetch has 0.
const ON_DEMAND: i32 = 1;

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
    /// Of the peer's allowance, and of everybody's.
    room: Option<(Room, Room)>,
    cancelled: CancellationToken,
    link: Arc<Link>,
    open: Option<Open>,
}

/// What an answer under way holds; goes back to [`serve`] when the service is done with it.
#[derive(Debug)]
struct Open {
    stream: SendStream,
    back: oneshot::Sender<SendStream>,
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

    /// Sends a whole piece, or an object as piece 0. Returns when the network has taken it over.
    ///
    /// # Errors
    /// [`SendError`]; then nothing more can be sent.
    pub async fn send_data(&mut self, piece: u32, bytes: Bytes) -> Result<(), SendError> {
        if self.room.is_none() {
            self.reserve(bytes.len()).await?;
        }
        let bytes = match self.room.take() {
            Some((own, all)) => own.keep(all.keep(bytes)),
            None => bytes,
        };
        let total = bytes.len() as u64;
        let mut offset = 0;
        loop {
            let part = bytes.slice(offset..bytes.len().min(offset + MAX_PAYLOAD));
            let length = part.len();
            let (request, offset_here) = (self.request, offset as u64);
            let data = Data { request, piece, total, offset: offset_here, length: length as u32 };
            self.send(&Message::Data(data), Some(part)).await?;
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
        self.send(&Message::NotHave { request: self.request, piece }, None).await
    }

    /// Asks for patience; may be repeated.
    ///
    /// # Errors
    /// [`SendError`].
    pub async fn pending(&mut self, eta: Duration) -> Result<(), SendError> {
        self.send(&Message::Pending { request: self.request, eta }, None).await
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
        self.send(message, None).await?;
        if let Some(mut open) = self.open.take() {
            // It fails only for a stream that the asker has stopped.
            let _ = open.stream.finish();
            let _ = open.back.send(open.stream);
        }
        Ok(())
    }

    async fn send(&mut self, message: &Message, payload: Option<Bytes>) -> Result<(), SendError> {
        self.ledger.check(message).map_err(|e| SendError::Wrong(e.to_string()))?;
        let header = frames::encode(message).map_err(|e| SendError::Wrong(e.to_string()))?;
        let open = self.open.as_mut().ok_or(SendError::Cancelled)?;
        let mut parts = [header, payload.unwrap_or_default()];
        let write = timeout(STALL_TIMEOUT, open.stream.write_all_chunks(&mut parts));
        let failed = tokio::select! {
            biased;
            () = self.cancelled.cancelled() => SendError::Cancelled,
            written = write => match written {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(_)) => SendError::Cancelled,
                Err(_) => SendError::Stalled,
            },
        };
        // Half a frame may be on its way.
        self.abandon();
        Err(failed)
    }

    fn abandon(&mut self) {
        if let Some(mut open) = self.open.take() {
            // Both fail only when there is nothing left to abandon.
            let _ = open.stream.reset(GIVEN_UP);
            let _ = open.back.send(open.stream);
        }
    }
}

impl Drop for AnswerSender {
    fn drop(&mut self) {
        self.abandon();
    }
}

/// Serves one stream that the peer opened.
pub(super) async fn serve(shared: Arc<Shared>, link: Arc<Link>, mut stream: SendStream, receive: quinn::RecvStream) {
    let mut frames = FrameReader::new(receive);
    let request = match timeout(REQUEST_TIMEOUT, frames.next()).await {
        Ok(Ok(Some(Message::Request(request)))) => request,
        Ok(Ok(Some(_))) => return link.close(Closing::Violation, "a stream that does not start with a request"),
        Ok(Ok(None)) => return link.close(Closing::Violation, "a stream without a request"),
        Ok(Err(error)) if error.is_violation() => return link.close(Closing::Violation, &error.to_string()),
        Ok(Err(_)) => return,
        Err(_) => {
            let _ = stream.reset(GIVEN_UP);
            return;
        }
    };
    if request.priority == Priority::OnDemand {
        // Fails only for a stream that the asker has stopped already.
        let _ = stream.set_priority(ON_DEMAND);
    }
    let Some(held) = hold(&shared, &link, request.priority) else {
        let busy = Message::Busy { request: request.id, retry_after: RETRY_AFTER, alternates: Vec::new() };
        // The asker may have gone; the stream is finished when it is dropped.
        let _ = timeout(STALL_TIMEOUT, frames::write(&mut stream, &busy)).await;
        return;
    };
    answer(&shared, &link, request, stream, frames).await;
    drop(held);
}

/// What a request occupies until its last byte is acknowledged.
type Held = (Slot, Slot, Using);

fn hold(shared: &Shared, link: &Arc<Link>, priority: Priority) -> Option<Held> {
    let own = link.slot(priority)?;
    Some((own, shared.slots.take(priority)?, link.using()))
}

async fn answer(shared: &Arc<Shared>, link: &Arc<Link>, request: Request, stream: SendStream, frames: FrameReader) {
    let (first, pieces) = match &request.what {
        Asked::Pieces { first, fingerprints, .. } => (*first, fingerprints.len()),
        Asked::Object { .. } => (0, 1),
    };
    let cancelled = CancellationToken::new();
    let _cancel_when_done = cancelled.clone().drop_guard();
    let stopped = stream.stopped();
    let (back, mut returned) = oneshot::channel();
    let answers = AnswerSender {
        request: request.id,
        priority: request.priority,
        ledger: Ledger::new(request.id, first, vec![u64::MAX; pieces]),
        budget: shared.budget.clone(),
        room: None,
        cancelled: cancelled.clone(),
        link: link.clone(),
        open: Some(Open { stream, back }),
    };
    let admitted = link.admitted();
    let peer = PeerContext { peer: admitted.peer, role: admitted.role, zone: admitted.zone.clone() };
    let id = request.id;
    shared.service.handle(peer, request, answers);
    let returned = tokio::select! {
        stream = &mut returned => stream,
        _ = stopped => { cancelled.cancel(); returned.await }
        () = cancel_asked(link, id, frames) => { cancelled.cancel(); returned.await }
    };
    // The sender always hands its stream back, whatever became of it.
    if let Ok(mut stream) = returned
        && timeout(STALL_TIMEOUT, stream.stopped()).await.is_err()
    {
        let _ = stream.reset(GIVEN_UP);
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
