//! Frames on one stream of a connection, whichever transport carries it.
//!
//! Over QUIC a stream is quinn's; over TCP it is what the connection's frames say about one request, or the notices.

use bytes::{Bytes, BytesMut};
use futures::future::Either;
use shoal_proto::{CodecError, Message, Status, encode_header};

use super::{Gone, quic, tcp};

/// Why no frame could be read.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum FrameError {
    /// The connection ended.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The other side gave the stream up.
    #[error("the stream was given up")]
    Reset,
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// What came is not a frame.
    #[error(transparent)]
    Codec(#[from] CodecError),
    /// A frame that has no place on this connection.
    #[error("{0}")]
    Misplaced(&'static str),
}

impl FrameError {
    /// Whether the other side broke the protocol, rather than went away.
    pub(super) fn is_violation(&self) -> bool {
        !matches!(self, Self::Gone(_) | Self::Reset)
    }
}

/// Why a message could not be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteFailed {
    /// The connection ended.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The other side does not want the rest of the stream.
    #[error("the stream is not read any more")]
    Stopped,
    /// The message breaks a limit.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// What goes first when a connection has more to send than it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Urgency {
    /// Answers that nobody waits for.
    Bulk,
    /// Answers that a process waits for, and requests.
    OnDemand,
    /// Small, and what others ask of whom hangs on them.
    Notice,
}

/// The receiving half of a stream. Dropping it tells the sender to stop.
#[derive(Debug)]
pub(super) enum FrameReader {
    Quic(quic::Reader),
    Tcp(tcp::Reader),
}

impl FrameReader {
    /// The next message; `None` when the stream ended where a frame would start. Not cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<Message>, FrameError> {
        match self {
            Self::Quic(reader) => reader.next().await,
            Self::Tcp(reader) => reader.next().await,
        }
    }

    /// Appends the `length` raw bytes that follow a message. Not cancel safe.
    pub(super) async fn payload(&mut self, length: usize, to: &mut BytesMut) -> Result<(), FrameError> {
        match self {
            Self::Quic(reader) => reader.payload(length, to).await,
            Self::Tcp(reader) => reader.payload(length, to),
        }
    }
}

/// The sending half of a stream.
#[derive(Debug)]
pub(super) enum FrameWriter {
    Quic(quic::Writer),
    Tcp(tcp::Writer),
}

impl FrameWriter {
    pub(super) fn set_urgency(&mut self, urgency: Urgency) {
        match self {
            Self::Quic(writer) => writer.set_urgency(urgency),
            Self::Tcp(writer) => writer.set_urgency(urgency),
        }
    }

    /// Most bytes of one part of a piece.
    pub(super) fn part(&self) -> usize {
        match self {
            Self::Quic(_) => shoal_proto::MAX_PAYLOAD,
            Self::Tcp(_) => tcp::PART,
        }
    }

    /// Hands a message and its payload to the connection; waits while that has too much to send. When it fails or is
    /// dropped half-way nothing more can be sent on the stream but [`reset`](Self::reset).
    pub(super) async fn write(&mut self, message: &Message, payload: Bytes) -> Result<(), WriteFailed> {
        match self {
            Self::Quic(writer) => writer.write(message, payload).await,
            Self::Tcp(writer) => writer.write(message, payload).await,
        }
    }

    /// Nothing follows.
    pub(super) fn finish(&mut self) {
        match self {
            Self::Quic(writer) => writer.finish(),
            Self::Tcp(writer) => writer.finish(),
        }
    }

    /// Gives the stream up, for a reason that is told where the transport has a word for it.
    pub(super) fn reset(&mut self, why: Status) {
        match self {
            Self::Quic(writer) => writer.reset(),
            Self::Tcp(writer) => writer.reset(why),
        }
    }

    /// Resolves when the other side has all that was written, or wants none of it.
    pub(super) fn taken(&self) -> impl Future<Output = ()> + Send + use<> {
        match self {
            Self::Quic(writer) => Either::Left(writer.taken()),
            Self::Tcp(writer) => Either::Right(writer.taken()),
        }
    }
}

/// The frame of a message, without its payload.
pub(super) fn encode(message: &Message) -> Result<Bytes, CodecError> {
    let mut frame = Vec::new();
    encode_header(message, &mut frame)?;
    Ok(frame.into())
}
