//! An image is preheated through one node, and then every node reads it without the registry.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{Daemon, Registry, assert_same, can_mount, json, tree, wait};

fn preheat(through: &Daemon, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.arg("preheat").args(arguments).args(["--wait", "--json", "--socket"]).arg(through.socket());
    command.output().expect("shoal preheat runs")
}

fn nodes(progress: &Value) -> Vec<Value> {
    progress["nodes"].as_array().expect("a list").clone()
}

fn id(daemon: &Daemon) -> String {
    daemon.status()["peer"].as_str().expect("an id").to_owned()
}

/// Waits until the seed peer, which is the first, knows the others and they know it.
fn wait_for_all(daemons: &[Daemon]) {
    let me = id(&daemons[0]);
    wait("the seed peer knows all nodes", || {
        let others = daemons[0].peers().into_iter().filter(|peer| peer["zone"] != "" && peer["peer"] != me.as_str());
        others.count() == daemons.len() - 1
    });
    daemons[1..].iter().for_each(Daemon::wait_for_home);
}

#[test]
fn what_was_preheated_is_read_without_the_registry() {
    if !can_mount("preheat") {
        return;
    }
    let (source, other) = (tree(41, 10, 200_000), tree(42, 4, 100_000));
    let mut registry = Registry::start();
    let encoded = registry.publish(source.path(), "1");
    registry.publish(other.path(), "2");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let seed = Daemon::start("seed", folder.path(), &["role=seed".into()]);
    let join = seed.join();
    let mut daemons = vec![seed];
    for name in ["a", "b", "c"] {
        daemons.push(Daemon::start(name, folder.path(), std::slice::from_ref(&join)));
    }
    wait_for_all(&daemons);

    let sent = registry.sent_bytes();
    let output = preheat(&daemons[1], &[&registry.reference("1"), "--all", "--for", "1h"]);
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{error} {}", daemons[1].log());
    let progress = json(&output);
    assert_eq!(nodes(&progress).len(), daemons.len());
    for node in nodes(&progress) {
        assert_eq!((&node["over"], &node["trouble"]), (&Value::Bool(true), &Value::String(String::new())));
        assert!(node["bytes"] == node["present_bytes"] && node["bytes"].as_u64().is_some_and(|bytes| bytes > 0));
    }
    let read = registry.sent_bytes() - sent;
    assert!(read < encoded * 3 / 2, "four nodes read {read} of {encoded} bytes at the registry");

    // A number of nodes, by the image: the same ones each time.
    let chosen = || -> Vec<String> {
        let output = preheat(&daemons[0], &[&registry.reference("2"), "--count", "2"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        nodes(&json(&output)).iter().map(|node| node["peer"].as_str().expect("an id").to_owned()).collect()
    };
    let two = chosen();
    assert_eq!(two.len(), 2);
    assert_eq!(chosen(), two);
    for daemon in &daemons {
        let pins = daemon.store_usage()["pins"].as_array().expect("a list").clone();
        assert_eq!(pins.len(), if two.contains(&id(daemon)) { 2 } else { 1 });
        assert!(pins.iter().all(|pin| pin["until"].as_u64().is_some_and(|until| until > 0)));
        daemon.ctl(&["evict", "--all"]);
    }

    registry.switch_off();
    let reference = progress["reference"].as_str().expect("a reference");
    for daemon in &daemons {
        daemon.mount(reference);
        assert_same(source.path(), &daemon.mountpoint());
        daemon.umount(&daemon.mountpoint());
    }
}

#[test]
fn a_node_that_may_not_read_the_registry_says_so() {
    if !can_mount("preheat_refused") {
        return;
    }
    let source = tree(43, 2, 50_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let asked = Daemon::start("asked", folder.path(), &[]);
    let settings = [asked.join(), "registry.serve=[]".into(), "zone=b".into()];
    let daemons = [asked, Daemon::start("unwilling", folder.path(), &settings)];
    wait("they know each other", || daemons[0].peers().iter().any(|peer| peer["zone"] == "b"));
    let output = preheat(&daemons[0], &[&registry.reference("1"), "--zone", "b"]);
    assert_eq!(output.status.code(), Some(1));
    let nodes = nodes(&json(&output));
    assert_eq!((nodes.len(), nodes[0]["peer"].as_str()), (1, Some(id(&daemons[1]).as_str())));
    assert!(nodes[0]["trouble"].as_str().expect("a text").contains("does not read that registry"), "{nodes:?}");
    assert_eq!(daemons[1].status()["store"]["pieces"], 0);

    // What no other node has cannot be preheated, and neither can a nobody.
    let folder = format!("oci:{}:1", registry.layout().display());
    assert_eq!(preheat(&daemons[0], &[&folder, "--all"]).status.code(), Some(1));
    assert_eq!(preheat(&daemons[0], &[&registry.reference("1"), "--all", "--seeds"]).status.code(), Some(2));
}
