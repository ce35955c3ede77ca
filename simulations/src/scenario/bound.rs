//! The time that no schedule beats.

use std::collections::BTreeSet;

use super::{Nodes, Role, Scenario, WorkloadKind};

/// Part of a link's rate that is payload: 1514 bytes on the wire carry about 1440 of it, over QUIC and over TCP.
pub const PAYLOAD_SHARE: f64 = 0.95;

impl Scenario {
    /// Seconds before which nobody can be done: the registry sends `bytes` once to each zone, the slowest node takes
    /// them in, and all that is received is sent by somebody. `share` is the part of a link's rate that is payload.
    pub fn bound_s(&self, bytes: u64, share: f64) -> f64 {
        let groups = || self.nodes.iter().filter(|group| group.count > 0);
        let zones: BTreeSet<_> = groups().map(|group| &group.zone).collect();
        let count: usize = groups().map(|group| group.count).sum();
        self.narrowest(groups(), bytes as f64, share, [zones.len(), 1, count])
    }

    /// Seconds that the last start of the workload takes at least, if each fetches `bytes`, and so many images are asked for, those
    /// of each zone counted by themselves. Of all starts at once one copy of each of these comes from the registry, and every node
    /// takes in those that it starts. Of starts that are spread out one may be alone.
    pub(crate) fn workload_bound_s(&self, bytes: u64, share: f64, asked_for: usize) -> f64 {
        let readers = self.nodes.iter().filter(|group| group.count > 0 && group.role == Role::Node);
        let each = self.workload.images.starts_per_node as usize;
        match (self.workload.kind, self.workload.images.count) {
            (WorkloadKind::FlashCrowd, 1) => self.bound_s(bytes, share),
            (WorkloadKind::FlashCrowd, _) => {
                self.narrowest(readers, bytes as f64, share, [asked_for, each, self.starts()])
            }
            _ => self.narrowest(readers, bytes as f64, share, [1, 1, 1]),
        }
    }

    /// Copies of `bytes` from the registry, into each of these nodes, and into all together: the longest that one of them takes.
    fn narrowest<'a>(
        &'a self,
        receivers: impl Iterator<Item = &'a Nodes>,
        bytes: f64,
        share: f64,
        [sourced, each, all]: [usize; 3],
    ) -> f64 {
        let rate = |mbit: f64| mbit * 125_000.0 * share;
        let registry = rate(self.registry.egress_mbit);
        let slowest = receivers.map(|group| rate(group.down_mbit)).fold(f64::INFINITY, f64::min);
        let up: f64 = self.nodes.iter().map(|group| group.count as f64 * rate(group.up_mbit)).sum();
        let all = all as f64 * bytes / (registry + up);
        (sourced as f64 * bytes / registry).max(each as f64 * bytes / slowest).max(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Images;

    #[test]
    fn the_bound_is_the_narrowest_place() {
        let scenario = Scenario::parse(include_str!("../../scenarios/cluster-32-seeds.toml")).unwrap();
        let bytes = scenario.encoded_bytes();
        assert!((scenario.bound_s(bytes, 1.0) - bytes as f64 / 2.5e6).abs() < 1e-6, "a node's own link");
        assert!(scenario.bound_s(bytes, 0.5) > 1.9 * scenario.bound_s(bytes, 1.0));
    }

    #[test]
    fn several_images_take_as_many_copies() {
        let mut scenario = Scenario::parse(include_str!("../../scenarios/cluster-32-seeds.toml")).unwrap();
        scenario.workload.images = Images { count: 9, zipf: 1.0, starts_per_node: 3 };
        let bytes = scenario.encoded_bytes();
        let one = bytes as f64 / 125_000.0;
        let of = |scenario: &Scenario, asked_for| scenario.workload_bound_s(bytes, 1.0, asked_for);
        let slowest = scenario.nodes.iter().map(|group| group.down_mbit).fold(f64::INFINITY, f64::min);
        assert!((of(&scenario, 9) - 3.0 * one / slowest).abs() < 1e-6, "a node takes in three images");
        scenario.registry.egress_mbit = slowest;
        assert!((of(&scenario, 9) - 9.0 * one / slowest).abs() < 1e-6, "the registry sends nine");
        scenario.workload.kind = WorkloadKind::Poisson;
        assert!((of(&scenario, 9) - one / slowest).abs() < 1e-6, "who starts alone takes in one");
    }
}
