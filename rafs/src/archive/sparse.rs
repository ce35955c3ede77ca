//! Sparse files: where their data lies, in the four forms in which GNU tar has written that down, and the reader that
//! fills the holes with zeroes.
//!
//! | form | segments | real size |
//! | --- | --- | --- |
//! | old GNU (type `S`) | 4 in the header, 21 in each block that follows | header |
//! | PAX 0.0 | records `GNU.sparse.offset` and `GNU.sparse.numbytes`, repeated | `GNU.sparse.size` |
//! | PAX 0.1 | record `GNU.sparse.map`: `offset,length,...` | `GNU.sparse.size` |
//! | PAX 1.0 | decimal lines in front of the data, padded to 512 | `GNU.sparse.realsize` |

use std::io::{self, Read};

use tar::{GnuExtSparseHeader, GnuSparseHeader, Header};

use super::records::{Records, decimal};

/// Most segments of a file: 16 MiB of memory.
const MAX_SEGMENTS: u64 = 1 << 20;

/// A range of a file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    offset: u64,
    len: u64,
}

impl Segment {
    /// Bytes.
    pub(super) fn len(self) -> u64 {
        self.len
    }
}

/// The map of one file while it is put together. A file without one is a single segment.
#[derive(Debug, Default)]
pub(super) struct Map {
    segments: Vec<Segment>,
    size: Option<u64>,
    /// A block with more segments follows the header.
    pub(super) continues: bool,
    /// The map is in front of the data.
    pub(super) in_data: bool,
}

impl Map {
    /// The map of the old GNU form.
    pub(super) fn read_header(&mut self, header: &Header) -> Result<(), String> {
        let gnu = header.as_gnu().ok_or("a sparse file in a header that is not of GNU tar")?;
        self.size = Some(gnu.real_size().map_err(|error| error.to_string())?);
        self.continues = gnu.isextended[0] != 0;
        self.read_slots(&gnu.sparse)
    }

    /// A block of the old GNU form that follows the header.
    pub(super) fn read_continuation(&mut self, block: &[u8; 512]) -> Result<(), String> {
        let mut more = GnuExtSparseHeader::new();
        more.as_mut_bytes().copy_from_slice(block);
        self.continues = more.isextended[0] != 0;
        self.read_slots(more.sparse())
    }

    fn read_slots(&mut self, slots: &[GnuSparseHeader]) -> Result<(), String> {
        for slot in slots.iter().filter(|slot| !slot.is_empty()) {
            let offset = slot.offset().map_err(|error| error.to_string())?;
            self.push(offset, slot.length().map_err(|error| error.to_string())?)?;
        }
        Ok(())
    }

    fn push(&mut self, offset: u64, len: u64) -> Result<(), String> {
        if self.segments.len() as u64 >= MAX_SEGMENTS {
            return Err(format!("a sparse file of more than {MAX_SEGMENTS} segments"));
        }
        self.segments.push(Segment { offset, len });
        Ok(())
    }

    /// The maps of the PAX forms, or that one precedes the data.
    pub(super) fn read_records(&mut self, records: &Records) -> Result<(), String> {
        let malformed = |key: &str| format!("malformed {key}");
        let mut offset = None;
        for (key, value) in records.iter().filter(|(key, _)| key.starts_with(b"GNU.sparse.")) {
            let number = || decimal(value).ok_or_else(|| malformed(&String::from_utf8_lossy(key)));
            match &key["GNU.sparse.".len()..] {
                b"size" | b"realsize" => self.size = Some(number()?),
                b"major" => self.in_data = number()? == 1,
                b"offset" => offset = Some(number()?),
                b"numbytes" => self.push(offset.take().ok_or_else(|| malformed("GNU.sparse.offset"))?, number()?)?,
                b"map" => {
                    let numbers = value.split(|byte| *byte == b',').map(decimal).collect::<Option<Vec<_>>>();
                    let numbers = numbers.filter(|numbers| numbers.len().is_multiple_of(2));
                    for pair in numbers.ok_or_else(|| malformed("GNU.sparse.map"))?.chunks_exact(2) {
                        self.push(pair[0], pair[1])?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The map in front of the data. Errors of kind `InvalidData` are about the map, others those of the stream.
    pub(super) fn read_data(&mut self, data: &mut impl Read) -> io::Result<()> {
        let mut lines = Lines { data, block: [0; 512], next: 512 };
        let count = lines.number()?;
        if count > MAX_SEGMENTS {
            return Err(invalid(format!("a sparse file of {count} segments, at most {MAX_SEGMENTS} are read")));
        }
        for _ in 0..count {
            let offset = lines.number()?;
            self.push(offset, lines.number()?).map_err(invalid)?;
        }
        Ok(())
    }

    /// Size and segments of the file, of which `data` bytes are stored.
    pub(super) fn finish(self, data: u64) -> Result<(u64, Vec<Segment>), String> {
        let Some(size) = self.size else {
            return match self.segments.is_empty() && !self.in_data {
                true => Ok((data, vec![Segment { offset: 0, len: data }])),
                false => Err("a sparse file without a size".into()),
            };
        };
        let (mut end, mut stored) = (0, 0);
        for Segment { offset, len } in &self.segments {
            let after = offset.checked_add(*len).filter(|after| *offset >= end && *after <= size);
            end = after.ok_or_else(|| format!("a sparse file with a segment of {len} bytes at {offset}"))?;
            stored += len;
        }
        if stored != data {
            return Err(format!("a sparse file with segments of {stored} bytes, of which {data} are there"));
        }
        Ok((size, self.segments))
    }
}

fn invalid(problem: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem.into())
}

/// Reads decimal lines; takes whole blocks from the data.
struct Lines<'a, R> {
    data: &'a mut R,
    block: [u8; 512],
    next: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> io::Result<u64> {
        let mut text = Vec::new();
        loop {
            if self.next == self.block.len() {
                self.data.read_exact(&mut self.block)?;
                self.next = 0;
            }
            let byte = self.block[self.next];
            self.next += 1;
            if byte == b'\n' {
                return decimal(&text).filter(|_| !text.is_empty()).ok_or_else(|| invalid("malformed sparse map"));
            }
            if text.len() == 20 {
                return Err(invalid("malformed sparse map"));
            }
            text.push(byte);
        }
    }
}

/// The content of a file: its segments, and zeroes between them.
pub(super) struct Content<'a, R> {
    stream: &'a mut R,
    /// Bytes of the entry in the stream that were not read.
    left: &'a mut u64,
    segments: std::iter::Peekable<std::vec::IntoIter<Segment>>,
    position: u64,
    size: u64,
}

impl<'a, R: Read> Content<'a, R> {
    pub(super) fn new(stream: &'a mut R, left: &'a mut u64, segments: Vec<Segment>, size: u64) -> Self {
        Self { stream, left, segments: segments.into_iter().peekable(), position: 0, size }
    }
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let position = self.position;
        while self.segments.next_if(|segment| segment.offset + segment.len <= position).is_some() {}
        let (is_data, end) = match self.segments.peek() {
            Some(segment) if segment.offset <= position => (true, segment.offset + segment.len),
            Some(segment) => (false, segment.offset),
            None => (false, self.size),
        };
        let len = buffer.len().min(usize::try_from(end - position).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let read = if is_data {
            let read = self.stream.read(&mut buffer[..len])?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            *self.left -= read as u64;
            read
        } else {
            buffer[..len].fill(0);
            len
        };
        self.position += read as u64;
        Ok(read)
    }
}
