//! Frames: how messages lie in a stream of bytes.
//!
//! ```text
//! | header length, u32 LE, 1..=65536 | header: wire.v1.Header in protobuf | payload: Data.length raw bytes, DATA only |
//! ```
//!
//! Pure: bytes in, messages out; reading and writing is the transport's. Both bounds are checked before anything is
//! allocated, so a stranger can make a reader hold at most one header and one payload.

use prost::Message as _;

use crate::{convert::ConvertError, generated::wire, message::Message};

/// Most bytes of a header.
pub const MAX_HEADER: usize = 64 << 10;
/// Most bytes of a payload.
pub const MAX_PAYLOAD: usize = 256 << 10;
/// Bytes before the header.
pub const PREFIX: usize = 4;

/// Why bytes are not a frame. The connection is of no more use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The length in front is zero or past [`MAX_HEADER`].
    #[error("a header of {found} bytes; from 1 to {MAX_HEADER} are allowed")]
    HeaderLength {
        /// The length found.
        found: u32,
    },
    /// The header is not protobuf.
    #[error("a header that does not parse: {0}")]
    Malformed(#[from] prost::DecodeError),
    /// The message breaks a limit.
    #[error("a message that breaks the protocol: {0}")]
    Invalid(#[from] ConvertError),
    /// The message to send does not fit in a frame.
    #[error("a message of {found} bytes to send; at most {MAX_HEADER} are allowed")]
    TooLarge {
        /// Its size.
        found: usize,
    },
}

/// Appends the prefix and header of `message`; for [`Message::Data`] the payload must follow on the stream.
///
/// Fails, with nothing appended, when the message breaks a limit that the other side would refuse it for.
pub fn encode_header(message: &Message, to: &mut Vec<u8>) -> Result<(), CodecError> {
    let header = wire::Header::try_from(message)?;
    let size = header.encoded_len();
    if size > MAX_HEADER {
        return Err(CodecError::TooLarge { found: size });
    }
    to.reserve(PREFIX + size);
    to.extend_from_slice(&(size as u32).to_le_bytes());
    header.encode(to).expect("a vector grows");
    Ok(())
}

/// The bytes of the header that follows this prefix.
pub fn header_len(prefix: [u8; PREFIX]) -> Result<usize, CodecError> {
    let found = u32::from_le_bytes(prefix);
    let len = found as usize;
    if len == 0 || len > MAX_HEADER { Err(CodecError::HeaderLength { found }) } else { Ok(len) }
}

/// The message in a whole header, without its prefix.
pub fn decode_body(header: &[u8]) -> Result<Message, CodecError> {
    Ok(Message::try_from(wire::Header::decode(header)?)?)
}

/// The message at the start of `bytes` and how many bytes it took, or nothing while its header is not all there.
///
/// [`Message::payload_len`] raw bytes follow on the stream; they are not counted.
pub fn decode_header(bytes: &[u8]) -> Result<Option<(Message, usize)>, CodecError> {
    let Some((prefix, rest)) = bytes.split_first_chunk() else { return Ok(None) };
    let len = header_len(*prefix)?;
    let Some(header) = rest.get(..len) else { return Ok(None) };
    Ok(Some((decode_body(header)?, PREFIX + len)))
}

#[cfg(test)]
mod tests;
