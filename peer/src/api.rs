//! The control API: what `shoal ctl` asks, over a Unix socket (gRPC; the contract is `proto/src/control.proto`).
//!
//! The socket is made with mode 0600: who may open it may mount file systems on this host.

#[allow(
    missing_docs,
    missing_debug_implementations,
    clippy::all,
    clippy::pedantic,
    unreachable_pub,
    reason = "generated from control.proto"
)]
mod generated {
    include!("generated/shoal.control.v1.rs");
}

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

use shoal_proto::control::{
    MountReply, MountRequest, PeersReply, PeersRequest, PrefetchProgress, PrefetchRequest, RevokeReply,
    RevokeRequest, StatusReply, StatusRequest, UnmountReply, UnmountRequest,
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, transport::Channel};

pub use self::generated::control_client::ControlClient;
use self::generated::control_server::{Control, ControlServer};
use crate::{command::Failure, daemon::Parts};

/// A connection to the daemon whose socket is `socket`.
///
/// # Errors
/// Nobody answers there.
pub async fn connect(socket: &Path) -> Result<ControlClient<Channel>, Failure> {
    let unreachable = |error: &dyn std::fmt::Display| format!("no daemon answers at {}: {error}", socket.display());
    let path = std::path::absolute(socket)?;
    let path = path.to_str().ok_or_else(|| format!("{} is not UTF-8", socket.display()))?;
    if let Err(error) = tokio::net::UnixStream::connect(path).await {
        return Err(unreachable(&error).into());
    }
    let channel = tonic::transport::Endpoint::from_shared(format!("unix://{path}"))?
        .connect()
        .await
        .map_err(|e| unreachable(&e))?;
    Ok(ControlClient::new(channel))
}

/// The daemon's own words, without gRPC's.
pub fn said(status: &Status) -> Failure {
    status.message().to_owned().into()
}

/// The listening API; [`ApiServer::stop`] ends it.
#[derive(Debug)]
pub(crate) struct ApiServer {
    socket: PathBuf,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl ApiServer {
    /// Listens on `socket`. A socket file that a killed daemon left is replaced: the lock on the data directory has
    /// already shown that no other daemon runs there.
    ///
    /// # Errors
    /// When the path cannot be bound, or another daemon answers on it.
    pub(crate) async fn start(socket: &Path, parts: Arc<Parts>) -> std::io::Result<Self> {
        if tokio::net::UnixStream::connect(socket).await.is_ok() {
            return Err(std::io::Error::other("another daemon answers on this socket"));
        }
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let (stop, stopped) = oneshot::channel();
        let server = tonic::transport::Server::builder().add_service(ControlServer::new(Api { parts }));
        let task = tokio::spawn(async move {
            let stopped = async { drop(stopped.await) };
            if let Err(error) = server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped).await
            {
                tracing::error!("the control API ended: {error}");
            }
        });
        Ok(Self { socket: socket.to_owned(), stop, task })
    }

    /// Takes the socket away and ends the calls under way.
    pub(crate) async fn stop(self) {
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::warn!("cannot remove {}: {error}", self.socket.display());
        }
        // Closed channel: the server has ended already.
        let _ = self.stop.send(());
        let grace = std::time::Duration::from_secs(1);
        if tokio::time::timeout(grace, self.task).await.is_err() {
            tracing::warn!("a control call was still under way");
        }
    }
}

struct Api {
    parts: Arc<Parts>,
}

/// Bad references and mount points are the caller's, everything else is ours.
fn invalid(error: &dyn std::error::Error) -> Status {
    Status::invalid_argument(crate::chain(error))
}

fn failed(error: &dyn std::error::Error) -> Status {
    Status::internal(crate::chain(error))
}

#[tonic::async_trait]
impl Control for Api {
    async fn mount(&self, request: Request<MountRequest>) -> Result<Response<MountReply>, Status> {
        let MountRequest { reference, mountpoint } = request.into_inner();
        let reference = reference.parse().map_err(|e| invalid(&e))?;
        let manifest = self.parts.mounts.mount(&reference, Path::new(&mountpoint)).await.map_err(|e| failed(&e))?;
        Ok(Response::new(MountReply { manifest: format!("sha256:{manifest}") }))
    }

    async fn unmount(&self, request: Request<UnmountRequest>) -> Result<Response<UnmountReply>, Status> {
        let mountpoint = PathBuf::from(request.into_inner().mountpoint);
        let detached = self.parts.mounts.unmount(&mountpoint).await.map_err(|e| failed(&e))?;
        Ok(Response::new(UnmountReply { detached }))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        Ok(Response::new(self.parts.status()))
    }

    async fn peers(&self, _: Request<PeersRequest>) -> Result<Response<PeersReply>, Status> {
        Ok(Response::new(PeersReply { peers: self.parts.peers() }))
    }

    async fn revoke(&self, request: Request<RevokeRequest>) -> Result<Response<RevokeReply>, Status> {
        let new = self.parts.revoke(request.into_inner().revocation.into()).await.map_err(|e| invalid(&e))?;
        Ok(Response::new(RevokeReply { new }))
    }

    type PrefetchStream = Pin<Box<dyn Stream<Item = Result<PrefetchProgress, Status>> + Send>>;

    async fn prefetch(&self, request: Request<PrefetchRequest>) -> Result<Response<Self::PrefetchStream>, Status> {
        let reference = request.into_inner().reference.parse().map_err(|e| invalid(&e))?;
        let (_, image) = self.parts.node.image(&reference).await.map_err(|e| failed(&e))?;
        let (progress, received) = mpsc::channel(4);
        let node = self.parts.node.clone();
        tokio::spawn(async move {
            if let Err(error) = crate::prefetch::run(&node, &image, &progress).await {
                // Nobody listens any more: the prefetch ends with its caller.
                let _ = progress.send(Err(failed(&error))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }
}
