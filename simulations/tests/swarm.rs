//! Whole swarms: everyone gets everything, the registry sends the image about once, what can be worked out by hand comes
//! out, and neither the seed used twice nor the order of a file changes a story.

use shoal_sim::{Fault, FaultKind, Policy, Report, Role, Scenario, run};

const FLASH_CROWD: &str = include_str!("../scenarios/flash-crowd.toml");
const LOST_SEED: &str = include_str!("../scenarios/lost-seed.toml");

/// A crowd small enough for a debug build.
fn small(text: &str) -> Scenario {
    let mut scenario = Scenario::parse(text).unwrap();
    scenario.image.encoded_mib = 32.0;
    scenario
}

fn complete(scenario: &Scenario, seed: u64) -> Report {
    let report = run(scenario, seed, &());
    assert!(report.is_right() && report.complete == report.alive, "seed {seed}: {report}");
    let received: u64 = report.received_bytes.values().sum();
    let needed = report.complete as u64 * report.image_encoded_bytes;
    if scenario.faults.is_empty() && scenario.image.shares.is_none() {
        assert!((needed..=needed + report.wasted_bytes).contains(&received), "seed {seed}: {received}: {report}");
    }
    report
}

fn fault(kind: FaultKind, select: Option<Role>, at_s: f64) -> Fault {
    Fault { at_s, kind, select, zone: None, fraction: 0.25, for_s: 0.0, factor: 0.1 }
}

#[test]
fn a_flash_crowd_with_seed_peers_costs_the_registry_one_copy() {
    let mut one_seed = small(FLASH_CROWD);
    one_seed.nodes[1].count = 1;
    for scenario in [small(FLASH_CROWD), one_seed] {
        for seed in 1..4 {
            let report = complete(&scenario, seed);
            let copies = report.copies_per_zone();
            assert!((0.99..=1.05).contains(&copies), "seed {seed}: {copies} copies");
            let last = report.complete_seconds.max / report.fluid_bound_seconds;
            assert!((1.0..2.0).contains(&last), "seed {seed}: {report}");
        }
    }
}

#[test]
fn a_crowd_without_seed_peers_shares_what_it_reads() {
    let mut scenario = small(FLASH_CROWD);
    scenario.nodes.pop();
    let copies = complete(&scenario, 1).copies_per_zone();
    assert!(copies < 3.0, "{copies} copies for 16 nodes");
}

#[test]
fn rolling_and_random_starts_and_readers_that_wait() {
    for kind in ["rolling", "poisson"] {
        let workload = format!("\"{kind}\"\nover_s = 10\nread = \"all\"\non_demand = 4");
        let report = complete(&small(&FLASH_CROWD.replace("\"flash-crowd\"\nread = \"all\"", &workload)), 1);
        // More than one copy: seed peers of 100 Mbit/s that send pieces of 512 KiB to many at once are silent to each for
        // longer than a waiting reader is patient, who then asks the next home.
        assert!(report.copies_per_zone() < 4.0, "{report}");
    }
}

#[test]
fn a_pause_between_two_starts_is_not_the_end() {
    let rolling = FLASH_CROWD.replace("\"flash-crowd\"\nread", "\"rolling\"\nover_s = 16000\nread");
    complete(&small(&rolling), 1);
}

#[test]
fn losing_a_quarter_of_the_nodes_and_a_seed_peer_costs_little() {
    let mut scenario = small(LOST_SEED);
    for fault in &mut scenario.faults {
        fault.at_s = 3.0;
    }
    for seed in 1..4 {
        let copies = complete(&scenario, seed).copies_per_zone();
        assert!(copies <= 1.3, "seed {seed}: {copies} copies");
    }
}

#[test]
fn losing_every_seed_peer_sends_the_nodes_to_the_registry() {
    let mut scenario = small(LOST_SEED);
    for fault in &mut scenario.faults {
        (fault.at_s, fault.fraction) = (0.5, if fault.select == Some(Role::Seed) { 1.0 } else { 0.0 });
    }
    complete(&scenario, 1);
}

#[test]
fn nodes_that_are_cut_off_slow_or_poisonous_keep_nobody_from_finishing() {
    let cut = |select, for_s| Fault { for_s, ..fault(FaultKind::Cut, select, 2.0) };
    let zone = Fault { zone: Some("b".to_owned()), ..cut(None, 5.0) };
    for faults in [
        vec![cut(Some(Role::Node), 20.0)],
        vec![zone],
        vec![fault(FaultKind::Slow, Some(Role::Node), 1.0), cut(Some(Role::Node), 3.0)],
        vec![fault(FaultKind::Poison, Some(Role::Node), 0.0)],
    ] {
        let scenario = Scenario { faults, ..small(LOST_SEED) };
        let report = complete(&scenario, 1);
        let poisoned = scenario.faults[0].kind == FaultKind::Poison;
        assert!(!poisoned || report.wasted_bytes > 0, "{report}");
    }
}

#[test]
fn a_thin_link_between_zones_carries_no_more_than_it_can() {
    let mut scenario = small(LOST_SEED);
    scenario.faults.clear();
    scenario.zones[1].uplink_mbit = Some(40.0);
    scenario.nodes.iter_mut().for_each(|group| group.racks = 3);
    scenario.zones[0].rack_uplink_mbit = Some(200.0);
    let report = complete(&scenario, 1);
    let most = 2.0 * 40.0 * 125_000.0 * report.complete_seconds.max;
    assert!((report.cross_zone_bytes as f64) <= most * 1.01, "{report}");
}

#[test]
fn what_links_and_seed_peers_carried_adds_up() {
    let mut scenario = small(FLASH_CROWD);
    scenario.zones[0].uplink_mbit = Some(90.0);
    let report = complete(&scenario, 1);
    let history = &report.history;
    assert!((history.end_s / report.complete_seconds.max - 1.0).abs() < 1e-9, "{} s: {report}", history.end_s);
    let carried = |name: &str| history.links.iter().find(|link| link.name == name).unwrap().carried.sum();
    let received = |source: &str| report.received_bytes[source];
    let registry: u64 = report.registry_bytes_per_zone.values().sum();
    assert_eq!((carried("registry egress"), carried("into zone a")), (registry, registry));
    assert_eq!(report.registry_bytes_over_time.sum(), registry);
    assert_eq!(carried("node downlinks"), report.received_bytes.values().sum::<u64>());
    assert_eq!(carried("node uplinks"), received("peer"));
    let load = report.seed_load;
    assert_eq!((load.peers, carried("seed uplinks")), (2, (load.mean_bytes * 2.0) as u64));
    assert!(carried("seed uplinks") >= received("seed"), "seed peers give each other something, too");
    assert!((0.0..=1.0).contains(&load.most_use) && (load.mean_use - report.link_use["seed uplinks"]).abs() < 1e-9);
    for (class, part) in &report.link_use {
        assert!((0.0..=1.0).contains(part), "{class}: {part}");
    }
    let each: u64 = history.nodes.iter().flat_map(|node| &node.trace.received).map(|series| series.sum()).sum();
    assert_eq!(each, carried("node downlinks"));
    // All of 64 pieces are wanted at first, since the prefetch window is larger, and none at last.
    for node in &history.nodes {
        let wants = &node.trace.wants.values;
        assert!(wants.iter().max() == Some(&64) && wants.last() < Some(&8), "{wants:?}");
    }
    assert!((0.9..=1.0).contains(&report.fairness.jain_index) && report.fairness.last_by_median >= 1.0);
}

#[test]
fn what_readers_wait_for_is_hedged_when_nodes_are_lost() {
    assert_eq!(complete(&small(FLASH_CROWD), 1).hedged_requests, 0, "nobody waits");
    let mut scenario = small(LOST_SEED);
    scenario.workload.on_demand = 4;
    scenario.faults = vec![Fault { fraction: 0.5, ..fault(FaultKind::Kill, Some(Role::Node), 3.0) }];
    let report = complete(&scenario, 1);
    assert!(report.hedged_requests > 0 && report.hedged_requests < report.requests / 10, "{report}");
}

#[test]
fn who_has_an_earlier_image_fetches_the_rest_only() {
    let text = FLASH_CROWD.replace("decoded_ratio = 2.0", "shares = { with = \"v1\", fraction = 0.75 }");
    let scenario = small(&text);
    let report = complete(&scenario, 1);
    let part = report.received_bytes.values().sum::<u64>() as f64 / (16 * report.image_encoded_bytes) as f64;
    assert!((0.1..0.45).contains(&part), "{part}");
}

/// Policies of whole images can be worked out by hand.
#[test]
fn whole_images_take_as_long_as_arithmetic_says() {
    let mut scenario = small(FLASH_CROWD);
    scenario.costs.decode_mib_s = 1e9;
    scenario.registry.latency_ms = 0.0;
    let own = 32.0 * f64::from(1 << 20) / (20.0 * 125_000.0 * shoal_sim::PAYLOAD_SHARE);
    let last = |scenario: &Scenario| complete(scenario, 1).complete_seconds.max;
    let near = |took: f64, expected: f64| assert!((took / expected - 1.0).abs() < 0.02, "{took} for {expected}");
    // Sixteen nodes of 20 Mbit/s behind a registry of 100: a fifth of what they could take.
    scenario.policy = Policy::Registry;
    near(last(&scenario), own * 16.0 * 20.0 / 100.0);
    // Wide enough, everyone is done at the fluid bound.
    scenario.registry.egress_mbit = 1000.0;
    near(last(&scenario), scenario.bound_s(scenario.encoded_bytes(), shoal_sim::PAYLOAD_SHARE));
    // One reads the registry, and then those who have it double four times.
    scenario.policy = Policy::WholeBlob;
    near(last(&scenario), own * 5.0);
    scenario.policy = Policy::Seeds;
    let report = complete(&scenario, 1);
    assert_eq!(report.received_bytes.get("peer"), None, "{report}");
}

#[test]
fn neither_a_second_run_nor_the_order_of_the_file_changes_anything() {
    let mut scenario = small(LOST_SEED);
    scenario.nodes[0].up_mbit = 40.0;
    let mut turned = scenario.clone();
    turned.nodes.reverse();
    turned.zones.reverse();
    let report = run(&scenario, 7, &());
    assert_eq!(report, run(&scenario, 7, &()));
    assert_eq!(report, run(&turned, 7, &()));
    assert_ne!(report, run(&scenario, 8, &()));
}
