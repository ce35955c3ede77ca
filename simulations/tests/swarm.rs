//! Whole swarms: everyone gets everything, the registry sends the image about once, and the same seed tells the same
//! story.

use std::process::Command;

use shoal_sim::{Report, Scenario, run};

const FLASH_CROWD: &str = include_str!("../scenarios/flash-crowd.toml");
const LOST_SEED: &str = include_str!("../scenarios/lost-seed.toml");

/// A crowd small enough for a debug build.
fn small(text: &str) -> Scenario {
    let mut scenario = Scenario::parse(text).unwrap();
    scenario.image.encoded_mib = 32.0;
    scenario
}

fn complete(report: &Report) {
    assert_eq!(report.complete, report.nodes, "seed {}: {report}", report.seed);
    assert_eq!(report.failed_reads, 0, "seed {}: {report}", report.seed);
}

#[test]
fn a_flash_crowd_with_seed_peers_costs_the_registry_one_copy() {
    let mut one_seed = small(FLASH_CROWD);
    one_seed.nodes[1].count = 1;
    for scenario in [small(FLASH_CROWD), one_seed] {
        for seed in 1..4 {
            let report = run(&scenario, seed);
            complete(&report);
            let copies = report.registry.copies_per_zone["a"];
            assert!((1.0..=1.05).contains(&copies), "seed {seed}: {copies} copies");
            assert!(report.all_s.max < 2.0 * report.bound_s, "seed {seed}: {report}");
        }
    }
}

#[test]
fn a_crowd_without_seed_peers_shares_what_it_reads() {
    let mut scenario = small(FLASH_CROWD);
    scenario.nodes.pop();
    let report = run(&scenario, 1);
    complete(&report);
    let copies = report.registry.copies_per_zone["a"];
    assert!(copies < 3.0, "{copies} copies for 16 nodes");
}

#[test]
fn rolling_starts_and_readers_that_wait() {
    let text = FLASH_CROWD
        .replace("\"flash-crowd\"\nread = \"all\"", "\"rolling\"\nover_s = 10\nread = \"all\"\non_demand = 4");
    let report = run(&small(&text), 1);
    complete(&report);
    assert!(report.registry.copies_per_zone["a"] <= 1.05, "{report}");
}

#[test]
fn losing_a_quarter_of_the_nodes_and_a_seed_peer_costs_little() {
    let mut scenario = small(LOST_SEED);
    for fault in &mut scenario.faults {
        fault.at_s = 3.0;
    }
    for seed in 1..4 {
        let report = run(&scenario, seed);
        complete(&report);
        for (zone, copies) in &report.registry.copies_per_zone {
            assert!(*copies <= 1.3, "seed {seed}: {copies} copies in zone {zone}");
        }
    }
}

#[test]
fn losing_every_seed_peer_sends_the_nodes_to_the_registry() {
    let mut scenario = small(LOST_SEED);
    for fault in &mut scenario.faults {
        (fault.at_s, fault.fraction) = (0.5, if fault.select == Some(shoal_sim::Role::Seed) { 1.0 } else { 0.0 });
    }
    complete(&run(&scenario, 1));
}

#[test]
fn the_same_seed_tells_the_same_story_and_usage_is_checked() {
    let folder = std::env::temp_dir().join(format!("shoal-sim-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let scenario = folder.join("small.toml");
    std::fs::write(&scenario, LOST_SEED.replace("encoded_mib = 64", "encoded_mib = 16")).unwrap();
    let sim = |arguments: &[&str]| Command::new(env!("CARGO_BIN_EXE_shoal-sim")).args(arguments).output().unwrap();
    let report = |name: &str, seed: &str| {
        let json = folder.join(name);
        let output = sim(&["run", scenario.to_str().unwrap(), "--seed", seed, "--json", json.to_str().unwrap()]);
        assert!(output.status.success(), "{output:?}");
        std::fs::read_to_string(json).unwrap()
    };
    assert_eq!(report("a.json", "5"), report("b.json", "5"));
    assert_ne!(report("a.json", "5"), report("c.json", "6"));
    for (code, arguments) in [
        (2, &["run"][..]),
        (2, &["walk"]),
        (1, &["run", "/nonexistent.toml"]),
        (1, &["run", scenario.to_str().unwrap(), "--json", "/nonexistent/report.json"]),
    ] {
        assert_eq!(sim(arguments).status.code(), Some(code), "{arguments:?}");
    }
    std::fs::remove_dir_all(&folder).unwrap();
}
