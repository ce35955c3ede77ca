//! The time that no schedule beats.

use std::collections::BTreeSet;

use super::Scenario;

/// Part of a link's rate that is payload: 1514 bytes on the wire carry about 1440 of it, over QUIC and over TCP.
pub const PAYLOAD_SHARE: f64 = 0.95;

impl Scenario {
    /// Seconds before which nobody can be done: the registry sends `bytes` once to each zone, the slowest node takes
    /// them in, and all that is received is sent by somebody. `share` is the part of a link's rate that is payload.
    pub fn bound_s(&self, bytes: u64, share: f64) -> f64 {
        let bytes = bytes as f64;
        let rate = |mbit: f64| mbit * 125_000.0 * share;
        let groups = || self.nodes.iter().filter(|group| group.count > 0);
        let zones: BTreeSet<_> = groups().map(|group| &group.zone).collect();
        let registry = rate(self.registry.egress_mbit);
        let slowest = groups().map(|group| rate(group.down_mbit)).fold(f64::INFINITY, f64::min);
        let up: f64 = groups().map(|group| group.count as f64 * rate(group.up_mbit)).sum();
        let count: usize = groups().map(|group| group.count).sum();
        let all = count as f64 * bytes / (registry + up);
        (zones.len() as f64 * bytes / registry).max(bytes / slowest).max(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_the_narrowest_place() {
        let scenario = Scenario::parse(include_str!("../../scenarios/cluster-32-seeds.toml")).unwrap();
        let bytes = scenario.encoded_bytes();
        assert!((scenario.bound_s(bytes, 1.0) - bytes as f64 / 2.5e6).abs() < 1e-6, "a node's own link");
        assert!(scenario.bound_s(bytes, 0.5) > 1.9 * scenario.bound_s(bytes, 1.0));
    }
}
