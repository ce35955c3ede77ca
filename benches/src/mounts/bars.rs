//! What one way is held to next to another: ratios of figures of the same round, of which the median counts.

use std::collections::BTreeMap;

use serde::Serialize;

use super::reads::Figures;
use crate::figures::median;

/// What a ratio has to be.
#[derive(Debug, Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

impl Bound {
    fn holds(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(most) => ratio <= most,
            Self::AtLeast(least) => ratio >= least,
        }
    }
}

type Value = fn(&Figures) -> Option<f64>;

/// A figure of one way divided by the same of another.
struct Bar {
    name: &'static str,
    ways: (&'static str, &'static str),
    value: Value,
    bound: Bound,
}

const fn bar(name: &'static str, ways: (&'static str, &'static str), value: Value, bound: Bound) -> Bar {
    Bar { name, ways, value, bound }
}

const NATIVE: (&str, &str) = ("native", "erofs");

/// Times are divided so that a way that is held to be fast stands above, where it is said how many times faster it is, and
/// below, where it is said how much longer it may take.
const BARS: [Bar; 9] = [
    bar("native_over_erofs_local_all", NATIVE, |of| of.local_all_seconds, Bound::AtMost(1.03)),
    bar("native_over_erofs_parallel_all", NATIVE, |of| of.parallel_all_seconds, Bound::AtMost(1.03)),
    bar("native_over_erofs_hot_all", NATIVE, |of| of.hot_all_seconds, Bound::AtMost(1.03)),
    bar("native_over_erofs_find", NATIVE, |of| of.find_seconds, Bound::AtMost(1.03)),
    bar("native_over_erofs_seq_read", NATIVE, |of| of.seq_read_mib_s, Bound::AtLeast(0.97)),
    bar("native_over_erofs_rand_read", NATIVE, |of| of.rand_read_iops, Bound::AtLeast(0.97)),
    bar("fuse_over_bare_hot_speed", ("bare_fuse", "fuse"), |of| of.hot_all_seconds, Bound::AtLeast(0.9)),
    bar("fuse_over_peer_cold_speed", ("peer", "fuse"), |of| of.cold_all_seconds, Bound::AtLeast(1.5)),
    bar("fuse_over_peer_fetched", ("fuse", "peer"), |of| of.cold_open_bytes_fetched, Bound::AtMost(0.6)),
];

/// What became of a bar.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    ratio: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_most: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at_least: Option<f64>,
    holds: bool,
}

impl Outcome {
    /// For people.
    pub(super) fn line(&self, name: &str) -> String {
        let bound = match (self.at_most, self.at_least) {
            (Some(most), _) => format!("at most {most}"),
            (None, least) => format!("at least {}", least.unwrap_or_default()),
        };
        format!("{name:<34}{:>8.3}  {bound}: {}", self.ratio, if self.holds { "holds" } else { "missed" })
    }
}

/// The bars for which both ways were measured.
pub(super) fn outcomes(rounds: &BTreeMap<&'static str, Vec<Figures>>) -> BTreeMap<&'static str, Outcome> {
    let outcome = |bar: &Bar| {
        let (above, below) = (rounds.get(bar.ways.0)?, rounds.get(bar.ways.1)?);
        let ratio = |(above, below)| Some((bar.value)(above)? / (bar.value)(below)?);
        let ratios: Vec<f64> = above.iter().zip(below).filter_map(ratio).collect();
        if ratios.is_empty() {
            return None;
        }
        let (at_most, at_least) = match bar.bound {
            Bound::AtMost(most) => (Some(most), None),
            Bound::AtLeast(least) => (None, Some(least)),
        };
        let ratio = median(&ratios);
        Some((bar.name, Outcome { ratio, at_most, at_least, holds: bar.bound.holds(ratio) }))
    };
    BARS.iter().filter_map(outcome).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_told_of_the_rounds_that_have_both() {
        let hot = |seconds| Figures { hot_all_seconds: Some(seconds), ..Figures::default() };
        let rounds = BTreeMap::from([
            ("fuse", vec![hot(1.0), hot(2.0), hot(4.0)]),
            ("bare_fuse", vec![hot(0.5), hot(2.0), hot(4.0)]),
            ("erofs", vec![hot(1.0)]),
            ("native", vec![Figures::default()]),
        ]);
        let outcomes = outcomes(&rounds);
        assert_eq!(outcomes.keys().copied().collect::<Vec<_>>(), ["fuse_over_bare_hot_speed"]);
        let outcome = &outcomes["fuse_over_bare_hot_speed"];
        assert!(outcome.holds && outcome.ratio == 1.0);
        assert!(outcome.line("x").ends_with("1.000  at least 0.9: holds"));
        assert!(!Bound::AtMost(0.6).holds(0.61) && Bound::AtLeast(1.5).holds(1.5));
    }
}
