//! The cluster harness, on the smallest cluster that is one: a seed peer and four nodes behind shaped links.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use serde_json::Value;

/// Why the harness cannot run here, if it cannot.
fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return Some("needs root and /dev/fuse".to_owned());
    }
    let runs = |tool: &&str| {
        let ran = Command::new(tool).arg("-V").stdout(Stdio::null()).stderr(Stdio::null()).status();
        ran.is_ok_and(|status| status.success())
    };
    if let Some(tool) = ["ip", "tc", "nsenter"].iter().find(|tool| !runs(tool)) {
        return Some(format!("needs {tool}"));
    }
    let probe = format!("shoal-{}-probe", std::process::id());
    let netns = |verb: &str| {
        let done = Command::new("ip").args(["netns", verb, &probe]).stderr(Stdio::null()).status();
        done.is_ok_and(|status| status.success())
    };
    if netns("add") && netns("delete") { None } else { Some("needs network namespaces".to_owned()) }
}

#[test]
fn a_small_cluster_reads_the_registry_once_and_leaves_nothing_behind() {
    if let Some(reason) = missing() {
        println!("skipped: cluster ({reason})");
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let scenario = Path::new(env!("CARGO_MANIFEST_DIR")).join("../simulations/scenarios/cluster-small.toml");
    let mut harness = Command::new(env!("CARGO_BIN_EXE_shoal-cluster"));
    let mut harness = harness.arg(scenario).arg("--json").arg(&json).stderr(Stdio::piped()).spawn().expect("it runs");
    let pid = harness.id();
    let status = harness.wait().expect("it ends");
    assert!(status.success(), "{status}");

    let report: Value = serde_json::from_slice(&std::fs::read(json).expect("a report")).expect("JSON");
    let figure = |value: &Value| value.as_f64().expect("a figure");
    assert_eq!((&report["nodes"], &report["alive"]), (&4.into(), &4.into()), "{report}");
    assert_eq!((&report["read_errors"], &report["wrong_bytes"]), (&0.into(), &0.into()), "{report}");
    let encoded = figure(&report["image_encoded_bytes"]);
    let sent = figure(&report["registry_bytes_per_zone"]["a"]);
    assert!(sent >= encoded && sent <= 1.3 * encoded, "the registry sent {sent} for {encoded}: {report}");
    assert!(figure(&report["complete_seconds"]["max"]) >= figure(&report["complete_seconds"]["p50"]), "{report}");
    assert!(figure(&report["complete_seconds"]["p50"]) >= 0.9 * figure(&report["fluid_bound_seconds"]), "{report}");
    assert!(figure(&report["cpu_seconds"]) > 0.0 && report["counts"].is_boolean(), "{report}");

    let left = |folder: &str, prefix: &str| {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)).count()
    };
    assert_eq!(left("/run/netns", &format!("shoal-{pid}-")), 0, "namespaces are gone");
    assert_eq!(left("/dev/shm", &format!("shoal-cluster-{pid}-")), 0, "the folder is gone");
}
