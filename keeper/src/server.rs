//! The keeper itself: one thread that waits for packets and events.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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
use crate::group::{Group, MAX_DESCRIPTORS, Verdict};
use crate::holder::Holder;
use crate::message::{Reply, Request};
use crate::packet;
use crate::peer_user::is_trusted;
use crate::pending::Pending;
use crate::table::Table;

/// Most daemons that are connected at a time; there is one, and while another starts there may be two.
const MAX_CLIENTS: usize = 16;
/// Time to the next attempt to accept a connection after one has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Time between looks for marks, when nobody is expected any more; or the patience, if that is shorter.
const LOOK: Duration = Duration::from_secs(10);
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
    /// A copy of the table's, to be read.
    group: Option<Group>,
    duty: Duty,
    /// Of a keeper that has one.
    holder: Option<Holder>,
    pending: Pending<OwnedFd>,
    /// The daemon that is told of events.
    taker: Option<OwnedFd>,
    /// Since when no daemon is connected.
    alone: Instant,
    /// None has been for longer than the patience.
    given_up: bool,
}

/// What is done with the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duty {
    /// It is read.
    Read,
    /// It is held, and read by somebody else; or denied, when nobody has come for longer than the patience.
    Hold,
}

/// What happens to a connection after a request.
enum After {
    Stays,
    Goes,
    /// It is told of events.
    Takes,
}

/// What there is to be done.
#[derive(Default)]
struct Ready {
    /// Somebody wants to connect.
    knocks: bool,
    /// Places of clients that have sent something or gone.
    clients: Vec<usize>,
    /// The taker has.
    taker: bool,
    /// The group has events.
    group: bool,
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
        Ok(Self {
            listener,
            path: path.to_owned(),
            patience,
            clients: Vec::new(),
            table: Table::default(),
            group: None,
            duty: Duty::Read,
            holder: None,
            pending: Pending::new(patience),
            taker: None,
            alone: Instant::now(),
            given_up: false,
        })
    }

    /// The same, with another process that has the group, too.
    #[must_use]
    pub fn with_holder(mut self, holder: Holder) -> Self {
        self.holder = Some(holder);
        self
    }

    /// A holder: it has the group for the case that nobody else has, and does not read it while a keeper is connected.
    #[must_use]
    pub fn holding(mut self) -> Self {
        self.duty = Duty::Hold;
        self
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

    /// Every mount is a descriptor, and the usual limit is 1024. Where it cannot be raised, what is beyond it is not kept. It is
    /// not raised beyond what a reader of a group may have.
    fn raise_descriptor_limit() {
        let limit = getrlimit(Resource::Nofile);
        let most = u64::from(MAX_DESCRIPTORS);
        let current = Some(limit.maximum.map_or(most, |maximum| maximum.min(most)));
        if let Err(error) = setrlimit(Resource::Nofile, rustix::process::Rlimit { current, ..limit }) {
            tracing::warn!("cannot raise the limit of open files: {error}");
        }
    }

    /// Keeps, until it is told to stop or nobody comes any more. With a group it stays even then, and denies every read: if it
    /// ended they would be of holes. It ends when no file has a mark any more.
    ///
    /// # Errors
    /// [`KeeperError::Wait`].
    pub fn run(mut self) -> Result<Ended, KeeperError> {
        loop {
            if self.table.is_stopped() {
                return Ok(Ended::Stopped);
            }
            if self.is_alone() && self.alone.elapsed() >= self.patience {
                let mounts = self.table.let_go();
                if !self.is_needed() {
                    if let Some(holder) = &mut self.holder {
                        holder.release();
                    }
                    return Ok(Ended::Alone { mounts });
                }
                if !std::mem::replace(&mut self.given_up, true) {
                    tracing::warn!("no daemon has come back, {mounts} mounts are let go, reads of others are denied");
                    self.follow_group().map_err(KeeperError::Wait)?;
                }
            }
            if let (Some(holder), Some(group)) = (&mut self.holder, self.table.group()) {
                holder.hold(group.as_fd());
            }
            let late = if self.given_up { self.pending.take_all() } else { self.pending.overdue(Instant::now()) };
            late.into_iter().for_each(|file| self.answer(file, Verdict::Deny));
            self.tell();
            let ready = self.wait().map_err(KeeperError::Wait)?;
            let was_alone = self.is_alone();
            if ready.taker {
                self.hear();
            }
            // From the end, so that the places of the others stay what they are.
            for place in ready.clients.into_iter().rev() {
                self.serve(place);
            }
            if ready.group {
                self.take_events();
            }
            if ready.knocks {
                self.admit();
            }
            if !was_alone && self.is_alone() {
                tracing::info!("no daemon is connected, {} mounts are kept", self.table.len());
                self.alone = Instant::now();
            }
        }
    }

    /// Whether somebody may still read a file that is not filled.
    fn is_needed(&self) -> bool {
        let group = self.table.group().and_then(|group| group.try_clone().ok()).map(Group::from);
        group.is_some_and(|group| group.marked().map_or(true, |marked| !marked.is_empty()))
    }

    fn is_alone(&self) -> bool {
        self.clients.is_empty() && self.taker.is_none()
    }

    /// Waits until there is something to be done, or it is time to look at who has waited for too long.
    fn wait(&self) -> io::Result<Ready> {
        let alone = self.is_alone().then(|| match self.given_up {
            true => LOOK.min(self.patience),
            false => self.patience.saturating_sub(self.alone.elapsed()),
        });
        let due = self.pending.due().map(|due| due.saturating_duration_since(Instant::now()));
        let retry = self.holder.as_ref().filter(|_| self.group.is_some()).and_then(Holder::due);
        let retry = retry.map(|retry| retry.saturating_duration_since(Instant::now()));
        let limit = alone.into_iter().chain(due).chain(retry).min();
        let limit = limit.map(|limit| Timespec::try_from(limit).unwrap_or(Timespec { tv_sec: 3600, tv_nsec: 0 }));
        let room = if self.pending.untold().is_some() { PollFlags::OUT } else { PollFlags::empty() };
        let group = self.group.as_ref().filter(|_| !self.pending.is_full());
        let mut sockets = vec![PollFd::new(&self.listener, PollFlags::IN)];
        sockets.extend(self.taker.iter().map(|taker| PollFd::new(taker, PollFlags::IN | room)));
        sockets.extend(group.map(|group| PollFd::new(group, PollFlags::IN)));
        sockets.extend(self.clients.iter().map(|client| PollFd::new(client, PollFlags::IN)));
        // Its end is seen in the next round.
        let holder = self.holder.as_ref().and_then(Holder::connection);
        sockets.extend(holder.map(|holder| PollFd::from_borrowed_fd(holder, PollFlags::RDHUP)));
        match poll(&mut sockets, limit.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(errno) => return Err(errno.into()),
        }
        let mut revents = sockets.iter().map(PollFd::revents);
        let mut next =
            |there: bool| if there { revents.next().unwrap_or(PollFlags::empty()) } else { PollFlags::empty() };
        let knocks = !next(true).is_empty();
        // That there is room for more does not mean that it has said something.
        let taker = !next(self.taker.is_some()).difference(PollFlags::OUT).is_empty();
        let group = !next(group.is_some()).is_empty();
        let clients = (0..self.clients.len())
            .zip(revents)
            .filter(|(_, client)| !client.is_empty())
            .map(|(place, _)| place)
            .collect();
        Ok(Ready { knocks, clients, taker, group })
    }

    /// Takes what the group has.
    fn take_events(&mut self) {
        let Some(group) = &self.group else { return };
        match group.read() {
            Ok(events) => {
                let now = Instant::now();
                events.into_iter().for_each(|event| self.pending.arrived(now, event.file, event.offset, event.len));
            }
            Err(error) => tracing::warn!("an event is denied: {error}"),
        }
    }

    /// Tells the daemon of events, as long as it listens.
    fn tell(&mut self) {
        while let (Some(taker), Some((id, event))) = (&self.taker, self.pending.untold()) {
            let number = event.file.as_raw_fd() as u64;
            let event_packet = Reply::Event { id, number, offset: event.offset, len: event.len }.encode();
            match packet::send(taker, &event_packet, Some(event.file.as_fd()), SendFlags::DONTWAIT) {
                Ok(()) => self.pending.told(id),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return self.lose_taker(&error.to_string()),
            }
        }
    }

    /// Takes the answers that the daemon has sent.
    fn hear(&mut self) {
        while let Some(taker) = &self.taker {
            match packet::receive(taker, RecvFlags::DONTWAIT) {
                Ok(Some((packet, _))) => match Request::decode(&packet) {
                    Ok(Request::Answer { id, allow }) => {
                        let verdict = if allow { Verdict::Allow } else { Verdict::Deny };
                        if let Some(file) = self.pending.answered(id) {
                            self.answer(file, verdict);
                        }
                    }
                    _ => self.lose_taker("it says something else"),
                },
                Ok(None) => self.lose_taker("it has gone"),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => self.lose_taker(&error.to_string()),
            }
        }
    }

    fn lose_taker(&mut self, reason: &str) {
        tracing::debug!("nobody takes events: {reason}");
        self.taker = None;
        self.pending.tell_again();
    }

    /// Gives the kernel the answer to an event, whose descriptor stays open until then: its number names it.
    fn answer(&self, file: OwnedFd, verdict: Verdict) {
        let Some(group) = &self.group else { return };
        match group.answer(file.as_raw_fd(), verdict) {
            // Its reader was killed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::error!("an event cannot be answered: {error}"),
            Ok(()) => {}
        }
    }

    /// Reads the group that the table has got, or does not any more.
    fn follow_group(&mut self) -> io::Result<()> {
        let reads = self.duty == Duty::Read || self.given_up;
        match (self.table.group().filter(|_| reads), &self.group) {
            (Some(group), None) => {
                // First, as a holder that has been alone reads it itself.
                if let Some(holder) = &mut self.holder {
                    holder.hold_first(group.as_fd());
                }
                let group = Group::from(group.try_clone()?);
                let left = group.settle();
                tracing::info!("a group of events is guarded, {left} of them were left unanswered");
                self.group = Some(group);
            }
            (None, Some(_)) => {
                self.pending.take_all().into_iter().for_each(|file| self.answer(file, Verdict::Deny));
                self.group = None;
                if let Some(holder) = &mut self.holder {
                    holder.release();
                }
            }
            _ => {}
        }
        Ok(())
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
            self.given_up = false;
            // A holder reads no more before it says anything to a keeper.
            if let Err(error) = self.follow_group() {
                tracing::warn!("the group cannot be copied: {error}");
            }
        }
    }

    /// Answers what the client in this place has sent, or lets it go.
    fn serve(&mut self, place: usize) {
        match self.exchange(place) {
            Ok(After::Stays) => {}
            Ok(After::Goes) => drop(self.clients.swap_remove(place)),
            Ok(After::Takes) => {
                self.taker = Some(self.clients.swap_remove(place));
                self.pending.tell_again();
            }
            Err(error) => {
                tracing::warn!("a daemon is cut off: {error}");
                self.clients.swap_remove(place);
            }
        }
    }

    fn exchange(&mut self, place: usize) -> io::Result<After> {
        let client = &self.clients[place];
        let (packet, connection) = match packet::receive(client, RecvFlags::DONTWAIT) {
            Ok(Some(received)) => received,
            Ok(None) => return Ok(After::Goes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(After::Stays),
            Err(error) => return Err(error),
        };
        let request = Request::decode(&packet);
        let takes = matches!(request, Ok(Request::Take));
        let (reply, connection) = match request {
            Ok(request) => {
                tracing::debug!("{request:?}");
                if self.duty == Duty::Hold && request == Request::Guard && connection.is_some() {
                    // Another copy of the same: who makes a new one has asked here first.
                    self.table.answer(Request::Release, None);
                }
                self.table.answer(request, connection)
            }
            Err(malformed) => (Reply::Refused { reason: malformed.to_string() }, None),
        };
        let takes = takes && reply == Reply::Done;
        match connection {
            Some(given) => packet::send(client, &reply.encode(), Some(given.as_fd()), SendFlags::DONTWAIT)?,
            None => {
                // Before the answer: what is said to be guarded is held, too.
                self.follow_group()?;
                packet::send(&self.clients[place], &reply.encode(), None, SendFlags::DONTWAIT)?;
            }
        }
        Ok(if takes { After::Takes } else { After::Stays })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}
