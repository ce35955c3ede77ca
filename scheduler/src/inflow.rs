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
    in_flight: u64,
    /// Received since `since`.
    bytes: u64,
    since: Time,
    rate_bytes_per_s: u64,
}

impl Inflow {
    /// Whether more may be asked for; twice as much for what somebody waits for.
    pub(crate) fn room(&self, priority: Priority, config: &Config) -> bool {
        let millis = u64::try_from(config.window_time.as_millis()).unwrap_or(u64::MAX);
        let limit = (self.rate_bytes_per_s / 1000).saturating_mul(millis).max(config.min_window);
        match priority {
            Priority::Prefetch => self.in_flight < limit,
            Priority::OnDemand => self.in_flight < limit.saturating_mul(2),
        }
    }

    /// How long what is on its way takes to arrive.
    pub(crate) fn drain(&self) -> Duration {
        match self.rate_bytes_per_s {
            0 => Duration::ZERO,
            rate => Duration::from_millis(self.in_flight.saturating_mul(1000) / rate).min(MAX_DRAIN),
        }
    }

    pub(crate) fn load(&mut self, now: Time, bytes: u64) {
        if self.in_flight == 0 {
            (self.since, self.bytes) = (now, 0);
        }
        self.in_flight += bytes;
    }

    pub(crate) fn unload(&mut self, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
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
        inflow.load(Time::ZERO, 999);
        assert_eq!(room(&inflow), [true, true]);
        inflow.load(Time::ZERO, 1);
        assert_eq!(room(&inflow), [false, true]);
        inflow.load(Time::ZERO, 1000);
        assert_eq!(room(&inflow), [false, false]);
        inflow.delivered(Time::ZERO + SAMPLE, 1000);
        assert_eq!(room(&inflow), [true, true], "10,000 bytes per second");
        assert_eq!(inflow.drain(), Duration::from_millis(200));
        inflow.unload(2000);
        assert_eq!(inflow.drain(), Duration::ZERO);
    }
}
