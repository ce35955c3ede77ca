//! The keeper itself: one thread that waits for packets.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    socket_with,
};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::client::Client;
use crate::message::{Reply, Request};
use crate::packet;
use crate::peer_user::is_trusted;
use crate::table::Table;

/// Most daemons that are connected at a time; there is one, and while another starts there may be two.
const MAX_CLIENTS: usize = 16;
/// Time to the next attempt to accept a connection after one has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long mounts are kept without a daemon if nobody says otherwise: time for an operator to look, and short enough for
/// readers that hang to be noticed as what they are.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(600);

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The socket could not be made.
    #[error("cannot listen on {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another keeper answers there.
    #[error("another keeper answers on {}", .0.display())]
    Occupied(PathBuf),
    /// Waiting failed.
    #[error("cannot wait for packets")]
    Wait(#[source] io::Error),
}

/// Why a keeper has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was told to, and kept nothing.
    Stopped,
    /// No daemon came for longer than its patience.
    Alone {
        /// Mounts that it has let go.
        mounts: usize,
    },
}

/// A keeper that listens.
#[derive(Debug)]
pub struct Keeper {
    listener: OwnedFd,
    path: PathBuf,
    patience: Duration,
    clients: Vec<OwnedFd>,
    table: Table<OwnedFd>,
    /// Since when no daemon is connected.
    alone: Instant,
}

impl Keeper {
    /// Listens on `path`, with mode 0600, in the place of a socket on which nobody answers. Without a daemon it keeps mounts
    /// for as long as `patience`.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn bind(path: &Path, patience: Duration) -> Result<Self, KeeperError> {
        if Client::connect(path).is_ok() {
            return Err(KeeperError::Occupied(path.to_owned()));
        }
        let failed = |source| KeeperError::Socket { path: path.to_owned(), source };
        let listener = Self::listen(path).map_err(failed)?;
        Self::raise_descriptor_limit();
        let (clients, table) = (Vec::new(), Table::default());
        Ok(Self { listener, path: path.to_owned(), patience, clients, table, alone: Instant::now() })
    }

    fn listen(path: &Path) -> io::Result<OwnedFd> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listen(&socket, MAX_CLIENTS as i32)?;
        Ok(socket)
    }

    /// Every mount is a descriptor, and the usual limit is 1024. Where it cannot be raised, what is beyond it is not kept.
    fn raise_descriptor_limit() {
        let limit = getrlimit(Resource::Nofile);
        if let Err(error) = setrlimit(Resource::Nofile, rustix::process::Rlimit { current: limit.maximum, ..limit }) {
            tracing::warn!("cannot raise the limit of open files: {error}");
        }
    }

    /// Keeps, until it is told to stop or nobody comes any more.
    ///
    /// # Errors
    /// [`KeeperError::Wait`].
    pub fn run(mut self) -> Result<Ended, KeeperError> {
        loop {
            if self.table.is_stopped() {
                return Ok(Ended::Stopped);
            }
            let left = self.clients.is_empty().then(|| self.patience.saturating_sub(self.alone.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Ended::Alone { mounts: self.table.len() });
            }
            let (knocks, ready) = self.wait(left).map_err(KeeperError::Wait)?;
            let had_clients = !self.clients.is_empty();
            // From the end, so that the places of the others stay what they are.
            for place in ready.into_iter().rev() {
                self.serve(place);
            }
            if knocks {
                self.admit();
            }
            if had_clients && self.clients.is_empty() {
                tracing::info!("no daemon is connected, {} mounts are kept", self.table.len());
                self.alone = Instant::now();
            }
        }
    }

    /// Whether somebody wants to connect, and which clients have sent something or gone. Returns with neither when `limit`
    /// is over.
    fn wait(&self, limit: Option<Duration>) -> io::Result<(bool, Vec<usize>)> {
        let limit = limit.map(|limit| Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 }));
        let sockets = std::iter::once(&self.listener).chain(&self.clients);
        let mut sockets: Vec<_> = sockets.map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        match poll(&mut sockets, limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let (listener, clients) = sockets.split_first().expect("the listener is the first of them");
        let ready = |socket: &PollFd<'_>| !socket.revents().is_empty();
        Ok((
            ready(listener),
            (0..).zip(clients).filter(|(_, client)| ready(client)).map(|(place, _)| place).collect(),
        ))
    }

    fn admit(&mut self) {
        let client = match accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(client) => client,
            Err(error) => {
                // Gone again, or no descriptor is free; then whoever knocks goes on to do so.
                tracing::debug!("cannot accept: {error}");
                return std::thread::sleep(ACCEPT_PAUSE);
            }
        };
        if !is_trusted(client.as_fd()) {
            tracing::warn!("a process of another user was turned away");
        } else if self.clients.len() >= MAX_CLIENTS {
            tracing::warn!("{MAX_CLIENTS} daemons are connected, which is the most");
        } else {
            self.clients.push(client);
        }
    }

    /// Answers what the client in this place has sent, or lets it go.
    fn serve(&mut self, place: usize) {
        match self.exchange(place) {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::warn!("a daemon is cut off: {error}"),
        }
        self.clients.swap_remove(place);
    }

    /// False when the client has gone.
    fn exchange(&mut self, place: usize) -> io::Result<bool> {
        let client = &self.clients[place];
        let (packet, connection) = match packet::receive(client, RecvFlags::DONTWAIT) {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) => return Err(error),
        };
        let (reply, connection) = match Request::decode(&packet) {
            Ok(request) => {
                tracing::debug!("{request:?}");
                self.table.answer(request, connection)
            }
            Err(malformed) => (Reply::Refused { reason: malformed.to_string() }, None),
        };
        packet::send(client, &reply.encode(), connection.map(AsFd::as_fd), SendFlags::DONTWAIT)?;
        Ok(true)
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
