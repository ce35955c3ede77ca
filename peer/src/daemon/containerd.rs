//! The daemon behind containerd: its snapshotter, and pulls through it.

use std::{io, path::Path, sync::atomic::Ordering::Relaxed};

use shoal_rafs::oci::Reference;

use super::{Parts, StartError};
use crate::{
    command::Failure,
    config::SnapshotterConfig,
    containerd::{self, Client, Pulled},
    grpc::UnixServer,
    image_service::ImageService,
    snapshotter::{self, Snapshotter},
    upgrade::Inheritance,
};

impl Parts {
    /// Serves snapshots to containerd, and images to a kubelet, if a socket is configured for that. Mounts of an earlier run must have been tried.
    pub(super) async fn serve_snapshots(
        &self,
        data_dir: &Path,
        inheritance: &Inheritance,
    ) -> Result<Option<UnixServer>, StartError> {
        let Some(socket) = self.snapshotter.socket() else { return Ok(None) };
        let snapshotter =
            Snapshotter::open(data_dir, self.node.clone(), self.mounts.clone(), self.snapshotter.lazy_oci);
        let snapshotter = snapshotter.await.map_err(Box::new)?;
        self.set_aside.store(snapshotter.set_aside(), Relaxed);
        let failed = |source| StartError::Socket { path: socket.display().to_string(), source };
        let images = ImageService::new(&self.snapshotter.containerd, self.node.images.registry().keyring().clone());
        let images = images.map_err(|error| failed(io::Error::other(error)))?;
        let services = snapshotter::serve(snapshotter).add_service(images);
        let server = UnixServer::start(socket, services, inheritance).await;
        Ok(Some(server.map_err(failed)?))
    }

    /// Makes the image that `reference` names at present known to containerd, without its blobs.
    pub(crate) async fn pull(&self, reference: &Reference, namespace: &str) -> Result<Pulled, Failure> {
        let SnapshotterConfig { name, containerd, lazy_oci, .. } = &self.snapshotter;
        if self.snapshotter.socket().is_none() {
            return Err(
                "this daemon is no snapshotter of containerd: see snapshotter.socket in its configuration".into()
            );
        }
        let client = Client::connect(containerd, namespace, name).await?;
        Ok(containerd::pull(&client, &self.node.images, reference, *lazy_oci).await?)
    }
}
