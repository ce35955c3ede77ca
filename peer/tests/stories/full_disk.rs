//! A full disk: everything can be read, nothing more is kept, and when there is room again it is used, by the index too.

use std::{fs, io::Write, path::Path};

use crate::support::{Daemon, Registry, assert_same, can_mount, drop_caches, metric, tree, wait};

/// A small file system of its own; gone when dropped.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path) -> Self {
        fs::create_dir_all(at).expect("a folder");
        let size = c"size=32m";
        rustix::mount::mount("none", at, "tmpfs", rustix::mount::MountFlags::empty(), Some(size)).expect("a tmpfs");
        Self(at)
    }

    /// Takes all that is left of it.
    fn fill(&self) {
        let mut ballast = fs::File::options().create(true).append(true).open(self.0.join("ballast")).expect("a file");
        for size in [1 << 20, 4096] {
            while ballast.write_all(&vec![0; size]).is_ok() {}
        }
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("ballast")).expect("the ballast");
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn nothing_is_kept_on_a_full_disk_and_everything_once_there_is_room() {
    if !can_mount("full_disk") {
        return;
    }
    let (first, second) = (tree(21, 6, 300_000), tree(22, 6, 300_000));
    let mut registry = Registry::start();
    registry.publish(first.path(), "1");
    registry.publish(second.path(), "2");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("node/data");
    let disk = SmallDisk::mount(&data);
    let mut daemon = Daemon::start(
        "node",
        folder.path(),
        &["store.keep_free_bytes=0".into(), "read.decoded_cache_bytes=0".into()],
    );
    daemon.mount(&registry.reference("1"));
    fs::read(daemon.mountpoint().join("d0/f0")).expect("there is room");

    // Nothing may go for what is read, since the only image is mounted.
    disk.fill();
    assert_same(first.path(), &daemon.mountpoint());
    let here = |daemon: &Daemon| daemon.status()["mounts"][0]["present_pieces"].as_u64().expect("a figure");
    let all = daemon.status()["mounts"][0]["pieces"].as_u64().expect("a figure");
    assert!(here(&daemon) < all, "{} of {all}", here(&daemon));
    assert!(metric(&daemon, "shoal_not_kept_total") >= 1.0);
    assert!(daemon.log().contains("there is no room"), "{}", daemon.log());
    // An image that was never here can be mounted all the same.
    let second_mount = folder.path().join("second");
    fs::create_dir(&second_mount).expect("a folder");
    daemon.mount_at(&registry.reference("2"), &second_mount);
    assert_same(second.path(), &second_mount);
    assert_eq!(daemon.status()["mounts"][0]["read_errors"], 0);
    daemon.umount(&second_mount);

    disk.empty();
    wait("everything is kept", || {
        drop_caches();
        assert_same(first.path(), &daemon.mountpoint());
        here(&daemon) == all
    });
    // What is kept now is recorded, too: it outlives the daemon and needs no registry.
    daemon.stop();
    daemon.start_again();
    registry.switch_off();
    drop_caches();
    wait("it is mounted again", || daemon.mountpoint().join("link").is_symlink());
    assert_eq!(here(&daemon), all);
    assert_same(first.path(), &daemon.mountpoint());
    daemon.stop();
}

#[test]
fn what_is_not_mounted_goes_first_on_a_full_disk() {
    if !can_mount("full_disk_evicts") {
        return;
    }
    let (first, second) = (tree(23, 6, 300_000), tree(24, 6, 300_000));
    let mut registry = Registry::start();
    registry.publish(first.path(), "1");
    registry.publish(second.path(), "2");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("node/data");
    let disk = SmallDisk::mount(&data);
    let daemon = Daemon::start(
        "node",
        folder.path(),
        &["store.keep_free_bytes=0".into(), "read.decoded_cache_bytes=0".into()],
    );
    daemon.ctl(&["prefetch", &registry.reference("1")]);
    disk.fill();
    daemon.mount(&registry.reference("2"));
    assert_same(second.path(), &daemon.mountpoint());
    wait("the second image is kept", || {
        drop_caches();
        assert_same(second.path(), &daemon.mountpoint());
        let status = daemon.status();
        status["mounts"][0]["present_pieces"] == status["mounts"][0]["pieces"]
    });
    assert!(metric(&daemon, "shoal_evicted_blobs_total") >= 1.0);
}
