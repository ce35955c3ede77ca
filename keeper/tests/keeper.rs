//! A keeper in a thread, with real sockets. What it keeps are ends of socket pairs: the other end tells whether somebody still
//! has it open.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, send, socket_with,
    socketpair,
};
use shoal_keeper::{Client, ClientError, Ended, Keeper, KeeperError, MAX_PACKET, Mount, Reply, Request, VERSION};

/// Longer than any test takes.
const PATIENCE: Duration = Duration::from_secs(600);

struct Bed {
    folder: tempfile::TempDir,
    keeper: JoinHandle<Ended>,
}

impl Bed {
    fn new(patience: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let keeper = Keeper::bind(&folder.path().join("sock"), patience).unwrap();
        Self { folder, keeper: thread::spawn(move || keeper.run().unwrap()) }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("sock")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket()).unwrap()
    }

    /// A connection without a client's manners.
    fn raw(&self) -> OwnedFd {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        connect(&socket, &SocketAddrUnix::new(self.socket()).unwrap()).unwrap();
        socket
    }
}

fn mount(device: &str) -> Mount {
    Mount { device: device.into(), mountpoint: Path::new("/mnt").join(device), record: device.into() }
}

/// Something to keep, and the end that sees whether it is open.
fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap()
}

/// Waits until the other end is closed everywhere, and fails if a byte came.
fn assert_closes(end: &OwnedFd) {
    assert_eq!(recv(end, &mut [0; 1], RecvFlags::empty()).unwrap().0, 0);
}

fn is_open(end: &OwnedFd) -> bool {
    recv(end, &mut [0; 1], RecvFlags::DONTWAIT).is_err_and(|errno| errno == rustix::io::Errno::AGAIN)
}

#[test]
fn what_is_kept_outlives_who_handed_it_over_and_comes_back() {
    let bed = Bed::new(PATIENCE);
    let (kept, watched) = pair();
    let mut first = bed.client();
    first.keep(mount("0:5"), kept.as_fd()).unwrap();
    first.keep(mount("0:40"), pair().0.as_fd()).unwrap();
    drop((first, kept));
    assert!(is_open(&watched));

    let mut second = bed.client();
    let mut all = second.kept().unwrap();
    let names: Vec<_> = all.iter().map(|(mount, _)| mount.clone()).collect();
    assert_eq!(names, [mount("0:40"), mount("0:5")]);
    // It is the very same: what goes in comes out at the other end.
    let (_, copy) = all.pop().unwrap();
    send(&copy, b"x", SendFlags::empty()).unwrap();
    assert_eq!(recv(&watched, &mut [0; 1], RecvFlags::empty()).unwrap().0, 1);
    drop((all, copy));

    assert!(matches!(second.stop(), Err(ClientError::Refused(reason)) if reason.contains('2')));
    second.forget("0:5").unwrap();
    second.forget("0:5").unwrap();
    assert_closes(&watched);
    second.forget("0:40").unwrap();
    assert!(second.kept().unwrap().is_empty());
    second.stop().unwrap();
    assert_eq!(bed.keeper.join().unwrap(), Ended::Stopped);
    assert!(!bed.folder.path().join("sock").exists());
}

#[test]
fn another_mount_with_the_same_number_takes_the_place() {
    let bed = Bed::new(PATIENCE);
    let mut client = bed.client();
    let ((first, watched), (second, _watched)) = (pair(), pair());
    client.keep(mount("0:5"), first.as_fd()).unwrap();
    drop(first);
    client.keep(mount("0:5"), second.as_fd()).unwrap();
    assert_closes(&watched);
    assert_eq!(client.kept().unwrap().len(), 1);
}

#[test]
fn without_a_daemon_its_patience_ends() {
    let (kept, watched) = pair();
    let bed = Bed::new(PATIENCE);
    bed.client().keep(mount("0:5"), kept.as_fd()).unwrap();
    drop(kept);
    assert!(is_open(&watched));

    // As long as a daemon is connected, none is needed. When it has gone, no time is left.
    let hasty = Keeper::bind(&bed.folder.path().join("hasty"), Duration::from_millis(100)).unwrap();
    let mut client = Client::connect(&bed.folder.path().join("hasty")).unwrap();
    let hasty = thread::spawn(move || hasty.run().unwrap());
    let (kept, watched) = pair();
    client.keep(mount("0:5"), kept.as_fd()).unwrap();
    drop(kept);
    assert!(is_open(&watched));
    drop(client);
    assert_closes(&watched);
    assert_eq!(hasty.join().unwrap(), Ended::Alone { mounts: 1 });
}

#[test]
fn one_keeper_for_a_socket_and_a_dead_one_makes_way() {
    let bed = Bed::new(PATIENCE);
    assert!(matches!(Keeper::bind(&bed.socket(), PATIENCE), Err(KeeperError::Occupied(_))));
    let left = bed.folder.path().join("left");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    let keeper = Keeper::bind(&left, PATIENCE).unwrap();
    let mode = std::fs::metadata(&left).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode.permissions()) & 0o777, 0o600);
    drop(keeper);
    assert!(matches!(Client::connect(&left), Err(ClientError::Io(error)) if error.kind() == io::ErrorKind::NotFound));
    let missing = Keeper::bind(&bed.folder.path().join("no/folder"), PATIENCE);
    assert!(matches!(missing, Err(KeeperError::Socket { .. })));
}

#[test]
fn a_stranger_is_refused_or_cut_off_and_disturbs_nobody() {
    let bed = Bed::new(PATIENCE);
    let mut client = bed.client();
    client.keep(mount("0:5"), pair().0.as_fd()).unwrap();

    let raw = bed.raw();
    let without_connection = Request::Keep(mount("0:6")).encode();
    for packet in [&[VERSION + 1, b'S'][..], &[VERSION, b'?'], &[VERSION, b'F', 9, 0], &without_connection] {
        send(&raw, packet, SendFlags::empty()).unwrap();
        let mut answer = [0; MAX_PACKET];
        let (len, _) = recv(&raw, &mut answer, RecvFlags::empty()).unwrap();
        assert!(matches!(Reply::decode(&answer[..len]), Ok(Reply::Refused { .. })), "{packet:?}");
    }
    send(&raw, &[VERSION; MAX_PACKET + 1], SendFlags::empty()).unwrap();
    assert_closes(&raw);
    // One who asks and does not listen.
    let deaf = bed.raw();
    while send(&deaf, &Request::Next { after: String::new() }.encode(), SendFlags::NOSIGNAL).is_ok() {}

    assert_eq!(client.kept().unwrap().len(), 1);
    client.forget("0:5").unwrap();
    client.stop().unwrap();
    assert_eq!(bed.keeper.join().unwrap(), Ended::Stopped);
}
