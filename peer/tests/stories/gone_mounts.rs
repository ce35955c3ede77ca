//! Mounts that somebody else takes away, or whose sessions somebody ends: the daemon notices and makes them again. And mounts of
//! an earlier run that cannot be made, which keep nobody waiting.

use std::{
    fs::{self, File},
    io::Read,
    net::TcpListener,
    os::unix::fs::MetadataExt,
    path::Path,
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    kept_mounts::readers::Readers,
    native_mounts::kind,
    support::{Daemon, Registry, assert_same, can_mount, drop_caches, metric, tree, wait},
};

/// Ends the session of a FUSE mount.
fn abort(mountpoint: &Path) {
    let minor = rustix::fs::minor(fs::metadata(mountpoint).expect("the mount").dev());
    let control = tempfile::tempdir().expect("a temporary folder");
    mount("fusectl", control.path(), "fusectl", MountFlags::empty(), None).expect("the control file system of FUSE");
    let aborted = fs::write(control.path().join(minor.to_string()).join("abort"), "1");
    unmount(control.path(), UnmountFlags::DETACH).expect("it can be unmounted");
    aborted.expect("the session ends");
}

#[test]
fn a_mount_that_has_gone_is_made_again() {
    if !can_mount("mounts that somebody else takes away") {
        return;
    }
    let (source, folder) = (tree(51, 10, 200_000), tempfile::tempdir().expect("a temporary folder"));
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let settings = ["mounts.keeper=on", "mounts.keeper_patience=30s", "mounts.graduate_after=0s"];
    let daemon = Daemon::start("node", folder.path(), &settings.map(str::to_owned));
    let (mountpoint, native) = (daemon.mountpoint(), folder.path().join("native"));
    fs::create_dir(&native).expect("a folder");
    let reference = registry.reference("1");
    daemon.mount(&reference);
    let lost = || metric(&daemon, "shoal_mounts_lost_total") as u32;

    let mut open = File::open(mountpoint.join("d0/f0")).expect("a file");
    unmount(&mountpoint, UnmountFlags::DETACH).expect("it can be unmounted");
    wait("it is mounted again", || kind(&mountpoint) == "fuse.shoal");
    assert_same(source.path(), &mountpoint);
    drop_caches();
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).expect("who had it open is served on");
    assert!(bytes == fs::read(source.path().join("d0/f0")).expect("the source"));
    drop(open);
    assert_eq!(lost(), 1, "{}", daemon.log());

    abort(&mountpoint);
    wait("it is noticed", || lost() == 2);
    wait("it answers again", || fs::read_dir(&mountpoint).is_ok_and(|entries| entries.count() > 0));
    assert_same(source.path(), &mountpoint);

    // By the kernel alone, where it can.
    daemon.ctl(&["mount", "--wait-complete", &reference, native.to_str().expect("UTF-8")]);
    let native_kind = kind(&native);
    unmount(&native, UnmountFlags::DETACH).expect("it can be unmounted");
    wait("it is mounted again", || kind(&native) == native_kind);
    assert_same(source.path(), &native);
    assert_eq!(lost(), 3, "{}", daemon.log());
    daemon.umount(&native);
    daemon.umount(&mountpoint);
    assert_eq!((kind(&native), kind(&mountpoint)), (String::new(), String::new()));
}

/// A registry that takes requests and answers none, in the place of another one.
fn silent(registry: &mut Registry) -> TcpListener {
    let reference = registry.reference("1");
    let address = reference.split('/').next().expect("a host").to_owned();
    registry.switch_off();
    TcpListener::bind(address).expect("its address")
}

#[test]
fn a_mount_whose_registry_is_silent_keeps_no_other_waiting() {
    if !can_mount("mounts beside one that cannot be made") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let trees = [tree(52, 10, 200_000), tree(53, 10, 200_000)];
    let mut registries = [Registry::start(), Registry::start()];
    for (registry, source) in registries.iter_mut().zip(&trees) {
        registry.publish(source.path(), "1");
        registry.switch_on();
    }
    let settings = ["mounts.keeper=on".into(), "mounts.keeper_patience=60s".into()];
    let mut daemon = Daemon::start("node", folder.path(), &settings);
    // In front of the other one.
    let stuck = folder.path().join("before");
    fs::create_dir(&stuck).expect("a folder");
    let objects = daemon.data_dir().join("objects");
    let names =
        || -> Vec<_> { fs::read_dir(&objects).expect("objects").map(|one| one.expect("one").path()).collect() };
    daemon.mount(&registries[1].reference("1"));
    let needed = names();
    daemon.mount_at(&registries[0].reference("1"), &stuck);
    let mountpoint = daemon.mountpoint();
    assert!(stuck < mountpoint);
    let mut readers = Readers::start(trees[1].path(), &mountpoint);
    readers.go_on();
    daemon.kill();
    drop_caches();
    unmount(&stuck, UnmountFlags::DETACH).expect("it can be unmounted");
    names().iter().filter(|name| !needed.contains(name)).for_each(|name| fs::remove_file(name).expect("an object"));
    let _silent = silent(&mut registries[0]);

    // This waits for half a minute at most, and each object of the other image for as long as a read may take, a minute.
    daemon.start_again();
    readers.go_on();
    readers.end();
    assert_eq!(daemon.status()["mounts"].as_array().map(Vec::len), Some(1), "{}", daemon.log());
    daemon.umount(&stuck);
}
