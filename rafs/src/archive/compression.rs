//! What an archive is compressed with, told by its first bytes.

use std::io::{self, BufRead, BufReader, Cursor, Read};

use flate2::bufread::GzDecoder;

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// Decompresses gzip (any number of members) and zstd (any number of frames); anything else is passed on. Garbage behind
/// compressed data is an error when it is reached.
pub(crate) fn decompress<'a>(mut stream: impl Read + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    let mut head = Vec::new();
    stream.by_ref().take(6).read_to_end(&mut head)?;
    let kind = compressed_with(&head);
    let stream = BufReader::with_capacity(BUFFER, Cursor::new(head).chain(stream));
    match kind {
        Some("gzip") => Ok(buffered(Members { member: Some(GzDecoder::new(stream)) })),
        Some("zstd") => Ok(buffered(zstd::stream::read::Decoder::with_buffer(stream)?)),
        Some(other) => {
            let message = format!("{other} is not supported: decompress it first");
            Err(io::Error::new(io::ErrorKind::Unsupported, message))
        }
        None => Ok(Box::new(stream)),
    }
}

/// A stream of a tar that is not compressed.
pub(crate) fn plain<'a>(mut stream: impl Read + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    let mut head = Vec::new();
    stream.by_ref().take(6).read_to_end(&mut head)?;
    if let Some(kind) = compressed_with(&head) {
        let message = format!("it is compressed with {kind}, and must be a plain tar: decompress it first");
        return Err(io::Error::new(io::ErrorKind::Unsupported, message));
    }
    Ok(Box::new(BufReader::with_capacity(BUFFER, Cursor::new(head).chain(stream))))
}

/// What a stream that begins so is compressed with, if that is known.
fn compressed_with(head: &[u8]) -> Option<&'static str> {
    match head {
        [0x1F, 0x8B, ..] => Some("gzip"),
        [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] => Some("zstd"),
        [b'B', b'Z', b'h', ..] => Some("bzip2"),
        [0xFD, b'7', b'z', b'X', b'Z', 0] => Some("xz"),
        _ => None,
    }
}

/// The members of a gzip stream, one behind the other. Unlike the library's own reader it tells garbage of a few bytes from a member
/// that is cut off.
struct Members<R> {
    /// None behind the last one.
    member: Option<GzDecoder<R>>,
}

impl<R: BufRead> Read for Members<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(member) = &mut self.member {
            let len = member.read(buffer)?;
            if len > 0 || buffer.is_empty() {
                return Ok(len);
            }
            match member.get_mut().fill_buf()?.first() {
                None => self.member = None,
                Some(0x1F) => self.member = self.member.take().map(|member| GzDecoder::new(member.into_inner())),
                Some(_) => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "what follows is no gzip member"));
                }
            }
        }
        Ok(0)
    }
}

fn buffered<'a>(stream: impl Read + 'a) -> Box<dyn BufRead + 'a> {
    Box::new(BufReader::with_capacity(BUFFER, stream))
}
