//! Frames on a QUIC stream: reading and writing what `shoal_proto` encodes.

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};
use shoal_proto::{CodecError, Message, PREFIX, decode_body, encode_header, header_len};
use tokio::io::AsyncReadExt;

/// Why no frame could be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum FrameError {
    /// The stream was reset or its connection is gone.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// What came is not a frame.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

impl FrameError {
    /// Whether the other side broke the protocol, rather than went away.
    pub(super) fn is_violation(&self) -> bool {
        !matches!(self, Self::Read(_))
    }
}

/// The receiving half of a stream. Dropping it tells the sender to stop.
#[derive(Debug)]
pub(super) struct FrameReader {
    stream: RecvStream,
    header: Vec<u8>,
}

impl FrameReader {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self { stream, header: Vec::new() }
    }

    /// The next message; `None` when the stream ended where a frame would start. Not cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<Message>, FrameError> {
        let mut prefix = [0; PREFIX];
        match self.stream.read_exact(&mut prefix).await {
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            read => read.map_err(exact)?,
        }
        self.header.resize(header_len(prefix)?, 0);
        self.stream.read_exact(&mut self.header).await.map_err(exact)?;
        Ok(Some(decode_body(&self.header)?))
    }

    /// Appends the `length` raw bytes that follow a message. Not cancel safe.
    pub(super) async fn payload(&mut self, length: usize, to: &mut BytesMut) -> Result<(), FrameError> {
        let end = to.len() + length;
        while to.len() < end {
            let left = end - to.len();
            let read = self.stream.read_buf(&mut to.limit(left)).await.map_err(io)?;
            if read == 0 {
                return Err(FrameError::Truncated);
            }
        }
        Ok(())
    }
}

fn exact(error: ReadExactError) -> FrameError {
    match error {
        ReadExactError::FinishedEarly(_) => FrameError::Truncated,
        ReadExactError::ReadError(error) => error.into(),
    }
}

/// Takes quinn's error out of the `io::Error` that the `AsyncRead` of its stream wraps it in.
fn io(error: std::io::Error) -> FrameError {
    match error.downcast::<ReadError>() {
        Ok(error) => error.into(),
        Err(_) => ReadError::ClosedStream.into(),
    }
}

/// Why a message could not be sent.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteFailed {
    /// The other side stopped the stream, or the connection is gone.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The message breaks a limit.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Sends a message without payload.
pub(super) async fn write(stream: &mut SendStream, message: &Message) -> Result<(), WriteFailed> {
    stream.write_all_chunks(&mut [encode(message)?]).await?;
    Ok(())
}

/// The frame of a message, without its payload.
pub(super) fn encode(message: &Message) -> Result<Bytes, CodecError> {
    let mut frame = Vec::new();
    encode_header(message, &mut frame)?;
    Ok(frame.into())
}
