//! The header of a gzip member (RFC 1952, section 2.3). Nothing in it matters here but where it ends.

use std::io::{self, BufRead};

/// Most bytes of a header: names and comments have no length of their own.
const MAX_HEADER: u64 = 64 << 10;

const MAGIC: [u8; 2] = [0x1F, 0x8B];
const DEFLATE: u8 = 8;
const HAS_CRC: u8 = 0x02;
const HAS_EXTRA: u8 = 0x04;
const HAS_NAME: u8 = 0x08;
const HAS_COMMENT: u8 = 0x10;
const RESERVED: u8 = 0xE0;

/// Reads a header; the next byte is the first of deflate.
pub(super) fn read(input: &mut impl BufRead) -> io::Result<()> {
    let mut input = io::Read::take(input, MAX_HEADER);
    let invalid = |problem: &str| Err(io::Error::new(io::ErrorKind::InvalidData, problem));
    // Garbage of a few bytes is garbage, rather than a header that is cut off.
    if input.fill_buf()?.first().is_some_and(|byte| *byte != MAGIC[0]) {
        return invalid("what follows is no gzip member");
    }
    let mut fixed = [0; 10];
    io::Read::read_exact(&mut input, &mut fixed)?;
    if !fixed.starts_with(&MAGIC) {
        return invalid("what follows is no gzip member");
    }
    let flags = fixed[3];
    if fixed[2] != DEFLATE || flags & RESERVED != 0 {
        return invalid("a gzip member of an unknown kind");
    }
    if flags & HAS_EXTRA != 0 {
        let mut len = [0; 2];
        io::Read::read_exact(&mut input, &mut len)?;
        let len = u64::from(u16::from_le_bytes(len));
        if io::copy(&mut io::Read::take(&mut input, len), &mut io::sink())? < len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    for flag in [HAS_NAME, HAS_COMMENT] {
        if flags & flag != 0 {
            let mut text = Vec::new();
            input.read_until(0, &mut text)?;
            if text.last() != Some(&0) {
                return invalid("a name or comment in a gzip header that does not end");
            }
        }
    }
    if flags & HAS_CRC != 0 {
        io::Read::read_exact(&mut input, &mut [0; 2])?;
    }
    Ok(())
}

/// What follows the header at the start of `bytes`.
pub(super) fn skip(mut bytes: &[u8]) -> Result<&[u8], String> {
    read(&mut bytes).map_err(|error| format!("the header of a gzip member: {error}"))?;
    Ok(bytes)
}
