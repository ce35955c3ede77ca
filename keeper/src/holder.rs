//! The holder, as the keeper sees it: one process more that has the group of events open, and does nothing with it.
//!
//! ```text
//!   keeper ── Guard, with the group ──> holder       over a socket of its own, beside the keeper's; the connection stays open
//!          ── Release, Stop ──────────>              nothing is marked any more
//!   daemon ── Group ──────────────────>              the next one, if it finds no keeper that has it
//! ```
//!
//! When the last process closes a group, holes of files are read as zeros. With daemon and keeper alone that happens when both
//! are killed at once, for instance with the cgroup that they share. The holder is what neither of them is: it serves nobody,
//! takes no events, is asked nothing, and has left the cgroup that it was started in. While it alone has the group, readers wait.
//!
//! It is a [`Keeper`](crate::Keeper) that reads the group only when it has been alone for longer than its patience; then it denies.

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::client::{Client, ClientError};
use crate::group::Group;

/// Time between attempts to find a holder, or to start one.
const RETRY: Duration = Duration::from_secs(1);
/// How long one may take to start.
const START_LIMIT: Duration = Duration::from_secs(2);
/// Time between looks whether one answers.
const LOOK: Duration = Duration::from_millis(5);
/// Time between looks whether a thread has found one.
const ATTEMPT_LOOK: Duration = Duration::from_millis(100);

/// Where the holder of a keeper listens.
pub fn holder_socket(keeper: &Path) -> PathBuf {
    let mut path = OsString::from(keeper);
    path.push(".holder");
    path.into()
}

/// The group that a keeper has left with its holder; none if there is no holder, or it has none.
///
/// # Errors
/// A holder is there and does not give it.
pub fn held(keeper: &Path) -> Result<Option<Group>, ClientError> {
    match Client::connect(&holder_socket(keeper)) {
        Ok(mut holder) => holder.group(),
        Err(ClientError::Io(error)) if is_nobody(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_nobody(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

type Start = dyn Fn(&Path) -> io::Result<()> + Send + Sync;
type Attempt = JoinHandle<Result<Client, ClientError>>;

/// Sees to it that there is a holder. What takes time, to find one or to start one, is done by a thread: the keeper has others to answer
/// meanwhile.
pub struct Holder {
    socket: PathBuf,
    start: Arc<Start>,
    client: Option<Client>,
    attempt: Option<Attempt>,
    retry: Instant,
    /// Why there is none, if that has been logged.
    trouble: Option<String>,
}

impl Holder {
    /// Of the keeper on this socket. `start` starts a holder that listens on the path that it is given.
    pub fn new(keeper: &Path, start: impl Fn(&Path) -> io::Result<()> + Send + Sync + 'static) -> Self {
        let (socket, start) = (holder_socket(keeper), Arc::new(start));
        Self { socket, start, client: None, attempt: None, retry: Instant::now(), trouble: None }
    }

    /// Has the group held, if it is not. Does not wait for that.
    pub(crate) fn hold(&mut self, group: BorrowedFd<'_>) {
        self.settle();
        let is_held = self.client.as_ref().is_some_and(Client::is_connected);
        if is_held || self.attempt.is_some() || Instant::now() < self.retry {
            return;
        }
        if self.client.take().is_some() {
            tracing::warn!("the holder has gone");
        }
        let begun = group.try_clone_to_owned().and_then(|group| {
            let (socket, start) = (self.socket.clone(), Arc::clone(&self.start));
            let attempt = move || {
                let mut client = find(&socket, &*start)?;
                client.guard_with(group.as_fd())?;
                Ok(client)
            };
            thread::Builder::new().name("shoal-holder".into()).spawn(attempt)
        });
        match begun {
            Ok(attempt) => self.attempt = Some(attempt),
            Err(error) => self.failed(&error.into()),
        }
    }

    /// The same, and waits for it, within bounds: for a group that is new here, of which nobody is to be told before.
    pub(crate) fn hold_first(&mut self, group: BorrowedFd<'_>) {
        self.hold(group);
        let deadline = Instant::now() + START_LIMIT;
        while self.attempt.as_ref().is_some_and(|attempt| !attempt.is_finished()) && Instant::now() < deadline {
            thread::sleep(LOOK);
        }
        self.settle();
    }

    /// Takes note of an attempt that has ended.
    fn settle(&mut self) {
        let Some(attempt) = self.attempt.take_if(|attempt| attempt.is_finished()) else { return };
        match attempt.join() {
            Ok(Ok(client)) => {
                tracing::info!("a holder has the group");
                (self.client, self.trouble) = (Some(client), None);
            }
            Ok(Err(error)) => self.failed(&error),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    fn failed(&mut self, error: &ClientError) {
        let trouble = error.to_string();
        if self.trouble.as_ref() != Some(&trouble) {
            tracing::error!("nobody would have the group should daemon and keeper be killed at once: {trouble}");
        }
        (self.trouble, self.retry) = (Some(trouble), Instant::now() + RETRY);
    }

    /// Nothing is marked any more.
    pub(crate) fn release(&mut self) {
        self.settle();
        let Some(mut client) = self.client.take() else { return };
        if let Err(error) = client.release().and_then(|()| client.stop()) {
            tracing::warn!("the holder may go on: {error}");
        }
    }

    /// The connection, which ends with the holder.
    pub(crate) fn connection(&self) -> Option<BorrowedFd<'_>> {
        self.client.as_ref().map(AsFd::as_fd)
    }

    /// When to look again, if there is none.
    pub(crate) fn due(&self) -> Option<Instant> {
        match (&self.client, &self.attempt) {
            (Some(_), _) => None,
            (None, Some(_)) => Some(Instant::now() + ATTEMPT_LOOK),
            (None, None) => Some(self.retry),
        }
    }
}

/// A holder that answers there, or one that is started. Blocks.
fn find(socket: &Path, start: &Start) -> Result<Client, ClientError> {
    match Client::connect(socket) {
        Err(ClientError::Io(error)) if is_nobody(&error) => {}
        found => return found,
    }
    start(socket)?;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        match Client::connect(socket) {
            Err(ClientError::Io(error)) if is_nobody(&error) && Instant::now() < deadline => thread::sleep(LOOK),
            found => return found,
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder").field("socket", &self.socket).field("client", &self.client).finish_non_exhaustive()
    }
}
