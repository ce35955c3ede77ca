//! What a run adds up while it lasts: bytes by who sent them and where they went, and how that went over time.

use std::collections::BTreeMap;

use shoal_scheduler::Time;

use crate::scenario::Role;

/// Who sent something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Sender {
    /// The registry.
    Registry,
    /// A node of a role, in a zone.
    Node(Role, u16),
}

impl Sender {
    /// How reports call it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Registry => "registry",
            Self::Node(Role::Seed, _) => "seed",
            Self::Node(Role::Node, _) => "peer",
        }
    }
}

/// Slices of a series at most.
const SLICES: usize = 256;

/// Bytes in equal slices of time; the slices grow with the run, so that there are never many.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    pub(crate) slice_s: f64,
    pub(crate) bytes: Vec<u64>,
}

impl Default for Series {
    fn default() -> Self {
        Self { slice_s: 1.0 / 64.0, bytes: Vec::new() }
    }
}

impl Series {
    fn add(&mut self, now: Time, bytes: u64) {
        while now.as_secs_f64() / self.slice_s >= SLICES as f64 {
            self.bytes = self.bytes.chunks(2).map(|pair| pair.iter().sum()).collect();
            self.slice_s *= 2.0;
        }
        let at = (now.as_secs_f64() / self.slice_s) as usize;
        if at >= self.bytes.len() {
            self.bytes.resize(at + 1, 0);
        }
        self.bytes[at] += bytes;
    }
}

/// The sums of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Bytes that arrived, by who sent them and the zone that they went to.
    pub(crate) moved: BTreeMap<(Sender, u16), u64>,
    /// Of these, what reading nodes took in.
    pub(crate) received: BTreeMap<&'static str, u64>,
    /// The same over time.
    pub(crate) series: BTreeMap<&'static str, Series>,
    /// Bytes that arrived for nothing: stopped on the way, wrong, or there already.
    pub(crate) wasted: u64,
    /// Requests to the registry.
    pub(crate) registry_requests: u64,
    /// Requests to nodes, and those answered busy.
    pub(crate) requests: u64,
    pub(crate) refused: u64,
}

impl Tally {
    /// So many bytes came through.
    pub(crate) fn add(&mut self, now: Time, from: Sender, zone: u16, to: Role, bytes: u64) {
        *self.moved.entry((from, zone)).or_default() += bytes;
        if to == Role::Node {
            *self.received.entry(from.name()).or_default() += bytes;
        }
        self.series.entry(from.name()).or_default().add(now, bytes);
    }

    /// Bytes from the registry to a zone.
    pub(crate) fn sent_by_registry(&self, zone: u16) -> u64 {
        self.moved.get(&(Sender::Registry, zone)).copied().unwrap_or(0)
    }

    /// Bytes from one zone to another.
    pub(crate) fn cross_zone(&self) -> u64 {
        let crosses = |&(from, to): &(Sender, u16)| matches!(from, Sender::Node(_, zone) if zone != to);
        self.moved.iter().filter(|(key, _)| crosses(key)).map(|(_, bytes)| bytes).sum()
    }

    /// All bytes that arrived.
    pub(crate) fn all(&self) -> u64 {
        self.moved.values().sum()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn slices_grow_and_lose_nothing() {
        let mut series = Series::default();
        for second in 0..1000 {
            series.add(Time::ZERO + Duration::from_secs(second), 3);
        }
        assert_eq!(series.bytes.iter().sum::<u64>(), 3000);
        assert!(series.bytes.len() <= SLICES && series.bytes.len() as f64 * series.slice_s >= 999.0);
    }

    #[test]
    fn what_crosses_zones_is_told_apart() {
        let mut tally = Tally::default();
        for (from, zone) in
            [(Sender::Registry, 1), (Sender::Node(Role::Seed, 1), 1), (Sender::Node(Role::Node, 0), 1)]
        {
            tally.add(Time::ZERO, from, zone, Role::Node, 10);
        }
        assert_eq!((tally.cross_zone(), tally.sent_by_registry(1), tally.all()), (10, 10, 30));
        assert_eq!(tally.received, [("peer", 10), ("registry", 10), ("seed", 10)].into());
    }
}
