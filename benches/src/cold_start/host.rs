//! One host: a containerd, and a daemon that is its snapshotter.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
};

use futures::StreamExt;
use shoal::{
    api,
    command::Failure,
    processes::{ContainerdProcess, NodeProcess, containerd_socket},
};
use shoal_proto::control::{PeersRequest, PrefetchRequest, PullRequest, StatusReply, StatusRequest};
use tonic::{codegen::http, transport::Endpoint};
use tonic_prost::ProstCodec;

use super::COMMAND;

/// `runtime.v1.PullImageRequest`, as far as it is used.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {}

/// containerd's namespace of what kubelets pull and run.
pub(super) const KUBERNETES: &str = "k8s.io";
/// Its namespace of everything else.
pub(super) const DEFAULT: &str = "default";

/// The containerd goes first: its containers use what the daemon has mounted.
#[derive(Debug)]
pub(super) struct Host {
    containerd: ContainerdProcess,
    node: NodeProcess,
    control_addresses: Vec<String>,
}

impl Host {
    /// Starts both in `folder`, from nothing, and waits until the node is connected to its neighbour.
    pub(super) async fn start(
        shoal: &Path,
        folder: &Path,
        registry: SocketAddr,
        neighbour: Option<&Self>,
    ) -> Result<Self, Failure> {
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
        std::fs::create_dir_all(folder)?;
        let snapshots = folder.join("snapshots.sock");
        let join = neighbour.map(|host| host.control_addresses.clone()).unwrap_or_default();
        let path = |path: &Path| path.display().to_string().into();
        let settings = [
            ("control.listen", vec!["/ip4/127.0.0.1/tcp/0".to_owned()].into()),
            ("control.bootstrap_peers", join.into()),
            ("data.listen", "127.0.0.1:0".into()),
            ("http.enabled", false.into()),
            ("registry.plain_http", vec![registry.to_string()].into()),
            ("snapshotter.socket", path(&snapshots)),
            ("snapshotter.containerd", path(&containerd_socket(folder))),
        ];
        let mut node = NodeProcess::start("node", folder, Command::new(shoal), &settings)?;
        let status = node.ready().await?;
        let containerd = ContainerdProcess::start(folder, &snapshots)?;
        let host = Self { containerd, node, control_addresses: status.control_addresses };
        if neighbour.is_some() {
            host.knows_somebody().await?;
        }
        Ok(host)
    }

    async fn knows_somebody(&self) -> Result<(), Failure> {
        let mut client = self.node.client().await?;
        for _ in 0..600 {
            let peers = client.peers(PeersRequest {}).await.map_err(|s| api::said(&s))?.into_inner().peers;
            if peers.iter().any(|peer| peer.connected) {
                return Ok(());
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        Err("the node does not find its neighbour".into())
    }

    /// Has the whole image fetched.
    pub(super) async fn prefetch(&self, image: &str) -> Result<(), Failure> {
        let request = PrefetchRequest { reference: image.to_owned() };
        let mut progress = self.node.client().await?.prefetch(request).await.map_err(|s| api::said(&s))?.into_inner();
        while let Some(step) = progress.next().await {
            step.map_err(|s| api::said(&s))?;
        }
        Ok(())
    }

    /// Pulls lazily into containerd.
    pub(super) async fn pull(&self, image: &str) -> Result<(), Failure> {
        let request = PullRequest { reference: image.to_owned(), namespace: DEFAULT.to_owned() };
        self.node.client().await?.pull(request).await.map_err(|s| api::said(&s))?;
        Ok(())
    }

    /// Has containerd pull as a kubelet does: it knows by itself what is lazy.
    pub(super) async fn pull_by_cri(&self, image: &str) -> Result<(), Failure> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.containerd.socket().display()))?;
        let mut client = tonic::client::Grpc::new(endpoint.connect().await?);
        client.ready().await?;
        let request = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }) };
        let method = http::uri::PathAndQuery::from_static("/runtime.v1.ImageService/PullImage");
        let codec = ProstCodec::<PullImageRequest, PullImageResponse>::default();
        client.unary(tonic::Request::new(request), method, codec).await.map_err(|s| api::said(&s))?;
        Ok(())
    }

    /// Runs the command in a new container of a namespace of containerd.
    pub(super) fn run(&self, namespace: &str, snapshotter: &str, image: &str) -> Result<(), Failure> {
        let run = ["-n", namespace, "run", "--rm", "--snapshotter", snapshotter, image, "start"];
        self.ctr(&[&run, &COMMAND[..]].concat())
    }

    /// Takes an image out of containerd; its pieces stay.
    pub(super) fn remove(&self, image: &str) -> Result<(), Failure> {
        self.ctr(&["images", "rm", "--sync", image])
    }

    pub(super) fn ctr(&self, arguments: &[&str]) -> Result<(), Failure> {
        let Output { status, stderr, .. } = self.containerd.ctr().args(arguments).output()?;
        if status.success() {
            return Ok(());
        }
        Err(format!("ctr {}: {}", arguments.join(" "), String::from_utf8_lossy(&stderr).trim()).into())
    }

    /// Bytes that the node received so far: pieces and objects.
    pub(super) async fn received(&self) -> Result<u64, Failure> {
        let total = self.status().await?.total.unwrap_or_default();
        let parts = [total.bytes.unwrap_or_default(), total.objects.unwrap_or_default()];
        Ok(parts.iter().map(|by| by.peer + by.seed + by.registry).sum())
    }

    /// Bytes of files that were read from the node's mounts.
    pub(super) async fn read_bytes(&self) -> Result<u64, Failure> {
        Ok(self.status().await?.mounts.iter().map(|mount| mount.read_bytes).sum())
    }

    async fn status(&self) -> Result<StatusReply, Failure> {
        let status = self.node.client().await?.status(StatusRequest {}).await;
        Ok(status.map_err(|s| api::said(&s))?.into_inner())
    }
}
