//! An image of very many files: what it takes to mount it again does not depend on how many there are.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
    process::{Command, Stdio},
};

use rustix::mount::{UnmountFlags, unmount};

use crate::support::{Built, Daemon, Registry, can_mount, wait};

/// Files in a folder.
const FOLDER: usize = 1000;

/// A tar of so many files without content.
fn tar(files: usize, path: &Path) {
    let mut tar = tar::Builder::new(File::create(path).expect("a file"));
    let mut header = tar::Header::new_gnu();
    header.set_size(0);
    header.set_mode(0o644);
    for number in 0..files {
        tar.append_data(&mut header, name(number), &[][..]).expect("an entry");
    }
    tar.into_inner().expect("a tar");
}

fn name(number: usize) -> String {
    format!("d{:04}/file-number-{number}", number / FOLDER)
}

/// Its own memory in KiB, and the bytes that it has read from files.
fn costs(pid: u32) -> (u64, u64) {
    let number = |file: &str, key: &str| {
        let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect("it runs");
        let value = text.lines().find_map(|line| line.strip_prefix(key)).expect("a figure");
        value.trim().trim_end_matches(" kB").parse::<u64>().expect("a number")
    };
    (number("status", "RssAnon:"), number("io", "rchar:"))
}

/// Looks at a folder, and at files all over the tree.
fn look(root: &Path, files: usize) {
    assert_eq!(fs::read_dir(root.join("d0004")).expect("a folder").count(), FOLDER);
    for number in (0..files).step_by(files / 20) {
        assert_eq!(fs::metadata(root.join(name(number))).expect("a file").len(), 0);
    }
    assert!(!root.join("d0000/file-number-x").exists());
}

#[test]
fn mounting_costs_the_same_with_ten_times_the_files() {
    if !can_mount("an image of very many files") {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let costs = [10_000, 100_000].map(|files| {
        let path = folder.path().join("tar");
        tar(files, &path);
        let built = Built::with(&path, &["--source-type", "tar"]);
        let bootstrap = fs::metadata(built.bootstrap()).expect("a bootstrap").len();

        let root = folder.path().join(format!("alone-{files}"));
        fs::create_dir(&root).expect("a folder");
        let mut mount = Command::new(env!("CARGO_BIN_EXE_shoal"));
        mount.args(["mount", "--bootstrap"]).arg(built.bootstrap()).arg("--blob-dir").arg(built.blobs()).arg(&root);
        let mut alone = mount.stdin(Stdio::null()).spawn().expect("it starts");
        wait("it is mounted", || root.join("d0000").exists());
        look(&root, files);
        let of_files = self::costs(alone.id());
        unmount(&root, UnmountFlags::empty()).expect("it is mounted");
        assert!(alone.wait().expect("it ends").success());

        let mut registry = Registry::start();
        built.push(&registry.layout(), "1");
        registry.switch_on();
        let mut daemon = Daemon::start(&format!("node-{files}"), folder.path(), &[]);
        daemon.mount(&registry.reference("1"));
        look(&daemon.mountpoint(), files);
        // What it takes to fetch and verify it does depend on them. It is done once.
        daemon.stop();
        registry.switch_off();
        daemon.start_again();
        look(&daemon.mountpoint(), files);
        let of_daemon = self::costs(daemon.pid());
        (bootstrap, of_files, of_daemon)
    });
    let [(small, files, daemon), (large, more_files, more_daemon)] = costs;
    println!("bootstraps of {small} and {large} bytes; own memory in KiB, bytes read:");
    println!("from files {files:?}, {more_files:?}; by a daemon {daemon:?}, {more_daemon:?}");
    assert!(large > 8 * small && large > 8 << 20);
    for ((memory, read), (more_memory, more_read)) in [(files, more_files), (daemon, more_daemon)] {
        // A fraction of what either would be if it had read the bootstrap.
        assert!(more_memory < memory + large / 1024 / 3, "{memory} KiB, {more_memory} KiB");
        assert!(more_read < read + large / 3, "{read} bytes, {more_read} bytes");
    }
}

/// What was unpacked may be evicted, and damaged: then it is unpacked again.
#[test]
fn what_was_unpacked_and_is_gone_is_unpacked_again() {
    if !can_mount("a bootstrap that is gone") {
        return;
    }
    let source = crate::support::tree(71, 12, 50_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("node", folder.path(), &[]);
    daemon.mount(&registry.reference("1"));
    crate::support::assert_same(source.path(), &daemon.mountpoint());
    for damage in
        [|path: &Path| fs::remove_file(path), |path: &Path| File::options().write(true).open(path)?.set_len(100)]
    {
        daemon.stop();
        let bootstrap = bootstrap_object(&daemon);
        damage(&bootstrap).expect("a file");
        daemon.start_again();
        crate::support::assert_same(source.path(), &daemon.mountpoint());
        assert_ne!(fs::metadata(&bootstrap).expect("it is there again").len(), 100);
    }
}

/// The bootstrap in the store, which alone begins with zeros.
fn bootstrap_object(daemon: &Daemon) -> std::path::PathBuf {
    let objects = fs::read_dir(daemon.data_dir().join("objects")).expect("objects");
    let is_bootstrap = |path: &std::path::PathBuf| {
        let mut start = [1; 1024];
        File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == [0; 1024]
    };
    objects.map(|entry| entry.expect("an object").path()).find(is_bootstrap).expect("a bootstrap")
}
