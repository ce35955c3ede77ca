//! The demo is the story of the README: a seed peer and four nodes read one image at once, and the registry sends it once.

use std::process::Command;

use crate::support::{can_mount, json, tree};

#[test]
fn the_registry_is_read_once_and_every_byte_is_right() {
    if !can_mount("demo") {
        return;
    }
    // 112 MB that do not compress.
    let source = tree(7, 160, 700_000);
    let mut demo = Command::new(env!("CARGO_BIN_EXE_shoal"));
    let output = demo.args(["demo", "--nodes", "4", "--json", "--source"]).arg(source.path()).output();
    let output = output.expect("shoal runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = json(&output);

    let encoded = report["image"]["encoded_bytes"].as_u64().expect("a figure") as f64;
    assert!(encoded > 100e6, "{report}");
    let sent = report["registry"]["bytes_sent"].as_u64().expect("a figure") as f64;
    assert!(sent <= 1.10 * encoded, "the registry sent {sent} for {encoded}: {report}");
    assert!(sent >= encoded, "somebody must have read it: {report}");

    let nodes = report["nodes"].as_array().expect("a list");
    assert_eq!(nodes.len(), 5);
    for node in nodes {
        assert_eq!(node["identical"], true, "{report}");
        assert_eq!(node["digest_failures"], 0, "{report}");
        let from = |origin: &str| {
            (node["bytes"][origin].as_u64().expect("a figure") + node["objects"][origin].as_u64().expect("a figure"))
                as f64
        };
        if node["role"] == "node" {
            let fetched = from("peer") + from("seed") + from("registry");
            assert!(from("peer") + from("seed") >= 0.9 * fetched, "{report}");
        }
    }
    assert_eq!(std::fs::read_to_string("/proc/mounts").expect("the mounts").matches("shoal-demo-").count(), 0);
}
