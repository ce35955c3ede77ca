//! Tar archives, read once from front to back: ustar, GNU and PAX, plain or in gzip or zstd.
//!
//! The `tar` crate decodes header fields. The framing is done here, because every length in an archive is a stranger's
//! word: names and attributes have bounds before they are read, sparse files are read whichever of the four ways
//! describes them, values may hold any byte, and an archive that ends without its end mark is an error rather than a
//! short archive.
//!
//! As container runtimes do, global PAX headers are read over. Owners are numbers; names of users and groups mean
//! nothing in an image.

use std::io::{self, Read};

use tar::{EntryType, Header};

use crate::blob::checksum_matches;
use crate::bootstrap::Kind;
use crate::builder::ArchiveLimits;
use records::Records;
use sparse::Segment;

mod compression;
mod records;
mod sparse;

pub(crate) use compression::{decompress, plain};

/// Unit of everything in a tar.
const BLOCK: u64 = 512;
/// Most bytes of long names and of PAX records of one entry.
const MAX_EXTENSION: u64 = 4 << 20;

/// Why an archive could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The stream failed, or what it is compressed with found an error.
    #[error("cannot read on at {place}")]
    Read {
        /// The entry that was being read.
        place: String,
        /// What was said.
        #[source]
        source: io::Error,
    },
    /// The archive ends in the middle.
    #[error("the archive is cut off at {place}")]
    Truncated {
        /// The last entry.
        place: String,
    },
    /// An entry is malformed, or the format of images has no place for it.
    #[error("{place}: {problem}")]
    Invalid {
        /// The entry.
        place: String,
        /// What is wrong.
        problem: String,
    },
    /// There is more than the limits allow.
    #[error("{place}: the archive has more than {limit} {what}")]
    TooLarge {
        /// The entry that is too much.
        place: String,
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}

/// What an entry makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberKind {
    /// Something of its own.
    Node(Kind),
    /// Another name of a file.
    HardLink,
}

/// One entry, its extension headers applied.
#[derive(Debug)]
pub(crate) struct Member {
    /// As written: nothing is known about it.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: MemberKind,
    /// Permissions without the type.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    /// Bytes of a file, its holes included; 0 for all others.
    pub(crate) size: u64,
    /// Target of a link of either kind.
    pub(crate) link: Vec<u8>,
    /// Full names and values, sorted; names as written.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
    /// Where a file has data.
    segments: Vec<Segment>,
}

impl Member {
    /// Whether bytes of the file are nowhere in the archive.
    pub(crate) fn has_holes(&self) -> bool {
        self.segments.iter().map(|segment| segment.len()).sum::<u64>() < self.size
    }
}

/// An archive that is being read.
#[derive(Debug)]
pub(crate) struct Archive<R> {
    stream: R,
    limits: ArchiveLimits,
    /// Bytes of the stream up to the end of the current entry.
    stream_bytes: u64,
    /// Bytes of all files so far.
    file_bytes: u64,
    /// Bytes of the current entry that were not read, with the padding behind them.
    left: u64,
    /// The current entry, for errors.
    place: String,
}

impl<R: Read> Archive<R> {
    /// An archive over a decompressed stream.
    pub(crate) fn new(stream: R, limits: ArchiveLimits) -> Self {
        Self { stream, limits, stream_bytes: 0, file_bytes: 0, left: 0, place: "its start".into() }
    }

    /// An error about the current entry.
    pub(crate) fn invalid(&self, problem: impl Into<String>) -> ArchiveError {
        ArchiveError::Invalid { place: self.place.clone(), problem: problem.into() }
    }

    /// An error about the current entry: there is more than the limits allow.
    pub(crate) fn too_large(&self, what: &'static str, limit: u64) -> ArchiveError {
        ArchiveError::TooLarge { place: self.place.clone(), what, limit }
    }

    /// Makes an error of what the stream said.
    pub(crate) fn read_error(place: &str, source: io::Error) -> ArchiveError {
        let place = place.to_owned();
        match source.kind() {
            io::ErrorKind::UnexpectedEof => ArchiveError::Truncated { place },
            _ => ArchiveError::Read { place, source },
        }
    }

    /// The current entry as errors name it.
    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// The next entry; `None` at the end of the archive, once the rest of the stream was read. What was not read of the
    /// content of the current one is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let (mut records, mut long_name, mut long_link) = (Records::default(), None, None);
        loop {
            self.skip()?;
            let block = self.block()?;
            if block.iter().all(|byte| *byte == 0) {
                return self.finish().map(|()| None);
            }
            let header = Header::from_byte_slice(&block);
            if !checksum_matches(header) {
                return Err(self.invalid("what follows it is no tar header: the checksum does not match"));
            }
            match header.entry_type().as_byte() {
                b'g' => self.state_size(header.entry_size())?,
                b'x' | b'X' => {
                    let bytes = self.extension(header)?;
                    records = Records::parse(&bytes).map_err(|problem| self.invalid(problem))?;
                }
                b'L' => long_name = Some(until_nul(self.extension(header)?)),
                b'K' => long_link = Some(until_nul(self.extension(header)?)),
                // The label of a volume.
                b'V' => self.state_size(header.entry_size())?,
                _ => return self.member(header, &records, long_name, long_link).map(Some),
            }
        }
    }

    /// The content of the entry that [`next`](Self::next) returned: exactly its size, or an error.
    pub(crate) fn content(&mut self, member: &Member) -> impl Read {
        sparse::Content::new(&mut self.stream, &mut self.left, member.segments.clone(), member.size)
    }

    fn member(
        &mut self,
        header: &Header,
        records: &Records,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Member, ArchiveError> {
        let plain = || header.path_bytes().into_owned();
        let path = records.path().map(<[u8]>::to_vec).or(long_name).unwrap_or_else(plain);
        self.place = format!("entry {:?}", String::from_utf8_lossy(&path[..path.len().min(4096)]));
        let kind = kind(header, &path).map_err(|problem| self.invalid(problem))?;
        let (fields, stored) = fields(header, records).map_err(|problem| self.invalid(problem))?;
        let link = || header.link_name_bytes().map(|link| link.into_owned()).unwrap_or_default();
        let link = records.get("linkpath").map(<[u8]>::to_vec).or(long_link).unwrap_or_else(link);
        let xattrs = records.xattrs();
        let mut member = Member { path, kind, link, xattrs, ..fields };
        if kind == MemberKind::Node(Kind::File) {
            self.file(&mut member, header, records, stored)?;
        } else if matches!(header.entry_type().as_byte(), 0 | b'0' | b'D') {
            // What a file has that a slash made a directory, or the list of names in a GNU dump.
            self.state_size(Ok(stored))?;
        }
        Ok(member)
    }

    /// Size and segments of a file.
    fn file(
        &mut self,
        member: &mut Member,
        header: &Header,
        records: &Records,
        stored: u64,
    ) -> Result<(), ArchiveError> {
        let mut map = sparse::Map::default();
        if header.entry_type() == EntryType::GNUSparse {
            map.read_header(header).map_err(|problem| self.invalid(problem))?;
            while map.continues {
                let block = self.block()?;
                map.read_continuation(&block).map_err(|problem| self.invalid(problem))?;
            }
        }
        self.state_size(Ok(stored))?;
        map.read_records(records).map_err(|problem| self.invalid(problem))?;
        let mut data = stored;
        if map.in_data {
            let before = self.left;
            let mut bytes = (&mut self.stream).take(stored);
            let read = map.read_data(&mut bytes);
            let used = stored - bytes.limit();
            self.left = before - used;
            data -= used;
            read.map_err(|source| match source.kind() {
                io::ErrorKind::InvalidData => self.invalid(source.to_string()),
                _ => Self::read_error(&self.place, source),
            })?;
        }
        (member.size, member.segments) = map.finish(data).map_err(|problem| self.invalid(problem))?;
        let total = self.file_bytes.checked_add(member.size).filter(|total| *total <= self.limits.bytes);
        self.file_bytes = total.ok_or_else(|| self.too_large("bytes of files", self.limits.bytes))?;
        Ok(())
    }

    /// Takes note of what an entry's header says of its size.
    fn state_size(&mut self, size: io::Result<u64>) -> Result<(), ArchiveError> {
        let size = size.map_err(|error| self.invalid(error.to_string()))?;
        let padded = size.checked_next_multiple_of(BLOCK);
        let total = padded.and_then(|padded| self.stream_bytes.checked_add(padded));
        let total = total.filter(|total| *total <= self.limits.bytes);
        self.stream_bytes = total.ok_or_else(|| self.too_large("bytes", self.limits.bytes))?;
        self.left = size.next_multiple_of(BLOCK);
        Ok(())
    }

    /// The body of an extension header.
    fn extension(&mut self, header: &Header) -> Result<Vec<u8>, ArchiveError> {
        self.state_size(header.entry_size())?;
        let size = header.entry_size().unwrap_or(0);
        if size > MAX_EXTENSION {
            return Err(
                self.invalid(format!("{size} bytes of names and attributes follow, at most {MAX_EXTENSION} may"))
            );
        }
        let mut bytes = vec![0; size as usize];
        self.stream.read_exact(&mut bytes).map_err(|source| Self::read_error(&self.place, source))?;
        self.left -= size;
        Ok(bytes)
    }

    fn block(&mut self) -> Result<[u8; BLOCK as usize], ArchiveError> {
        let mut block = [0; BLOCK as usize];
        self.stream.read_exact(&mut block).map_err(|source| Self::read_error(&self.place, source))?;
        self.stream_bytes += BLOCK;
        if self.stream_bytes > self.limits.bytes {
            return Err(self.too_large("bytes", self.limits.bytes));
        }
        Ok(block)
    }

    /// Goes to the end of the current entry.
    fn skip(&mut self) -> Result<(), ArchiveError> {
        let skipped = io::copy(&mut (&mut self.stream).take(self.left), &mut io::sink());
        let skipped = skipped.map_err(|source| Self::read_error(&self.place, source))?;
        if skipped < self.left {
            return Err(ArchiveError::Truncated { place: self.place.clone() });
        }
        self.left = 0;
        Ok(())
    }

    /// Reads the rest of the stream: padding, and the checksums of what it is compressed with.
    fn finish(&mut self) -> Result<(), ArchiveError> {
        let room = self.limits.bytes - self.stream_bytes;
        let rest = io::copy(&mut (&mut self.stream).take(room.saturating_add(1)), &mut io::sink());
        self.place = format!("its end, after {}", self.place);
        let rest = rest.map_err(|source| Self::read_error(&self.place, source))?;
        if rest > room { Err(self.too_large("bytes", self.limits.bytes)) } else { Ok(()) }
    }
}

/// The fields of an entry that are numbers, and how many bytes it says are stored; the rest of the entry is empty.
fn fields(header: &Header, records: &Records) -> Result<(Member, u64), String> {
    let number = |key: &str, field: &[u8], value: io::Result<u64>| match records.get(key) {
        Some(text) => records::decimal(text).ok_or_else(|| format!("{key} {:?}", String::from_utf8_lossy(text))),
        None if is_blank(field) => Ok(0),
        None => value.map_err(|error| error.to_string()),
    };
    let owner = |key: &str, field: &[u8], value| {
        let id = number(key, field, value)?;
        u32::try_from(id).map_err(|_| format!("{key} {id} has more than 32 bits"))
    };
    let old = header.as_old();
    let mode = if is_blank(&old.mode) { Ok(0) } else { header.mode().map_err(|error| error.to_string()) };
    let mtime = match records.get("mtime") {
        Some(text) => records::time(text).ok_or_else(|| format!("mtime {:?}", String::from_utf8_lossy(text)))?,
        // Times before 1970 are a large number there.
        None => (number("mtime", &old.mtime, header.mtime())? as i64, 0),
    };
    let member = Member {
        path: Vec::new(),
        kind: MemberKind::HardLink,
        mode: mode? & 0o7777,
        uid: owner("uid", &old.uid, header.uid())?,
        gid: owner("gid", &old.gid, header.gid())?,
        mtime,
        size: 0,
        link: Vec::new(),
        xattrs: Vec::new(),
        device: device(header)?,
        segments: Vec::new(),
    };
    Ok((member, number("size", &old.size, header.entry_size())?))
}

fn kind(header: &Header, path: &[u8]) -> Result<MemberKind, String> {
    Ok(MemberKind::Node(match header.entry_type().as_byte() {
        // Before there was a type for directories, a slash told.
        0 | b'0' if path.ends_with(b"/") => Kind::Directory,
        0 | b'0' | b'7' | b'S' => Kind::File,
        b'1' => return Ok(MemberKind::HardLink),
        b'2' => Kind::Symlink,
        b'3' => Kind::CharDevice,
        b'4' => Kind::BlockDevice,
        b'5' | b'D' => Kind::Directory,
        b'6' => Kind::Fifo,
        b'M' => return Err("it continues a file of another volume".into()),
        other => return Err(format!("unknown entry type {:?}", char::from(other))),
    }))
}

fn device(header: &Header) -> Result<(u32, u32), String> {
    if !matches!(header.entry_type(), EntryType::Char | EntryType::Block) {
        return Ok((0, 0));
    }
    let number = |field: &[u8], value: io::Result<Option<u32>>| match value {
        _ if is_blank(field) => Ok(0),
        Ok(value) => Ok(value.unwrap_or(0)),
        Err(error) => Err(error.to_string()),
    };
    let (major, minor) = match (header.as_ustar(), header.as_gnu()) {
        (Some(ustar), _) => (&ustar.dev_major, &ustar.dev_minor),
        (_, Some(gnu)) => (&gnu.dev_major, &gnu.dev_minor),
        _ => return Err("a device without numbers".into()),
    };
    let device = (number(major, header.device_major())?, number(minor, header.device_minor())?);
    // What 32 bits of the kernel's form hold.
    if device.0 > 0xFFF || device.1 > 0xF_FFFF {
        return Err(format!("device {}:{} does not exist", device.0, device.1));
    }
    Ok(device)
}

/// Whether a numeric field was left out.
fn is_blank(field: &[u8]) -> bool {
    field.iter().all(|byte| matches!(byte, 0 | b' '))
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len()));
    bytes
}
