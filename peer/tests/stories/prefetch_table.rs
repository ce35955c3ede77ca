//! What an image's prefetch table lists is fetched when it is mounted, before anybody reads; the rest is not.

use std::{fs, path::Path, process::Stdio};

use shoal_rafs::{Bootstrap, Nid};

use crate::{
    modes::{Mode, unmount_below},
    support::{Built, Daemon, Registry, assert_same, can_mount, tree, wait},
};

fn find(image: &Bootstrap, path: &str) -> Nid {
    path.split('/').fold(image.root(), |nid, name| {
        let inode = image.inode(nid).expect("a directory");
        inode.lookup(name.as_bytes()).expect("a directory").expect("it is there")
    })
}

/// Puts a table with these paths where the bootstrap has unused bytes.
fn list(bootstrap: &Path, paths: &[&str]) {
    let mut bytes = fs::read(bootstrap).expect("the bootstrap");
    let image = Bootstrap::parse(bytes.clone().into()).expect("a bootstrap");
    let table: Vec<u8> = paths.iter().flat_map(|path| (find(&image, path).0 as u32).to_le_bytes()).collect();
    bytes[2048..2048 + table.len()].copy_from_slice(&table);
    bytes[1152 + 40..1152 + 48].copy_from_slice(&2048u64.to_le_bytes());
    bytes[1152 + 48..1152 + 52].copy_from_slice(&(table.len() as u32).to_le_bytes());
    fs::write(bootstrap, bytes).expect("the bootstrap");
}

fn listed_files_are_here_before_they_are_read(mode: Mode) {
    if !mode.is_possible(&format!("prefetch_table ({mode:?})")) {
        return;
    }
    let source = tree(3, 40, 50_000);
    let built = Built::new(source.path(), "none");
    // A directory of ten files, and a file of it again.
    list(&built.bootstrap(), &["d2", "d1/f15", "d2/f21"]);
    let mut registry = Registry::start();
    built.push(&registry.layout(), "1");
    registry.switch_on();

    let folder = tempfile::tempdir().expect("a temporary folder");
    let daemon = Daemon::start("node", folder.path(), &mode.settings_without_ahead());
    mode.mount(&daemon, &registry.reference("1"));
    let present = || daemon.status()["mounts"][0]["present_pieces"].as_u64().expect("a figure");
    wait("the listed files are here", || present() >= 11);
    registry.switch_off();
    for name in (20..30).map(|n| format!("d2/f{n}")).chain(["d1/f15".to_owned()]) {
        let read = fs::read(daemon.mountpoint().join(&name)).expect("it is here");
        assert!(read == fs::read(source.path().join(&name)).expect("the source"), "{name}");
    }
    assert_eq!(present(), 11);
    registry.switch_on();
    assert_same(source.path(), &daemon.mountpoint());
    drop(daemon);
    unmount_below(folder.path());
}

#[test]
fn over_fuse() {
    listed_files_are_here_before_they_are_read(Mode::Fuse);
}

#[test]
fn natively_and_lazily() {
    listed_files_are_here_before_they_are_read(Mode::Lazy);
}

/// `shoal mount --trace` notes what is read, in order; `--stats` sums it up.
#[test]
fn a_mount_notes_what_is_read() {
    if !can_mount("mount_trace") {
        return;
    }
    let source = tree(4, 12, 5_000);
    let built = Built::new(source.path(), "zstd");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (mountpoint, trace) = (folder.path().join("mnt"), folder.path().join("trace"));
    fs::create_dir(&mountpoint).expect("a folder");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.args(["mount", "--bootstrap"]).arg(built.bootstrap()).arg("--blob-dir").arg(built.blobs());
    command.arg("--trace").arg(&trace).arg("--stats").arg(&mountpoint).stdout(Stdio::piped());
    let mount = command.spawn().expect("shoal runs");
    wait("it is mounted", || mountpoint.join("link").is_symlink());
    for name in ["d1/f11", "d0/f3", "d1/f11", "empty"] {
        fs::read(mountpoint.join(name)).expect("it can be read");
    }
    let pid = rustix::process::Pid::from_child(&mount);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it can be signalled");
    let ended = mount.wait_with_output().expect("it ends");
    assert!(ended.status.success());
    let stats = String::from_utf8(ended.stdout).expect("text");
    assert!(stats.starts_with("2 reads of 9.77 KiB, 0 failed\nhalf took at most "), "{stats}");
    // Of noise, which does not shrink, two chunks of 5,000 bytes and what compression adds.
    assert!(stats.contains(" fetched, 1.0") && stats.ends_with(" for each byte read\n"), "{stats}");
    assert_eq!(fs::read_to_string(trace).expect("a trace"), "0\t/d1/f11\n0\t/d0/f3\n");
}
