//! How long reads took: counts by powers of two, so that noting one costs next to nothing and memory does not grow.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The last one counts everything from half an hour on.
const BUCKETS: usize = 32;

/// Bucket `n` counts what took less than 2^n microseconds, and no bucket before it counts.
#[derive(Debug, Default)]
pub(crate) struct Latencies([AtomicU64; BUCKETS]);

impl Latencies {
    pub(crate) fn note(&self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (u64::BITS - micros.leading_zeros()) as usize;
        self.0[bucket.min(BUCKETS - 1)].fetch_add(1, Relaxed);
    }

    /// A time that `percent` of 100 did not exceed, to the next power of two; zero before the first.
    pub(crate) fn percentile(&self, percent: u64) -> Duration {
        let counts = self.0.each_ref().map(|count| count.load(Relaxed));
        let wanted = (counts.iter().sum::<u64>() * percent).div_ceil(100);
        if wanted == 0 {
            return Duration::ZERO;
        }
        let mut seen = 0;
        let bucket = counts.iter().position(|count| {
            seen += count;
            seen >= wanted
        });
        Duration::from_micros(1 << bucket.unwrap_or(BUCKETS - 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_powers_of_two_above_what_was_noted() {
        let latencies = Latencies::default();
        assert_eq!(latencies.percentile(99), Duration::ZERO);
        for micros in [0, 1, 3, 100, 100, 100, 100, 100, 100, 5000] {
            latencies.note(Duration::from_micros(micros));
        }
        latencies.note(Duration::MAX);
        let percentile = |percent| latencies.percentile(percent).as_micros();
        assert_eq!([0, 9, 50, 90].map(percentile), [0, 1, 128, 8192]);
        assert_eq!(latencies.percentile(100), Duration::from_micros(1 << 31));
    }
}
