//! Native mounts: an image that is complete is served by the kernel, with no daemon in the way and none needed.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Daemon, Registry, assert_same, can_mount, drop_caches, json, tree, wait};

/// Where an EROFS image says what a reader must know: four bytes, little-endian.
const FEATURE_INCOMPAT: u64 = 1024 + 80;

/// A tree, its image in a registry, and a daemon.
struct Bed {
    daemon: Daemon,
    registry: Registry,
    source: TempDir,
    folder: TempDir,
}

impl Bed {
    fn new(test: &str, settings: &[&str]) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        if !known.lines().any(|line| line.trim() == "erofs") {
            println!("skipped: {test} (needs EROFS in the kernel)");
            return None;
        }
        let source = tree(31, 20, 300_000);
        let mut registry = Registry::start();
        registry.publish(source.path(), "1");
        registry.switch_on();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let settings: Vec<String> = settings.iter().map(ToString::to_string).collect();
        let daemon = Daemon::start("node", folder.path(), &settings);
        Some(Self { daemon, registry, source, folder })
    }

    fn reference(&self) -> String {
        self.registry.reference("1")
    }

    /// Mounts with these options of `shoal ctl mount`.
    fn mount(&self, mountpoint: &Path, options: &[&str]) {
        let reference = self.reference();
        let operands = [reference.as_str(), mountpoint.to_str().expect("UTF-8")];
        self.daemon.ctl(&[&["mount"], options, &operands].concat());
    }

    /// Another mountpoint.
    fn beside(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).expect("a folder");
        path
    }

    fn decoded(&self) -> Vec<PathBuf> {
        let files = fs::read_dir(self.daemon.data_dir().join("decoded")).expect("decoded forms");
        files.map(|entry| entry.expect("a file").path()).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Nothing else takes a native mount away, once the daemon is gone.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below = self.folder.path().to_str().expect("UTF-8");
        for mountpoint in mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|at| at.starts_with(below))
        {
            let _ = unmount(mountpoint, UnmountFlags::DETACH);
        }
    }
}

/// The type of the file system that is seen at `mountpoint`.
pub(crate) fn kind(mountpoint: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let seen = table.lines().rev().map(|line| line.split(' ').collect::<Vec<_>>());
    let seen = seen.into_iter().find(|fields| Path::new(fields[1]) == mountpoint);
    seen.map_or_else(String::new, |fields| fields[2].to_owned())
}

fn mount_of<'a>(status: &'a Value, mountpoint: &Path) -> &'a Value {
    let mounts = status["mounts"].as_array().expect("a list");
    mounts.iter().find(|mount| Path::new(mount["mountpoint"].as_str().unwrap()) == mountpoint).expect("the mount")
}

#[test]
fn a_complete_image_is_read_with_no_daemon_and_found_again_by_the_next() {
    let Some(mut bed) = Bed::new("native mounts outlive the daemon", &["mounts.keeper=off"]) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &["--wait-complete"]);
    assert_eq!(kind(&mountpoint), "erofs");
    let device = fs::metadata(&mountpoint).expect("the mount").dev();
    assert_eq!(mount_of(&bed.daemon.status(), &mountpoint)["native"], true);

    bed.registry.switch_off();
    bed.daemon.kill();
    drop_caches();
    assert_same(bed.source.path(), &mountpoint);

    bed.daemon.start_again();
    let status = bed.daemon.status();
    assert_eq!(mount_of(&status, &mountpoint)["native"], true);
    assert_eq!(fs::metadata(&mountpoint).expect("the mount").dev(), device, "it is the same mount all along");
    bed.daemon.stop();
    assert_same(bed.source.path(), &mountpoint);
    bed.daemon.start_again();
    bed.daemon.umount(&mountpoint);
    assert_eq!(kind(&mountpoint), "");
}

#[test]
fn after_a_reboot_it_is_mounted_again_natively() {
    let Some(mut bed) = Bed::new("native mounts come back", &["mounts.keeper=off"]) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &["--mode", "native", "--wait-complete"]);
    bed.daemon.stop();
    bed.registry.switch_off();
    unmount(&mountpoint, UnmountFlags::empty()).expect("nobody uses it");
    // Without the decoded form it is made again of what the store has.
    bed.decoded().into_iter().for_each(|path| fs::remove_file(path).expect("a decoded form"));
    bed.daemon.start_again();
    assert_eq!(kind(&mountpoint), "erofs");
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn what_is_not_complete_is_not_mounted_natively() {
    let Some(bed) = Bed::new("a native mount of an incomplete image", &[]) else { return };
    let (reference, mountpoint) = (bed.reference(), bed.daemon.mountpoint());
    let path = mountpoint.to_str().expect("UTF-8");
    let refused = bed.daemon.try_ctl(&["mount", "--mode", "native", &reference, path]);
    let error = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{error}");
    assert!(error.contains("--wait-complete") && error.contains("is not here"), "{error}");
    assert_eq!((kind(&mountpoint), bed.decoded().len()), (String::new(), 0));
    let unknown = bed.daemon.try_ctl(&["mount", "--mode", "loop", &reference, path]);
    assert_eq!(unknown.status.code(), Some(2));
    // The place is free for another try.
    bed.mount(&mountpoint, &[]);
    assert_eq!(kind(&mountpoint), "fuse.shoal");
    assert_same(bed.source.path(), &mountpoint);
}

#[test]
fn the_next_mount_of_an_image_that_has_become_complete_is_native() {
    let Some(bed) = Bed::new("graduation", &["mounts.graduate_after=10ms"]) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &[]);
    assert_eq!(kind(&mountpoint), "fuse.shoal");
    assert_same(bed.source.path(), &mountpoint);
    wait("it is decoded", || !bed.daemon.log().is_empty() && bed.daemon.log().contains("its next mount is native"));

    let (next, over_fuse) = (bed.beside("next"), bed.beside("fuse"));
    bed.mount(&next, &[]);
    bed.mount(&over_fuse, &["--mode", "fuse"]);
    assert_eq!([kind(&mountpoint), kind(&next), kind(&over_fuse)], ["fuse.shoal", "erofs", "fuse.shoal"]);
    let status = bed.daemon.status();
    assert_eq!(mount_of(&status, &mountpoint)["native"], false);
    assert_eq!(mount_of(&status, &next)["native"], true);
    assert_same(bed.source.path(), &next);
    assert_same(bed.source.path(), &mountpoint);
    bed.daemon.umount(&over_fuse);
    bed.daemon.umount(&next);
    bed.daemon.umount(&mountpoint);
}

#[test]
fn what_is_decoded_is_read_so_over_fuse_and_from_the_store_when_it_has_gone() {
    let settings = ["mounts.graduate_after=10ms", "read.decoded_cache_bytes=0"];
    let Some(mut bed) = Bed::new("decoded forms over FUSE", &settings) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &[]);
    assert_same(bed.source.path(), &mountpoint);
    wait("it is decoded", || bed.daemon.log().contains("its next mount is native"));
    bed.registry.switch_off();

    // Nothing but the decoded form has the bytes any more.
    let blobs = fs::read_dir(bed.daemon.data_dir().join("blobs")).expect("blobs");
    for blob in blobs.map(|entry| entry.expect("an entry").path().join("encoded")) {
        let file = File::options().write(true).open(blob).expect("a blob");
        let len = file.metadata().expect("its length").len();
        file.write_all_at(&vec![0; len as usize], 0).expect("zeros");
    }
    for _ in 0..2 {
        drop_caches();
        assert_eq!(kind(&mountpoint), "fuse.shoal");
        assert_same(bed.source.path(), &mountpoint);
    }

    // The mount does not hold it, as it can go on without.
    bed.registry.switch_on();
    bed.daemon.ctl(&["evict", &bed.reference()]);
    assert!(bed.decoded().is_empty());
    drop_caches();
    assert_same(bed.source.path(), &mountpoint);
    bed.daemon.umount(&mountpoint);
}

#[test]
fn an_image_that_is_decoded_again_and_again_does_not_wait() {
    let settings = ["mounts.graduate_after=1h", "read.decoded_cache_bytes=0"];
    let Some(bed) = Bed::new("decoded again and again", &settings) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &[]);
    wait("much is decoded again", || {
        drop_caches();
        assert_same(bed.source.path(), &mountpoint);
        bed.daemon.log().contains("its next mount is native")
    });
    bed.daemon.umount(&mountpoint);
}

#[test]
fn decoded_forms_go_when_nobody_needs_them_and_damage_of_one_is_found() {
    let Some(bed) = Bed::new("decoded forms in the store", &[]) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &["--wait-complete"]);
    let reference = bed.reference();
    let evict = || bed.daemon.ctl(&["evict", &reference]);
    assert!(String::from_utf8_lossy(&evict().stdout).contains("are in use"), "a mount needs them");
    let scrubbed = json(&bed.daemon.store(&["scrub", "--json"]));
    assert_eq!((&scrubbed["decoded"], &scrubbed["damaged_decoded"]), (&1.into(), &0.into()));
    bed.daemon.umount(&mountpoint);

    let [path] = &bed.decoded()[..] else { panic!("one decoded form") };
    let file = File::options().read(true).write(true).open(path).expect("the decoded form");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 4097).expect("a byte");
    file.write_all_at(&[!byte[0]], 4097).expect("another byte");
    let scrub = bed.daemon.store(&["scrub", "--json"]);
    assert_eq!((scrub.status.code(), &json(&scrub)["damaged_decoded"]), (Some(1), &1.into()));
    assert!(bed.decoded().is_empty());

    bed.mount(&mountpoint, &["--wait-complete"]);
    assert_eq!((kind(&mountpoint), bed.decoded().len()), ("erofs".to_owned(), 1));
    assert_same(bed.source.path(), &mountpoint);
    bed.daemon.umount(&mountpoint);
    evict();
    assert!(bed.decoded().is_empty());
}

#[test]
fn what_the_kernel_does_not_mount_is_mounted_over_fuse() {
    let Some(bed) = Bed::new("native mounts that the kernel refuses", &[]) else { return };
    let mountpoint = bed.daemon.mountpoint();
    bed.mount(&mountpoint, &["--wait-complete"]);
    assert_eq!(kind(&mountpoint), "erofs");
    // Where the kernel has its bootstrap from.
    let table = fs::read_to_string("/proc/self/mounts").expect("the mounts");
    let line = table.lines().find(|line| line.split(' ').nth(1) == mountpoint.to_str()).expect("the mount");
    let bootstrap = PathBuf::from(line.split(' ').next().expect("its source"));
    bed.daemon.umount(&mountpoint);
    // A feature that no kernel knows.
    let file = File::options().write(true).open(&bootstrap).expect("the bootstrap");
    file.write_all_at(&[0x80], FEATURE_INCOMPAT + 3).expect("a byte");

    let reference = bed.reference();
    let refused = bed.daemon.try_ctl(&["mount", "--mode", "native", &reference, mountpoint.to_str().expect("UTF-8")]);
    assert!(!refused.status.success());
    bed.mount(&mountpoint, &[]);
    assert_eq!(kind(&mountpoint), "fuse.shoal", "{}", bed.daemon.log());
    assert_same(bed.source.path(), &mountpoint);
    bed.daemon.umount(&mountpoint);
}
