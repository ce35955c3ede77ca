//! A keeper in a thread, with real sockets. What it keeps are ends of socket pairs: the other end tells whether somebody still
//! has it open.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept, bind, connect, listen,
    recv, send, socket_with, socketpair,
};
use shoal_keeper::{
    Client, ClientError, Ended, Group, Holder, Keeper, KeeperError, MAX_PACKET, Mount, Reply, Request, VERSION,
    Verdict, held, holder_socket,
};

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

/// A group with a mark on an empty file of a page; none where the kernel or the file system has no such thing.
fn marked(test: &str) -> Option<(Group, tempfile::NamedTempFile)> {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4096).unwrap();
    let group = Group::new().and_then(|group| group.mark(file.as_file().as_fd()).map(|()| group));
    match group {
        Ok(group) => Some((group, file)),
        Err(error) => {
            println!("skipped: {test} (needs pre-content events: {error})");
            None
        }
    }
}

/// Reads the first byte, in a thread.
fn reader(path: &Path) -> JoinHandle<io::Result<u8>> {
    let mut file = File::open(path).unwrap();
    thread::spawn(move || {
        let mut byte = [0];
        file.read_exact(&mut byte).map(|()| byte[0])
    })
}

#[test]
fn an_event_waits_for_whoever_answers_it_and_is_told_to_the_next_if_one_goes() {
    let Some((group, file)) = marked("events come to a daemon, and to the next one") else { return };
    let bed = Bed::new(PATIENCE);
    assert!(matches!(bed.client().take(), Err(ClientError::Refused(_))));
    bed.client().guard(&group).unwrap();
    assert!(matches!(bed.client().guard(&group), Err(ClientError::Refused(_))));
    assert!(matches!(bed.client().stop(), Err(ClientError::Refused(_))));
    drop(group);

    let first = bed.client().take().unwrap();
    let waits = reader(file.path());
    let told = first.next().unwrap().unwrap();
    assert_eq!((told.event.offset, told.event.len), (0, 4096), "whole pages");
    // The keeper tells the next one of it as soon as it notices that there is another.
    let second = bed.client().take().unwrap();
    let again = second.next().unwrap().unwrap();
    assert_eq!(again.id, told.id);
    assert!(!waits.is_finished());
    File::from(again.event.file).write_all_at(b"x", 0).unwrap();
    second.answer(again.id, Verdict::Allow).unwrap();
    assert_eq!(waits.join().unwrap().unwrap(), b'x');
    // Late, and from the wrong one.
    let _ = first.answer(told.id, Verdict::Deny);

    let denied = reader(file.path());
    let told = second.next().unwrap().unwrap();
    assert_ne!(told.id, again.id);
    second.answer(told.id, Verdict::Deny).unwrap();
    assert_eq!(denied.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));

    let copy = bed.client().group().unwrap().unwrap();
    copy.unmark(file.as_file().as_fd()).unwrap();
    assert_eq!(reader(file.path()).join().unwrap().unwrap(), b'x');
    bed.client().release().unwrap();
    assert!(bed.client().group().unwrap().is_none());
    second.shut();
    bed.client().stop().unwrap();
    assert_eq!(bed.keeper.join().unwrap(), Ended::Stopped);
}

#[test]
fn with_nobody_to_answer_reads_are_denied_and_the_keeper_stays() {
    let Some((group, file)) = marked("events that nobody answers") else { return };
    let bed = Bed::new(Duration::from_millis(100));
    bed.client().guard(&group).unwrap();
    drop(group);
    for _ in 0..3 {
        assert_eq!(reader(file.path()).join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    // Somebody is there, and does not answer.
    let deaf = bed.client().take().unwrap();
    assert_eq!(reader(file.path()).join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(deaf);
    let late = bed.client();
    assert!(!bed.keeper.is_finished());
    drop(late);
    bed.client().release().unwrap();
    bed.client().stop().unwrap();
    assert_eq!(bed.keeper.join().unwrap(), Ended::Stopped);
}

#[test]
fn what_another_reader_of_the_group_has_left_is_denied_first() {
    let Some((group, file)) = marked("events of a dead keeper") else { return };
    let waits = reader(file.path());
    let left = loop {
        if let Some(event) = group.read().unwrap().pop() {
            break event;
        }
        thread::sleep(Duration::from_millis(1));
    };
    let number = left.file.as_raw_fd();
    drop(left);
    let bed = Bed::new(PATIENCE);
    bed.client().guard(&group).unwrap();
    assert_eq!(waits.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(group.answer(number, Verdict::Allow).unwrap_err().kind(), io::ErrorKind::NotFound);
    bed.client().release().unwrap();
}

#[test]
fn a_holder_takes_no_event_while_a_keeper_is_there_and_denies_them_when_nobody_comes() {
    let Some((group, file)) = marked("a holder of a group") else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let patience = Duration::from_millis(100);
    let holder = Keeper::bind(&holder_socket(&socket), patience).unwrap().holding();
    let holder = thread::spawn(move || holder.run().unwrap());
    let mut keeper = Client::connect(&holder_socket(&socket)).unwrap();
    keeper.guard(&group).unwrap();
    // The next keeper has another copy.
    keeper.guard(&group).unwrap();
    drop(group);

    let waits = reader(file.path());
    thread::sleep(3 * patience);
    assert!(!waits.is_finished(), "nobody has answered");
    let copy = held(&socket).unwrap().unwrap();
    let event = std::iter::repeat_with(|| copy.read().unwrap()).find_map(|mut events| events.pop()).unwrap();
    copy.answer(event.file.as_raw_fd(), Verdict::Allow).unwrap();
    assert_eq!(waits.join().unwrap().unwrap(), 0);

    drop(keeper);
    reader(file.path()).join().unwrap().unwrap_err();
    // Who comes after that reads the group, and nobody else does.
    let keeper = Client::connect(&holder_socket(&socket)).unwrap();
    assert!(held(&socket).unwrap().is_some());
    let waits = reader(file.path());
    thread::sleep(3 * patience);
    assert!(!waits.is_finished(), "nobody has answered");
    let event = std::iter::repeat_with(|| copy.read().unwrap()).find_map(|mut events| events.pop()).unwrap();
    copy.answer(event.file.as_raw_fd(), Verdict::Deny).unwrap();
    waits.join().unwrap().unwrap_err();

    drop(keeper);
    copy.unmark(file.as_file().as_fd()).unwrap();
    assert_eq!(holder.join().unwrap(), Ended::Alone { mounts: 0 });
}

#[test]
fn a_keeper_has_a_holder_for_as_long_as_it_has_a_group() {
    let Some((group, _file)) = marked("a keeper with a holder") else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let holder = Holder::new(&socket, |path| {
        let holder = Keeper::bind(path, PATIENCE).map_err(io::Error::other)?.holding();
        thread::spawn(move || holder.run());
        Ok(())
    });
    let keeper = Keeper::bind(&socket, PATIENCE).unwrap().with_holder(holder);
    let keeper = thread::spawn(move || keeper.run().unwrap());
    let mut client = Client::connect(&socket).unwrap();
    assert!(held(&socket).unwrap().is_none());
    client.guard(&group).unwrap();
    assert!(held(&socket).unwrap().is_some());
    client.release().unwrap();
    // It has been told before this is answered, and ends.
    while Client::connect(&holder_socket(&socket)).is_ok() {
        thread::sleep(Duration::from_millis(5));
    }
    client.stop().unwrap();
    assert_eq!(keeper.join().unwrap(), Ended::Stopped);
}

/// A process that listens for keepers, and was stopped.
fn stuck_holder(path: &Path) -> OwnedFd {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    listen(&socket, 16).unwrap();
    socket
}

#[test]
fn events_are_answered_while_a_holder_is_stuck() {
    let Some((group, file)) = marked("events beside a stuck holder") else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("sock");
    let stuck = stuck_holder(&holder_socket(&socket));
    let holder = Holder::new(&socket, |_| panic!("there is one"));
    let keeper = Keeper::bind(&socket, PATIENCE).unwrap().with_holder(holder);
    let keeper = thread::spawn(move || keeper.run().unwrap());
    let mut client = Client::connect(&socket).unwrap();
    client.guard(&group).unwrap();
    let taker = Client::connect(&socket).unwrap().take().unwrap();

    // The keeper asks the holder again and again, and gives up each time after some seconds.
    let answered_meanwhile = (0..4).any(|_| {
        let asking = accept(&stuck).unwrap();
        let waits = reader(file.path());
        let told = taker.next().unwrap().unwrap();
        taker.answer(told.id, Verdict::Allow).unwrap();
        waits.join().unwrap().unwrap();
        let mut sockets = [PollFd::new(&asking, PollFlags::RDHUP)];
        poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
        sockets[0].revents().is_empty()
    });
    assert!(answered_meanwhile, "the keeper answers nobody while it waits for its holder");
    group.unmark(file.as_file().as_fd()).unwrap();
    client.release().unwrap();
    client.stop().unwrap();
    assert_eq!(keeper.join().unwrap(), Ended::Stopped);
}
