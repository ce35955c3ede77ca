//! What a report says of many nodes in a few figures.

use serde::{Deserialize, Serialize};

/// Median, 90th and 99th percentile, and maximum.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Spread {
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    #[serde(default)]
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Maximum.
    pub max: f64,
}

impl Spread {
    /// Of these values; zeros if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let index = (values.len() as f64 * part).ceil() as usize;
            values.get(index.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

/// How evenly starts were served: each node's, or each of its images by itself. Both are 1 when all of them are done after the same
/// time, and 0 if none is.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Fairness {
    /// Of the rates at which starts got their image, `(sum of x)^2 / (n * sum of x^2)`: k when k of n get equal parts and the
    /// others nothing, in parts of n (Jain, Chiu, Hawe: *A Quantitative Measure of Fairness*, 1984).
    pub jain_index: f64,
    /// Time of the last by the median.
    pub last_by_median: f64,
}

impl Fairness {
    /// Of the times that starts took, which all fetch the same; those that needed none have no rate and do not count.
    pub(crate) fn of(times_s: &[f64]) -> Self {
        let took: Vec<f64> = times_s.iter().copied().filter(|&time| time > 0.0).collect();
        if took.is_empty() {
            return Self::default();
        }
        let (sum, squares) = took.iter().fold((0.0, 0.0), |(sum, squares), time| {
            let rate = 1.0 / time;
            (sum + rate, squares + rate * rate)
        });
        let jain_index = sum * sum / (took.len() as f64 * squares);
        let Spread { p50, max, .. } = Spread::of(took);
        Self { jain_index, last_by_median: max / p50 }
    }
}

/// What seed peers sent. All zero where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct SeedLoad {
    /// Seed peers, living and dead.
    pub peers: usize,
    /// Bytes that one of them sent on average.
    pub mean_bytes: f64,
    /// Bytes that the most loaded sent.
    pub most_bytes: u64,
    /// These by the average: 1 when all sent the same.
    pub most_by_mean: f64,
    /// What they sent, by what their uplinks could have carried until the end of the run.
    pub mean_use: f64,
    /// The same of the one whose uplink was used most.
    pub most_use: f64,
}

impl SeedLoad {
    /// Of the bytes that each seed peer sent and what its uplink could have carried.
    pub(crate) fn of(seeds: &[(u64, f64)]) -> Self {
        let sent: u64 = seeds.iter().map(|(sent, _)| sent).sum();
        let possible: f64 = seeds.iter().map(|(_, possible)| possible).sum();
        let part = |bytes: f64, of: f64| if of > 0.0 { bytes / of } else { 0.0 };
        let mean_bytes = part(sent as f64, seeds.len() as f64);
        let most_bytes = seeds.iter().map(|(sent, _)| *sent).max().unwrap_or(0);
        Self {
            peers: seeds.len(),
            mean_bytes,
            most_bytes,
            most_by_mean: part(most_bytes as f64, mean_bytes),
            mean_use: part(sent as f64, possible),
            most_use: seeds.iter().map(|&(sent, possible)| part(sent as f64, possible)).fold(0.0, f64::max),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(Vec::new()), Spread::default());
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { p50: 2.0, p90: 3.0, p99: 3.0, max: 3.0 });
        let hundred = Spread { p50: 50.0, p90: 90.0, p99: 99.0, max: 100.0 };
        assert_eq!(Spread::of((1..=100).map(f64::from).collect()), hundred);
    }

    #[test]
    fn fairness_is_one_among_equals() {
        assert_eq!(Fairness::of(&[]), Fairness::default());
        assert_eq!(Fairness::of(&[2.0, 2.0, 0.0]), Fairness { jain_index: 1.0, last_by_median: 1.0 });
        // Rates of 3 and 1: 16 / (2 * 10).
        let Fairness { jain_index, last_by_median } = Fairness::of(&[1.0, 3.0]);
        assert!((jain_index - 0.8).abs() < 1e-12 && last_by_median == 3.0, "{jain_index} {last_by_median}");
    }

    #[test]
    fn a_seed_peer_that_sends_more_than_the_others_shows() {
        assert_eq!(SeedLoad::of(&[]), SeedLoad::default());
        let load = SeedLoad::of(&[(300, 1000.0), (100, 200.0)]);
        assert_eq!((load.peers, load.mean_bytes, load.most_bytes), (2, 200.0, 300));
        assert_eq!((load.most_by_mean, load.mean_use, load.most_use), (1.5, 400.0 / 1200.0, 0.5));
        assert_eq!(SeedLoad::of(&[(0, 0.0)]).most_by_mean, 0.0, "a run of no length");
    }
}
