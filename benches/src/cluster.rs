//! Real daemons on one machine, each in a network namespace of its own behind a shaped link: the cluster that a scenario
//! of the simulator describes, for measuring what the simulator predicts.
//!
//! ```text
//!   [host] eth0 --tbf up--> <--tbf down-- [zone router] ------- [backbone router] <--tbf egress-- eth0 [registry]
//!   shoal daemon                                                                               shoal serve-layout
//! ```
//!
//! Nothing is made outside these namespaces and one folder; both go away at the end, on Ctrl-C, and at the next start if
//! the harness was killed. Everyone is a member of a cluster with a key. Every byte that is read is compared.
//!
//! Not here: latency (there is no netem on the machines that this was made for), faults of the kinds slow and poison.

mod faults;
mod image;
mod meter;
mod network;
mod nodes;
mod readers;
mod report;
mod waiting;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Instant,
};

use shoal::{command::Failure, processes::RegistryProcess};
use shoal_sim::Scenario;
use tokio::signal::unix::{SignalKind, signal};

pub(crate) use self::network::{Host, NAMESPACES, Network, check_tools, remove, shape};
use self::{
    image::{Image, Workshop},
    meter::Meter,
    nodes::Nodes,
    readers::Readers,
    report::Figures,
};
pub use self::{
    report::Report,
    waiting::{Waiting, waiting},
};

/// Port of the registry.
const REGISTRY_PORT: u16 = 5000;

/// What all parts of a run share.
struct Run<'a> {
    scenario: &'a Scenario,
    /// The `shoal` binary.
    shoal: &'a Path,
    folder: PathBuf,
    interrupted: Arc<AtomicBool>,
    /// Options of all daemons beside those that every run has.
    also: Vec<(&'static str, toml::Value)>,
}

/// Runs a scenario with the `shoal` binary given. When `interrupted` is set, whatever waits for bytes gives up; dropping
/// the future takes everything down.
///
/// # Errors
/// The machine cannot do it, or a process fails; wrong bytes and failed reads stand in the report instead.
pub async fn run(scenario: &Scenario, shoal: &Path, interrupted: Arc<AtomicBool>) -> Result<Report, Failure> {
    if let Some(what) = scenario.only_simulated() {
        return Err(format!("{what}: only the simulator can do that").into());
    }
    network::check_tools()?;
    raise_descriptors();
    let folder = work_folder()?;
    let run = Run { scenario, shoal, folder: folder.path().to_owned(), interrupted, also: Vec::new() };
    eprintln!("cluster: building the image");
    let mut workshop = Workshop::new(scenario, folder.path())?;
    let earlier = match &scenario.image.shares {
        Some(shares) => Some(workshop.earlier(&shares.with).await?),
        None => None,
    };
    let image = workshop.image().await?;

    eprintln!("cluster: {} hosts", scenario.nodes.iter().map(|group| group.count).sum::<usize>());
    let network = Network::create(scenario)?;
    let mut registry = run.registry(&network, &workshop)?;
    let mut nodes = Nodes::start(&run, &network).await?;
    if let Some(earlier) = earlier {
        eprintln!("cluster: everyone reads {} first", earlier.tag);
        let outcomes = Readers::start(&run, &nodes, &earlier, registry.address()).await?.finish().await;
        if outcomes.iter().any(|outcome| outcome.failed()) {
            return Err(format!("{} could not be read", earlier.tag).into());
        }
        nodes.unmount().await?;
        registry.stop()?;
        registry = run.registry(&network, &workshop)?;
    }
    let measured = run.measure(&network, &mut nodes, &image, &registry).await?;
    nodes.stop();
    Ok(Report::new(scenario, &image, &network, &measured, &registry.stop()?))
}

/// [`run`] to its end, or until somebody interrupts this process.
///
/// # Errors
/// As [`run`], and when it was interrupted.
pub fn run_interruptibly(scenario: &Scenario, shoal: &Path) -> Result<Report, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    crate::run::block_on(async {
        // Dropping the run ends its processes, mounts and namespaces, however it ends.
        tokio::select! {
            report = run(scenario, shoal, interrupted.clone()) => report,
            stop = stop_signal() => {
                interrupted.store(true, Relaxed);
                stop?;
                Err("interrupted".into())
            }
        }
    })
}

async fn stop_signal() -> std::io::Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

impl Run<'_> {
    fn registry(&self, network: &Network, workshop: &Workshop) -> Result<RegistryProcess, Failure> {
        let listen = (network.registry().address, REGISTRY_PORT).into();
        RegistryProcess::start(network.registry().command(self.shoal), workshop.layout(), listen, &self.folder)
    }

    /// What the scenario is about: everyone mounts and reads everything while faults happen.
    async fn measure(
        &self,
        network: &Network,
        nodes: &mut Nodes,
        image: &Image,
        registry: &RegistryProcess,
    ) -> Result<Figures, Failure> {
        let before = nodes.traffic().await?;
        let links = network.counters()?;
        let mut meter = Meter::start(nodes.processes().chain([registry.id()]));
        eprintln!("cluster: everyone mounts and reads everything");
        let readers = Readers::start(self, nodes, image, registry.address()).await?;
        let started = readers.started();
        let outcomes = {
            let faults = faults::run(self.scenario, network, nodes, &mut meter, started);
            let reading = readers.finish();
            tokio::pin!(faults, reading);
            tokio::select! {
                outcomes = &mut reading => outcomes,
                result = &mut faults => {
                    result?;
                    reading.await
                }
            }
        };
        let elapsed = started.elapsed();
        let usage = meter.stop();
        let after = nodes.traffic().await?;
        let links = network.counters()?.since(&links);
        Ok(Figures { outcomes, elapsed, usage, links, traffic: after.since(&before), alive: nodes.alive() })
    }
}

/// The folder for everything: in memory if there is such a place, since what is measured is the network. What an
/// earlier run left that was killed is removed.
fn work_folder() -> Result<tempfile::TempDir, Failure> {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    for entry in std::fs::read_dir(&place)?.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix("shoal-cluster-")?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    let prefix = format!("shoal-cluster-{}-", std::process::id());
    Ok(tempfile::Builder::new().prefix(&prefix).tempdir_in(place)?)
}

/// Children inherit the limit, and a daemon may need a thousand descriptors.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // A lower limit may do for a small scenario.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Where the `shoal` binary is that was built together with this program.
///
/// # Errors
/// There is none.
pub fn built_shoal() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe()?;
    let folders = program.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join("shoal")).find(|path| path.is_file());
    found.ok_or_else(|| "there is no shoal beside this program: build the workspace first".into())
}

fn is_interrupted(interrupted: &AtomicBool) -> bool {
    interrupted.load(Relaxed)
}

/// Runs a tool and expects success; `input` goes to its standard input.
pub(crate) fn tool(program: &str, arguments: &[&str], input: &str) -> Result<Vec<u8>, Failure> {
    use std::{io::Write, process::Stdio};
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(format!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim()).into())
}

/// Seconds from `start`.
fn seconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64()
}
