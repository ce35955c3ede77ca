//! The same start on eight nodes at once, none of which has anything: each in a network namespace of its own with a containerd,
//! beside a seed peer that has nothing either. Their links are as fast as the machine makes them, and so are eight nodes on it.

use std::{path::Path, sync::Arc, time::Instant};

use futures::future::try_join_all;
use shoal::{command::Failure, processes::RegistryProcess};
use shoal_sim::{Role, Scenario};
use tokio::{sync::Barrier, task::spawn_blocking};

use super::host::{DEFAULT, Host, Place};
use crate::{cluster::Network, machine::drop_caches};

/// The hosts. The rest is what a scenario has to have.
const SCENARIO: &str = r#"
name = "crowd"
registry = { egress_mbit = 1000 }
image = { encoded_mib = 1, piece_kib = 64 }
zones = [{ name = "default" }]
nodes = [
    { zone = "default", role = "seed", count = 1, up_mbit = 1000, down_mbit = 1000 },
    { zone = "default", role = "node", count = 8, up_mbit = 1000, down_mbit = 1000 },
]
workload = { kind = "flash-crowd", read = "all" }
"#;

const REGISTRY_PORT: u16 = 5000;

/// How eight nodes got through it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Crowd {
    /// Of the slowest node, in seconds.
    pub(super) slowest: f64,
    /// Bytes that the registry sent, headers and all, by those that one node needs for the start.
    pub(super) registry_ratio: f64,
}

impl Crowd {
    /// Has all start the image with this tag of an OCI layout.
    pub(super) async fn start(shoal: &Path, layout: &Path, folder: &Path, tag: &str) -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("crowd-").tempdir_in(folder)?;
        let folder = folder.path();
        let network = Network::create(&scenario()?)?;
        let registry = network.registry();
        let listen = (registry.address, REGISTRY_PORT).into();
        let served = RegistryProcess::start(registry.command(shoal), layout, listen, folder)?;
        let image = format!("{}/app:{tag}", served.address());
        let (seeds, nodes): (Vec<_>, Vec<_>) = network.hosts().iter().partition(|host| host.role == Role::Seed);
        let [seed] = seeds[..] else { return Err("one seed peer is to be among them".into()) };
        let role = [("role", "seed".into())];
        let mut seed = Place::On(seed).daemon(shoal, (folder, "seed"), served.address(), &[], &role)?;
        let join = seed.ready().await?.control_addresses;
        let mut hosts = Vec::new();
        for (n, place) in nodes.into_iter().enumerate() {
            let own = folder.join(format!("node{n}"));
            hosts.push(Arc::new(Host::start(shoal, &own, Place::On(place), served.address(), &join).await?));
        }
        for host in &hosts {
            host.knows_seed().await?;
        }

        drop_caches()?;
        let together = Arc::new(Barrier::new(hosts.len()));
        let starts = hosts.iter().map(|host| tokio::spawn(start(host.clone(), image.clone(), together.clone())));
        let seconds: Vec<_> = try_join_all(starts).await?.into_iter().collect::<Result<_, _>>()?;
        let received = try_join_all(hosts.iter().map(|host| host.received())).await?;
        drop(hosts);
        drop(seed);
        let sent = served.stop()?.bytes_sent;
        // Nobody has asked for the same twice, or who has asked least has not.
        let needed = received.into_iter().min().unwrap_or_default();
        let slowest = seconds.into_iter().fold(0.0, f64::max);
        Ok(Self { slowest, registry_ratio: sent as f64 / needed as f64 })
    }
}

/// Pulls lazily and runs, when all others do; in seconds.
async fn start(host: Arc<Host>, image: String, together: Arc<Barrier>) -> Result<f64, Failure> {
    together.wait().await;
    let started = Instant::now();
    host.pull(&image).await?;
    spawn_blocking(move || host.run(DEFAULT, "shoal", &image)).await??;
    Ok(started.elapsed().as_secs_f64())
}

/// With links that nothing holds back.
fn scenario() -> Result<Scenario, Failure> {
    let mut scenario = Scenario::parse(SCENARIO)?;
    scenario.registry.egress_mbit = f64::INFINITY;
    for group in &mut scenario.nodes {
        (group.up_mbit, group.down_mbit) = (f64::INFINITY, f64::INFINITY);
    }
    Ok(scenario)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_are_a_seed_peer_and_eight_nodes() {
        let scenario = scenario().expect("a scenario");
        let count = |role| scenario.nodes.iter().filter(|group| group.role == role).map(|group| group.count).sum();
        let counts: [usize; 2] = [count(Role::Seed), count(Role::Node)];
        assert_eq!(counts, [1, 8]);
    }
}
