//! Whose process is at the other end of a socket.
//!
//! Not by rustix's `socket_peercred`: of a process in another PID namespace, as daemon and keeper in pods of their own are, the
//! kernel says that its number is 0, for which rustix has no value, so it fails. The number is of no interest here.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::process::{Uid, geteuid};

/// Whether the process at the other end belongs to this user, or to root. Not if the kernel does not say.
pub(crate) fn is_trusted(socket: BorrowedFd<'_>) -> bool {
    user(socket).is_ok_and(|user| user.is_root() || user == geteuid())
}

/// The user to whom the process belonged when it connected, or listened.
fn user(socket: BorrowedFd<'_>) -> io::Result<Uid> {
    Ok(Uid::from_raw(credentials(socket)?.uid))
}

fn credentials(socket: BorrowedFd<'_>) -> io::Result<libc::ucred> {
    // What remains if the kernel does not fill it in.
    let mut found = libc::ucred { pid: 0, uid: libc::uid_t::MAX, gid: libc::gid_t::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    let to = (&raw mut found).cast();
    // SAFETY: the descriptor is open as long as it is borrowed, and `to` points to `len` bytes that live until the call returns.
    let outcome = unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, &mut len) };
    match outcome {
        0 if len as usize == size_of::<libc::ucred>() => Ok(found),
        0 => Err(io::ErrorKind::InvalidData.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::env;
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_process_of_this_user_is_trusted_and_no_socket_is_not() {
        let (here, there) = UnixStream::pair().unwrap();
        assert_eq!(user(here.as_fd()).unwrap(), geteuid());
        assert!(is_trusted(there.as_fd()));
        let file = tempfile::tempfile().unwrap();
        assert!(user(file.as_fd()).is_err() && !is_trusted(file.as_fd()));
    }

    /// Names the socket for the process that the next test starts.
    const SOCKET: &str = "SHOAL_TEST_SOCKET";

    #[test]
    #[ignore = "the process that the other test starts"]
    fn listens() {
        let listener = UnixListener::bind(env::var_os(SOCKET).unwrap()).unwrap();
        let (there, _) = listener.accept().unwrap();
        assert_eq!(credentials(there.as_fd()).unwrap().pid, 0, "it is not of this namespace");
        assert!(is_trusted(there.as_fd()));
    }

    #[test]
    fn a_process_in_another_pid_namespace_is_known_by_its_user() {
        if !geteuid().is_root() {
            println!("skipped: a process in another PID namespace (needs root)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let mut inside = Command::new("unshare");
        inside.args(["--pid", "--fork"]).arg(env::current_exe().unwrap());
        inside.args(["--exact", "--ignored", "peer_user::tests::listens"]).env(SOCKET, &path);
        let mut inside = inside.spawn().unwrap();
        let _connected = loop {
            match UnixStream::connect(&path) {
                Ok(connected) => break connected,
                Err(error) => assert!(inside.try_wait().unwrap().is_none(), "nobody listens: {error}"),
            }
            thread::sleep(Duration::from_millis(10));
        };
        assert!(inside.wait().unwrap().success());
    }
}
