//! Eight nodes start the same lazy image at once, a small one and a real one, or pull an ordinary one through their mirrors, each with a
//! containerd and a network namespace of its own. The registry sends what that needs about once.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Barrier,
    thread,
    time::Instant,
};

use shoal::processes::{ContainerdProcess, NodeProcess, RegistryProcess, containerd_socket};
use shoal_proto::control::StatusRequest;
use shoal_rafs::oci::Layout;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use toml::Value;

use crate::{
    application::{Application, PART, PROGRAM, RESULT},
    bed::{can_run_containers, in_container},
    hosts::Hosts,
    image::{self, DATA_BYTES, Layers},
    support::{self, drop_caches},
};

const NODES: u8 = 8;
/// The host of the seed peer; the registry is where the bridge is, and the nodes are behind.
const SEED: u8 = 1;
/// What the registry may send, by what one node needs for the start, if that is nearly all of the image: headers, tags that each
/// node resolves, and manifest and config, which each makes known to its containerd.
const EGRESS: f64 = 1.1;
/// The same where it is a tenth of the image, in many places: the seed peer reads on behind each, for the sake of others, and not all
/// of that is asked for. Nodes that get nothing from each other would have eight times as much sent.
const SCATTERED_EGRESS: f64 = 2.5;

/// Where each node's mirror listens: its loopback is its own.
const MIRROR: &str = "127.0.0.1:4804";

/// A node, and its containerd. The second goes first.
struct Node {
    host: u8,
    containerd: ContainerdProcess,
    daemon: NodeProcess,
    folder: PathBuf,
    /// Of its container: runc's state is everyone's, so it is another one on each.
    id: String,
}

fn shoal(hosts: &Hosts, host: u8) -> Command {
    hosts.command(host, env!("CARGO_BIN_EXE_shoal"))
}

/// A daemon in `folder`, with these settings and those that all have.
fn daemon(hosts: &Hosts, host: u8, folder: &Path, registry: &str, more: &[(&str, Value)]) -> NodeProcess {
    let address = hosts.address(host);
    let text = |text: String| Value::String(text);
    let mut settings = vec![
        ("control.listen", Value::Array(vec![text(format!("/ip4/{address}/tcp/4801"))])),
        ("data.listen", text(format!("{address}:4802"))),
        ("http.enabled", Value::Boolean(false)),
        ("cluster.insecure_open", Value::Boolean(true)),
        ("registry.plain_http", Value::Array(vec![text(registry.to_owned())])),
    ];
    settings.extend_from_slice(more);
    NodeProcess::start(&format!("host{host}"), folder, shoal(hosts, host), &settings).expect("a daemon starts")
}

fn node(hosts: &Hosts, host: u8, folder: &Path, registry: &str, join: &Value) -> Node {
    // Paths of sockets are short.
    let own = folder.join(format!("c{host}"));
    fs::create_dir(&own).expect("a folder");
    let snapshots = own.join("s");
    let path = |path: &Path| Value::String(path.display().to_string());
    let settings = [
        ("control.bootstrap_peers", join.clone()),
        ("snapshotter.socket", path(&snapshots)),
        ("snapshotter.containerd", path(&containerd_socket(&own))),
        ("mirror.listen", Value::String(MIRROR.into())),
    ];
    let daemon = daemon(hosts, host, folder, registry, &settings);
    let containerd = hosts.command(host, "containerd");
    let containerd = ContainerdProcess::start_by(containerd, &own, &snapshots).expect("containerd starts");
    Node {
        host,
        containerd,
        daemon,
        folder: folder.join(format!("host{host}")),
        id: format!("first-{}", hosts.namespace(host)),
    }
}

impl Node {
    /// Pulls lazily and runs a command; gives what it says, and the seconds that it took.
    fn start(&self, image: &str, command: &[&str]) -> (String, f64) {
        let begun = Instant::now();
        let mut pull = Command::new(env!("CARGO_BIN_EXE_shoal"));
        pull.arg("ctl").arg("--socket").arg(self.folder.join("shoal.sock")).args(["rpull", image]);
        let succeeded = |output: Output| {
            let said = String::from_utf8(output.stdout).expect("text");
            let error = String::from_utf8_lossy(&output.stderr);
            let log = || fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            assert!(output.status.success(), "{error}{said}\n{}", log());
            said
        };
        succeeded(pull.output().expect("it runs"));
        let arguments = [&["--rm", "--snapshotter", "shoal", image, &self.id], command].concat();
        let said = succeeded(in_container(&self.containerd.socket(), &["run"], &arguments));
        (said, begun.elapsed().as_secs_f64())
    }
}

/// Bytes of pieces and objects that a node was given.
async fn received(daemon: &NodeProcess) -> u64 {
    let mut client = daemon.client().await.expect("it answers");
    let status = client.status(StatusRequest {}).await.expect("it answers").into_inner();
    let total = status.total.expect("figures");
    let kinds = [total.bytes, total.objects].map(Option::unwrap_or_default);
    kinds.iter().map(|by| by.peer + by.seed + by.registry).sum()
}

/// A registry, a seed peer, and eight nodes that have nothing and know it. What is last goes first.
struct Swarm {
    nodes: Vec<Node>,
    seed: NodeProcess,
    served: RegistryProcess,
    runtime: Runtime,
    folder: TempDir,
}

impl Swarm {
    fn new(hosts: &Hosts, layout: &Path) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listen = (hosts.address(0), 5000).into();
        let served = RegistryProcess::start(shoal(hosts, 0), layout, listen, folder.path()).expect("a registry");
        let registry = served.address().to_string();
        let runtime = Runtime::new().expect("a runtime");
        let mut seed = daemon(hosts, SEED, folder.path(), &registry, &[("role", Value::String("seed".into()))]);
        let seed_status = runtime.block_on(seed.ready()).expect("the seed peer answers");
        let join = Value::try_from(&seed_status.control_addresses).expect("texts");
        let mut nodes: Vec<_> = (1..=NODES).map(|n| node(hosts, SEED + n, folder.path(), &registry, &join)).collect();
        runtime.block_on(async {
            for node in &mut nodes {
                node.daemon.ready().await.expect("the node answers");
                node.daemon.knows_seeds("default", 1).await.expect("it finds the seed peer");
            }
        });
        Self { nodes, seed, served, runtime, folder }
    }

    fn image(&self) -> String {
        format!("{}/app:1", self.served.address())
    }

    /// Has all nodes do something at the same time.
    fn at_once<T: Send>(&self, work: impl Fn(&Node) -> T + Sync) -> Vec<T> {
        drop_caches();
        let together = Barrier::new(self.nodes.len());
        thread::scope(|scope| {
            let one = |node| {
                let (together, work) = (&together, &work);
                move || {
                    together.wait();
                    work(node)
                }
            };
            let all: Vec<_> = self.nodes.iter().map(|node| scope.spawn(one(node))).collect();
            all.into_iter().map(|one| one.join().expect("it is done")).collect()
        })
    }
}

/// Eight nodes that have nothing start the image with the tag `1` of a layout by this command. Each must print what is
/// expected. Gives the bytes that one of them needs, and what the registry sent by that.
fn start_at_once(hosts: &Hosts, layout: &Path, command: &[&str], expected: &str) -> (u64, f64) {
    let swarm = Swarm::new(hosts, layout);
    let image = swarm.image();
    let started = swarm.at_once(|node| node.start(&image, command));
    let Swarm { nodes, seed, served, runtime, folder: _folder } = swarm;
    let received = nodes.iter().map(|node| runtime.block_on(received(&node.daemon)));
    // Nobody has asked for the same twice, or who has asked least has not.
    let needed = received.min().expect("nodes");
    drop(nodes);
    drop(seed);
    let sent = served.stop().expect("its figures").bytes_sent;
    let slowest = started.iter().map(|(_, seconds)| *seconds).fold(0.0, f64::max);
    let ratio = sent as f64 / needed as f64;
    println!(
        "{NODES} nodes: the registry sent {sent} bytes, {ratio:.3} x the {needed} that a node needs; the slowest took {slowest:.2} s"
    );
    assert!(started.iter().all(|(said, _)| said == expected), "{started:?}");
    (needed, ratio)
}

#[test]
fn eight_nodes_start_an_image_at_once_and_the_registry_sends_it_about_once() {
    const TEST: &str = "eight nodes with containerds of their own";
    if !can_run_containers(TEST) {
        return;
    }
    let Some(hosts) = Hosts::new(TEST, SEED + NODES) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let layout = folder.path().join("layout");
    shoal_rafs::oci::Layout::new(&layout).create().expect("a layout");
    Layers::new().push_lazy(&layout, "1");
    let (needed, ratio) = start_at_once(&hosts, &layout, &["/bin/sha256sum", "/data"], &Layers::data_digest());
    assert!(needed > DATA_BYTES as u64);
    assert!(ratio <= EGRESS, "{ratio:.3}");
}

#[test]
fn eight_nodes_pull_an_ordinary_image_at_once_and_the_registry_sends_it_about_once() {
    const TEST: &str = "eight nodes with mirrors and containerds of their own";
    if !can_run_containers(TEST) {
        return;
    }
    let Some(hosts) = Hosts::new(TEST, SEED + NODES) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let layout = Layout::new(folder.path().join("layout"));
    layout.create().expect("a layout");
    Layers::new().push_packed(layout.dir(), "1");
    let manifest = image::manifest(&layout, "1");
    let layers = manifest["layers"].as_array().expect("layers").iter().chain([&manifest["config"]]);
    let bytes: u64 = layers.map(|layer| layer["size"].as_u64().expect("a size")).sum();
    assert!(bytes > DATA_BYTES as u64);

    let swarm = Swarm::new(&hosts, layout.dir());
    let image = swarm.image();
    let host = image.split('/').next().expect("a host");
    let certs = swarm.folder.path().join("certs");
    let registry = format!("http://{host}");
    let configure = ["mirror", "configure", "--registry", &registry, "--mirror", MIRROR, "--certs-dir"];
    support::shoal(&configure, &[&certs]);
    let seconds = swarm.at_once(|node| {
        let begun = Instant::now();
        // It is the client that downloads.
        let mut pull = hosts.command(node.host, "ctr");
        pull.arg("-a").arg(node.containerd.socket()).args(["images", "pull", "--snapshotter", "native"]);
        let pulled = pull.arg("--hosts-dir").arg(&certs).arg(&image).output().expect("ctr runs");
        assert!(pulled.status.success(), "{}", String::from_utf8_lossy(&pulled.stderr));
        begun.elapsed().as_secs_f64()
    });
    // What the mirror gave: whoever had gone to the registry would have had it sent once more.
    let received = swarm.nodes.iter().map(|node| swarm.runtime.block_on(received(&node.daemon)));
    assert!(received.min() >= Some(bytes), "a node has pulled past its mirror");
    let Swarm { nodes, seed, served, .. } = swarm;
    drop(nodes);
    drop(seed);
    let sent = served.stop().expect("its figures").bytes_sent;
    let (ratio, slowest) = (sent as f64 / bytes as f64, seconds.into_iter().fold(0.0, f64::max));
    println!(
        "{NODES} nodes: the registry sent {sent} bytes, {ratio:.3} x the image's {bytes}; the slowest took {slowest:.2} s"
    );
    assert!(ratio <= EGRESS, "{ratio:.3}");
}

#[test]
fn eight_nodes_start_an_application_at_once() {
    const TEST: &str = "an application on eight nodes at once";
    let Some(application) = Application::new(TEST) else { return };
    let Some(hosts) = Hosts::new(TEST, SEED + NODES) else { return };
    let (needed, ratio) = start_at_once(&hosts, application.layout(), &["python3", "-c", PROGRAM], RESULT);
    assert!(needed < application.bytes() / PART, "{needed}");
    assert!(ratio <= SCATTERED_EGRESS, "{ratio:.3}");
}
