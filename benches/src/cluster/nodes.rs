//! The daemons: one per host, members of one cluster with a key.

use std::fs;

use shoal::{
    api,
    command::Failure,
    identity::Identity,
    membership::{ClusterKey, unix_now},
    processes::NodeProcess,
};
use shoal_proto::control::{BySource, StatusRequest, UnmountRequest};
use shoal_sim::Role;

use super::{
    Run,
    network::{Host, Network},
};

/// How long the certificates last: longer than any run.
const VALID_S: u64 = 24 * 3600;
/// Nodes through which the others join where there are no seed peers.
const INTRODUCERS: usize = 3;

/// All daemons of a run.
pub(super) struct Nodes {
    nodes: Vec<Node>,
}

/// A daemon and its host.
pub(super) struct Node {
    pub(super) host: Host,
    pub(super) process: NodeProcess,
    /// Until a fault kills it.
    pub(super) alive: bool,
}

/// Bytes that the living nodes received, by where they came from.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Traffic {
    pub(super) peer: u64,
    pub(super) seed: u64,
    pub(super) registry: u64,
}

impl Traffic {
    pub(super) fn since(self, before: &Self) -> Self {
        Self {
            peer: self.peer.saturating_sub(before.peer),
            seed: self.seed.saturating_sub(before.seed),
            registry: self.registry.saturating_sub(before.registry),
        }
    }

    fn add(&mut self, by: &BySource) {
        self.peer += by.peer;
        self.seed += by.seed;
        self.registry += by.registry;
    }
}

impl Nodes {
    /// Starts seed peers first, through which the others join, and waits until every node knows those of its zone.
    pub(super) async fn start(run: &Run<'_>, network: &Network) -> Result<Self, Failure> {
        let key = ClusterKey::create(&run.folder.join("key"))?;
        let seeds = |host: &&Host| host.role == Role::Seed;
        let mut introducers: Vec<_> = network.hosts().iter().filter(seeds).collect();
        if introducers.is_empty() {
            introducers.extend(network.hosts().iter().take(INTRODUCERS));
        }
        let join: Vec<_> = introducers.iter().map(|host| format!("/ip4/{}/tcp/4801", host.address)).collect();
        let mut nodes = Vec::new();
        let (first, rest): (Vec<_>, Vec<_>) = network.hosts().iter().cloned().partition(|host| seeds(&host));
        for (n, host) in first.into_iter().chain(rest).enumerate() {
            let name = format!("{}{n}", if host.role == Role::Seed { "seed" } else { "node" });
            let process = start(run, network, &key, &name, &host, &join)?;
            nodes.push(Node { host, process, alive: true });
        }
        for node in &mut nodes {
            node.process.ready().await?;
        }
        for node in nodes.iter().filter(|node| node.host.role == Role::Node) {
            let own = |other: &&Node| other.host.role == Role::Seed && other.host.zone == node.host.zone;
            node.process.knows_seeds(&node.host.zone, nodes.iter().filter(own).count()).await?;
        }
        Ok(Self { nodes })
    }

    pub(super) fn processes(&self) -> impl Iterator<Item = u32> {
        self.nodes.iter().map(|node| node.process.id())
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Node> {
        self.nodes.iter_mut()
    }

    /// Those that read, which are no seed peers.
    pub(super) fn readers(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.host.role == Role::Node)
    }

    /// The seed peers.
    pub(super) fn seeds(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.host.role == Role::Seed)
    }

    /// Whether each of those that read is alive, in their order.
    pub(super) fn alive(&self) -> Vec<bool> {
        self.readers().map(|node| node.alive).collect()
    }

    /// What those that read and are alive have received so far.
    pub(super) async fn traffic(&self) -> Result<Traffic, Failure> {
        let mut sum = Traffic::default();
        for node in self.readers().filter(|node| node.alive) {
            let status = node.process.client().await?.status(StatusRequest {}).await;
            let total = status.map_err(|s| api::said(&s))?.into_inner().total.unwrap_or_default();
            sum.add(&total.bytes.unwrap_or_default());
            sum.add(&total.objects.unwrap_or_default());
        }
        Ok(sum)
    }

    /// Unmounts what the readers have mounted.
    pub(super) async fn unmount(&self) -> Result<(), Failure> {
        for node in self.readers() {
            let mountpoint = node.process.mountpoint().display().to_string();
            let request = UnmountRequest { mountpoint };
            node.process.client().await?.unmount(request).await.map_err(|s| api::said(&s))?;
        }
        Ok(())
    }

    /// Asks all to stop, so that waiting for the first is waiting for all.
    pub(super) fn stop(mut self) {
        self.nodes.iter_mut().for_each(|node| node.process.terminate());
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.nodes.iter_mut().for_each(|node| node.process.terminate());
    }
}

fn start(
    run: &Run<'_>,
    network: &Network,
    key: &ClusterKey,
    name: &str,
    host: &Host,
    join: &[String],
) -> Result<NodeProcess, Failure> {
    let data = run.folder.join(name).join("data");
    fs::create_dir_all(&data)?;
    let peer = Identity::load_or_create(&data)?.peer();
    let role = match host.role {
        Role::Node => shoal_proto::Role::Node,
        Role::Seed => shoal_proto::Role::Seed,
    };
    let (_, shown) = key.issue(peer, role, &host.zone, unix_now(), VALID_S)?;
    fs::write(data.join("membership"), shown)?;
    let own = format!("/ip4/{}/tcp/4801", host.address);
    let others: Vec<_> = join.iter().filter(|address| **address != own).cloned().collect();
    let registry = format!("{}:{}", network.registry().address, super::REGISTRY_PORT);
    let mut settings = vec![
        ("role", role.to_string().into()),
        ("zone", host.zone.clone().into()),
        ("cluster.public_key", key.public_key().into()),
        ("control.listen", vec![own].into()),
        ("control.bootstrap_peers", others.into()),
        ("data.listen", format!("{}:4802", host.address).into()),
        ("http.enabled", false.into()),
        ("registry.plain_http", vec![registry].into()),
    ];
    settings.extend(run.also.iter().cloned());
    NodeProcess::start(name, &run.folder, host.command(run.shoal), &settings)
}
