//! What an archive is compressed with, told by its first bytes.

use std::io::{self, BufRead, BufReader, Cursor, Read};

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// Decompresses gzip (any number of members) and zstd (any number of frames); anything else is passed on. Garbage behind
/// compressed data is an error when it is reached.
pub(crate) fn decompress<'a>(mut stream: impl Read + 'a) -> io::Result<Box<dyn BufRead + 'a>> {
    let mut head = Vec::new();
    stream.by_ref().take(6).read_to_end(&mut head)?;
    let kind = head.clone();
    let stream = BufReader::with_capacity(BUFFER, Cursor::new(head).chain(stream));
    let unsupported = |what: &str| Err(io::Error::new(io::ErrorKind::Unsupported, what.to_owned()));
    match kind.as_slice() {
        [0x1F, 0x8B, ..] => Ok(buffered(flate2::bufread::MultiGzDecoder::new(stream))),
        [0x28, 0xB5, 0x2F, 0xFD, ..] | [0x50..=0x5F, 0x2A, 0x4D, 0x18, ..] => {
            Ok(buffered(zstd::stream::read::Decoder::with_buffer(stream)?))
        }
        [b'B', b'Z', b'h', ..] => unsupported("bzip2 is not supported: decompress it first"),
        [0xFD, b'7', b'z', b'X', b'Z', 0] => unsupported("xz is not supported: decompress it first"),
        _ => Ok(Box::new(stream)),
    }
}

fn buffered<'a>(stream: impl Read + 'a) -> Box<dyn BufRead + 'a> {
    Box::new(BufReader::with_capacity(BUFFER, stream))
}
