//! The daemon's side of the protocol.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, shutdown,
    socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

use crate::group::{Event, Group, Verdict};
use crate::message::{Malformed, Mount, Reply, Request};
use crate::packet;
use crate::peer_user::is_trusted;

/// How long an answer may take. The keeper does nothing that takes long, so one that does not answer is stopped or stuck.
const LIMIT: Duration = Duration::from_secs(5);

/// Why the keeper did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It cannot be reached, or has not answered within five seconds.
    #[error("cannot talk to the keeper")]
    Io(#[from] io::Error),
    /// It does not belong to this user.
    #[error("the keeper belongs to another user")]
    Stranger,
    /// It said something that cannot be read.
    #[error("the keeper is not understood")]
    Malformed(#[from] Malformed),
    /// It said something that is no answer to what was asked.
    #[error("the keeper answers something else")]
    Unexpected,
    /// It refused.
    #[error("the keeper refuses: {0}")]
    Refused(String),
}

/// A connection to the keeper. While it is open the keeper knows that a daemon is there. After an error other than
/// [`Refused`](ClientError::Refused) it is of no use any more.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Connects to the keeper that listens on `path`.
    ///
    /// # Errors
    /// Nobody answers there, or somebody else.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let address = SocketAddrUnix::new(path).map_err(io::Error::from)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(io::Error::from)?;
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(LIMIT)).map_err(io::Error::from)?;
        }
        connect(&socket, &address).map_err(io::Error::from)?;
        if is_trusted(socket.as_fd()) { Ok(Self { socket }) } else { Err(ClientError::Stranger) }
    }

    /// Has a mount kept, in place of what had its device number.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn keep(&mut self, mount: Mount, connection: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.done(&Request::Keep(mount), Some(connection))
    }

    /// All mounts that are kept, each with its connection.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn kept(&mut self) -> Result<Vec<(Mount, OwnedFd)>, ClientError> {
        let (mut all, mut after) = (Vec::<(Mount, OwnedFd)>::new(), String::new());
        loop {
            match self.ask(&Request::Next { after }, None)? {
                // In order, so that it ends.
                (Reply::Kept(mount), Some(connection))
                    if all.last().is_none_or(|(last, _)| last.device < mount.device) =>
                {
                    after = mount.device.clone();
                    all.push((mount, connection));
                }
                (Reply::End, _) => return Ok(all),
                _ => return Err(ClientError::Unexpected),
            }
        }
    }

    /// Has the connection of a mount closed. That there is none is no error.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn forget(&mut self, device: &str) -> Result<(), ClientError> {
        self.done(&Request::Forget { device: device.to_owned() }, None)
    }

    /// Has a group of events held and read.
    ///
    /// # Errors
    /// See [`ClientError`]; it refuses if it has one.
    pub fn guard(&mut self, group: &Group) -> Result<(), ClientError> {
        self.guard_with(group.as_fd())
    }

    pub(crate) fn guard_with(&mut self, group: BorrowedFd<'_>) -> Result<(), ClientError> {
        self.done(&Request::Guard, Some(group))
    }

    /// A copy of the group that it holds.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn group(&mut self) -> Result<Option<Group>, ClientError> {
        match self.ask(&Request::Group, None)? {
            (Reply::Group, Some(group)) => Ok(Some(group.into())),
            (Reply::End, None) => Ok(None),
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Has it let go of the group, of which nothing may be marked any more. That there is none is no error.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn release(&mut self) -> Result<(), ClientError> {
        self.done(&Request::Release, None)
    }

    /// Has it tell of the group's events from now on: of all that wait, then of others as they come. Who was told before is not
    /// any more.
    ///
    /// # Errors
    /// See [`ClientError`]; it refuses if it has no group.
    pub fn take(mut self) -> Result<Taker, ClientError> {
        self.done(&Request::Take, None)?;
        set_socket_timeout(&self.socket, Timeout::Recv, None).map_err(io::Error::from)?;
        Ok(Taker { socket: self.socket })
    }

    /// Has the keeper end.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it keeps or guards something.
    pub fn stop(&mut self) -> Result<(), ClientError> {
        self.done(&Request::Stop, None)
    }

    /// Whether the keeper is there. Does not ask it.
    pub fn is_connected(&self) -> bool {
        let mut sockets = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut sockets, Some(&at_once)).is_ok() && sockets[0].revents().is_empty()
    }

    fn done(&mut self, request: &Request, connection: Option<BorrowedFd<'_>>) -> Result<(), ClientError> {
        match self.ask(request, connection)? {
            (Reply::Done, _) => Ok(()),
            _ => Err(ClientError::Unexpected),
        }
    }

    fn ask(
        &mut self,
        request: &Request,
        connection: Option<BorrowedFd<'_>>,
    ) -> Result<(Reply, Option<OwnedFd>), ClientError> {
        packet::send(&self.socket, &request.encode(), connection, SendFlags::empty())?;
        let answer = packet::receive(&self.socket, RecvFlags::empty())?;
        let (packet, connection) = answer.ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted))?;
        match Reply::decode(&packet)? {
            Reply::Refused { reason } => Err(ClientError::Refused(reason)),
            reply => Ok((reply, connection)),
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A connection over which the keeper tells of events. Threads may use it at the same time.
#[derive(Debug)]
pub struct Taker {
    socket: OwnedFd,
}

/// An event, as the keeper tells of it.
#[derive(Debug)]
pub struct Told {
    /// To be answered by this.
    pub id: u64,
    /// What it is called by the group, should the keeper have died: see [`Group::answer`].
    pub number: RawFd,
    /// What is about to be read.
    pub event: Event,
}

impl Taker {
    /// Waits for the next event; none when the keeper has gone, or this has been [shut](Self::shut).
    ///
    /// # Errors
    /// [`ClientError::Io`], or the keeper says something else.
    pub fn next(&self) -> Result<Option<Told>, ClientError> {
        let Some((packet, file)) = packet::receive(&self.socket, RecvFlags::empty())? else { return Ok(None) };
        match (Reply::decode(&packet)?, file) {
            (Reply::Event { id, number, offset, len }, Some(file)) => {
                let number = RawFd::try_from(number).map_err(|_| ClientError::Unexpected)?;
                Ok(Some(Told { id, number, event: Event { file, offset, len } }))
            }
            _ => Err(ClientError::Unexpected),
        }
    }

    /// Answers an event; one that has been answered does not come to harm.
    ///
    /// # Errors
    /// The keeper has gone, or does not listen.
    pub fn answer(&self, id: u64, verdict: Verdict) -> io::Result<()> {
        let answer = Request::Answer { id, allow: verdict == Verdict::Allow };
        packet::send(&self.socket, &answer.encode(), None, SendFlags::empty())
    }

    /// Ends it, also for a thread that waits.
    pub fn shut(&self) {
        // It may have ended by itself.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }
}
