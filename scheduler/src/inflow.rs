//! How much may be on its way to this node at a time: about what it takes in within `window_time`, at the best rate measured
//! of late. Not at the present rate: who was refused a few times takes in less, would ask for less, and take in even less.
//!
//! Asking many peers for more than the own downlink carries makes every one of them look slow, and all of it would
//! queue in front of the next on-demand read.

use std::time::Duration;

use shoal_proto::Priority;

use crate::{Config, Time};

/// The rate is taken over at least so long.
const SAMPLE: Duration = Duration::from_millis(100);
/// The best rate of late loses this part with each sample: half of it within about 4 s.
const FADES: u64 = 64;
/// Part of the limit that is left for prefetch while somebody waits for something. With all of it 40 nodes of 200 Mbit/s (the
/// simulator's scenario `lazy-start`) need 5.9 s for a tenth of the image while the rest is prefetched, with a third 4.6 s, with an
/// eighth 3.9 s; but who reads all of an image in turn always waits for something, and with an eighth has it a tenth later.
const BESIDE_READERS: u64 = 3;
/// Longest time that the own queue explains a peer's silence.
const MAX_DRAIN: Duration = Duration::from_secs(5);

/// What bytes on their way are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Asked of peers.
    Peers(Priority),
    /// Asked of the registry, which waits for nobody: what peers owe must never hold it up, or homes that ask each other
    /// would wait for each other.
    Registry(Priority),
}

impl Lane {
    fn index(self) -> usize {
        match self {
            Self::Peers(priority) => priority as usize,
            Self::Registry(_) => 2,
        }
    }
}

/// Bytes on their way from all sources.
#[derive(Debug, Default)]
pub(crate) struct Inflow {
    /// Prefetch and on-demand from peers, all from the registry.
    in_flight: [u64; 3],
    /// Received since `since`.
    bytes: u64,
    since: Time,
    rate_bytes_per_s: u64,
    /// The best rate of late.
    best_bytes_per_s: u64,
}

impl Inflow {
    /// Whether more may be asked for. On-demand may have twice as much on its way and does not count what nobody waits
    /// for; at the registry its slots are limit enough.
    pub(crate) fn room(&self, lane: Lane, config: &Config) -> bool {
        let limit = self.limit(config);
        match lane {
            Lane::Peers(Priority::Prefetch) => self.total() < limit,
            Lane::Peers(Priority::OnDemand) => self.in_flight[lane.index()] < limit.saturating_mul(2),
            Lane::Registry(Priority::Prefetch) => self.in_flight[lane.index()] < limit,
            Lane::Registry(Priority::OnDemand) => true,
        }
    }

    /// Whether more may be prefetched from peers beside what somebody waits for: what is on its way at the same time slows that down.
    pub(crate) fn room_beside_readers(&self, config: &Config) -> bool {
        self.in_flight[Lane::Peers(Priority::Prefetch).index()] < self.limit(config) / BESIDE_READERS
    }

    fn limit(&self, config: &Config) -> u64 {
        let millis = u64::try_from(config.window_time.as_millis()).unwrap_or(u64::MAX);
        (self.best_bytes_per_s / 1000).saturating_mul(millis).max(config.min_window)
    }

    fn total(&self) -> u64 {
        self.in_flight.iter().fold(0, |total, bytes| total.saturating_add(*bytes))
    }

    /// How long what is on its way takes to arrive.
    pub(crate) fn drain(&self) -> Duration {
        match self.rate_bytes_per_s {
            0 => Duration::ZERO,
            rate => Duration::from_millis(self.total().saturating_mul(1000) / rate).min(MAX_DRAIN),
        }
    }

    pub(crate) fn load(&mut self, now: Time, lane: Lane, bytes: u64) {
        if self.total() == 0 {
            (self.since, self.bytes) = (now, 0);
        }
        self.in_flight[lane.index()] += bytes;
    }

    pub(crate) fn unload(&mut self, lane: Lane, bytes: u64) {
        let in_flight = &mut self.in_flight[lane.index()];
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
            let best = self.best_bytes_per_s - self.best_bytes_per_s / FADES;
            self.best_bytes_per_s = self.rate_bytes_per_s.max(best);
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
        let lanes = [Priority::Prefetch, Priority::OnDemand].map(Lane::Peers);
        let [prefetch, on_demand] = lanes;
        let registry = Lane::Registry(Priority::Prefetch);
        let room = |inflow: &Inflow| [prefetch, on_demand, registry].map(|lane| inflow.room(lane, &config));
        inflow.load(Time::ZERO, prefetch, 999);
        assert_eq!(room(&inflow), [true, true, true]);
        inflow.load(Time::ZERO, prefetch, 2001);
        assert_eq!(room(&inflow), [false, true, true]);
        inflow.load(Time::ZERO, on_demand, 2000);
        assert_eq!(room(&inflow), [false, false, true]);
        inflow.load(Time::ZERO, registry, 1000);
        assert_eq!(room(&inflow), [false, false, false]);
        assert!(inflow.room(Lane::Registry(Priority::OnDemand), &config));
        inflow.delivered(Time::ZERO + SAMPLE, 1000);
        assert_eq!(room(&inflow), [true, true, true], "10,000 bytes per second");
        assert_eq!(inflow.drain(), Duration::from_millis(600));
        for (lane, bytes) in [(prefetch, 3000), (on_demand, 2000), (registry, 1000)] {
            inflow.unload(lane, bytes);
        }
        assert_eq!(inflow.drain(), Duration::ZERO);
    }

    #[test]
    fn a_third_is_left_for_prefetch_beside_readers() {
        let config = Config { min_window: 900, ..Config::new(PeerId::new([0; 32]), "a") };
        let mut inflow = Inflow::default();
        inflow.load(Time::ZERO, Lane::Peers(Priority::OnDemand), 5000);
        inflow.load(Time::ZERO, Lane::Peers(Priority::Prefetch), 299);
        assert!(inflow.room_beside_readers(&config), "whatever they wait for");
        inflow.load(Time::ZERO, Lane::Peers(Priority::Prefetch), 1);
        assert!(!inflow.room_beside_readers(&config));
    }
}
