//! Calls to containerd, in a namespace and under a lease.

use std::{collections::HashMap, path::Path};

use tokio_stream::StreamExt;
use tonic::{Code, Request, Status, metadata::AsciiMetadataValue, transport::Channel};

use super::{
    content::{self, WriteAction, WriteContentRequest, content_client::ContentClient},
    images::{self, CreateImageRequest, UpdateImageRequest, images_client::ImagesClient},
    leases::{self, leases_client::LeasesClient},
    snapshots::{
        PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, snapshots_client::SnapshotsClient,
    },
    types::Descriptor,
};
use crate::{command::Failure, grpc};

/// Labels of content, images, leases and snapshots.
pub(crate) type Labels = HashMap<String, String>;

/// Header with the namespace of a call.
const NAMESPACE: &str = "containerd-namespace";
/// Header with the lease that what a call makes belongs to.
const LEASE: &str = "containerd-lease";

/// A connection to containerd, and what its calls have in common.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    channel: Channel,
    namespace: AsciiMetadataValue,
    lease: Option<AsciiMetadataValue>,
    snapshotter: String,
}

impl Client {
    /// Connects to the containerd that serves on `socket`, where the daemon is the snapshotter `snapshotter`.
    ///
    /// # Errors
    /// Nobody answers there, or the namespace cannot be one.
    pub(crate) async fn connect(socket: &Path, namespace: &str, snapshotter: &str) -> Result<Self, Failure> {
        let header = namespace.parse().map_err(|_| format!("{namespace:?} is no name of a namespace"))?;
        let channel = grpc::connect("containerd", socket).await?;
        Ok(Self { channel, namespace: header, lease: None, snapshotter: snapshotter.to_owned() })
    }

    /// The name by which containerd knows this daemon's snapshotter.
    pub(super) fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert(NAMESPACE, self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert(LEASE, lease.clone());
        }
        request
    }

    /// Makes a lease; what the client that is given makes belongs to it.
    pub(super) async fn lease(&self, id: &str, labels: Labels) -> Result<Self, Status> {
        let request = self.request(leases::CreateRequest { id: id.to_owned(), labels });
        LeasesClient::new(self.channel.clone()).create(request).await?;
        let lease = id.parse().map_err(|_| Status::invalid_argument("the lease's name does not fit a header"))?;
        Ok(Self { lease: Some(lease), ..self.clone() })
    }

    /// Ends a lease.
    pub(super) async fn end_lease(&self, id: &str) -> Result<(), Status> {
        let request = self.request(leases::DeleteRequest { id: id.to_owned() });
        LeasesClient::new(self.channel.clone()).delete(request).await.map(drop)
    }

    /// Stores bytes under their digest, with these labels; if they are there already, the labels are added.
    pub(super) async fn put_content(&self, digest: &str, data: Vec<u8>, labels: Labels) -> Result<(), Status> {
        let mut client = ContentClient::new(self.channel.clone());
        let write = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: format!("shoal-{digest}"),
            total: data.len() as i64,
            expected: digest.to_owned(),
            offset: 0,
            data,
            labels: labels.clone(),
        };
        // The answer's head or its first message can bear the refusal.
        let written = match client.write(self.request(tokio_stream::once(write))).await {
            Ok(answer) => answer.into_inner().collect::<Result<Vec<_>, _>>().await.map(drop),
            Err(status) => Err(status),
        };
        match written {
            Err(status) if status.code() == Code::AlreadyExists => {}
            written => return written,
        }
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Some(content::Info { digest: digest.to_owned(), labels });
        let update = content::UpdateRequest { info, update_mask: Some(prost_types::FieldMask { paths }) };
        client.update(self.request(update)).await.map(drop)
    }

    /// Points a name to an image, whatever it pointed to before.
    pub(super) async fn put_image(&self, name: &str, target: Descriptor) -> Result<(), Status> {
        let mut client = ImagesClient::new(self.channel.clone());
        let image = images::Image { name: name.to_owned(), labels: Labels::new(), target: Some(target) };
        match client.create(self.request(CreateImageRequest { image: Some(image.clone()) })).await {
            Err(status) if status.code() == Code::AlreadyExists => {
                let update_mask = Some(prost_types::FieldMask { paths: vec!["target".to_owned()] });
                client.update(self.request(UpdateImageRequest { image: Some(image), update_mask })).await.map(drop)
            }
            created => created.map(drop),
        }
    }

    /// Whether there is a snapshot of this name.
    pub(super) async fn has_snapshot(&self, name: &str) -> Result<bool, Status> {
        let request = StatSnapshotRequest { snapshotter: self.snapshotter.clone(), key: name.to_owned() };
        match SnapshotsClient::new(self.channel.clone()).stat(self.request(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(status),
        }
    }

    /// Asks for a snapshot to unpack a layer into; false if there is nothing to unpack.
    pub(super) async fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<bool, Status> {
        let request = PrepareSnapshotRequest {
            snapshotter: self.snapshotter.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels,
        };
        match SnapshotsClient::new(self.channel.clone()).prepare(self.request(request)).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::AlreadyExists => Ok(false),
            Err(status) => Err(status),
        }
    }

    /// Removes a snapshot.
    pub(super) async fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest { snapshotter: self.snapshotter.clone(), key: key.to_owned() };
        SnapshotsClient::new(self.channel.clone()).remove(self.request(request)).await.map(drop)
    }
}
