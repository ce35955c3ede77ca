//! The parts in which a blob file is read: each byte once, each piece whole.
//!
//! ```text
//! file      |  piece  |  piece  |  piece  |   unnamed   |  piece  | table |
//! segments  |-------------------|-----------------------|-----------------|   about 1 MiB each
//! ```

use std::ops::Range;

use crate::layout::CHUNK_SIZES;

/// Bytes of a segment, unless a piece makes it longer: what is hashed and then decoded should be in the processor's cache still.
const SEGMENT: u64 = 1 << 20;
/// Longest piece that is read with others: the largest chunk. What is read at once has twice this and a segment at most.
const MAX_PIECE: u64 = *CHUNK_SIZES.end() as u64;

/// Bytes of a file with the pieces in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// The bytes that no other segment has.
    pub(super) own: Range<u64>,
    /// What is read: those, and what its first pieces have before them, as pieces of a gzip layer may.
    pub(super) read: Range<u64>,
    /// Its pieces: a range of those that were sorted.
    pub(super) pieces: Range<usize>,
}

/// Segments of a file of `len` bytes, and pieces that are in none of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Segments {
    /// At least one, in order, all bytes of the file.
    pub(super) segments: Vec<Segment>,
    /// By offset: numbers of pieces with where they lie.
    pub(super) pieces: Vec<(u32, Range<u64>)>,
    /// Pieces that are too long, or empty, or not in the file.
    pub(super) others: Vec<u32>,
}

impl Segments {
    pub(super) fn new(len: u64, pieces: impl Iterator<Item = (u32, Range<u64>)>) -> Self {
        let mut cut = Self::default();
        for (number, range) in pieces {
            match range.end <= len && (1..=MAX_PIECE).contains(&(range.end - range.start)) {
                true => cut.pieces.push((number, range)),
                false => cut.others.push(number),
            }
        }
        cut.pieces.sort_by_key(|(number, range)| (range.start, *number));
        let (mut start, mut first) = (0, 0);
        while start < len || cut.segments.is_empty() {
            let segment = cut.next(start, first, len);
            (start, first) = (segment.own.end, segment.pieces.end);
            cut.segments.push(segment);
        }
        cut
    }

    /// The segment that begins at `start` with the piece at `first` or later ones.
    fn next(&self, start: u64, first: usize, len: u64) -> Segment {
        let mut segment =
            Segment { own: start..(start + SEGMENT).min(len), read: start..start, pieces: first..first };
        let mut end = start;
        for (_, range) in &self.pieces[first..] {
            if range.start >= segment.own.end || end - start >= SEGMENT {
                break;
            }
            segment.read.start = segment.read.start.min(range.start);
            segment.pieces.end += 1;
            end = end.max(range.end);
        }
        // It ends with its last piece, so that the next one need not read that again.
        if end > start {
            segment.own.end = end;
        }
        segment.read.end = segment.own.end;
        segment
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_is_in_one_segment_and_every_piece_in_what_one_reads(
            len in 0..64 * SEGMENT,
            pieces in proptest::collection::vec((0..66 * SEGMENT, 0..20 * SEGMENT), 0..80),
        ) {
            let pieces: Vec<_> = (0..).zip(pieces.into_iter().map(|(start, len)| start..start + len)).collect();
            let cut = Segments::new(len, pieces.iter().cloned());
            let (mut end, mut found) = (0, cut.others.clone());
            for segment in &cut.segments {
                prop_assert_eq!(segment.own.start, end);
                end = segment.own.end;
                prop_assert!(segment.read.start <= segment.own.start && segment.read.end == end);
                prop_assert!(segment.read.end - segment.read.start <= 2 * MAX_PIECE + SEGMENT);
                for (number, range) in &cut.pieces[segment.pieces.clone()] {
                    prop_assert!(segment.read.start <= range.start && range.end <= end);
                    found.push(*number);
                }
            }
            prop_assert_eq!(end, len);
            found.sort_unstable();
            prop_assert_eq!(found, (0..pieces.len() as u32).collect::<Vec<_>>());
        }
    }
}
