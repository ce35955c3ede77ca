//! How long it takes from nothing to the first command of a container: the same image the ordinary way and lazily, behind a real
//! containerd, in one run.
//!
//! ```text
//! oci          containerd pulls, unpacks (overlayfs) and runs
//! lazy_cold    `rpull` and run on a node that has nothing, with nobody to ask but the registry
//! lazy_warm    the same beside a node that has the image
//! lazy_local   the same on the node that has the image
//! lazy_cold_4x as lazy_cold, of an image four times as large by files that the command does not touch
//! lazy_eight   as lazy_cold, on eight nodes at once: the slowest of them, and what the registry sends
//! lazy_cold_cri as lazy_cold, pulled through the CRI as a kubelet does it, and run
//! .._400mbit   as oci and lazy_cold, with the registry behind a link of 400 Mbit/s
//! ```
//!
//! Each round does them all, one after the other, each with page caches dropped; containerd and daemons have been started before
//! the clock. Registry, nodes and containers share this machine.

mod crowd;
mod host;
mod link;
mod report;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::Command,
    time::Instant,
};

use shoal::{command::Failure, processes::RegistryProcess};

pub use self::report::Report;
use self::{
    crowd::Crowd,
    host::{DEFAULT, Host, KUBERNETES, Place},
    link::Link,
};
use crate::{
    cluster::check_tools,
    machine::{drop_caches, finish},
};

/// What the container runs.
const COMMAND: [&str; 3] = ["python3", "-c", "import sys"];

/// The image as it is, and four times as large.
const TAGS: [&str; 2] = ["1", "4x"];

/// Rate of the link to a registry that is not on this host.
const LINK_MBIT: f64 = 400.0;

/// A start, and what it cost.
#[derive(Debug, Clone, Copy)]
struct Start {
    seconds: f64,
    /// Bytes that the node received.
    fetched: u64,
    /// Bytes of files that the kernel read from the mount.
    read: u64,
}

/// What a run works with.
#[derive(Clone, Copy)]
struct Bench<'a> {
    shoal: &'a Path,
    folder: &'a Path,
    registry: SocketAddr,
}

/// Measures `rounds` rounds with the `shoal` binary given. `images` is an OCI layout with the image under the tags `1` and `4x`.
///
/// # Errors
/// Needs root, FUSE, containerd and runc, `ip` and `tc`; or a command failed.
pub async fn run(shoal: &Path, images: &Path, rounds: usize) -> Result<Report, Failure> {
    check_tools()?;
    let folder = tempfile::Builder::new().prefix("shoal-cold-start-").tempdir()?;
    let layout = folder.path().join("layout");
    for tag in TAGS {
        eprintln!("cold start: converting {tag}");
        image_command(shoal, "convert", &oci(images, tag), &oci(&layout, &lazy(tag)))?;
    }
    image_command(shoal, "copy", &oci(images, TAGS[0]), &oci(&layout, TAGS[0]))?;
    let listen = (Ipv4Addr::LOCALHOST, 0).into();
    let registry = RegistryProcess::start(Command::new(shoal), &layout, listen, folder.path())?;
    let bench = Bench { shoal, folder: folder.path(), registry: registry.address() };
    let link = Link::new(LINK_MBIT)?;
    let behind_link = folder.path().join("link");
    std::fs::create_dir(&behind_link)?;
    let far_registry = RegistryProcess::start(link.command(shoal), &layout, link.address(), &behind_link)?;
    let far = Bench { registry: far_registry.address(), ..bench };

    let warm = bench.host("warm", None).await?;
    eprintln!("cold start: the neighbour gets the image");
    warm.prefetch(&bench.reference(&lazy(TAGS[0]))).await?;
    let mut report = Report::default();
    for round in 1..=rounds {
        bench.round(&warm, &mut report).await?;
        far.round_behind_link(&mut report).await?;
        let crowd = Crowd::start(shoal, &layout, folder.path(), &lazy(TAGS[0])).await?;
        report.lazy_eight_slowest.push(crowd.slowest);
        report.eight_registry_ratio.push(crowd.registry_ratio);
        eprintln!("cold start: round {round} of {rounds}: {}", report.last());
    }
    Ok(report)
}

impl Bench<'_> {
    async fn round(&self, warm: &Host, report: &mut Report) -> Result<(), Failure> {
        let [once, four_times] = TAGS.map(|tag| self.reference(&lazy(tag)));
        let ordinary = self.host("ordinary", None).await?;
        report.oci_total.push(self.ordinary(&ordinary)?);
        drop(ordinary);
        let cold = self.host("cold", None).await?;
        let start = self.lazy(&cold, &once).await?;
        report.lazy_cold.push(start.seconds);
        report.bytes_fetched.push(start.fetched);
        report.bytes_read.push(start.read);
        drop(cold);
        let beside = self.host("beside", Some(warm)).await?;
        report.lazy_warm_peer.push(self.lazy(&beside, &once).await?.seconds);
        drop(beside);
        report.lazy_local.push(self.lazy(warm, &once).await?.seconds);
        warm.remove(&once)?;
        let large = self.host("large", None).await?;
        report.lazy_cold_4x.push(self.lazy(&large, &four_times).await?.seconds);
        drop(large);
        let cri = self.host("cri", None).await?;
        report.lazy_cold_cri.push(self.lazy_by_cri(&cri, &once).await?);
        Ok(())
    }

    /// The same two that begin with nothing, from a registry that is further away.
    async fn round_behind_link(&self, report: &mut Report) -> Result<(), Failure> {
        let ordinary = self.host("ordinary", None).await?;
        report.oci_total_400mbit.push(self.ordinary(&ordinary)?);
        drop(ordinary);
        let cold = self.host("cold", None).await?;
        report.lazy_cold_400mbit.push(self.lazy(&cold, &self.reference(&lazy(TAGS[0]))).await?.seconds);
        Ok(())
    }

    async fn host(&self, name: &str, neighbour: Option<&Host>) -> Result<Host, Failure> {
        let join = neighbour.map(Host::control_addresses).unwrap_or_default();
        let host = Host::start(self.shoal, &self.folder.join(name), Place::Here, self.registry, join).await?;
        if neighbour.is_some() {
            host.knows_somebody().await?;
        }
        Ok(host)
    }

    /// Pull, unpack, run; in seconds.
    fn ordinary(&self, host: &Host) -> Result<f64, Failure> {
        let image = self.reference(TAGS[0]);
        drop_caches()?;
        let started = Instant::now();
        host.ctr(&["images", "pull", "--plain-http", &image])?;
        host.run(DEFAULT, "overlayfs", &image)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Pull what cannot be done without, run.
    async fn lazy(&self, host: &Host, image: &str) -> Result<Start, Failure> {
        let before = host.received().await?;
        drop_caches()?;
        let started = Instant::now();
        host.pull(image).await?;
        host.run(DEFAULT, "shoal", image)?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(Start { seconds, fetched: host.received().await? - before, read: host.read_bytes().await? })
    }

    /// The same as a kubelet pulls; in seconds.
    async fn lazy_by_cri(&self, host: &Host, image: &str) -> Result<f64, Failure> {
        drop_caches()?;
        let started = Instant::now();
        host.pull_by_cri(image).await?;
        host.run(KUBERNETES, "shoal", image)?;
        Ok(started.elapsed().as_secs_f64())
    }

    fn reference(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.registry)
    }
}

/// The tag of an image once it is lazy.
fn lazy(tag: &str) -> String {
    format!("{tag}-lazy")
}

fn oci(layout: &Path, tag: &str) -> String {
    format!("oci:{}:{tag}", layout.display())
}

fn image_command(shoal: &Path, verb: &str, from: &str, to: &str) -> Result<(), Failure> {
    finish(Command::new(shoal).args(["image", verb, from, to]))
}
