//! A store with a limit: what is not mounted goes, what is mounted or pinned stays, and nobody ever reads a wrong byte,
//! whether he believed in what has gone or reads more than there is room for.

use std::{fs, path::Path};

use serde_json::Value;

use crate::support::{Daemon, Registry, assert_same, can_mount, drop_caches, json, metric, tree, wait};

/// An image here has about 3 MB.
const LIMIT: u64 = 5 << 20;

fn held(usage: &Value) -> Vec<bool> {
    usage["blobs"].as_array().expect("a list").iter().map(|blob| blob["held"] == true).collect()
}

fn is_complete(status: &Value, mountpoint: &Path) -> bool {
    let mounts = status["mounts"].as_array().expect("a list");
    let mount = mounts.iter().find(|mount| mount["mountpoint"].as_str() == mountpoint.to_str());
    mount.is_some_and(|mount| mount["present_pieces"] == mount["pieces"])
}

#[test]
fn the_unmounted_image_goes_and_who_believed_in_it_reads_right() {
    if !can_mount("store_limit") {
        return;
    }
    let (old, new) = (tree(11, 10, 300_000), tree(12, 10, 300_000));
    let mut registry = Registry::start();
    registry.publish(old.path(), "old");
    registry.publish(new.path(), "new");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let settings = [format!("store.max_bytes={LIMIT}"), "read.decoded_cache_bytes=0".into()];
    let small = Daemon::start("small", folder.path(), &settings);
    let other = Daemon::start("other", folder.path(), &[small.join(), "read.ahead_bytes=0".into()]);
    let connected = |peer: &Value| peer["connected"] == true;
    wait("the nodes are neighbours", || other.peers().iter().any(connected));

    small.mount(&registry.reference("old"));
    assert_same(old.path(), &small.mountpoint());
    // The other hears what the first has, and reads a part of it.
    other.mount(&registry.reference("old"));
    fs::read(other.mountpoint().join("d0/f0")).expect("it can be read");
    small.umount(&small.mountpoint());
    assert_eq!(held(&small.store_usage()), [false]);

    small.mount(&registry.reference("new"));
    assert_same(new.path(), &small.mountpoint());
    wait("only the mounted image is left", || held(&small.store_usage()) == [true]);
    assert!(is_complete(&small.status(), &small.mountpoint()), "nothing of the mounted image went");
    assert!(metric(&small, "shoal_evicted_blobs_total") >= 1.0);
    assert_same(old.path(), &other.mountpoint());
    assert_eq!(other.status()["mounts"][0]["read_errors"], 0);

    // Both at once are more than there is room for: all can be read, and not all is kept.
    let again = folder.path().join("again");
    fs::create_dir(&again).expect("a folder");
    small.mount_at(&registry.reference("old"), &again);
    for _ in 0..2 {
        assert_same(old.path(), &again);
        assert_same(new.path(), &small.mountpoint());
        drop_caches();
    }
    let status = small.status();
    assert!(status["store"]["disk_bytes"].as_u64().expect("a figure") <= LIMIT, "{status}");
    assert!(metric(&small, "shoal_not_kept_total") >= 1.0);
    assert!(!is_complete(&status, &again) && is_complete(&status, &small.mountpoint()));
    // Room comes back with the unmounting of the one, and is used for the other.
    small.umount(&small.mountpoint());
    assert_same(old.path(), &again);
    wait("all of it is kept", || {
        drop_caches();
        assert_same(old.path(), &again);
        is_complete(&small.status(), &again)
    });
    small.umount(&again);
}

#[test]
fn a_limit_that_is_set_while_the_daemon_runs_counts_at_once() {
    if !can_mount("store_limit_set") {
        return;
    }
    let images = [tree(14, 10, 300_000), tree(15, 10, 300_000)];
    let mut registry = Registry::start();
    for (image, tag) in images.iter().zip(["first", "second"]) {
        registry.publish(image.path(), tag);
    }
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &[]);
    let disk_bytes = || daemon.status()["store"]["disk_bytes"].as_u64().expect("a figure");
    let prefetch = |tag: &str| daemon.ctl(&["prefetch", &registry.reference(tag)]);
    prefetch("first");
    prefetch("second");
    assert!(disk_bytes() > LIMIT);

    daemon.ctl(&["set", &format!("store.max_bytes={LIMIT}"), "store.high_percent=85", "store.low_percent=80"]);
    wait("the image that was used first goes", || disk_bytes() <= LIMIT * 85 / 100);
    assert_eq!(daemon.status()["store"]["limit_bytes"], LIMIT);
    assert_eq!(metric(&daemon, "shoal_store_limit_bytes"), LIMIT as f64);
    prefetch("first");
    wait("the other goes for it", || disk_bytes() <= LIMIT * 85 / 100);
    daemon.mount(&registry.reference("first"));
    assert_same(images[0].path(), &daemon.mountpoint());

    let refused = daemon.try_ctl(&["set", "store.max_bytes=0", "store.low_percent=90"]);
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && why.contains("must be at most store.high_percent"), "{why}");
    daemon.ctl(&["set", "store.max_bytes=0"]);
    prefetch("second");
    assert!(disk_bytes() > LIMIT, "there is room for both again");
    daemon.stop();
}

#[test]
fn a_pin_keeps_an_image_until_it_ends() {
    if !can_mount("store_pins") {
        return;
    }
    let source = tree(13, 4, 200_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start(
        "node",
        folder.path(),
        &["store.keep_unmounted=false".into(), "read.decoded_cache_bytes=0".into()],
    );
    let reference = registry.reference("1");
    daemon.ctl(&["pin", &reference]);
    daemon.ctl(&["prefetch", &reference]);
    let pieces = daemon.status()["store"]["pieces"].as_u64().expect("a figure");
    assert!(pieces > 0);
    daemon.ctl(&["evict", "--all"]);
    daemon.ctl(&["evict", &reference]);
    assert_eq!(daemon.status()["store"]["pieces"], pieces);

    // Pins are for longer than a daemon lives, and what is pinned needs no registry.
    daemon.stop();
    daemon.start_again();
    daemon.ctl(&["evict", "--all"]);
    registry.switch_off();
    let digest =
        json(&daemon.store(&["usage", "--json"]))["pins"][0]["manifest"].as_str().expect("a digest").to_owned();
    daemon.mount(&format!("{reference}@{digest}"));
    assert_same(source.path(), &daemon.mountpoint());
    daemon.umount(&daemon.mountpoint());
    assert_eq!(daemon.status()["store"]["pieces"], pieces);

    // A pin may end by itself.
    registry.switch_on();
    daemon.ctl(&["pin", &reference, "--for", "1s"]);
    wait("the pin has ended", || daemon.store_usage()["pins"] == Value::Array(Vec::new()));
    assert!(!daemon.try_ctl(&["unpin", &reference]).status.success());
    daemon.ctl(&["evict", &reference]);
    assert_eq!(daemon.status()["store"]["pieces"], 0);

    // Without a pin the image goes with its mount.
    daemon.mount(&reference);
    assert_same(source.path(), &daemon.mountpoint());
    assert_eq!(daemon.status()["store"]["pieces"], pieces);
    daemon.umount(&daemon.mountpoint());
    assert_eq!(daemon.status()["store"]["pieces"], 0);
}
