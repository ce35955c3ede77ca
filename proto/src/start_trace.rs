//! What a start of an image touches first: its pieces, in order. A node that starts the image later has them fetched before
//! they are asked for.
//!
//! ```text
//! | "shoalst1" | blob, u32 LE, its place in the image's table of blobs | first piece, u32 LE | pieces, u32 LE | .. runs
//! ```
//!
//! A hint and no more: nothing verifies it, so nothing is trusted for its sake. Whoever follows one looks up each piece in the
//! image that it has itself, and a wrong trace costs the fetching of pieces of that image that nobody will read, at most
//! [`MAX_PIECES`](StartTrace::MAX_PIECES) of them.

use std::collections::HashSet;

/// What an encoded trace begins with.
const MAGIC: &[u8; 8] = b"shoalst1";
/// Bytes of a run.
const RUN: usize = 12;

/// Why bytes are no trace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartTraceError {
    /// They begin otherwise.
    #[error("no trace of a start")]
    Magic,
    /// They end in the middle of a run, or there are too many.
    #[error("a trace of {0} bytes")]
    Length(usize),
    /// A run without pieces, or past the last number that there is.
    #[error("a run of {count} pieces from {first}")]
    Run {
        /// The first piece.
        first: u32,
        /// How many.
        count: u32,
    },
    /// All runs have more pieces than a trace may.
    #[error("a trace of more than {} pieces", StartTrace::MAX_PIECES)]
    TooLong,
}

/// Pieces behind each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    blob: u32,
    first: u32,
    count: u32,
}

/// Pieces in the order of their first use, each named by the place of its blob in the image's table and its number. See the
/// module.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StartTrace(Vec<Run>);

impl StartTrace {
    /// Most runs of pieces behind each other.
    pub const MAX_RUNS: usize = 4096;
    /// Most pieces.
    pub const MAX_PIECES: usize = 16384;
    /// Most bytes of an encoded trace: about 48 KiB.
    pub const MAX_ENCODED: usize = MAGIC.len() + Self::MAX_RUNS * RUN;

    /// The trace of these pieces, each counted once, up to the first that there is no more room for.
    pub fn of(pieces: impl IntoIterator<Item = (u32, u32)>) -> Self {
        let mut seen = HashSet::new();
        let mut runs: Vec<Run> = Vec::new();
        // The last number of all belongs to no run, or its end would be no number.
        for (blob, piece) in pieces.into_iter().filter(|(_, piece)| *piece < u32::MAX) {
            if !seen.insert((blob, piece)) {
                continue;
            }
            if seen.len() > Self::MAX_PIECES {
                break;
            }
            if let Some(run) = runs.last_mut()
                && run.blob == blob
                && run.first + run.count == piece
            {
                run.count += 1;
            } else if runs.len() < Self::MAX_RUNS {
                runs.push(Run { blob, first: piece, count: 1 });
            } else {
                break;
            }
        }
        Self(runs)
    }

    /// What [`encode`](Self::encode) made, from wherever it comes. It may name a piece more than once.
    ///
    /// # Errors
    /// [`StartTraceError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, StartTraceError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(StartTraceError::Magic)?;
        let (runs, odd) = rest.as_chunks::<RUN>();
        if !odd.is_empty() || runs.len() > Self::MAX_RUNS {
            return Err(StartTraceError::Length(bytes.len()));
        }
        let mut pieces = 0;
        let run = |run: &[u8; RUN]| {
            let number = |at: usize| u32::from_le_bytes([run[at], run[at + 1], run[at + 2], run[at + 3]]);
            let (blob, first, count) = (number(0), number(4), number(8));
            if count == 0 || first.checked_add(count).is_none() {
                return Err(StartTraceError::Run { first, count });
            }
            pieces += u64::from(count);
            if pieces > Self::MAX_PIECES as u64 {
                Err(StartTraceError::TooLong)
            } else {
                Ok(Run { blob, first, count })
            }
        };
        Ok(Self(runs.iter().map(run).collect::<Result<_, _>>()?))
    }

    /// See the module.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.encoded_len());
        bytes.extend_from_slice(MAGIC);
        for run in &self.0 {
            [run.blob, run.first, run.count].iter().for_each(|number| bytes.extend_from_slice(&number.to_le_bytes()));
        }
        bytes
    }

    /// Bytes of the encoded trace, which is about what it takes up in memory.
    pub fn encoded_len(&self) -> usize {
        MAGIC.len() + self.0.len() * RUN
    }

    /// The pieces in order: places of blobs, and numbers.
    pub fn pieces(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.0.iter().flat_map(|run| (run.first..run.first + run.count).map(|piece| (run.blob, piece)))
    }

    /// Whether it names nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn bytes(runs: &[[u32; 3]]) -> Vec<u8> {
        let numbers = runs.iter().flatten().flat_map(|number| number.to_le_bytes());
        MAGIC.iter().copied().chain(numbers).collect()
    }

    #[test]
    fn what_is_no_trace_is_refused_by_its_reason() {
        assert_eq!(StartTrace::parse(b""), Err(StartTraceError::Magic));
        assert_eq!(StartTrace::parse(MAGIC), Ok(StartTrace::default()));
        assert_eq!(StartTrace::parse(&bytes(&[[0, 1, 2]])[..19]), Err(StartTraceError::Length(19)));
        let run = |first, count| Err(StartTraceError::Run { first, count });
        assert_eq!(StartTrace::parse(&bytes(&[[0, 1, 0]])), run(1, 0));
        assert_eq!(StartTrace::parse(&bytes(&[[0, u32::MAX, 1]])), run(u32::MAX, 1));
        let most = StartTrace::MAX_PIECES as u32;
        assert!(StartTrace::parse(&bytes(&[[9, 0, most]])).is_ok());
        assert_eq!(StartTrace::parse(&bytes(&[[9, 0, most], [9, 0, 1]])), Err(StartTraceError::TooLong));
        assert_eq!(StartTrace::parse(&bytes(&[[0, 0, u32::MAX]])), Err(StartTraceError::TooLong));
        let many = vec![[0, 0, 1]; StartTrace::MAX_RUNS + 1];
        assert!(StartTrace::parse(&bytes(&many[1..])).is_ok());
        assert_eq!(StartTrace::parse(&bytes(&many)), Err(StartTraceError::Length(bytes(&many).len())));
    }

    #[test]
    fn a_trace_ends_where_there_is_no_more_room() {
        let scattered = StartTrace::of((0..10_000).map(|piece| (0, piece * 2)));
        assert_eq!(scattered.pieces().count(), StartTrace::MAX_RUNS);
        assert_eq!(scattered.encode().len(), StartTrace::MAX_ENCODED);
        let dense = StartTrace::of((0..20_000).map(|piece| (0, piece)));
        assert_eq!(dense.pieces().count(), StartTrace::MAX_PIECES);
        const { assert!(StartTrace::MAX_ENCODED + 1024 < crate::MAX_HEADER) };
    }

    proptest! {
        #[test]
        fn pieces_stay_in_order_and_round_trip(pieces in vec((0..3u32, prop_oneof![0..40u32, u32::MAX - 3..=u32::MAX]), 0..80)) {
            let trace = StartTrace::of(pieces.iter().copied());
            let mut expected: Vec<(u32, u32)> = Vec::new();
            for piece in pieces {
                if piece.1 != u32::MAX && !expected.contains(&piece) {
                    expected.push(piece);
                }
            }
            prop_assert_eq!(trace.pieces().collect::<Vec<_>>(), expected);
            prop_assert_eq!(StartTrace::parse(&trace.encode()), Ok(trace));
        }

        #[test]
        fn any_bytes_are_a_trace_or_an_error(rest in vec(any::<u8>(), 0..200)) {
            let bytes = [&MAGIC[..], &rest].concat();
            if let Ok(trace) = StartTrace::parse(&bytes) {
                prop_assert!(trace.pieces().count() <= StartTrace::MAX_PIECES);
                prop_assert_eq!(trace.encode(), bytes);
            }
        }
    }
}
