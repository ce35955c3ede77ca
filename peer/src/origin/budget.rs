//! A budget of bytes per second: a token bucket that may be overdrawn, so that large reads need no large bucket. Pure.

use std::time::Duration;

use shoal_proto::Priority;

/// Holds one second's worth. A read may begin while there is anything in it; on-demand reads may begin until it is
/// overdrawn by a second's worth. Whatever begins is taken in full, so the rate holds in the long run for both.
#[derive(Debug)]
pub(super) struct Budget {
    rate: f64,
    level: f64,
    filled: Duration,
}

impl Budget {
    /// `rate` in bytes per second, at least 1.
    pub(super) fn new(rate: u64) -> Self {
        let rate = rate.max(1) as f64;
        Self { rate, level: rate, filled: Duration::ZERO }
    }

    /// Takes `bytes` at time `now`, or says how long to wait before asking again.
    pub(super) fn take(&mut self, now: Duration, bytes: u64, priority: Priority) -> Result<(), Duration> {
        let passed = now.saturating_sub(self.filled);
        self.filled = self.filled.max(now);
        self.level = (self.level + passed.as_secs_f64() * self.rate).min(self.rate);
        let floor = match priority {
            Priority::OnDemand => -self.rate,
            Priority::Prefetch => 0.0,
        };
        if self.level > floor {
            self.level -= bytes as f64;
            return Ok(());
        }
        // One byte above the floor; never zero, lest the caller spin, never long, lest it oversleep a change.
        let wait = (floor - self.level + 1.0) / self.rate;
        Err(Duration::from_secs_f64(wait.clamp(0.001, 1.0)))
    }

    /// Takes bytes that have been spent already.
    pub(super) fn debit(&mut self, bytes: u64) {
        self.level -= bytes as f64;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn on_demand_goes_ahead_where_prefetch_waits() {
        let mut budget = Budget::new(1000);
        assert_eq!(budget.take(Duration::ZERO, 1500, Priority::Prefetch), Ok(()));
        let wait = budget.take(Duration::ZERO, 1, Priority::Prefetch).unwrap_err();
        assert!(wait > Duration::from_millis(500), "{wait:?}");
        assert_eq!(budget.take(Duration::ZERO, 600, Priority::OnDemand), Ok(()));
        assert!(budget.take(Duration::ZERO, 1, Priority::OnDemand).is_err());
        assert_eq!(budget.take(Duration::from_secs(2), 1, Priority::Prefetch), Ok(()));
    }

    proptest! {
        #[test]
        fn the_rate_holds_in_the_long_run(
            rate in 1_000u64..1_000_000,
            reads in proptest::collection::vec((1u64..100_000, any::<bool>(), 0u64..50), 1..200),
        ) {
            let mut budget = Budget::new(rate);
            let (mut now, mut taken, mut largest) = (Duration::ZERO, 0, 0);
            for (bytes, on_demand, pause) in reads {
                now += Duration::from_millis(pause);
                let priority = if on_demand { Priority::OnDemand } else { Priority::Prefetch };
                let mut asked = 0;
                while let Err(wait) = budget.take(now, bytes, priority) {
                    now += wait;
                    asked += 1;
                    prop_assert!(asked < 1000, "it ends");
                }
                taken += bytes;
                largest = largest.max(bytes);
                let allowed = (now.as_secs_f64() + 2.0) * rate as f64 + largest as f64 + 1.0;
                prop_assert!(taken as f64 <= allowed, "{taken} of {allowed}");
            }
        }
    }
}
