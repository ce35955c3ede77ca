//! The daemon's side of the protocol.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
    sockopt::{Timeout, set_socket_timeout},
};

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

    /// Has the keeper end.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it keeps something.
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
