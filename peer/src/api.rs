//! The control API: what `shoal ctl` asks, over a Unix socket (gRPC; the contract is `proto/src/control.proto`).

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
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

use shoal_proto::control::{
    GetReply, GetRequest, MountReply, MountRequest, PeersReply, PeersRequest, PrefetchProgress, PrefetchRequest,
    PullReply, PullRequest, RevokeReply, RevokeRequest, SetReply, SetRequest, StatusReply, StatusRequest,
    UnmountReply, UnmountRequest,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, transport::Channel};

pub use self::generated::control_client::ControlClient;
use self::generated::control_server::{Control, ControlServer};
use crate::{
    command::Failure,
    daemon::Parts,
    grpc::{self, UnixServer},
};

/// A connection to the daemon whose socket is `socket`.
///
/// # Errors
/// Nobody answers there.
pub async fn connect(socket: &Path) -> Result<ControlClient<Channel>, Failure> {
    grpc::connect("daemon", socket).await.map(ControlClient::new)
}

/// The daemon's own words, without gRPC's.
pub fn said(status: &Status) -> Failure {
    status.message().to_owned().into()
}

/// Serves the API on `socket`.
///
/// # Errors
/// See [`UnixServer::start`].
pub(crate) async fn serve(socket: &Path, parts: Arc<Parts>) -> std::io::Result<UnixServer> {
    let services = tonic::transport::Server::builder().add_service(ControlServer::new(Api { parts }));
    UnixServer::start(socket, services).await
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

    async fn pull(&self, request: Request<PullRequest>) -> Result<Response<PullReply>, Status> {
        let PullRequest { reference, namespace } = request.into_inner();
        let reference = reference.parse().map_err(|e| invalid(&e))?;
        let pulled = self.parts.pull(&reference, &namespace).await.map_err(|e| failed(&*e))?;
        Ok(Response::new(PullReply { image: pulled.name, manifest: format!("sha256:{}", pulled.manifest) }))
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

    async fn set(&self, request: Request<SetRequest>) -> Result<Response<SetReply>, Status> {
        let settings = self.parts.settings.set(&request.into_inner().settings).await.map_err(|e| invalid(&e))?;
        Ok(Response::new(SetReply { settings }))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetReply>, Status> {
        let settings = self.parts.settings.get(&request.into_inner().key).map_err(|e| invalid(&e))?;
        Ok(Response::new(GetReply { settings }))
    }

    type PrefetchStream = Pin<Box<dyn Stream<Item = Result<PrefetchProgress, Status>> + Send>>;

    async fn prefetch(&self, request: Request<PrefetchRequest>) -> Result<Response<Self::PrefetchStream>, Status> {
        let reference = request.into_inner().reference.parse().map_err(|e| invalid(&e))?;
        let image = self.parts.node.image(&reference).await.map_err(|e| failed(&e))?;
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
