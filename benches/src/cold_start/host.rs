//! One host: a containerd, and a daemon that is its snapshotter.

use std::{
    net::{Ipv4Addr, SocketAddr},
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
use crate::cluster;

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

/// The zone of nodes that are told none.
const ZONE: &str = "default";

/// containerd's namespace of what kubelets pull and run.
pub(super) const KUBERNETES: &str = "k8s.io";
/// Its namespace of everything else.
pub(super) const DEFAULT: &str = "default";

/// Where the programs of a host run.
#[derive(Debug, Clone, Copy)]
pub(super) enum Place<'a> {
    /// In this process's own network.
    Here,
    /// In a network namespace.
    On(&'a cluster::Host),
}

impl Place<'_> {
    fn address(self) -> Ipv4Addr {
        match self {
            Self::Here => Ipv4Addr::LOCALHOST,
            Self::On(host) => host.address,
        }
    }

    fn command(self, program: &Path) -> Command {
        match self {
            Self::Here => Command::new(program),
            Self::On(host) => host.command(program),
        }
    }

    /// Starts a daemon in `folder/name` that joins by the addresses in `join`, with more settings.
    pub(super) fn daemon(
        self,
        shoal: &Path,
        (folder, name): (&Path, &str),
        registry: SocketAddr,
        join: &[String],
        more: &[(&str, toml::Value)],
    ) -> Result<NodeProcess, Failure> {
        let address = self.address();
        let mut settings = vec![
            ("control.listen", vec![format!("/ip4/{address}/tcp/0")].into()),
            ("control.bootstrap_peers", join.to_vec().into()),
            ("data.listen", format!("{address}:0").into()),
            ("http.enabled", false.into()),
            // Whoever reaches these networks belongs to this run.
            ("cluster.insecure_open", true.into()),
            ("registry.plain_http", vec![registry.to_string()].into()),
        ];
        settings.extend_from_slice(more);
        NodeProcess::start(name, folder, self.command(shoal), &settings)
    }
}

/// The containerd goes first: its containers use what the daemon has mounted.
#[derive(Debug)]
pub(super) struct Host {
    containerd: ContainerdProcess,
    node: NodeProcess,
    control_addresses: Vec<String>,
    /// What its containers are called: runc's state is everyone's, so no other host that runs has the same.
    container: String,
}

impl Host {
    /// Starts both in `folder`, from nothing. The daemon joins by the addresses in `join`.
    pub(super) async fn start(
        shoal: &Path,
        folder: &Path,
        place: Place<'_>,
        registry: SocketAddr,
        join: &[String],
    ) -> Result<Self, Failure> {
        if folder.exists() {
            std::fs::remove_dir_all(folder)?;
        }
        std::fs::create_dir_all(folder)?;
        let snapshots = folder.join("snapshots.sock");
        let path = |path: &Path| path.display().to_string().into();
        let settings =
            [("snapshotter.socket", path(&snapshots)), ("snapshotter.containerd", path(&containerd_socket(folder)))];
        let mut node = place.daemon(shoal, (folder, "node"), registry, join, &settings)?;
        let status = node.ready().await?;
        let containerd = ContainerdProcess::start_by(place.command("containerd".as_ref()), folder, &snapshots)?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let container = format!("start-{name}-{}", std::process::id());
        Ok(Self { containerd, node, control_addresses: status.control_addresses, container })
    }

    /// How others join it.
    pub(super) fn control_addresses(&self) -> &[String] {
        &self.control_addresses
    }

    /// Waits until the node is connected to a seed peer, and has heard that it reads the registry for others.
    pub(super) async fn knows_seed(&self) -> Result<(), Failure> {
        self.node.knows_seeds(ZONE, 1).await
    }

    /// Waits until the node is connected to its neighbour.
    pub(super) async fn knows_somebody(&self) -> Result<(), Failure> {
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
        let run = ["-n", namespace, "run", "--rm", "--snapshotter", snapshotter, image, &self.container];
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
