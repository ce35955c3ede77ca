//! Who reads what: a start that reads a part of an image, by fraction or by trace.

use std::path::Path;

use shoal_rafs::{Bootstrap, BuildOptions, Builder};
use shoal_sim::{Policy, Prefetch, Read, Report, Scenario, Spread, run};

const LAZY_START: &str = include_str!("../scenarios/lazy-start.toml");

/// The example, small enough for a debug build.
fn lazy(read: Read, prefetch: Option<Prefetch>) -> Scenario {
    let mut scenario = Scenario::parse(LAZY_START).unwrap();
    (scenario.workload.read, scenario.workload.prefetch) = (read, prefetch);
    scenario.image.encoded_mib = 64.0;
    scenario.nodes[1].count = 12;
    scenario
}

/// Runs a scenario in which everyone gets everything; gives what its nodes received, in images a node.
fn complete(scenario: &Scenario) -> (Report, f64) {
    let report = run(scenario, scenario.seed, &());
    assert!(report.is_right() && report.complete == report.nodes, "{report}");
    let received = report.received_bytes.values().sum::<u64>() - report.wasted_bytes;
    let images = received as f64 / (report.nodes as u64 * report.image_encoded_bytes) as f64;
    (report, images)
}

#[test]
fn a_start_reads_a_part_and_the_rest_comes_if_it_is_asked_for() {
    let (whole, images) = complete(&lazy(Read::All, None));
    assert_eq!((whole.start_seconds, images), (whole.complete_seconds, 1.0), "who reads everything");
    let fraction = || Read::Fraction(0.125);
    for prefetch in [None, Some(Prefetch::Start)] {
        let (part, images) = complete(&lazy(fraction(), prefetch));
        assert_eq!((part.start_seconds, images), (part.complete_seconds, 0.125), "{prefetch:?}: {part}");
        assert!(part.fluid_bound_seconds < whole.fluid_bound_seconds / 4.0, "{part}");
        assert!(part.complete_seconds.p50 < whole.complete_seconds.p50 / 2.0, "{part} next to {whole}");
    }
    let (behind, images) = complete(&lazy(fraction(), Some(Prefetch::All)));
    assert_eq!(images, 1.0);
    let Spread { p50, max, .. } = behind.start_seconds;
    assert!(p50 < behind.complete_seconds.p50 / 2.0 && max < behind.complete_seconds.max, "{behind}");
}

#[test]
fn who_reads_one_piece_after_the_other_waits_longer() {
    let mut scenario = lazy(Read::Fraction(0.5), None);
    scenario.workload.on_demand = 0;
    let (one, _) = complete(&scenario);
    scenario.workload.on_demand = 8;
    let (eight, _) = complete(&scenario);
    assert!(one.start_seconds.p50 > eight.start_seconds.p50, "{one} next to {eight}");
}

#[test]
fn whole_images_are_there_before_anything_starts() {
    let mut scenario = lazy(Read::Fraction(0.125), None);
    for policy in [Policy::Registry, Policy::WholeBlob] {
        scenario.policy = policy;
        let (report, images) = complete(&scenario);
        assert_eq!((report.start_seconds, images), (report.complete_seconds, 1.0), "{report}");
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
    let (report, images) = complete(&scenario);
    let read: u64 = scenario.workload.traced.iter().map(|&piece| scenario.image.pieces[piece as usize]).sum();
    assert_eq!(images, read as f64 / report.image_encoded_bytes as f64, "{report}");
    assert_eq!(scenario.fetched_bytes(), read);
}

#[test]
fn a_trace_of_something_else_is_refused() {
    for (trace, says) in [("0\t/a\n9\t/a\n", "line 2"), ("0\t/c\n", "line 1"), ("\n", "nothing was read")] {
        let folder = tempfile::tempdir().unwrap();
        let error = traced(folder.path(), trace).unwrap_err();
        assert!(error.contains(says) && error.contains("trace"), "{trace:?}: {error}");
    }
}
