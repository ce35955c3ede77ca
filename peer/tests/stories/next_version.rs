//! A node that has one version of an image gets of the next one only what changed, wherever the rest lies in the new blob.

use std::fs;

use crate::{
    modes::{Mode, unmount_below},
    support::{Daemon, Registry, assert_same, drop_caches, noise, total_bytes, tree, wait},
};

fn only_what_changed_is_fetched(mode: Mode) {
    if !mode.is_possible(&format!("next_version ({mode:?})")) {
        return;
    }
    const FILES: usize = 40;
    let source = tree(5, FILES, 100_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    // A new file in front of the others moves all that follows in the blob; a fifth of them changes.
    fs::write(source.path().join("d0/added"), noise(99, 30_000)).expect("a file");
    for n in (0..FILES).step_by(5) {
        fs::write(source.path().join(format!("d{}/f{n}", n / 10)), noise(1000 + n as u64, 100_000)).expect("a file");
    }
    let encoded = registry.publish(source.path(), "2");
    registry.switch_on();

    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &mode.settings());
    let first = daemon.mountpoint().join("first");
    let second = daemon.mountpoint().join("second");
    for mountpoint in [&first, &second] {
        fs::create_dir(mountpoint).expect("a folder");
    }
    mode.mount_at(&daemon, &registry.reference("1"), &first);
    daemon.ctl(&["prefetch", &registry.reference("1")]);
    let before = daemon.status();
    assert_eq!(total_bytes(&before, "local"), 0);
    // What was just fetched is found once it is durable; a restart makes sure, and that the index is what finds it.
    daemon.stop();
    daemon.start_again();
    wait("the first version is mounted again", || first.join("link").is_symlink());

    let sent = registry.sent_bytes();
    mode.mount_at(&daemon, &registry.reference("2"), &second);
    assert_same(source.path(), &second);
    let fetched = registry.sent_bytes() - sent;
    assert!(fetched * 100 <= encoded * 25, "{fetched} of {encoded} bytes for a fifth that changed");
    let status = daemon.status();
    assert!(total_bytes(&status, "local") * 100 >= encoded * 75, "{}", status["total"]["bytes"]);

    // What was taken over is as much here as what was fetched.
    registry.switch_off();
    drop_caches();
    assert_same(source.path(), &second);
    daemon.ctl(&["umount", second.to_str().expect("UTF-8")]);
    daemon.ctl(&["umount", first.to_str().expect("UTF-8")]);
    drop(daemon);
    unmount_below(folder.path());
}

#[test]
fn over_fuse() {
    only_what_changed_is_fetched(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    only_what_changed_is_fetched(Mode::Lazy);
}

#[test]
fn natively() {
    only_what_changed_is_fetched(Mode::Native);
}
