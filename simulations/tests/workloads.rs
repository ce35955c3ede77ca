//! Who reads what: a start that reads a part of an image, by fraction or by trace, and nodes that start several images.

use std::path::Path;

use shoal_rafs::{Bootstrap, BuildOptions, Builder};
use shoal_sim::{Fault, FaultKind, Images, Policy, Prefetch, Read, Report, Role, Scenario, Spread, run};

const LAZY_START: &str = include_str!("../scenarios/lazy-start.toml");
const MANY_IMAGES: &str = include_str!("../scenarios/many-images.toml");

/// The example, small enough for a debug build.
fn lazy(read: Read, prefetch: Option<Prefetch>) -> Scenario {
    let mut scenario = Scenario::parse(LAZY_START).unwrap();
    (scenario.workload.read, scenario.workload.prefetch) = (read, prefetch);
    scenario.image.encoded_mib = 64.0;
    scenario.nodes[1].count = 12;
    scenario
}

/// Runs a scenario in which every node gets so many images' worth, and nothing beyond it but what was for nothing.
fn complete(scenario: &Scenario, images: f64) -> Report {
    let report = run(scenario, scenario.seed, &());
    assert!(report.is_right() && report.complete == report.nodes, "{report}");
    let received: u64 = report.received_bytes.values().sum();
    let needed = (images * (report.nodes as u64 * report.image_encoded_bytes) as f64).round() as u64;
    assert!((needed..=needed + report.wasted_bytes).contains(&received), "{received} for {needed}: {report}");
    report
}

#[test]
fn a_start_reads_a_part_and_the_rest_comes_if_it_is_asked_for() {
    let whole = complete(&lazy(Read::All, None), 1.0);
    assert_eq!(whole.start_seconds, whole.complete_seconds, "who reads everything");
    let fraction = || Read::Fraction(0.125);
    for prefetch in [None, Some(Prefetch::Start)] {
        let part = complete(&lazy(fraction(), prefetch), 0.125);
        assert_eq!(part.start_seconds, part.complete_seconds, "{prefetch:?}: {part}");
        assert!(part.fluid_bound_seconds < whole.fluid_bound_seconds / 4.0, "{part}");
        assert!(part.complete_seconds.p50 < whole.complete_seconds.p50 / 2.0, "{part} next to {whole}");
    }
    let behind = complete(&lazy(fraction(), Some(Prefetch::All)), 1.0);
    let Spread { p50, max, .. } = behind.start_seconds;
    assert!(p50 < behind.complete_seconds.p50 / 2.0 && max < behind.complete_seconds.max, "{behind}");
}

#[test]
fn who_reads_one_piece_after_the_other_waits_longer() {
    let mut scenario = lazy(Read::Fraction(0.5), None);
    scenario.workload.on_demand = 0;
    let one = complete(&scenario, 0.5);
    scenario.workload.on_demand = 8;
    let eight = complete(&scenario, 0.5);
    assert!(one.start_seconds.p50 > eight.start_seconds.p50, "{one} next to {eight}");
}

#[test]
fn whole_images_are_there_before_anything_starts() {
    let mut scenario = lazy(Read::Fraction(0.125), None);
    for policy in [Policy::Registry, Policy::WholeBlob] {
        scenario.policy = policy;
        let report = complete(&scenario, 1.0);
        assert_eq!(report.start_seconds, report.complete_seconds, "{report}");
        assert!(report.complete_seconds.p50 >= report.fluid_bound_seconds, "{report}");
    }
}

/// An image of two files of eight pieces each.
fn build(folder: &Path) -> Bootstrap {
    let source = folder.join("source");
    std::fs::create_dir_all(&source).unwrap();
    for (name, salt) in [("a", 1), ("b", 2)] {
        // Chunks that differ.
        let bytes: Vec<u8> = (0..0x8000_u32).map(|at| ((at >> 12) * 31 + at * salt) as u8).collect();
        std::fs::write(source.join(name), bytes).unwrap();
    }
    let options = BuildOptions { chunk_size: 0x1000, ..BuildOptions::default() };
    Builder::new(options).build(&source, &folder.join("boot"), &folder.join("blobs")).unwrap();
    Bootstrap::open(&folder.join("boot")).unwrap()
}

/// The example with that image and a start that reads so.
fn traced(folder: &Path, trace: &str) -> Result<Scenario, String> {
    build(folder);
    std::fs::write(folder.join("trace"), trace).unwrap();
    let text = LAZY_START.replace("encoded_mib = 256\npiece_kib = 1024", "bootstrap = \"boot\"");
    let text = text.replace("{ fraction = 0.1 }", "{ trace = \"trace\" }").replace("prefetch = \"all\"", "");
    let path = folder.join("scenario.toml");
    std::fs::write(&path, text).unwrap();
    Scenario::load(&path).map_err(|error| error.to_string())
}

#[test]
fn a_recorded_start_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    // One chunk comes twice; who reads it again has it.
    let scenario = traced(folder.path(), "3\t/b\n0\t/a\n1\t/a\n3\t/b\n").unwrap();
    assert_eq!(scenario.workload.traced.len(), 3);
    let read: u64 = scenario.workload.traced.iter().map(|&piece| scenario.image.pieces[piece as usize]).sum();
    assert_eq!(scenario.fetched_bytes(), read);
    complete(&scenario, read as f64 / scenario.encoded_bytes() as f64);
}

#[test]
fn a_trace_of_something_else_is_refused() {
    for (trace, says) in [("0\t/a\n9\t/a\n", "line 2"), ("0\t/c\n", "line 1"), ("\n", "nothing was read")] {
        let folder = tempfile::tempdir().unwrap();
        let error = traced(folder.path(), trace).unwrap_err();
        assert!(error.contains(says) && error.contains("trace"), "{trace:?}: {error}");
    }
}

/// The example with several images, small enough for a debug build.
fn many(count: u32, starts_per_node: u32) -> Scenario {
    let mut scenario = Scenario::parse(MANY_IMAGES).unwrap();
    scenario.workload.images = Images { count, zipf: 1.0, starts_per_node };
    scenario.image.encoded_mib = 16.0;
    let nodes = scenario.nodes.iter_mut().filter(|group| group.role == Role::Node);
    nodes.for_each(|group| group.count = 12);
    scenario
}

#[test]
fn of_several_images_a_zone_reads_each_once() {
    for (count, starts_per_node) in [(4, 1), (6, 3)] {
        let scenario = many(count, starts_per_node);
        let report = complete(&scenario, f64::from(starts_per_node));
        assert_eq!(report.nodes, 24);
        let asked_for = &report.images_per_zone;
        assert!(asked_for.values().all(|&images| images > 1 && images <= count as usize), "{asked_for:?}");
        let copies = report.copies_per_zone();
        assert!((0.99..1.05).contains(&copies), "{copies}: {report}");
        for (zone, images) in &report.registry_images_per_zone {
            let bytes = report.image_encoded_bytes * asked_for[zone] as u64;
            assert_eq!(*images, report.registry_bytes_per_zone[zone] as f64 / bytes as f64, "{zone}");
        }
        assert_eq!((report.starts, report.history.nodes.len()), (24 * starts_per_node as usize, 24));
        assert_eq!(report.nodes_per_zone.values().sum::<usize>(), 24);
        assert!(report.history.nodes.iter().all(|node| node.starts.len() == starts_per_node as usize));
        assert_eq!(report.history.times(|start| start.complete_s).len(), report.starts);
        let traced: u64 = report.history.nodes.iter().flat_map(|node| &node.trace.received).map(|s| s.sum()).sum();
        assert_eq!(traced, report.received_bytes.values().sum::<u64>(), "of all images of a node");
        assert_eq!(report, run(&scenario, scenario.seed, &()));
        let mut turned = scenario.clone();
        turned.zones.reverse();
        turned.nodes.reverse();
        assert_eq!(report, run(&turned, scenario.seed, &()));
    }
}

#[test]
fn one_image_of_one_is_the_image() {
    let one = many(1, 1);
    let mut plain = one.clone();
    plain.workload.images = Images::default();
    let report = complete(&one, 1.0);
    assert_eq!(report, run(&plain, one.seed, &()));
    assert!(report.images_per_zone.values().all(|&images| images == 1), "{report}");
}

#[test]
fn whole_images_are_counted_one_by_one() {
    let mut scenario = many(6, 3);
    scenario.policy = Policy::Registry;
    let registry = complete(&scenario, 3.0);
    let sent: u64 = registry.registry_bytes_per_zone.values().sum();
    assert_eq!(sent, 24 * 3 * registry.image_encoded_bytes, "{registry}");
    scenario.policy = Policy::WholeBlob;
    let whole = complete(&scenario, 3.0);
    assert_eq!(whole.copies_per_zone(), 1.0, "{whole}");
    assert_eq!(whole.images_per_zone, registry.images_per_zone, "whatever the policy");
}

#[test]
fn several_images_survive_the_loss_of_nodes_and_of_all_seed_peers() {
    let kill = |select, fraction| Fault {
        at_s: 1.0,
        kind: FaultKind::Kill,
        select: Some(select),
        zone: None,
        fraction,
        for_s: 0.0,
        factor: 0.1,
    };
    for faults in [vec![kill(Role::Node, 0.25), kill(Role::Seed, 0.5)], vec![kill(Role::Seed, 1.0)]] {
        let scenario = Scenario { faults, ..many(4, 2) };
        let report = run(&scenario, scenario.seed, &());
        assert!(report.is_right() && report.complete == report.alive, "{report}");
    }
}

#[test]
fn without_seed_peers_several_images_are_shared_too() {
    let mut scenario = many(3, 2);
    scenario.nodes.retain(|group| group.role == Role::Node);
    let report = complete(&scenario, 2.0);
    assert!(report.copies_per_zone() < 6.0, "of 24 nodes with 2 of 3 images each: {report}");
}
