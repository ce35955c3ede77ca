//! What went on over time, in equal slices of it. The slices grow with the run, so that there are never many.

use serde::{Deserialize, Serialize};
use shoal_scheduler::Time;

/// Sums or highest levels in equal slices of time, the first of which begins with the run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// Length of a slice.
    pub slice_seconds: f64,
    /// One for each slice; after the last there is nothing.
    pub values: Vec<u64>,
}

impl Default for Series {
    fn default() -> Self {
        Self { slice_seconds: 1.0 / 64.0, values: Vec::new() }
    }
}

impl Series {
    /// Adds bytes that came through between two times, evenly: nobody knows better when each of them did. `most` is the
    /// number of slices that there may be.
    pub(crate) fn add(&mut self, most: usize, since: Time, until: Time, bytes: u64) {
        let (since, until) = (since.as_secs_f64(), until.as_secs_f64());
        self.fit(until, most, |a, b| a + b);
        let (first, last) = (self.slice_of(since), self.slice_of(until));
        if last >= self.values.len() {
            self.values.resize(last + 1, 0);
        }
        let mut told = 0;
        for at in first..last {
            let passed = ((at + 1) as f64 * self.slice_seconds - since) / (until - since);
            let by_then = (bytes as f64 * passed) as u64;
            let more = by_then.clamp(told, bytes) - told;
            self.values[at] += more;
            told += more;
        }
        self.values[last] += bytes - told;
    }

    /// Notes that a level changed. Each slice keeps the highest that it saw.
    pub(crate) fn change(&mut self, most: usize, now: Time, from: u64, to: u64) {
        let now = now.as_secs_f64();
        self.fit(now, most, u64::max);
        let slice = self.slice_of(now);
        if slice >= self.values.len() {
            self.values.resize(slice + 1, from);
        }
        self.values[slice] = self.values[slice].max(to);
    }

    fn slice_of(&self, at_s: f64) -> usize {
        (at_s / self.slice_seconds) as usize
    }

    /// Makes the slices so long that a time is in one of them.
    fn fit(&mut self, at_s: f64, most: usize, join: fn(u64, u64) -> u64) {
        while self.slice_of(at_s) >= most {
            let join = |pair: &[u64]| pair.iter().copied().reduce(join).unwrap_or_default();
            self.values = self.values.chunks(2).map(join).collect();
            self.slice_seconds *= 2.0;
        }
    }

    /// Start and end of each slice, seconds, and its value. The last ends with the run.
    pub fn slices(&self, end_s: f64) -> impl Iterator<Item = (f64, f64, u64)> {
        let edge = move |at: usize| (at as f64 * self.slice_seconds).min(end_s);
        let slices = self.values.iter().enumerate().map(move |(at, &value)| (edge(at), edge(at + 1), value));
        slices.filter(|(start, end, _)| end > start)
    }

    /// The same sums in slices that are longer by a power of two.
    pub(crate) fn joined(&self, slice_seconds: f64) -> Self {
        let together = (slice_seconds / self.slice_seconds) as usize;
        let values = self.values.chunks(together.max(1)).map(|slices| slices.iter().sum());
        Self { slice_seconds, values: values.collect() }
    }

    /// The same sums in so many slices at most.
    pub(crate) fn in_fewer(&self, most: usize) -> Self {
        let together = self.values.len().div_ceil(most).max(1).next_power_of_two();
        self.joined(self.slice_seconds * together as f64)
    }

    /// All of it.
    pub fn sum(&self) -> u64 {
        self.values.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: f64) -> Time {
        Time::ZERO + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn slices_grow_and_lose_nothing() {
        let mut series = Series::default();
        for second in 0..1000 {
            series.add(256, at(f64::from(second)), at(f64::from(second) + 0.7), 3);
        }
        assert_eq!(series.sum(), 3000);
        assert!(series.values.len() <= 256 && series.values.len() as f64 * series.slice_seconds >= 999.0);
    }

    #[test]
    fn bytes_are_spread_over_the_time_that_they_took() {
        let mut series = Series { slice_seconds: 1.0, values: Vec::new() };
        series.add(8, at(0.5), at(3.5), 301);
        assert_eq!(series.values, [50, 100, 100, 51]);
        series.add(8, at(3.0), at(3.0), 9);
        assert_eq!(series.values, [50, 100, 100, 60], "at once");
        series.add(4, at(4.0), at(5.0), 10);
        assert_eq!((series.slice_seconds, &series.values[..]), (2.0, &[150, 160, 10][..]), "slices twice as long");
        assert_eq!((series.in_fewer(2).slice_seconds, series.in_fewer(2).values), (4.0, vec![310, 10]));
        assert_eq!(series.in_fewer(3), series);
        let slices: Vec<_> = series.slices(5.0).collect();
        assert_eq!(slices, [(0.0, 2.0, 150), (2.0, 4.0, 160), (4.0, 5.0, 10)]);
    }

    #[test]
    fn levels_stay_until_they_change() {
        let mut series = Series { slice_seconds: 1.0, values: Vec::new() };
        series.change(8, at(0.1), 0, 7);
        series.change(8, at(3.2), 7, 2);
        series.change(8, at(3.4), 2, 1);
        series.change(8, at(5.0), 1, 0);
        assert_eq!(series.values, [7, 7, 7, 7, 1, 1]);
        series.change(4, at(6.0), 0, 0);
        assert_eq!(series.values, [7, 7, 1, 0], "the higher of two");
    }
}
