//! Which pieces share a request. Pure.

use std::ops::Range;

/// One ranged request and the pieces that it brings, in the order of the blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Read {
    pub(super) range: Range<u64>,
    pub(super) pieces: Vec<(u32, Range<u64>)>,
}

/// Joins pieces with at most `gap` bytes between them into requests of at most `max` bytes; a larger piece has a request
/// of its own. Pieces of one blob do not overlap (its table sees to that); one that is asked for twice is read once.
pub(super) fn join(mut pieces: Vec<(u32, Range<u64>)>, gap: u64, max: u64) -> Vec<Read> {
    pieces.sort_unstable_by_key(|(piece, range)| (range.start, *piece));
    pieces.dedup();
    let mut reads: Vec<Read> = Vec::new();
    for (piece, range) in pieces {
        match reads.last_mut() {
            Some(read) if range.start - read.range.end <= gap && range.end - read.range.start <= max => {
                read.range.end = range.end;
                read.pieces.push((piece, range));
            }
            _ => reads.push(Read { range: range.clone(), pieces: vec![(piece, range)] }),
        }
    }
    reads
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn neighbours_share_a_request_and_the_distant_do_not() {
        let pieces = vec![(3, 300..400), (0, 0..100), (1, 100..200), (9, 10_000..10_100), (1, 100..200)];
        let reads = join(pieces, 100, 1000);
        let ranges: Vec<_> = reads.iter().map(|read| read.range.clone()).collect();
        assert_eq!(ranges, [0..400, 10_000..10_100]);
        assert_eq!(reads[0].pieces, [(0, 0..100), (1, 100..200), (3, 300..400)]);
        assert!(join(Vec::new(), 1, 1).is_empty());
    }

    /// A blob of pieces with holes between them, and some of the pieces.
    fn choice() -> impl Strategy<Value = (Vec<(u32, Range<u64>)>, Vec<usize>)> {
        proptest::collection::vec((0u64..50, 1u64..200), 1..60).prop_flat_map(|sizes| {
            let mut at = 0;
            let blob: Vec<_> = (0..)
                .zip(&sizes)
                .map(|(piece, (hole, length))| {
                    let start = at + hole;
                    at = start + length;
                    (piece, start..at)
                })
                .collect();
            let count = blob.len();
            (Just(blob), proptest::collection::vec(0..count, 0..80))
        })
    }

    proptest! {
        #[test]
        fn every_piece_is_read_once_within_the_bounds((blob, chosen) in choice(), gap in 0u64..100, max in 1u64..600) {
            let wanted: std::collections::BTreeMap<_, _> = chosen.iter().map(|&i| blob[i].clone()).collect();
            let reads = join(chosen.iter().map(|&i| blob[i].clone()).collect(), gap, max);
            let got: Vec<_> = reads.iter().flat_map(|read| read.pieces.clone()).collect();
            prop_assert_eq!(got, wanted.into_iter().collect::<Vec<_>>());
            for read in &reads {
                let first = &read.pieces[0].1;
                let last = &read.pieces[read.pieces.len() - 1].1;
                prop_assert_eq!(&read.range, &(first.start..last.end));
                prop_assert!(read.range.end - read.range.start <= max || read.pieces.len() == 1);
                for pair in read.pieces.windows(2) {
                    prop_assert!(pair[1].1.start - pair[0].1.end <= gap);
                }
            }
            for pair in reads.windows(2) {
                let next = &pair[1].pieces[0].1;
                let apart = next.start - pair[0].range.end > gap;
                prop_assert!(apart || next.end - pair[0].range.start > max, "two requests where one would do");
            }
        }
    }
}
