//! Several starts of one image made one. Pure.

use std::collections::HashMap;

use shoal_proto::StartTrace;

/// What one piece has so far.
#[derive(Default)]
struct Places {
    /// Sum of its places in the starts that touched it.
    sum: u64,
    starts: u64,
    /// The last of them, counted from one: a trace from a stranger may name a piece twice.
    last: usize,
}

/// The pieces of all of them by their mean place, first those that starts touch early. A start that did not touch a piece counts as
/// if it had touched it after the last one of the longest: so what most starts need goes before what one needed, and one
/// trace that is made up moves each piece only as far as any other start would. Of equal ones the lower goes first.
pub(super) fn merge<'a>(traces: impl IntoIterator<Item = &'a StartTrace>) -> StartTrace {
    let mut pieces: HashMap<(u32, u32), Places> = HashMap::new();
    let (mut starts, mut longest) = (0, 0);
    for (number, trace) in (1..).zip(traces) {
        let mut place = 0;
        for piece in trace.pieces() {
            let places = pieces.entry(piece).or_default();
            if places.last != number {
                *places = Places { sum: places.sum + place, starts: places.starts + 1, last: number };
                place += 1;
            }
        }
        starts = number as u64;
        longest = longest.max(place);
    }
    let mean = |places: Places| places.sum + (starts - places.starts) * longest;
    let mut order: Vec<_> = pieces.into_iter().map(|(piece, places)| (mean(places), piece)).collect();
    order.sort_unstable();
    StartTrace::of(order.into_iter().map(|(_, piece)| piece))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn merged(traces: &[&[u32]]) -> Vec<u32> {
        let traces: Vec<_> = traces.iter().map(|pieces| StartTrace::of(pieces.iter().map(|p| (0, *p)))).collect();
        merge(&traces).pieces().map(|(_, piece)| piece).collect()
    }

    #[test]
    fn what_most_starts_need_early_goes_first() {
        assert_eq!(merged(&[]), [0; 0]);
        assert_eq!(merged(&[&[5, 3, 9]]), [5, 3, 9]);
        assert_eq!(merged(&[&[5, 3, 9], &[5, 3, 9]]), [5, 3, 9]);
        // 5 and 3 in both, 1 and 7 in one each; at the end the lower number.
        assert_eq!(merged(&[&[5, 3, 7], &[5, 1, 3]]), [5, 3, 1, 7]);
        // One that is made up goes behind what the others agree about.
        assert_eq!(merged(&[&[1, 2, 3], &[1, 2, 3], &[70, 80, 90]])[..2], [1, 2]);
    }

    #[test]
    fn a_trace_that_repeats_itself_counts_once() {
        let twice = [&b"shoalst1"[..], &[0; 4], &[1, 0, 0, 0], &[2, 0, 0, 0]].concat();
        let twice = StartTrace::parse(&[&twice[..], &twice[8..]].concat()).unwrap();
        assert_eq!(twice.pieces().count(), 4);
        assert_eq!(merge(&[twice]), StartTrace::of([(0, 1), (0, 2)]));
    }

    /// The same as plainly as it can be said.
    fn model(traces: &[Vec<(u32, u32)>]) -> Vec<(u32, u32)> {
        let longest = traces.iter().map(Vec::len).max().unwrap_or(0);
        let mut all: Vec<_> = traces.concat();
        all.sort_unstable();
        all.dedup();
        let place = |trace: &Vec<_>, piece| trace.iter().position(|found| *found == piece).unwrap_or(longest);
        all.sort_by_key(|piece| traces.iter().map(|trace| place(trace, *piece)).sum::<usize>());
        all
    }

    proptest! {
        #[test]
        fn it_is_the_plain_model_whatever_the_order(
            traces in vec(vec((0..2u32, 0..30u32), 0..40), 0..6),
            turn in any::<prop::sample::Index>(),
        ) {
            let mut traces: Vec<_> = traces.into_iter().map(StartTrace::of).collect();
            let plain: Vec<Vec<_>> = traces.iter().map(|trace| trace.pieces().collect()).collect();
            let merged = merge(&traces);
            prop_assert_eq!(merged.pieces().collect::<Vec<_>>(), model(&plain));
            if !traces.is_empty() {
                let turn = turn.index(traces.len());
                traces.rotate_left(turn);
                prop_assert_eq!(merge(&traces), merged);
            }
        }
    }
}
