//! Asking: a request, and its answer piece by piece.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use shoal_proto::{Asked, Contact, Data, Message, PeerId, Request, Status};
use tokio::time::timeout;

use super::{
    Closing, Violation,
    frames::{FrameError, FrameReader},
    ledger::Ledger,
    link::{Link, Using},
};

/// How long the peer may keep us waiting for a stream and for room to ask.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// Memory set aside for a piece before its bytes are there; a larger one grows as they come.
const FIRST_ALLOCATION: u64 = 4 << 20;

/// What is called progress: who sends a piece in crumbs is as good as silent.
const PROGRESS_BYTES: usize = 64 << 10;

/// One part of what a peer says to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A whole piece, or the object as piece 0; within the limit given for it, and otherwise unverified.
    Data {
        /// Which.
        piece: u32,
        /// Encoded, as they lie in the blob.
        bytes: Bytes,
    },
    /// A good part of a piece has come, not yet all of it.
    Progress,
    /// The peer does not hold this piece under the fingerprint asked for.
    NotHave {
        /// Which.
        piece: u32,
    },
    /// The peer is getting it.
    Pending {
        /// Expected time until data flows.
        eta: Duration,
    },
    /// Not now, not here. Nothing follows.
    Busy {
        /// When to come again.
        retry_after: Duration,
        /// Who else may have it.
        alternates: Vec<Contact>,
    },
    /// The peer is not home to these pieces. Nothing follows.
    NotMyHome {
        /// Who it believes to be the live seed peers of the zone.
        members: Vec<PeerId>,
    },
    /// The peer is home but may not or cannot read this registry. Nothing follows.
    CannotSource {
        /// For the log.
        reason: String,
    },
}

/// Why a request could not be sent.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// There is no connection to the peer.
    #[error("not connected to {0}")]
    NotConnected(PeerId),
    /// A daemon of an earlier release does not know such objects.
    #[error("{0} does not know what it would be asked for")]
    Unknown(PeerId),
    /// The connection broke, or the peer took too long to let us ask.
    #[error("cannot ask {peer}: {why}")]
    Lost {
        /// Whom.
        peer: PeerId,
        /// What happened.
        why: String,
    },
    /// There must be as many limits as pieces, and one for an object.
    #[error("{limits} limits for {pieces} pieces")]
    Limits {
        /// Pieces asked for.
        pieces: usize,
        /// Limits given.
        limits: usize,
    },
}

/// Why an answer broke off.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// The connection or the stream is gone.
    #[error("lost: {0}")]
    Lost(String),
    /// The peer ended it, for its own reasons.
    #[error("the peer ended it: {0:?}")]
    Ended(Status),
    /// The peer broke the protocol; its connection is closed.
    #[error("the peer broke the protocol: {0}")]
    Violation(String),
}

/// What a peer says to a request, in order; ends after the last answer or the first error. Dropping it cancels the
/// request.
pub struct AnswerStream(Pin<Box<dyn Stream<Item = Result<Answer, AnswerError>> + Send>>);

impl fmt::Debug for AnswerStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AnswerStream").finish_non_exhaustive()
    }
}

impl Stream for AnswerStream {
    type Item = Result<Answer, AnswerError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(cx)
    }
}

/// Sends `request` over `link`, with the greatest length that the answer to each piece may have.
pub(super) async fn ask(
    link: Arc<Link>,
    mut request: Request,
    limits: Vec<u64>,
) -> Result<AnswerStream, RequestError> {
    let (first, pieces) = match &request.what {
        Asked::Pieces { first, fingerprints, .. } => (*first, fingerprints.len()),
        Asked::Object { .. } => (0, 1),
    };
    if pieces != limits.len() {
        return Err(RequestError::Limits { pieces, limits: limits.len() });
    }
    let using = link.using();
    request.id = link.next_request();
    let lost = |why: String| RequestError::Lost { peer: link.peer(), why };
    let id = request.id;
    if !link.knows(request.what.needs()) {
        return Err(RequestError::Unknown(link.peer()));
    }
    let frames = timeout(ASK_TIMEOUT, link.wire().ask(request, &limits))
        .await
        .map_err(|_| lost("it does not let us ask".into()))?
        .map_err(|e| lost(e.to_string()))?;
    let ledger = Ledger::new(id, first, limits);
    let answers = Answers { link, _using: using, frames, ledger, partial: BytesMut::new(), told: 0, over: false };
    let answers = stream::unfold(answers, |mut answers| async {
        let next = answers.next().await?;
        Some((next, answers))
    });
    Ok(AnswerStream(answers.boxed()))
}

struct Answers {
    link: Arc<Link>,
    _using: Using,
    frames: FrameReader,
    ledger: Ledger,
    partial: BytesMut,
    /// Bytes of `partial` that were told as progress.
    told: usize,
    over: bool,
}

impl Answers {
    async fn next(&mut self) -> Option<Result<Answer, AnswerError>> {
        if self.over {
            return None;
        }
        let next = self.read().await.transpose();
        self.over |= !matches!(next, Some(Ok(_)));
        next
    }

    async fn read(&mut self) -> Result<Option<Answer>, AnswerError> {
        loop {
            let message = self.frames.next().await.map_err(|e| self.failed(e))?;
            let message = message.ok_or_else(|| self.failed(FrameError::Truncated))?;
            self.ledger.check(&message).map_err(|e| self.violation(&e))?;
            let answer = match message {
                Message::Data(data) => match self.part(data).await? {
                    Some(answer) => answer,
                    None => continue,
                },
                Message::NotHave { piece, .. } => Answer::NotHave { piece },
                Message::Pending { eta, .. } => Answer::Pending { eta },
                Message::Busy { retry_after, alternates, .. } => self.last(Answer::Busy { retry_after, alternates }),
                Message::NotMyHome { members, .. } => self.last(Answer::NotMyHome { members }),
                Message::CannotSource { reason, .. } => self.last(Answer::CannotSource { reason }),
                Message::End { status: Status::Complete, .. } => return Ok(None),
                Message::End { status, .. } => return Err(AnswerError::Ended(status)),
                _ => return Err(self.violation(&Violation::NoAnswer)),
            };
            return Ok(Some(answer));
        }
    }

    async fn part(&mut self, data: Data) -> Result<Option<Answer>, AnswerError> {
        if data.offset == 0 {
            self.partial = BytesMut::with_capacity(data.total.min(FIRST_ALLOCATION) as usize);
            self.told = 0;
        }
        let read = self.frames.payload(data.length as usize, &mut self.partial).await;
        read.map_err(|e| self.failed(e))?;
        self.link.count_received(data.length.into());
        if data.is_last() {
            return Ok(Some(Answer::Data { piece: data.piece, bytes: std::mem::take(&mut self.partial).freeze() }));
        }
        if self.partial.len() - self.told < PROGRESS_BYTES {
            return Ok(None);
        }
        self.told = self.partial.len();
        Ok(Some(Answer::Progress))
    }

    fn last(&mut self, answer: Answer) -> Answer {
        self.over = true;
        answer
    }

    fn failed(&self, error: FrameError) -> AnswerError {
        if error.is_violation() { self.violation(&error) } else { AnswerError::Lost(error.to_string()) }
    }

    fn violation(&self, error: &dyn std::error::Error) -> AnswerError {
        let detail = error.to_string();
        self.link.close(Closing::Violation, &detail);
        AnswerError::Violation(detail)
    }
}
