//! Reading a blob file from front to back, each byte once.
//!
//! A check reads all of an image and needs none of it again, so it goes past the page cache: that would cost as much as the
//! sha256 of the file, and push out what others use. What is in the page cache already is taken from there.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::{ReadWriteFlags, preadv2};

/// Unit of offsets, lengths and addresses past the page cache: what any disk takes.
const UNIT: u64 = 4096;
/// Places in a file that tell whether it is in the page cache.
const PROBES: u64 = 8;

/// A blob file.
#[derive(Debug)]
pub(super) struct SegmentReader {
    file: File,
    /// The same past the page cache, where the file system can do that.
    direct: Option<File>,
    pub(super) len: u64,
}

impl SegmentReader {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let direct = || OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok();
        let direct = if is_cached(&file, len) { None } else { direct() };
        Ok(Self { file, direct, len })
    }

    /// A range of the file. `buffer` is overwritten, and used again by the next call.
    pub(super) fn read<'a>(&self, range: &Range<u64>, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
        let start = range.start / UNIT * UNIT;
        let (skipped, needed) = ((range.start - start) as usize, (range.end - start) as usize);
        let room = needed.next_multiple_of(UNIT as usize);
        if buffer.len() < room + UNIT as usize {
            buffer.resize(room + UNIT as usize, 0);
        }
        let aligned = (buffer.as_ptr() as usize).wrapping_neg() % UNIT as usize;
        let bytes = &mut buffer[aligned..aligned + room];
        let done = self.direct.as_ref().is_some_and(|direct| fill(direct, &mut bytes[..], start) >= needed);
        if !done {
            self.file.read_exact_at(&mut bytes[skipped..needed], range.start)?;
        }
        Ok(&bytes[skipped..needed])
    }
}

/// How much could be read; whoever reads in another way learns what is wrong with the rest.
fn fill(file: &File, bytes: &mut [u8], start: u64) -> usize {
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], start + filled as u64) {
            Ok(0) => break,
            Ok(len) => filled += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    filled
}

fn is_cached(file: &File, len: u64) -> bool {
    (0..PROBES).all(|probe| {
        let (mut byte, place) = ([0], len / PROBES * probe);
        preadv2(file, &mut [IoSliceMut::new(&mut byte)], place, ReadWriteFlags::NOWAIT).is_ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_is_read_and_none_beyond_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..40_000u32).flat_map(u32::to_le_bytes).collect();
        let path = dir.path().join("file");
        std::fs::write(&path, &content).unwrap();
        let cached = SegmentReader::open(&path).unwrap();
        let direct = OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(&path).ok();
        if direct.is_none() {
            println!("skipped: no reading past the page cache here");
        }
        let direct = SegmentReader { direct, file: File::open(&path).unwrap(), len: cached.len };
        let mut buffer = Vec::new();
        for reader in [cached, direct] {
            for range in [0..0, 0..1, 4095..4097, 4096..8192, 1..160_000, 159_999..160_000, 160_000..160_000] {
                let expected = &content[range.start as usize..range.end as usize];
                assert_eq!(reader.read(&range, &mut buffer).unwrap(), expected, "{range:?}");
            }
            assert!(reader.read(&(159_999..160_001), &mut buffer).is_err());
        }
    }
}
