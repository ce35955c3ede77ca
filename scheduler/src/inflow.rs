//! How much may be on its way to this node at a time: about what it takes in within `window_time`, measured.
//!
//! Asking many peers for more than the own downlink carries makes every one of them look slow, and all of it would
//! queue in front of the next on-demand read.

use std::time::Duration;

use shoal_proto::Priority;

use crate::{Config, Time};

/// The rate is taken over at least so long.
const SAMPLE: Duration = Duration::from_millis(100);
/// Longest time that the own queue explains a peer's silence.
const MAX_DRAIN: Duration = Duration::from_secs(5);

/// Bytes on their way from all sources.
#[derive(Debug, Default)]
pub(crate) struct Inflow {
    /// Prefetch, on-demand.
    in_flight: [u64; 2],
    /// Received since `since`.
    bytes: u64,
    since: Time,
    rate_bytes_per_s: u64,
}

impl Inflow {
    /// Whether more may be asked for. On-demand may have twice as much on its way and does
    /// not count what nobody waits for.
    pub(crate) fn room(&self, priority: Priority, config: &Config) -> bool {
        let millis = u64::try_from(config.window_time.as_millis()).unwrap_or(u64::MAX);
        let limit = (self.rate_bytes_per_s / 1000).saturating_mul(millis).max(config.min_window);
        match priority {
            Priority::Prefetch => self.total() < limit,
            Priority::OnDemand => self.in_flight[1] < limit.saturating_mul(2),
        }
    }

    fn total(&self) -> u64 {
        self.in_flight[0].saturating_add(self.in_flight[1])
    }

    /// How long what is on its way takes to arrive.
    pub(crate) fn drain(&self) -> Duration {
        match self.rate_bytes_per_s {
            0 => Duration::ZERO,
            rate => Duration::from_millis(self.total().saturating_mul(1000) / rate).min(MAX_DRAIN),
        }
    }

    pub(crate) fn load(&mut self, now: Time, priority: Priority, bytes: u64) {
        if self.total() == 0 {
            (self.since, self.bytes) = (now, 0);
        }
        self.in_flight[priority as usize] += bytes;
    }

    pub(crate) fn unload(&mut self, priority: Priority, bytes: u64) {
        let in_flight = &mut self.in_flight[priority as usize];
        *in_flight = in_flight.saturating_sub(bytes);
    }

    pub(crate) fn delivered(&mut self, now: Time, bytes: u64) {
        self.bytes = self.bytes.saturating_add(bytes);
        let elapsed = now.since(self.since);
        if elapsed >= SAMPLE {
            let rate = u128::from(self.bytes) * 1_000_000_000 / elapsed.as_nanos();
            let rate = u64::try_from(rate).unwrap_or(u64::MAX);
            let known = if self.rate_bytes_per_s == 0 { rate } else { self.rate_bytes_per_s };
            self.rate_bytes_per_s = known - known / 4 + rate / 4;
            (self.since, self.bytes) = (now, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::PeerId;

    use super::*;

    #[test]
    fn the_window_follows_the_rate() {
        let config = Config {
            min_window: 1000,
            window_time: Duration::from_secs(1),
            ..Config::new(PeerId::new([0; 32]), "a")
        };
        let mut inflow = Inflow::default();
        let room = |inflow: &Inflow| [Priority::Prefetch, Priority::OnDemand].map(|p| inflow.room(p, &config));
        let (prefetch, on_demand) = (Priority::Prefetch, Priority::OnDemand);
        inflow.load(Time::ZERO, prefetch, 999);
        assert_eq!(room(&inflow), [true, true]);
        inflow.load(Time::ZERO, prefetch, 2001);
        assert_eq!(room(&inflow), [false, true]);
        inflow.load(Time::ZERO, on_demand, 2000);
        assert_eq!(room(&inflow), [false, false]);
        inflow.delivered(Time::ZERO + SAMPLE, 1000);
        assert_eq!(room(&inflow), [true, true], "10,000 bytes per second");
        assert_eq!(inflow.drain(), Duration::from_millis(500));
        inflow.unload(prefetch, 3000);
        inflow.unload(on_demand, 2000);
        assert_eq!(inflow.drain(), Duration::ZERO);
    }
}
