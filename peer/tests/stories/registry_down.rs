//! The registry goes away: what is here can be read, what is not ends with EIO within the deadline, and comes back with
//! the registry.

use std::{fs, time::Duration};

use crate::{
    modes::{Mode, unmount_below},
    support::{Daemon, Registry, assert_same, drop_caches, files, tree, wait},
};

fn present_chunks_are_read_and_absent_ones_fail_until_it_is_back(mode: Mode) {
    if !mode.is_possible(&format!("registry_down ({mode:?})")) {
        return;
    }
    let source = tree(1, 8, 300_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let settings = [mode.settings_without_ahead(), vec!["read.deadline=\"2s\"".into()]].concat();
    let daemon = Daemon::start("node", folder.path(), &settings);
    mode.mount(&daemon, &registry.reference("1"));

    let names: Vec<_> = files(source.path()).into_iter().filter(|name| !name.starts_with("empty")).collect();
    let content = |name| fs::read(source.path().join(name)).expect("the source");
    let read = |name| fs::read(daemon.mountpoint().join(name));
    let (seen, unseen): (Vec<_>, Vec<_>) = names.iter().partition(|name| name.ends_with("f0"));
    assert!(read(seen[0]).expect("the registry is up") == content(seen[0]));

    registry.switch_off();
    // What the kernel and the daemon hold in memory does not count as the store.
    drop_caches();
    assert!(read(seen[0]).expect("its chunk is here") == content(seen[0]));
    let started = std::time::Instant::now();
    let error = read(unseen[0]).expect_err("its chunk is nowhere");
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    assert!(started.elapsed() < Duration::from_secs(20), "the deadline is 2 s, and the kernel tries few times");
    let log = daemon.log();
    assert!(log.contains("deadline passed") && log.contains("registry"), "{log}");

    registry.switch_on();
    wait("absent chunks can be read again", || read(unseen[0]).is_ok_and(|bytes| bytes == content(unseen[0])));
    assert_same(source.path(), &daemon.mountpoint());
    drop(daemon);
    unmount_below(folder.path());
}

#[test]
fn over_fuse() {
    present_chunks_are_read_and_absent_ones_fail_until_it_is_back(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    present_chunks_are_read_and_absent_ones_fail_until_it_is_back(Mode::Lazy);
}
