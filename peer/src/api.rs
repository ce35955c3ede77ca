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
    time::Duration,
};

use shoal_proto::control::{
    EvictReply, EvictRequest, GetReply, GetRequest, MountMode as WantedMode, MountReply, MountRequest, PeersReply,
    PeersRequest, PinReply, PinRequest, PrefetchProgress, PrefetchRequest, PreheatGroup, PreheatProgress,
    PreheatRequest, PullReply, PullRequest, RevokeReply, RevokeRequest, ScrubProgress, ScrubRequest, SetReply,
    SetRequest, StatusReply, StatusRequest, StoreUsageReply, StoreUsageRequest, UnmountReply, UnmountRequest,
    UnpinReply, UnpinRequest, UpgradeReply, UpgradeRequest,
};
use shoal_rafs::oci::Reference;
use shoal_scheduler::{Event, Item};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, transport::Channel};

pub use self::generated::control_client::ControlClient;
use self::generated::control_server::{Control, ControlServer};
use crate::{
    command::Failure,
    config::MountMode,
    daemon::Parts,
    driver::DriverHandle,
    grpc::{self, UnixServer},
    mounts::blocking,
    preheat::Choice,
    scrub,
    store::Evicted,
    upgrade::Inheritance,
    usage,
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
pub(crate) async fn serve(
    socket: &Path,
    parts: Arc<Parts>,
    inheritance: &Inheritance,
) -> std::io::Result<UnixServer> {
    let services = tonic::transport::Server::builder().add_service(ControlServer::new(Api { parts }));
    UnixServer::start(socket, services, inheritance).await
}

struct Api {
    parts: Arc<Parts>,
}

/// What comes bit by bit.
type Progress<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

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
        let MountRequest { reference, mountpoint, mode, decode } = request.into_inner();
        let reference = reference.parse().map_err(|e| invalid(&e))?;
        let mode = match WantedMode::try_from(mode) {
            Ok(WantedMode::Configured) => None,
            Ok(WantedMode::Auto) => Some(MountMode::Auto),
            Ok(WantedMode::Native) => Some(MountMode::Native),
            Ok(WantedMode::Fuse) => Some(MountMode::Fuse),
            Err(_) => return Err(Status::invalid_argument("no such mode of a mount")),
        };
        let manifest = self.parts.mounts.mount(&reference, Path::new(&mountpoint), mode, decode).await;
        let manifest = manifest.map_err(|e| failed(&e))?;
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

    type PrefetchStream = Progress<PrefetchProgress>;

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
    async fn store_usage(&self, _: Request<StoreUsageRequest>) -> Result<Response<StoreUsageReply>, Status> {
        let store = self.parts.node.store.clone();
        Ok(Response::new(blocking(move || usage::report(&store)).await.map_err(|e| failed(&e))?))
    }

    type ScrubStream = Progress<ScrubProgress>;

    async fn scrub(&self, _: Request<ScrubRequest>) -> Result<Response<Self::ScrubStream>, Status> {
        let (progress, received) = mpsc::channel(4);
        let (store, driver) = (self.parts.node.store.clone(), self.parts.node.driver.clone());
        let node = self.parts.node.clone();
        tokio::task::spawn_blocking(move || {
            let open = |layer, bytes, seal: &_| node.images.registry().open_layer(layer, bytes, Some(seal));
            let result = scrub::run(&store, &open, &mut Scrubbing { progress: &progress, driver: &driver });
            // A caller that has gone does not need it.
            let _ = progress.blocking_send(result.map_err(|e| failed(&e)));
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(received))))
    }

    async fn pin(&self, request: Request<PinRequest>) -> Result<Response<PinReply>, Status> {
        let PinRequest { reference, seconds } = request.into_inner();
        let reference = reference.parse().map_err(|e| invalid(&e))?;
        let lifetime = (seconds > 0).then(|| Duration::from_secs(seconds));
        let pinned = self.parts.pins.pin(&reference, lifetime).await.map_err(|e| failed(&e))?;
        Ok(Response::new(PinReply { manifest: format!("sha256:{}", pinned.manifest) }))
    }

    async fn unpin(&self, request: Request<UnpinRequest>) -> Result<Response<UnpinReply>, Status> {
        let reference: Reference = request.into_inner().reference.parse().map_err(|e| invalid(&e))?;
        let unpinned = self.parts.pins.unpin(&reference.to_string()).await.map_err(|e| failed(&e))?;
        Ok(Response::new(UnpinReply { unpinned }))
    }

    async fn evict(&self, request: Request<EvictRequest>) -> Result<Response<EvictReply>, Status> {
        let reference = request.into_inner().reference;
        let store = self.parts.node.store.clone();
        let evicted = if reference.is_empty() {
            blocking(move || store.evict_all()).await
        } else {
            let reference = reference.parse().map_err(|e| invalid(&e))?;
            let image = self.parts.node.image(&reference).await.map_err(|e| failed(&e))?;
            blocking(move || store.evict(&image.image.native_names().needs(&image))).await
        };
        let Evicted { blobs, objects, decoded, bytes, held } = evicted.map_err(|e| failed(&e))?;
        Ok(Response::new(EvictReply { blobs, objects, bytes, held, decoded }))
    }

    type PreheatStream = Progress<PreheatProgress>;

    async fn preheat(&self, request: Request<PreheatRequest>) -> Result<Response<Self::PreheatStream>, Status> {
        let PreheatRequest { reference, group, zone, count, seconds, wait } = request.into_inner();
        let reference = reference.parse().map_err(|e| invalid(&e))?;
        let (choice, lifetime) = (choice(group, zone, count)?, Duration::from_secs(seconds));
        let preheats = self.parts.preheats.clone();
        let id = preheats.ask(&reference, choice, lifetime).await.map_err(|e| failed(&e))?;
        let (progress, received) = mpsc::channel(1);
        tokio::spawn(async move { preheats.follow(id, wait, progress).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(received).map(Ok))))
    }

    async fn upgrade(&self, request: Request<UpgradeRequest>) -> Result<Response<UpgradeReply>, Status> {
        let UpgradeRequest { binary, exit, force } = request.into_inner();
        let binary = Some(binary).filter(|binary| !binary.is_empty()).map(PathBuf::from);
        let reply = self.parts.upgrade(binary, exit, force).await;
        Ok(Response::new(reply.map_err(|e| Status::failed_precondition(crate::chain(&e)))?))
    }
}

/// Who is meant by a request to preheat.
fn choice(group: i32, zone: String, count: u32) -> Result<Choice, Status> {
    match PreheatGroup::try_from(group) {
        Ok(PreheatGroup::Seeds) => Ok(Choice::Seeds),
        Ok(PreheatGroup::All) => Ok(Choice::All),
        Ok(PreheatGroup::Zone) => Ok(Choice::Zone(zone)),
        Ok(PreheatGroup::Count) => Ok(Choice::Count(count as usize)),
        Err(_) => Err(Status::invalid_argument("no such group of nodes")),
    }
}

/// Tells the caller how far a scrub is, and the scheduler what is not here after all.
struct Scrubbing<'a> {
    progress: &'a mpsc::Sender<Result<ScrubProgress, Status>>,
    driver: &'a DriverHandle,
}

impl scrub::Listener for Scrubbing<'_> {
    fn progress(&mut self, now: ScrubProgress) -> bool {
        // A slow listener misses a step.
        !matches!(self.progress.try_send(Ok(now)), Err(mpsc::error::TrySendError::Closed(_)))
    }

    fn lost(&mut self, item: Item) {
        tokio::runtime::Handle::current().block_on(self.driver.event(Event::Lost { item }));
    }
}
