//! gRPC over Unix sockets: serving, and connecting to somebody who does.
//!
//! Sockets are made with mode 0600: who may open one may have file systems mounted on this host.

use std::{
    io,
    os::unix::{fs::PermissionsExt, net::UnixListener as StdListener},
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{net::UnixListener, sync::oneshot, task::JoinHandle};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, server::Router};

use crate::{
    command::Failure,
    upgrade::{Inheritance, Listener},
};

/// How long calls under way may go on when the server stops.
const GRACE: Duration = Duration::from_secs(1);
/// The same when another daemon comes in its place. Who calls meanwhile waits for that one.
const UPGRADE_GRACE: Duration = Duration::from_secs(10);

/// A server that listens; [`UnixServer::stop`] ends it.
#[derive(Debug)]
pub(crate) struct UnixServer {
    socket: PathBuf,
    /// A copy, to be left to the next daemon.
    listener: StdListener,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl UnixServer {
    /// Listens on `socket`, which the daemon before may have left. A socket file that a killed daemon left is replaced: the lock on
    /// the data directory has already shown that no other daemon runs there.
    ///
    /// # Errors
    /// When the path cannot be bound, or another daemon answers on it.
    pub(crate) async fn start(socket: &Path, services: Router, inheritance: &Inheritance) -> io::Result<Self> {
        let listener = match inheritance.listener(socket)? {
            Some(listener) => listener,
            None => Self::bind(socket).await?,
        };
        listener.set_nonblocking(true)?;
        let accepting = UnixListener::from_std(listener.try_clone()?)?;
        let (stop, stopped) = oneshot::channel();
        let path = socket.to_owned();
        let task = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            let incoming = UnixListenerStream::new(accepting);
            if let Err(error) = services.serve_with_incoming_shutdown(incoming, stopped).await {
                tracing::error!("the server on {} ended: {error}", path.display());
            }
        });
        Ok(Self { socket: socket.to_owned(), listener, stop, task })
    }

    async fn bind(socket: &Path) -> io::Result<StdListener> {
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Err(io::Error::other("another daemon answers on this socket"));
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = StdListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Takes the socket away and ends the calls under way.
    pub(crate) async fn stop(self) {
        let Self { socket, listener, stop, task } = self;
        if let Err(error) = std::fs::remove_file(&socket) {
            tracing::warn!("cannot remove {}: {error}", socket.display());
        }
        // Or who has connected a moment ago would wait for nobody.
        drop(listener);
        Self::end(&socket, stop, task, GRACE).await;
    }

    /// Ends the calls under way, and gives the socket for the next daemon: who connects waits until that accepts.
    pub(crate) async fn leave(self) -> Listener {
        Self::end(&self.socket, self.stop, self.task, UPGRADE_GRACE).await;
        Listener::new(self.socket, self.listener)
    }

    async fn end(socket: &Path, stop: oneshot::Sender<()>, task: JoinHandle<()>, grace: Duration) {
        // Closed channel: the server has ended already.
        let _ = stop.send(());
        if tokio::time::timeout(grace, task).await.is_err() {
            tracing::warn!("a call on {} was still under way", socket.display());
        }
    }
}

/// A connection to `who`, who serves on `socket`.
///
/// # Errors
/// Nobody answers there.
pub(crate) async fn connect(who: &str, socket: &Path) -> Result<Channel, Failure> {
    let unreachable = |error: &dyn std::fmt::Display| format!("no {who} answers at {}: {error}", socket.display());
    let path = std::path::absolute(socket)?;
    let path = path.to_str().ok_or_else(|| format!("{} is not UTF-8", socket.display()))?;
    if let Err(error) = tokio::net::UnixStream::connect(path).await {
        return Err(unreachable(&error).into());
    }
    Ok(Endpoint::from_shared(format!("unix://{path}"))?.connect().await.map_err(|e| unreachable(&e))?)
}
