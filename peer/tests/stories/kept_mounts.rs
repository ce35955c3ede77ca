//! Mounts that outlive the daemon: it is killed, stopped, fails to start, loses its keeper, while readers go on. None of them
//! sees an error or a wrong byte.

use std::{
    fs::{self, File},
    io::Read,
    net::TcpListener,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use rustix::{
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with, sockopt::socket_peercred},
    process::{Pid, Signal, kill_process},
};
use shoal::processes::RegistryProcess;
use shoal_keeper::Client;
use tempfile::TempDir;

use crate::support::{Daemon, Registry, assert_same, can_mount, drop_caches, files, noise, publish, tree, wait};

pub(crate) mod readers;

use readers::Readers;

/// A tree, its image in a registry, and a daemon with a keeper of its own that has it mounted.
struct Bed {
    daemon: Daemon,
    _registry: Registry,
    source: TempDir,
    folder: TempDir,
}

impl Bed {
    fn new(test: &str) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        let source = tree(11, 20, 700_000);
        let mut registry = Registry::start();
        registry.publish(source.path(), "1");
        registry.switch_on();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let daemon = Daemon::start("node", folder.path(), &settings());
        daemon.mount(&registry.reference("1"));
        Some(Self { daemon, _registry: registry, source, folder })
    }

    fn readers(&self) -> Readers {
        Readers::start(self.source.path(), &self.daemon.mountpoint())
    }

    /// The number of the mounted file system, which another mount of the same image would not have.
    fn device(&self) -> u64 {
        fs::metadata(self.daemon.mountpoint()).expect("the mount").dev()
    }
}

/// A keeper that does not make a test that fails hang for long.
fn settings() -> Vec<String> {
    vec!["mounts.keeper=on".into(), "mounts.keeper_patience=30s".into()]
}

/// The first file that is closed tells the kernel that nobody wants to hear of it. Otherwise a daemon that is started while
/// this process has a file open, and with a copy of it, would wait for itself when it closes that.
fn close_a_file(daemon: &Daemon) {
    drop(File::open(daemon.mountpoint().join("empty")).expect("a file"));
}

/// Who listens on a socket of a keeper; none if nobody does.
pub(crate) fn listener(path: &Path) -> Option<Pid> {
    let socket: OwnedFd = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).ok()?;
    connect(&socket, &SocketAddrUnix::new(path).ok()?).ok()?;
    Some(socket_peercred(&socket).ok()?.pid)
}

#[test]
fn readers_do_not_notice_that_the_daemon_is_killed() {
    let Some(mut bed) = Bed::new("readers go on when the daemon is killed") else { return };
    let (device, mut readers) = (bed.device(), bed.readers());
    for delay in noise(5, 6) {
        readers.go_on();
        // 0 to 510 ms, and as long with nobody there: at any point of a read.
        thread::sleep(Duration::from_millis(2 * u64::from(delay)));
        bed.daemon.kill();
        drop_caches();
        thread::sleep(Duration::from_millis(u64::from(delay)));
        bed.daemon.start_again();
    }
    readers.go_on();
    assert_eq!(bed.device(), device, "it is the same mount all along");
    readers.end();
    assert_same(bed.source.path(), &bed.daemon.mountpoint());
}

#[test]
fn a_daemon_that_fails_to_start_leaves_the_mounts_to_the_next() {
    let Some(mut bed) = Bed::new("a daemon fails to start") else { return };
    let (device, mut readers) = (bed.device(), bed.readers());
    readers.go_on();
    bed.daemon.kill();
    drop_caches();
    // Once before it has looked for mounts, once when it serves them already.
    bed.daemon.fail_to_start(&["cluster.public_key=no-key".into()]);
    let occupied = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = occupied.local_addr().expect("its address");
    bed.daemon.fail_to_start(&[format!("http.listen={address}")]);
    bed.daemon.start_again();
    readers.go_on();
    assert_eq!(bed.device(), device);
    readers.end();
}

#[test]
fn a_restart_in_good_order_is_not_noticed_either() {
    let Some(mut bed) = Bed::new("readers go on when the daemon is restarted") else { return };
    let (device, mut readers) = (bed.device(), bed.readers());
    for _ in 0..4 {
        readers.go_on();
        drop_caches();
        bed.daemon.stop();
        bed.daemon.start_again();
    }
    readers.go_on();
    assert_eq!(bed.device(), device);
    readers.end();
    // Stopped for good, with nothing mounted, the daemon takes its keeper along.
    bed.daemon.ctl(&["umount", bed.daemon.mountpoint().to_str().expect("UTF-8")]);
    bed.daemon.stop();
    wait("the keeper ends", || listener(&bed.daemon.keeper_socket()).is_none());
}

#[test]
fn a_read_that_waited_for_the_registry_is_answered_after_all() {
    if !can_mount("a read in flight when the daemon is killed") {
        return;
    }
    let (source, folder) = (tree(13, 3, 900_000), tempfile::tempdir().expect("a temporary folder"));
    let layout = folder.path().join("layout");
    fs::create_dir_all(&layout).expect("a folder");
    publish(source.path(), &layout, "1");
    let listen = "127.0.0.1:0".parse().expect("an address");
    let shoal = Command::new(env!("CARGO_BIN_EXE_shoal"));
    let registry = RegistryProcess::start(shoal, &layout, listen, folder.path()).expect("a registry");
    let registry_pid = Pid::from_raw(registry.id() as i32).expect("a process id");
    let mut daemon =
        Daemon::start("node", folder.path(), &[settings().as_slice(), &["read.ahead_bytes=0".into()]].concat());
    daemon.mount(&format!("{}/app:1", registry.address()));
    close_a_file(&daemon);

    kill_process(registry_pid, Signal::STOP).expect("it stops answering");
    let path = daemon.mountpoint().join("d0/f1");
    let mut file = File::open(path).expect("names need no registry");
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map(|_| bytes)
    });
    // For the read to be under way, most likely; the outcome is the same if it is not.
    thread::sleep(Duration::from_millis(300));
    assert!(!reader.is_finished());
    daemon.kill();
    kill_process(registry_pid, Signal::CONT).expect("it answers again");
    daemon.start_again();
    let read = reader.join().expect("it ends").expect("it is answered");
    assert!(read == fs::read(source.path().join("d0/f1")).expect("the source"));
    assert_same(source.path(), &daemon.mountpoint());
}

#[test]
fn a_keeper_that_dies_is_replaced() {
    let Some(mut bed) = Bed::new("the keeper is killed") else { return };
    let (device, mut readers) = (bed.device(), bed.readers());
    let first = listener(&bed.daemon.keeper_socket()).expect("a keeper");
    assert_ne!(first.as_raw_nonzero().get() as u32, bed.daemon.pid());
    kill_process(first, Signal::KILL).expect("it can be killed");
    let device_held = || Client::connect(&bed.daemon.keeper_socket()).ok().and_then(|mut client| client.kept().ok());
    wait("another keeper has the mount", || {
        listener(&bed.daemon.keeper_socket()).is_some_and(|pid| pid != first)
            && device_held().is_some_and(|kept| kept.len() == 1)
    });
    bed.daemon.kill();
    drop_caches();
    bed.daemon.start_again();
    readers.go_on();
    assert_eq!(bed.device(), device);
    readers.end();
}

#[test]
fn what_nobody_will_serve_is_let_go() {
    let Some(mut bed) = Bed::new("kept mounts that nobody serves") else { return };
    close_a_file(&bed.daemon);
    let open = File::open(bed.daemon.mountpoint().join("d0/f0")).expect("a file");
    bed.daemon.kill();
    // Another daemon with the same keeper, to which this mount means nothing.
    let socket = format!("mounts.keeper_socket={}", bed.daemon.keeper_socket().display());
    let other = Daemon::start("other", bed.folder.path(), &["mounts.keeper=auto".into(), socket]);
    assert_eq!(fs::read_dir(bed.daemon.mountpoint()).expect("an empty folder").count(), 0, "{}", other.log());
    (&open).read_to_end(&mut Vec::new()).expect_err("what was open has nobody to answer");
    drop(other);

    // Back again, with a new mount; then without a keeper.
    bed.daemon.start_again();
    close_a_file(&bed.daemon);
    let open = File::open(bed.daemon.mountpoint().join("d0/f0")).expect("a file");
    bed.daemon.kill();
    bed.daemon.set("mounts.keeper=off");
    bed.daemon.start_again();
    (&open).read_to_end(&mut Vec::new()).expect_err("it was mounted anew");
    assert!(listener(&bed.daemon.keeper_socket()).is_none());
    assert_same(bed.source.path(), &bed.daemon.mountpoint());
    assert_eq!(files(bed.source.path()).len(), 22);
    bed.daemon.stop();
    assert_eq!(fs::read_dir(bed.daemon.mountpoint()).expect("an empty folder").count(), 0);
}
