//! Whoever may push one image may claim anything about any blob id. Two images here name the same blob with different
//! digests; each reads its own right bytes or EIO, whichever comes first, on one node and across nodes.

use std::{fs, path::Path};

use crate::{
    modes::{Mode, unmount_below},
    support::{Built, Daemon, Registry, assert_same, drop_caches, files, noise},
};

/// A tree whose files have the same names and sizes for every seed, and other bytes.
fn sources(seed: u64) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for n in 0..4 {
        fs::write(dir.path().join(format!("f{n}")), noise(seed + n, 200_000)).expect("a file");
    }
    dir
}

/// Publishes an honest image as `honest`, and as `forged` one of other files that claims to have the honest one's blob.
fn publish(registry: &Registry, source: &Path, other: &Path) {
    let honest = Built::new(source, "none");
    honest.push(&registry.layout(), "honest");
    let forged = Built::new(other, "none");
    let (claimed, own) = (honest.blob(), forged.blob());
    let mut bootstrap = fs::read(forged.bootstrap()).expect("the bootstrap");
    let mut replaced = 0;
    for at in 0..bootstrap.len() - own.len() {
        if bootstrap[at..].starts_with(own.as_bytes()) {
            bootstrap[at..at + own.len()].copy_from_slice(claimed.as_bytes());
            replaced += 1;
        }
    }
    assert_eq!(replaced, 2, "the device table and the blob table name it");
    fs::write(forged.bootstrap(), bootstrap).expect("the bootstrap");
    fs::remove_file(forged.blobs().join(own)).expect("its own blob");
    fs::copy(honest.blobs().join(&claimed), forged.blobs().join(&claimed)).expect("the claimed blob");
    forged.push(&registry.layout(), "forged");
}

fn assert_unreadable(mount: &Path) {
    for name in files(mount) {
        let error = fs::read(mount.join(&name)).expect_err("the blob does not hold what the image claims");
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{}", name.display());
    }
}

fn neither_image_poisons_the_other(mode: Mode) {
    if !mode.is_possible(&format!("disputed_blob ({mode:?})")) {
        return;
    }
    let (source, other) = (sources(10), sources(20));
    let mut registry = Registry::start();
    publish(&registry, source.path(), other.path());
    registry.switch_on();

    let folder = tempfile::tempdir().expect("a temporary folder");
    let settings = ["read.deadline=\"1s\"".to_owned()];
    let seed = Daemon::start("seed", folder.path(), &[settings[0].clone(), "role=seed".into()]);
    let node = |name: &str| {
        let settings = [mode.settings(), vec![settings[0].clone(), seed.join()]].concat();
        let node = Daemon::start(name, folder.path(), &settings);
        node.wait_for_home();
        node
    };
    let (first, second) = (node("honest-first"), node("forged-first"));
    let mounts = |daemon: &Daemon, order: [&str; 2]| {
        for tag in order {
            let mountpoint = folder.path().join(format!("{}-{tag}", daemon.pid()));
            fs::create_dir(&mountpoint).expect("a mountpoint");
            mode.mount_at(daemon, &registry.reference(tag), &mountpoint);
            if tag == "honest" { assert_same(source.path(), &mountpoint) } else { assert_unreadable(&mountpoint) }
        }
        // Again, when both are known and what is here is read from the store.
        drop_caches();
        assert_same(source.path(), &folder.path().join(format!("{}-honest", daemon.pid())));
        assert_unreadable(&folder.path().join(format!("{}-forged", daemon.pid())));
    };
    mounts(&second, ["forged", "honest"]);
    mounts(&first, ["honest", "forged"]);
    for mut daemon in [first, second] {
        daemon.stop();
    }
    unmount_below(folder.path());
}

#[test]
fn over_fuse() {
    neither_image_poisons_the_other(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    neither_image_poisons_the_other(Mode::Lazy);
}
