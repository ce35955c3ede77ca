//! `shoal demo`: a registry, a seed peer and nodes as separate processes on loopback, one real image, every byte
//! compared. What a user sees first, and what the end-to-end tests run.

mod compare;
mod report;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use shoal_proto::control::{MountMode, MountRequest, StatusRequest};
use shoal_rafs::{
    BuildOptions, Builder,
    oci::{PushOptions, Reference, Registry, RegistryOptions, push},
};

use self::{
    compare::{Comparison, Difference, Seen},
    report::{ImageFigures, NodeFigures, Report},
};
use super::{Failure, human_bytes, print_json, runtime, stop_signal};
use crate::{
    api,
    processes::{NodeProcess, RegistryProcess, this_program},
};

/// Exits 1 when a byte differs or a process fails. Progress goes to standard error.
#[derive(Debug, clap::Args)]
pub(super) struct Demo {
    /// Nodes beside the seed peer.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Directory to make the image of. Default: this machine's Python library, or its documentation.
    #[arg(long)]
    source: Option<PathBuf>,
    /// Print one JSON object instead of the table.
    #[arg(long)]
    json: bool,
}

impl Demo {
    pub(super) fn run(self) -> Result<ExitCode, Failure> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
            return Err("the demo mounts file systems: it needs root and /dev/fuse".into());
        }
        let source = self.source.clone().map_or_else(default_source, Ok)?;
        let interrupted = Arc::new(AtomicBool::new(false));
        let report = runtime()?.block_on(async {
            // Dropping the run ends its processes and mounts, however it ends.
            tokio::select! {
                report = run(self.nodes, &source, interrupted.clone()) => report,
                stop = stop_signal() => {
                    interrupted.store(true, Relaxed);
                    stop?;
                    Err("interrupted".into())
                }
            }
        })?;
        if self.json {
            print_json(&report)?
        } else {
            report.print()
        }
        let identical = report.nodes.iter().all(|node| node.identical);
        Ok(if identical { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// A real tree that most machines have: Python's library, else the documentation, else all shared files.
fn default_source() -> Result<PathBuf, Failure> {
    let python = Command::new("python3")
        .args(["-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    [python, Some("/usr/share/doc".into()), Some("/usr/share".into())]
        .into_iter()
        .flatten()
        .find(|path| path.is_dir())
        .ok_or_else(|| "no tree to make an image of: give one with --source DIR".into())
}

async fn run(nodes: u16, source: &Path, interrupted: Arc<AtomicBool>) -> Result<Report, Failure> {
    let folder = tempfile::Builder::new().prefix("shoal-demo-").tempdir()?;
    let (image, layout) = prepare(source, folder.path()).await?;

    eprintln!("demo: starting a registry, a seed peer and {nodes} nodes");
    let registry = RegistryProcess::start(this_program()?, &layout, loopback(0), folder.path())?;
    let mut seed = start("seed", "seed", folder.path(), &[])?;
    let join = seed.ready().await?.control_addresses;
    let mut daemons = vec![seed];
    for n in 1..=nodes {
        daemons.push(start(&format!("node{n}"), "node", folder.path(), &join)?);
    }
    for daemon in &mut daemons[1..] {
        daemon.ready().await?;
        daemon.knows_seeds("default", 1).await?;
    }

    eprintln!("demo: mounting on every node and reading everything at once");
    let reference = format!("{}/demo:1", registry.address());
    let readers = daemons.iter().map(|daemon| read_all(daemon, &reference, source, &interrupted));
    let outcomes = futures::future::join_all(readers).await;

    let mut figures = Vec::new();
    for (daemon, outcome) in daemons.iter().zip(outcomes) {
        let (seen, identical) = match outcome? {
            Ok(seen) => (seen, true),
            Err(difference) => {
                eprintln!("demo: {}: {difference}", daemon.name());
                (Seen::default(), false)
            }
        };
        let status = daemon.client().await?.status(StatusRequest {}).await.map_err(|s| api::said(&s))?.into_inner();
        let seconds = (seen.first_byte.unwrap_or_default().as_secs_f64(), seen.all.as_secs_f64());
        let peak = daemon.peak_rss_bytes()?;
        figures.push(NodeFigures::new(daemon.name().to_owned(), &status, seconds, peak, identical));
    }
    daemons.iter_mut().for_each(NodeProcess::terminate);
    drop(daemons);
    let mut registry = registry.stop()?;
    registry.clients.clear();
    Ok(Report { image, registry, nodes: figures })
}

/// Builds the image and pushes it into an OCI layout.
async fn prepare(source: &Path, folder: &Path) -> Result<(ImageFigures, PathBuf), Failure> {
    let (bootstrap, blobs, layout) = (folder.join("bootstrap"), folder.join("blobs"), folder.join("layout"));
    eprintln!("demo: building an image of {}", source.display());
    let started = Instant::now();
    let built = tokio::task::spawn_blocking({
        let (source, bootstrap, blobs) = (source.to_owned(), bootstrap.clone(), blobs.clone());
        move || Builder::new(BuildOptions::default()).build(&source, &bootstrap, &blobs)
    })
    .await??;
    eprintln!(
        "demo: {} files, {} in {:.1} s",
        built.files,
        human_bytes(built.decoded_bytes),
        started.elapsed().as_secs_f64()
    );
    let reference: Reference = format!("oci:{}:1", layout.display()).parse()?;
    let registry = Registry::new(RegistryOptions::default())?;
    let pushed = push(&registry, &bootstrap, &blobs, &reference, PushOptions::default(), |_| {}).await?;
    std::fs::remove_dir_all(&blobs)?;
    let image =
        ImageFigures { files: built.files, decoded_bytes: built.decoded_bytes, encoded_bytes: pushed.encoded_bytes };
    Ok((image, layout))
}

/// Starts a daemon on free loopback ports; `bootstrap_peers` are the others to join through.
fn start(name: &str, role: &str, folder: &Path, bootstrap_peers: &[String]) -> Result<NodeProcess, Failure> {
    let settings = [
        ("role", role.into()),
        ("control.listen", vec!["/ip4/127.0.0.1/tcp/0"].into()),
        ("control.bootstrap_peers", bootstrap_peers.to_vec().into()),
        ("data.listen", loopback(0).to_string().into()),
        ("http.listen", loopback(0).to_string().into()),
    ];
    NodeProcess::start(name, folder, this_program()?, &settings)
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

async fn read_all(
    daemon: &NodeProcess,
    reference: &str,
    source: &Path,
    interrupted: &Arc<AtomicBool>,
) -> Result<Result<Seen, Difference>, Failure> {
    let started = Instant::now();
    let mountpoint = daemon.mountpoint();
    let (reference, path) = (reference.to_owned(), mountpoint.display().to_string());
    let request = MountRequest { reference, mountpoint: path, mode: MountMode::Fuse.into(), decode: false };
    daemon.client().await?.mount(request).await.map_err(|s| api::said(&s))?;
    let (source, interrupted) = (source.to_owned(), interrupted.clone());
    let compared =
        tokio::task::spawn_blocking(move || Comparison::new(started, &interrupted).run(&source, &mountpoint));
    Ok(compared.await?)
}
