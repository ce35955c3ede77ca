//! What goes from one daemon to the next through exec(2): open files by their numbers, which a variable of the environment
//! tells.
//!
//! - The **sockets** on which others call, so that they wait meanwhile and are not refused.
//! - The **program that ran before**, open: it is run again if the new one does not start. Its file may have been replaced.
//! - **Why** an upgrade has failed, for who asked for it.
//!
//! The variable is for one process: whoever inherits it otherwise has another number. What it names is closed on the next
//! exec(2) unless it is passed on again.

use std::{
    env,
    ffi::OsString,
    io,
    net::{SocketAddr, TcpListener},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::Command,
};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};
use serde::{Deserialize, Serialize};

use super::candidate;

/// Versions of [`Record`]. The second has sockets of TCP.
pub(super) const VERSIONS: [u32; 2] = [1, 2];
/// The variable.
const VARIABLE: &str = "SHOAL_UPGRADE";
/// Most bytes of the reason of a failure: there is a limit to what exec(2) takes.
const MAX_FAILURE: usize = 2048;
/// Standard input, output and error are nobody's to leave.
const FIRST_NUMBER: RawFd = 3;

/// A socket that others connect to.
#[derive(Debug)]
pub(crate) struct Listener {
    place: Place,
    socket: OwnedFd,
}

/// Where it listens.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Path(PathBuf),
    Address(SocketAddr),
}

impl Listener {
    pub(crate) fn new(path: PathBuf, socket: UnixListener) -> Self {
        Self { place: Place::Path(path), socket: socket.into() }
    }

    /// `address` is how the configuration has it.
    pub(crate) fn on_tcp(address: SocketAddr, socket: TcpListener) -> Self {
        Self { place: Place::Address(address), socket: socket.into() }
    }
}

/// See the module. The default is that of a daemon which takes nobody's place.
#[derive(Debug, Default)]
pub(crate) struct Inheritance {
    listeners: Vec<Listener>,
    fallback: Option<OwnedFd>,
    /// Arguments of that.
    arguments: Vec<OsString>,
    failure: String,
}

/// As it stands in the variable.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    version: u32,
    process: u32,
    listeners: Vec<(PathBuf, RawFd)>,
    #[serde(default)]
    addresses: Vec<(SocketAddr, RawFd)>,
    fallback: Option<RawFd>,
    arguments: Vec<OsString>,
    failure: String,
}

impl Inheritance {
    /// What this process was left. To be called once, before anything else is opened.
    pub(crate) fn take() -> Self {
        let record = env::var(VARIABLE).ok().and_then(|text| serde_json::from_str::<Record>(&text).ok());
        let Some(record) =
            record.filter(|record| record.process == std::process::id() && VERSIONS.contains(&record.version))
        else {
            return Self::default();
        };
        let paths = record.listeners.iter().map(|(path, number)| (Place::Path(path.clone()), *number));
        let addresses = record.addresses.iter().map(|(address, number)| (Place::Address(*address), *number));
        let left = paths.chain(addresses);
        let listeners = left.filter_map(|(place, number)| Some(Listener { place, socket: adopt(number)? })).collect();
        let Record { fallback, arguments, failure, .. } = record;
        Self { listeners, fallback: fallback.and_then(adopt), arguments, failure }
    }

    /// For the next program: these, and `fallback`, which is run with the arguments of this process if that one does not start.
    pub(super) fn new(listeners: Vec<Listener>, fallback: OwnedFd) -> Self {
        let arguments = env::args_os().skip(1).collect();
        Self { listeners, fallback: Some(fallback), arguments, failure: String::new() }
    }

    /// The same for what is fallen back to, because of `failure`.
    fn after(self, failure: &str) -> Self {
        let end = (0..=MAX_FAILURE.min(failure.len())).rev().find(|at| failure.is_char_boundary(*at)).unwrap_or(0);
        Self { fallback: None, failure: failure[..end].to_owned(), ..self }
    }

    /// A copy of the socket at `path`, if that was left, and is still there.
    ///
    /// # Errors
    /// There are too many open files.
    pub(crate) fn listener(&self, path: &Path) -> io::Result<Option<UnixListener>> {
        let place = Place::Path(path.to_owned());
        Ok(self.socket(&place)?.filter(|_| path.exists()).map(UnixListener::from))
    }

    /// A copy of the socket that listens on `address`, if that was left.
    ///
    /// # Errors
    /// There are too many open files.
    pub(crate) fn tcp_listener(&self, address: SocketAddr) -> io::Result<Option<TcpListener>> {
        Ok(self.socket(&Place::Address(address))?.map(TcpListener::from))
    }

    fn socket(&self, place: &Place) -> io::Result<Option<OwnedFd>> {
        let left = self.listeners.iter().find(|listener| listener.place == *place);
        left.map(|listener| listener.socket.try_clone()).transpose()
    }

    /// Why there was no upgrade; empty if nothing has failed.
    pub(crate) fn failure(&self) -> &str {
        &self.failure
    }

    /// Becomes what there is to fall back to, because of `failure`. Returns only if there is nothing, or that fails.
    pub(crate) fn fall_back(mut self, failure: &str) {
        let Some(program) = self.fallback.take() else { return };
        tracing::error!("the upgrade has failed, the version before goes on: {failure}");
        let path = format!("/proc/self/fd/{}", program.as_raw_fd());
        let mut command = Command::new(path);
        // Not those of this process: what has started it may have added some.
        command.args(&self.arguments);
        let error = candidate::run(command, &self.after(failure));
        tracing::error!("it does not: {error}");
    }

    /// Has a program that this process becomes find all of it.
    pub(super) fn put_into(&self, command: &mut Command) -> io::Result<()> {
        let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
        for Listener { place, socket } in &self.listeners {
            match place {
                Place::Path(path) => listeners.push((path.clone(), socket.as_raw_fd())),
                Place::Address(address) => addresses.push((*address, socket.as_raw_fd())),
            }
        }
        let [first, last] = VERSIONS;
        let record = Record {
            // What is fallen back to may know no other.
            version: if addresses.is_empty() { first } else { last },
            process: std::process::id(),
            listeners,
            addresses,
            fallback: self.fallback.as_ref().map(AsRawFd::as_raw_fd),
            arguments: self.arguments.clone(),
            failure: self.failure.clone(),
        };
        command.env(VARIABLE, serde_json::to_string(&record)?);
        self.files().try_for_each(|file| Ok(fcntl_setfd(file, FdFlags::empty())?))
    }

    /// Nothing has become of that.
    pub(super) fn keep_here(&self) {
        // It cannot fail for what is open.
        for file in self.files() {
            let _ = fcntl_setfd(file, FdFlags::CLOEXEC);
        }
    }

    fn files(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.listeners.iter().map(|listener| listener.socket.as_fd()).chain(self.fallback.iter().map(AsFd::as_fd))
    }
}

/// What was left under this number, if anything was.
fn adopt(number: RawFd) -> Option<OwnedFd> {
    if number < FIRST_NUMBER {
        return None;
    }
    // SAFETY: borrowed for a look only, which fails for a number under which nothing is open.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) }).ok()?;
    // What this process has opened itself is closed on exec(2), so it was not left to it.
    if flags.contains(FdFlags::CLOEXEC) {
        return None;
    }
    // SAFETY: it is open, and since it has come through exec(2) nothing in this process has it.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&file, FdFlags::CLOEXEC).ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::fd::IntoRawFd};

    use super::*;

    #[test]
    fn what_is_left_is_found_in_the_environment_of_the_next_program() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let listener = Listener::new(path.clone(), UnixListener::bind(&path).unwrap());
        let on_tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = on_tcp.local_addr().unwrap();
        let listeners = vec![listener, Listener::on_tcp(address, on_tcp)];
        let inheritance = Inheritance::new(listeners, File::open("/dev/null").unwrap().into());
        assert_eq!(inheritance.tcp_listener(address).unwrap().unwrap().local_addr().unwrap(), address);
        assert!(inheritance.tcp_listener(([127, 0, 0, 2], address.port()).into()).unwrap().is_none());
        assert!(inheritance.listener(&path).unwrap().is_some());
        assert!(inheritance.listener(folder.path()).unwrap().is_none());
        let mut command = Command::new("program");
        inheritance.put_into(&mut command).unwrap();
        let (_, record) = command.get_envs().find(|(name, _)| *name == VARIABLE).unwrap();
        let record: Record = serde_json::from_str(record.unwrap().to_str().unwrap()).unwrap();
        assert_eq!((record.version, record.process), (2, std::process::id()));
        assert_eq!(record.listeners, [(path.clone(), inheritance.listeners[0].socket.as_raw_fd())]);
        assert_eq!(record.addresses, [(address, inheritance.listeners[1].socket.as_raw_fd())]);
        assert!(record.fallback.is_some() && record.failure.is_empty());
        assert!(inheritance.files().all(|file| fcntl_getfd(file).unwrap().is_empty()));
        inheritance.keep_here();
        assert!(inheritance.files().all(|file| fcntl_getfd(file).unwrap() == FdFlags::CLOEXEC));
        std::fs::remove_file(&path).unwrap();
        assert!(inheritance.listener(&path).unwrap().is_none(), "nobody could connect to it");
    }

    #[test]
    fn only_what_came_through_exec_is_adopted() {
        assert!(adopt(-1).is_none() && adopt(0).is_none() && adopt(RawFd::MAX).is_none());
        let file = File::open("/dev/null").unwrap();
        assert!(adopt(file.as_raw_fd()).is_none(), "this process has it");
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        let adopted = adopt(file.into_raw_fd()).unwrap();
        assert_eq!(fcntl_getfd(&adopted).unwrap(), FdFlags::CLOEXEC);
    }

    #[test]
    fn a_long_reason_is_cut() {
        let reason = format!("a{}", "é".repeat(MAX_FAILURE));
        let left = Inheritance::default().after(&reason);
        assert!(left.failure().len() <= MAX_FAILURE && reason.starts_with(left.failure()));
        assert_eq!(Inheritance::default().after("short").failure(), "short");
    }
}
