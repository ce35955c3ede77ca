//! The gRPC side: containerd's messages to calls, errors to the codes by which containerd knows them.

use std::pin::Pin;

use shoal_snapshots::{CatalogError, Kind, LabelUpdate, Snapshot};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, transport::server::Router};

use super::{SnapshotError, Snapshotter};
use crate::{
    containerd::snapshots::{
        CleanupRequest, CommitSnapshotRequest, Info, Kind as WireKind, ListSnapshotsRequest, ListSnapshotsResponse,
        MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest,
        StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest,
        UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
        snapshots_server::{Snapshots, SnapshotsServer},
    },
    images::ImageError,
    mounts::MountsError,
};

/// Snapshots in one message of a list, as containerd's own server has it.
const LIST_BATCH: usize = 100;

/// The service, to be served on a socket.
pub(crate) fn serve(snapshotter: Snapshotter) -> Router {
    tonic::transport::Server::builder().add_service(SnapshotsServer::new(snapshotter))
}

impl From<SnapshotError> for Status {
    fn from(error: SnapshotError) -> Self {
        let text = crate::chain(&error);
        match error {
            SnapshotError::Catalog(error) => match error {
                CatalogError::Exists(_) => Self::already_exists(text),
                CatalogError::NotFound(_) | CatalogError::NoParent { .. } => Self::not_found(text),
                CatalogError::NotActive(_)
                | CatalogError::NoMounts(_)
                | CatalogError::HasChildren(_)
                | CatalogError::NoFiles(_) => Self::failed_precondition(text),
                CatalogError::ParentNotCommitted { .. }
                | CatalogError::Immutable { .. }
                | CatalogError::Name(_)
                | CatalogError::Labels(_) => Self::invalid_argument(text),
            },
            SnapshotError::Filter(_) => Self::invalid_argument(text),
            // The registry is away, or the mount of an earlier run is being made again: worth another try.
            SnapshotError::Image(ImageError::Resolve { .. } | ImageError::Object { .. })
            | SnapshotError::Mount(MountsError::InUse(_) | MountsError::Image(_)) => Self::unavailable(text),
            SnapshotError::NoReference
            | SnapshotError::OtherLayer { .. }
            | SnapshotError::NoBlob { .. }
            | SnapshotError::WrongChain { .. }
            | SnapshotError::Image(_) => Self::failed_precondition(text),
            SnapshotError::Mount(_) | SnapshotError::Io { .. } | SnapshotError::Inconsistent(_) => {
                tracing::error!("{text}");
                Self::internal(text)
            }
        }
    }
}

impl From<Snapshot> for Info {
    fn from(snapshot: Snapshot) -> Self {
        let kind = match snapshot.kind {
            Kind::View => WireKind::View,
            Kind::Active => WireKind::Active,
            Kind::Committed => WireKind::Committed,
        };
        Self {
            name: snapshot.name,
            parent: snapshot.parent,
            kind: kind.into(),
            created_at: Some(snapshot.created.into()),
            updated_at: Some(snapshot.updated.into()),
            labels: snapshot.labels.into_iter().collect(),
        }
    }
}

#[tonic::async_trait]
impl Snapshots for Snapshotter {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = Self::prepare(self, key, parent, labels.into_iter().collect()).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts }))
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = Self::view(self, key, parent, labels.into_iter().collect()).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let mounts = Self::mounts(self, &request.into_inner().key).await?;
        Ok(Response::new(MountsResponse { mounts }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { name, key, labels, .. } = request.into_inner();
        Self::commit(self, name, key, labels.into_iter().collect()).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        Self::remove(self, request.into_inner().key).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Result<Response<StatSnapshotResponse>, Status> {
        let info = Some(Self::stat(self, &request.into_inner().key)?.into());
        Ok(Response::new(StatSnapshotResponse { info }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.ok_or_else(|| Status::invalid_argument("an update of nothing"))?;
        let mask = update_mask.unwrap_or_default();
        let update = LabelUpdate::parse(&info.name, &mask.paths).map_err(SnapshotError::from)?;
        let changed = Self::update(self, info.name, update, info.labels.into_iter().collect()).await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(changed.into()) }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let mut infos: Vec<Info> =
            Self::list(self, &request.into_inner().filters)?.into_iter().map(Info::from).collect();
        let mut batches = Vec::new();
        while !infos.is_empty() {
            let rest = infos.split_off(infos.len().min(LIST_BATCH));
            batches.push(Ok(ListSnapshotsResponse { info: std::mem::replace(&mut infos, rest) }));
        }
        Ok(Response::new(Box::pin(tokio_stream::iter(batches))))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let usage = Self::usage(self, &request.into_inner().key).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Ok(Response::new(UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) }))
    }

    async fn cleanup(&self, _: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        Self::cleanup(self).await?;
        Ok(Response::new(()))
    }
}
