//! How long reads took: counts by powers of two, so that noting one costs next to nothing and memory does not grow.

use std::ops::AddAssign;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The last one counts everything from half an hour on.
const BUCKETS: usize = 32;

/// Counters that many may add to at once.
#[derive(Debug, Default)]
pub struct Latencies {
    counts: [AtomicU64; BUCKETS],
    micros: AtomicU64,
}

/// What such counters have counted. Bucket `n` counts what took less than 2^n microseconds, and no bucket before it counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReadTimes {
    counts: [u64; BUCKETS],
    micros: u64,
}

impl Latencies {
    /// A read has taken this long.
    pub fn note(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.counts[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
        self.micros.fetch_add(micros, Relaxed);
    }

    /// What was noted so far.
    pub fn times(&self) -> ReadTimes {
        ReadTimes {
            counts: self.counts.each_ref().map(|count| count.load(Relaxed)),
            micros: self.micros.load(Relaxed),
        }
    }
}

impl ReadTimes {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// What they took together.
    pub fn total(&self) -> Duration {
        Duration::from_micros(self.micros)
    }

    /// How many took less than 2^`power` microseconds.
    pub fn below(&self, power: usize) -> u64 {
        self.counts.iter().take(power + 1).sum()
    }

    /// A time that `percent` of 100 did not exceed, to the next power of two; zero before the first.
    pub fn percentile(&self, percent: u64) -> Duration {
        let wanted = (self.count() * percent).div_ceil(100);
        if wanted == 0 {
            return Duration::ZERO;
        }
        let mut seen = 0;
        let bucket = self.counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        Duration::from_micros(1 << bucket.unwrap_or(BUCKETS - 1))
    }
}

impl AddAssign for ReadTimes {
    fn add_assign(&mut self, other: Self) {
        self.counts.iter_mut().zip(other.counts).for_each(|(count, more)| *count += more);
        self.micros = self.micros.saturating_add(other.micros);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_powers_of_two_above_what_was_noted() {
        let latencies = Latencies::default();
        assert_eq!(latencies.times().percentile(99), Duration::ZERO);
        for micros in [0, 1, 3, 100, 100, 100, 100, 100, 100, 5000] {
            latencies.note(Duration::from_micros(micros));
        }
        assert_eq!(latencies.times().total(), Duration::from_micros(5604));
        latencies.note(Duration::MAX);
        let times = latencies.times();
        let percentile = |percent| times.percentile(percent).as_micros();
        assert_eq!([0, 9, 50, 90].map(percentile), [0, 1, 128, 8192]);
        assert_eq!(times.percentile(100), Duration::from_micros(1 << 31));
        assert_eq!([0, 1, 2, 7, 12, 13, 30, 31].map(|power| times.below(power)), [1, 2, 3, 9, 9, 10, 10, 11]);
        let mut twice = times;
        twice += times;
        assert_eq!((twice.count(), twice.below(7)), (22, 18));
    }
}
