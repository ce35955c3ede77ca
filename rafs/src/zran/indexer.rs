//! Reads a gzip stream from front to back, takes note of where one could start, and hashes the stored bytes.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::rc::Rc;

use flate2::Crc;
use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

use super::inflater::{Inflater, Step, Stop};
use super::{InflateContext, header};

/// Decoded and encoded bytes between checkpoints: what a read of little costs, against 32 KiB of index for each.
const SPAN: u64 = 2 << 20;
const ENCODED_SPAN: u64 = 1 << 20;
/// Bytes of the stream that are read at once.
const BUFFER: usize = 256 << 10;

/// How far a stream was read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Stored bytes that were needed for what was decoded so far.
    pub(crate) encoded: u64,
    /// Bytes that were decoded and handed out.
    pub(crate) decoded: u64,
    /// Checkpoints so far; the last of them is at or before this position.
    pub(crate) checkpoints: usize,
}

/// A place to start at. Its lengths are 0: how far what is reached from it extends, others know.
pub(crate) type Checkpoint = InflateContext;

/// A gzip stream that is read once. Decoded bytes come out of [`Read`]; each read ends exactly where its bytes do, so that
/// positions are those of the bytes that were handed out.
pub(crate) struct Indexer<R> {
    input: BufReader<Hashed<R>>,
    inflater: Inflater,
    /// Whether the next byte is one of deflate, rather than of a header or the end.
    in_member: bool,
    members: u64,
    /// The last byte that was consumed.
    byte: u8,
    checksum: Crc,
    position: Rc<Cell<Position>>,
    checkpoints: Vec<Checkpoint>,
}

impl<R: Read> Indexer<R> {
    /// Of a stream whose sha256 is to be found out, unless it is `known`.
    pub(crate) fn new(stream: R, known: Option<BlobId>) -> Self {
        let digest = known.map_or_else(|| Digest::Hash(Sha256::new()), Digest::Known);
        Self {
            input: BufReader::with_capacity(BUFFER, Hashed { stream, digest, len: 0 }),
            inflater: Inflater::new(),
            in_member: false,
            members: 0,
            byte: 0,
            checksum: Crc::new(),
            position: Rc::default(),
            checkpoints: Vec::new(),
        }
    }

    /// Where the stream is, also while it is lent to somebody else.
    pub(crate) fn position(&self) -> Rc<Cell<Position>> {
        Rc::clone(&self.position)
    }

    /// Once the stream was read to its end: sha256 and number of its stored bytes, and all checkpoints in order.
    pub(crate) fn finish(self) -> (BlobId, u64, Vec<Checkpoint>) {
        let Hashed { digest, len, .. } = self.input.into_inner();
        let id = match digest {
            Digest::Known(id) => id,
            Digest::Hash(hasher) => BlobId::new(hasher.finalize().into()),
        };
        (id, len, self.checkpoints)
    }

    /// Decodes something into the buffer, or goes on to the next block or member. `None` at the end of the stream.
    fn step(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        if !self.in_member {
            return Ok(self.begin_member()?.then_some(0));
        }
        let input = self.input.fill_buf()?;
        if input.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let stepped = self.inflater.step(input, buffer, true);
        let Step { consumed, produced, stop } =
            stepped.map_err(|problem| invalid(format!("the gzip data is malformed: {problem}")))?;
        self.byte = if consumed > 0 { input[consumed - 1] } else { self.byte };
        self.input.consume(consumed);
        self.checksum.update(&buffer[..produced]);
        self.advance(consumed, produced);
        match stop {
            Stop::Short => {}
            Stop::Block { bits } => self.offer(bits),
            Stop::End => self.end_member()?,
        }
        Ok(Some(produced))
    }

    fn advance(&self, encoded: usize, decoded: usize) {
        let mut position = self.position.get();
        position.encoded += encoded as u64;
        position.decoded += decoded as u64;
        self.position.set(position);
    }

    /// Reads the header of the next member; `false` at the end of the stream.
    fn begin_member(&mut self) -> io::Result<bool> {
        if self.input.fill_buf()?.is_empty() && self.members > 0 {
            return Ok(false);
        }
        let mut counted = Counted { input: &mut self.input, len: 0 };
        header::read(&mut counted)?;
        let len = counted.len;
        self.advance(len, 0);
        self.inflater.reset();
        self.byte = 0;
        self.checksum.reset();
        (self.in_member, self.members) = (true, self.members + 1);
        self.offer(0);
        Ok(true)
    }

    /// Compares checksum and length at the end of a member.
    fn end_member(&mut self) -> io::Result<()> {
        let mut trailer = [0; super::TRAILER];
        self.input.read_exact(&mut trailer)?;
        self.advance(trailer.len(), 0);
        self.in_member = false;
        let stated = u64::from_le_bytes(trailer);
        let found = u64::from(self.checksum.amount()) << 32 | u64::from(self.checksum.sum());
        if stated == found { Ok(()) } else { Err(invalid("checksum or length at the end of a gzip member is wrong")) }
    }

    /// Takes the current block as a checkpoint if the last one is far enough away.
    fn offer(&mut self, bits: u8) {
        let mut position = self.position.get();
        let far = self.checkpoints.last().is_none_or(|last| {
            position.decoded - last.decoded_offset >= SPAN || position.encoded - last.encoded_offset >= ENCODED_SPAN
        });
        if !far {
            return;
        }
        self.checkpoints.push(Checkpoint {
            encoded_offset: position.encoded,
            encoded_len: 0,
            decoded_offset: position.decoded,
            decoded_len: 0,
            byte: if bits == 0 { 0 } else { self.byte },
            bits,
            window: self.inflater.window().into(),
        });
        position.checkpoints = self.checkpoints.len();
        self.position.set(position);
    }
}

impl<R: Read> Read for Indexer<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match self.step(buffer)? {
                Some(0) => {}
                Some(decoded) => return Ok(decoded),
                None => return Ok(0),
            }
        }
    }
}

fn invalid(problem: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, problem.into())
}

/// Counts what is read through it, and hashes it. Each read is a full one as long as there is more: where the inflater stops
/// between two blocks depends a little on where its input ends, and an index shall not depend on how a stream arrives.
struct Hashed<R> {
    stream: R,
    digest: Digest,
    len: u64,
}

enum Digest {
    Known(BlobId),
    Hash(Sha256),
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut len = 0;
        while len < buffer.len() {
            match self.stream.read(&mut buffer[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if let Digest::Hash(hasher) = &mut self.digest {
            hasher.update(&buffer[..len]);
        }
        self.len += len as u64;
        Ok(len)
    }
}

/// Counts what is consumed through it.
struct Counted<'a, R> {
    input: &'a mut R,
    len: usize,
}

impl<R: BufRead> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buffer)?;
        self.len += len;
        Ok(len)
    }
}

impl<R: BufRead> BufRead for Counted<'_, R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, len: usize) {
        self.len += len;
        self.input.consume(len);
    }
}
