//! What one node's start of an image touched first is here on the next node before anybody reads it; the rest is not.

use std::{fs, path::Path};

use crate::support::{Daemon, Registry, assert_same, can_mount, metric, tree, wait};

/// Files of one piece each, in the order in which they are read.
const READ: [&str; 4] = ["d3/f31", "d0/f2", "d1/f17", "d0/f3"];

fn present(daemon: &Daemon) -> u64 {
    daemon.status()["mounts"][0]["present_pieces"].as_u64().expect("a figure")
}

fn prefetched(daemon: &Daemon, reason: &str) -> f64 {
    metric(daemon, &format!("shoal_prefetched_pieces_total{{reason=\"{reason}\"}}"))
}

fn read(source: &Path, daemon: &Daemon, names: &[&str]) {
    for name in names {
        let read = fs::read(daemon.mountpoint().join(name)).expect("it can be read");
        assert!(read == fs::read(source.join(name)).expect("the source"), "{name}");
    }
}

#[test]
fn a_later_start_finds_what_an_earlier_one_touched() {
    if !can_mount("start_traces") {
        return;
    }
    let source = tree(21, 40, 50_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let start = |name: &str, settings: &[String]| {
        let ahead = ["read.ahead_bytes=0".to_owned()];
        Daemon::start(name, folder.path(), &[&ahead[..], settings].concat())
    };
    let mut seed = start("seed", &["role=seed".into()]);
    let node = |name: &str, settings: &[&str]| {
        let settings = settings.iter().map(ToString::to_string).chain([seed.join()]).collect::<Vec<_>>();
        let node = start(name, &settings);
        node.wait_for_home();
        node.mount(&registry.reference("1"));
        node
    };

    let mut first = node("first", &[]);
    read(source.path(), &first, &READ);
    let touched = present(&first);
    assert_eq!(touched, READ.len() as u64);
    assert_eq!(seed.status()["start_traces"]["starts"], 0);
    // It would be told in a minute; the end of the mount is the end of the start.
    first.umount(&first.mountpoint());
    wait("the seed peer hears of the start", || seed.status()["start_traces"]["starts"] == 1);
    assert_eq!(metric(&seed, "shoal_start_traces_heard_total{taken=\"yes\"}"), 1.0);

    let mut careless = node("careless", &["prefetch.traces=false"]);
    let mut second = node("second", &[]);
    let mut eager = node("eager", &["prefetch.rest=true"]);
    wait("what was touched is here", || prefetched(&second, "trace") == touched as f64);
    wait("all of it is here", || {
        present(&eager) > touched && eager.status()["mounts"][0]["pieces"] == present(&eager)
    });
    assert_eq!((present(&second), prefetched(&second, "rest")), (touched, 0.0));
    assert_eq!(prefetched(&eager, "trace"), touched as f64);
    assert_eq!(present(&careless), 0, "it was told not to");

    // Nobody is there to be asked any more.
    registry.switch_off();
    for daemon in [&mut first, &mut careless, &mut eager, &mut seed] {
        daemon.stop();
    }
    read(source.path(), &second, &READ);
    assert_eq!(present(&second), touched);

    // A seed peer that starts anew has lost what it was told, which is no error.
    registry.switch_on();
    seed.start_again();
    second.stop();
    let mut third = start("third", &[seed.join()]);
    third.wait_for_home();
    third.mount(&registry.reference("1"));
    assert_same(source.path(), &third.mountpoint());
    assert_eq!(prefetched(&third, "trace"), 0.0);
    third.stop();
    seed.stop();
}
