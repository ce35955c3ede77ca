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

    // What somebody has pinned for good stays so, whoever preheats it, for how short a time, and whether it succeeds or not.
    let pinned = progress["reference"].as_str().expect("a reference");
    daemons[2].ctl(&["pin", pinned]);
    let output = preheat(&daemons[0], &[pinned, "--seeds", "--for", "1h"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let seeds: Vec<_> = nodes(&json(&output)).iter().map(|node| node["peer"].clone()).collect();
    assert_eq!(seeds, [Value::from(id(&daemons[0]))], "seed peers alone");
    let output = preheat(&daemons[0], &[pinned, "--all", "--for", "1s"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let until = |daemon: &Daemon| daemon.store_usage()["pins"][0]["until"].as_u64().expect("a time");
    assert_eq!(until(&daemons[2]), 0, "for good");
    let now = std::time::UNIX_EPOCH.elapsed().expect("it is later than 1970").as_secs();
    assert!(until(&daemons[1]) > now + 1000, "what was said to be pinned for an hour");
    assert!(daemons[2].ctl(&["unpin", pinned]).status.success());
    let output = preheat(&daemons[0], &[pinned, "--all", "--for", "1h"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

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

/// Without seed peers, and with a registry that each reads slowly: what one of them has read the others have from it.
#[test]
fn without_seed_peers_the_registry_is_not_read_by_each() {
    let source = tree(44, 60, 100_000);
    let mut registry = Registry::start();
    let encoded = registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemons = vec![Daemon::start("first", folder.path(), &["limits.registry=500KiB".into()])];
    let settings = [daemons[0].join(), "limits.registry=500KiB".into()];
    for name in ["second", "third", "fourth"] {
        daemons.push(Daemon::start(name, folder.path(), &settings));
    }
    wait("they are connected", || {
        let connected = |daemon: &Daemon| daemon.peers().iter().filter(|peer| peer["connected"] == true).count();
        daemons.iter().all(|daemon| connected(daemon) == 3)
    });
    let sent = registry.sent_bytes();
    let output = preheat(&daemons[1], &[&registry.reference("1"), "--all"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(nodes(&json(&output)).len(), daemons.len());
    let read = registry.sent_bytes() - sent;
    assert!(read < encoded * 2, "four nodes read {read} of {encoded} bytes at the registry");
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
