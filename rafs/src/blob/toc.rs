//! The table of contents at the very end of a blob made for registries: where its other parts lie, and their digests.

use std::io;
use std::ops::Range;

use super::members::{Member, ReadAt, content};
use super::{ChunkTableError, TOC_NAME, invalid};
use crate::codec::Compressor;

/// Bytes of an entry.
const TOC_ENTRY: usize = 128;
/// Bytes of a name.
const NAME: usize = 16;
/// Most entries: with its tar header the table then fits the last 4096 bytes of a blob, which is where it is looked for.
const MAX_ENTRIES: usize = 28;

/// A table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toc {
    /// In stored order, each name once.
    pub entries: Vec<TocEntry>,
}

/// One part of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocEntry {
    /// Such as `image.boot`: 1 to 16 printable ASCII characters.
    pub name: String,
    /// How the part is compressed as a whole.
    pub compressor: Compressor,
    /// The sha256 of its decoded bytes; for `image.blob` of its stored bytes and the tar header behind them.
    pub sha256: [u8; 32],
    /// Where it lies in the blob.
    pub range: Range<u64>,
    /// Bytes once decoded.
    pub decoded_size: u64,
}

impl Toc {
    /// Parses the entries, without the tar header behind them.
    pub fn parse(bytes: &[u8]) -> Result<Self, ChunkTableError> {
        let count = bytes.len() / TOC_ENTRY;
        if !bytes.len().is_multiple_of(TOC_ENTRY) || !(1..=MAX_ENTRIES).contains(&count) {
            return Err(invalid("table of contents", format!("{} bytes", bytes.len())));
        }
        let mut entries: Vec<TocEntry> = Vec::new();
        for (number, bytes) in bytes.chunks_exact(TOC_ENTRY).enumerate() {
            let fail = |problem: String| invalid("table of contents", format!("entry {number}: {problem}"));
            let entry = entry(bytes).map_err(fail)?;
            if entries.iter().any(|other| other.name == entry.name) {
                return Err(fail(format!("{} is listed twice", entry.name)));
            }
            entries.push(entry);
        }
        Ok(Self { entries })
    }

    /// The table of a blob, if its members, the last one first, end with one.
    pub(crate) fn find(blob: &impl ReadAt, members: &[Member]) -> Result<Option<Self>, ChunkTableError> {
        let Some(last) = members.first().filter(|last| last.name == TOC_NAME) else { return Ok(None) };
        let limit = (MAX_ENTRIES * TOC_ENTRY) as u64;
        Self::parse(&content(blob, &last.range, "table of contents", limit)?).map(Some)
    }

    /// The bytes that [`parse`](Self::parse) reads.
    ///
    /// # Errors
    /// An entry that cannot be stored: a name of other than 1 to 16 bytes, or a compressor that the format has no flag for.
    pub(crate) fn encode(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.entries.len() * TOC_ENTRY);
        for entry in &self.entries {
            entry.encode_into(&mut bytes)?;
        }
        Ok(bytes)
    }

    /// The part with this name.
    pub fn entry(&self, name: &str) -> Option<&TocEntry> {
        self.entries.iter().find(|entry| entry.name == name)
    }
}

impl TocEntry {
    /// The 128 bytes that [`entry`] reads.
    fn encode_into(&self, bytes: &mut Vec<u8>) -> io::Result<()> {
        let flags: u32 = match self.compressor {
            Compressor::None => 1,
            Compressor::Zstd => 2,
            Compressor::Lz4 => 4,
            Compressor::Gzip => return Err(io::Error::other("a table of contents has no flag for gzip")),
        };
        let mut name = [0; NAME];
        let field = name.get_mut(..self.name.len()).filter(|field| !field.is_empty());
        let field = field.ok_or_else(|| io::Error::other(format!("{:?} is no name of a part", self.name)))?;
        field.copy_from_slice(self.name.as_bytes());
        let end = bytes.len() + TOC_ENTRY;
        bytes.extend_from_slice(&u64::from(flags).to_le_bytes());
        bytes.extend_from_slice(&name);
        bytes.extend_from_slice(&self.sha256);
        for number in [self.range.start, self.range.end - self.range.start, self.decoded_size] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.resize(end, 0);
        Ok(())
    }
}

/// flags u32, reserved u32, name 16 bytes, sha256 32 bytes, offset u64, stored size u64, decoded size u64, reserved 48.
fn entry(bytes: &[u8]) -> Result<TocEntry, String> {
    let word = |at: usize| bytes[at..at + 4].iter().rev().fold(0u32, |word, byte| word << 8 | u32::from(*byte));
    let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    let compressor = match word(0) {
        1 => Compressor::None,
        2 => Compressor::Zstd,
        4 => Compressor::Lz4,
        other => return Err(format!("flags {other:#x} name no single compressor")),
    };
    let field = &bytes[8..24];
    let name = &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())];
    let printable = !name.is_empty() && name.iter().all(u8::is_ascii_graphic);
    if !printable || field[name.len()..].iter().any(|byte| *byte != 0) {
        return Err(format!("name {:?}", String::from_utf8_lossy(field)));
    }
    let name = String::from_utf8_lossy(name).into_owned();
    let (start, len, decoded_size) = (long(56), long(64), long(72));
    let end = start.checked_add(len).ok_or_else(|| format!("{len} bytes at {start}"))?;
    let mut sha256 = [0; 32];
    sha256.copy_from_slice(&bytes[24..56]);
    Ok(TocEntry { name, compressor, sha256, range: start..end, decoded_size })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(flags: u32, name: &[u8], numbers: [u64; 3]) -> Vec<u8> {
        let mut bytes = vec![0; TOC_ENTRY];
        bytes[..4].copy_from_slice(&flags.to_le_bytes());
        bytes[8..8 + name.len()].copy_from_slice(name);
        bytes[24..56].fill(7);
        for (at, number) in [56, 64, 72].into_iter().zip(numbers) {
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn entries_are_read() {
        let table =
            [bytes(1, b"image.blob", [0, 100, 4096]), bytes(2, b"blob.meta.header", [612, 10, 4096])].concat();
        let toc = Toc::parse(&table).unwrap();
        let expected = TocEntry {
            name: "blob.meta.header".into(),
            compressor: Compressor::Zstd,
            sha256: [7; 32],
            range: 612..622,
            decoded_size: 4096,
        };
        assert_eq!(toc.entry("blob.meta.header"), Some(&expected));
        assert_eq!((toc.entries.len(), toc.entry("image.boot")), (2, None));
    }

    #[test]
    fn what_is_no_table_is_refused() {
        let good = bytes(1, b"image.blob", [0, 1, 1]);
        for wrong in [
            vec![],
            good[1..].to_vec(),
            good.repeat(2),
            (0..29u8).flat_map(|number| bytes(1, &[b'a' + number], [0, 1, 1])).collect(),
            bytes(0, b"image.blob", [0, 1, 1]),
            bytes(3, b"image.blob", [0, 1, 1]),
            bytes(1, b"", [0, 1, 1]),
            bytes(1, b"a\0b", [0, 1, 1]),
            bytes(1, b"new\nline", [0, 1, 1]),
            bytes(1, b"image.blob", [u64::MAX, 1, 1]),
        ] {
            assert!(Toc::parse(&wrong).is_err());
        }
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let entry = |name: &str, compressor| TocEntry {
            name: name.into(),
            compressor,
            sha256: [0; 32],
            range: 0..1,
            decoded_size: 1,
        };
        for (name, compressor) in
            [("", Compressor::None), ("seventeen-letters", Compressor::None), ("a", Compressor::Gzip)]
        {
            assert!(Toc { entries: vec![entry(name, compressor)] }.encode().is_err(), "{name:?} {compressor}");
        }
    }

    proptest! {
        #[test]
        fn tables_round_trip(parts in prop::collection::btree_map("[!-~]{1,16}", (0..3usize, any::<[u8; 32]>(), any::<u64>(), any::<u32>(), any::<u64>()), 1..=28)) {
            let entries = parts.into_iter().map(|(name, (compressor, sha256, start, len, decoded_size))| {
                let compressor = [Compressor::None, Compressor::Zstd, Compressor::Lz4][compressor];
                let start = start / 2;
                TocEntry { name, compressor, sha256, range: start..start + u64::from(len), decoded_size }
            });
            let toc = Toc { entries: entries.collect() };
            prop_assert_eq!(Toc::parse(&toc.encode().unwrap()).unwrap(), toc);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..1024)) {
            if let Ok(toc) = Toc::parse(&bytes) {
                prop_assert_eq!(toc.entries.len(), bytes.len() / TOC_ENTRY);
                prop_assert_eq!(Toc::parse(&toc.encode().unwrap()).unwrap(), toc);
            }
        }
    }
}
