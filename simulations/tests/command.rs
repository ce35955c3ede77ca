//! The `shoal-sim` program: what it prints and writes, and how it fails.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

const SMALL: &str = include_str!("../scenarios/cluster-small.toml");

struct Bench {
    folder: TempDir,
    scenario: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let scenario = folder.path().join("small.toml");
        std::fs::write(&scenario, SMALL).unwrap();
        Self { folder, scenario }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

fn sim(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shoal-sim")).args(arguments).output().unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A report without the keys in which equal runs differ.
fn report(path: &Path) -> Value {
    let mut report: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for key in ["wall_seconds", "peak_rss_bytes"] {
        assert!(report.as_object_mut().unwrap().remove(key).is_some_and(|value| value.as_f64() > Some(0.0)), "{key}");
    }
    report
}

#[test]
fn a_run_writes_the_keys_of_the_cluster_harness_and_a_page() {
    let bench = Bench::new();
    let (a, b, page) = (bench.path("a.json"), bench.path("b.json"), bench.path("a.html"));
    let scenario = text(&bench.scenario);
    let ran = sim(&["run", scenario, "--seed", "5", "--json", text(&a), "--html", text(&page)]);
    assert!(ran.status.success(), "{ran:?}");
    assert!(sim(&["run", scenario, "--seed", "5", "--json", text(&b)]).status.success());
    let first = report(&a);
    assert_eq!(first, report(&b), "the same seed tells the same story");
    for key in [
        "nodes",
        "fluid_bound_seconds",
        "complete_seconds",
        "registry_bytes_per_zone",
        "image_encoded_bytes",
        "registry_images_per_zone",
        "registry_bytes_over_time",
        "cross_zone_bytes",
        "first_seconds_per_zone",
        "start_seconds",
        "start_seconds_per_zone",
        "images_per_zone",
        "starts",
        "image_fetched_bytes",
        "fairness",
        "seed_load",
        "link_use",
        "hedged_requests",
        "read_errors",
        "wrong_bytes",
        "cpu_seconds",
        "events",
    ] {
        assert!(first.get(key).is_some(), "{key}: {first}");
    }
    assert_eq!(first["nodes"], 4);
    let complete = ["p50", "p90", "p99", "max"].map(|part| first["complete_seconds"][part].as_f64().unwrap());
    assert!(complete[0] > 0.0 && complete.is_sorted(), "{complete:?}");
    let page = std::fs::read_to_string(page).unwrap();
    assert_eq!(page.matches("<svg").count(), 5);
    assert!(page.contains("fluid bound") && page.contains("seed peers of a") && !page.contains("http-equiv"));
    let json = bench.path("compared.json");
    let compared = sim(&["compare", text(&a), scenario, "--json", text(&json)]);
    let compared = String::from_utf8(compared.stdout).unwrap();
    assert!(compared.contains("complete last s") && compared.contains("cluster-small"), "{compared}");
    let compared: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!((&compared["a"]["nodes"], &compared["figures"]["nodes"]["b"]), (&4.into(), &4.0.into()));
}

#[test]
fn the_page_shows_the_node_that_was_asked_for() {
    let bench = Bench::new();
    let (scenario, page) = (text(&bench.scenario), bench.path("page.html"));
    let run = |node: &str| sim(&["run", scenario, "--html", text(&page), "--node", node]);
    assert!(run("2").status.success());
    assert!(std::fs::read_to_string(&page).unwrap().contains("<h2>Node 2</h2>"));
    let refused = run("4");
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(String::from_utf8(refused.stderr).unwrap(), "shoal-sim: --node 4: 4 nodes read, numbered from 0\n");
}

#[test]
fn a_sweep_runs_all_combinations() {
    let bench = Bench::new();
    let json = bench.path("sweep.json");
    let (keys, policies) = ("nodes.1.count=2,3", "policy=shoal,registry,whole-blob");
    let swept = sim(&["sweep", text(&bench.scenario), "--vary", keys, "--vary", policies, "--json", text(&json)]);
    assert!(swept.status.success(), "{swept:?}");
    let cells: Vec<Value> = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let set = |cell: &Value| (cell["report"]["nodes"].clone(), cell["report"]["policy"].clone());
    let found: Vec<_> = cells.iter().map(set).collect();
    let expected =
        [2, 3].map(|nodes| ["shoal", "registry", "whole-blob"].map(|policy| (nodes.into(), policy.into())));
    assert_eq!(found, expected.concat());
}

#[test]
fn a_plan_finds_what_meets_the_target_or_says_that_nothing_does() {
    let (folder, crowd) = (tempfile::tempdir().unwrap(), ["--nodes", "12", "--image", "64"]);
    let json = folder.path().join("plan.json");
    let plan = |target| {
        let links = ["--node-mbit", "100", "--seed-mbit", "200", "--json", text(&json)];
        sim(&[&["plan", "--target", target][..], &crowd, &links].concat())
    };
    let found = plan("12s");
    let says = String::from_utf8(found.stdout).unwrap();
    assert!(found.status.success() && says.contains("seed peers in each of 1 zones"), "{says}");
    let written: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    let costs = ["seed_peers_per_zone", "registry_mbit", "registry_bytes", "bytes_per_seed_peer"];
    assert!(costs.iter().all(|key| written[key].as_f64() > Some(0.0)), "{written}");
    assert_eq!(written["report"]["complete"], 12);
    let none = plan("2s");
    assert_eq!(none.status.code(), Some(1));
    assert!(String::from_utf8(none.stderr).unwrap().contains("own link"));
}

#[test]
fn mistakes_are_told_from_failures() {
    let bench = Bench::new();
    let scenario = text(&bench.scenario);
    for (code, arguments) in [
        (2, &["run"][..]),
        (2, &["walk"]),
        (2, &["run", scenario, "--node", "1"]),
        (2, &["sweep", scenario, "--vary", "seed"]),
        (2, &["plan", "--nodes", "1", "--image", "1", "--target", "soon"]),
        (1, &["run", "/nonexistent.toml"]),
        (1, &["run", scenario, "--json", "/nonexistent/report.json"]),
        (1, &["sweep", scenario, "--vary", "nodes.7.count=1"]),
        (1, &["compare", "/nonexistent.json", scenario]),
    ] {
        assert_eq!(sim(arguments).status.code(), Some(code), "{arguments:?}");
    }
}
