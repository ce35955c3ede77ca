//! A cluster with a key, of real daemons: members mount and read; who has no certificate, or one that is void, gets
//! nothing on either plane; certificates are renewed and revoked while everything runs.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use crate::support::{Daemon, Registry, assert_same, can_mount, shoal, total_bytes, tree, wait};
use bytes::Bytes;
use serde_json::Value;
use shoal::{
    admission::Admission,
    control::{Control, ControlEvent, ControlOptions},
    data::{AnswerSender, DataOptions, DataPlane, Limits, PeerContext, PeerEvent, Service, Transport},
    identity::{Identity, from_text},
    membership::{self, Membership, Policy},
};
use shoal_proto::{Hello, MIN_VERSION, PeerId, Request, Role, VERSION};
use tempfile::TempDir;

/// How long a stranger tries; a member is let in within a tenth of that.
const TRY: Duration = Duration::from_secs(3);

/// A cluster's key, and the folder of its nodes.
struct Cluster {
    folder: TempDir,
    public_key: String,
}

impl Cluster {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let made = shoal(&["cluster", "init"], &[&folder.path().join("key")]);
        let text = String::from_utf8(made.stdout).expect("UTF-8");
        let public_key = text.trim().replace("public_key = ", "cluster.public_key=");
        Self { folder, public_key }
    }

    fn key(&self) -> PathBuf {
        self.folder.path().join("key")
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.arg("cluster").args(arguments).arg("--cluster").arg(self.key());
        let output = command.output().expect("shoal runs");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }

    /// Puts a certificate where the daemon `name` looks for it.
    fn issue(&self, name: &str, role: &str, valid: &str) {
        let data = self.folder.path().join(name).join("data");
        self.run(&["issue", "--data-dir", data.to_str().expect("UTF-8"), "--role", role, "--valid", valid]);
    }

    fn start(&self, name: &str, role: &str, more: &[String]) -> Daemon {
        let settings = [self.public_key.clone(), format!("role={role}"), "control.lease=\"3s\"".into()];
        Daemon::start(name, self.folder.path(), &[&settings[..], more].concat())
    }

    fn member(&self, name: &str, role: &str, more: &[String]) -> Daemon {
        self.issue(name, role, "1h");
        self.start(name, role, more)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// Whom a stranger tries to reach.
struct Target {
    peer: PeerId,
    control: Vec<String>,
    data: String,
}

impl Target {
    fn of(daemon: &Daemon) -> Self {
        let status = daemon.status();
        let addresses = status["control_addresses"].as_array().expect("a list");
        Self {
            peer: from_text(status["peer"].as_str().expect("a text")).expect("a peer id"),
            control: addresses.iter().map(|address| address.as_str().expect("a text").to_owned()).collect(),
            data: status["data_address"].as_str().expect("a text").to_owned(),
        }
    }
}

struct Silent;

impl Service for Silent {
    fn handle(&self, _: PeerContext, _: Request, _: AnswerSender) {}
}

/// Tries to be let in by `target` on both planes with what `own` shows, or on the data plane with `shown`, believing anybody; true if
/// either does.
async fn gets_in(identity: &Identity, own: Membership, shown: Bytes, target: &Target) -> bool {
    let listen = ([127, 0, 0, 1], 0).into();
    let hello = Hello {
        version: VERSION,
        min_version: MIN_VERSION,
        features: 0,
        membership: shown,
        role: own.role(),
        zone: own.zone().to_owned(),
        labels: Default::default(),
        data_addresses: vec![listen],
        name: "stranger".into(),
    };
    let admit: shoal::data::Admit = Arc::new(|peer, shown| {
        membership::Certificate::read(shown).map_err(|refusal| refusal.to_string()).map(|mut certificate| {
            certificate.peer = *peer;
            certificate
        })
    });
    let options = DataOptions {
        keypair: identity.keypair().clone(),
        listen,
        transport: Transport::Auto,
        hello,
        admit,
        limits: Limits::default(),
    };
    let (data, mut peers) = DataPlane::start(options, Arc::new(Silent)).expect("a data plane");
    let options = ControlOptions {
        identity: identity.clone(),
        admission: Admission::new(Policy::Open, own),
        insecure_open: false,
        listen: vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")],
        bootstrap_peers: target.control.iter().map(|text| text.parse().expect("an address")).collect(),
        mdns: false,
        capacity: 1,
        lease: Duration::from_secs(3),
        data_address: data.local_address(),
    };
    let (control, mut events) = Control::start(options).await.expect("a control plane");
    data.connect(target.peer, &[target.data.parse().expect("an address")]);
    let let_in = async {
        loop {
            tokio::select! {
                event = peers.recv() => match event {
                    // The target may hang up after it has heard our hello and before it has said its own.
                    Some(PeerEvent::Up { .. }) => return true,
                    Some(_) => {}
                    None => return false,
                },
                event = events.recv() => match event {
                    Some(ControlEvent::PeerSeen { .. } | ControlEvent::Lease { .. }) => return true,
                    Some(_) => {}
                    None => return false,
                },
            }
        }
    };
    let entered = tokio::time::timeout(TRY, let_in).await.unwrap_or(false);
    control.stop().await;
    data.stop().await;
    entered
}

/// What the certificate in `file` shows, whether or not anybody believes it.
fn shown_in(file: &Path, identity: &Identity) -> Membership {
    let shown = fs::read(file).expect("a certificate");
    Membership::certified(&Policy::Open, shown.into(), &identity.peer(), 0).expect("a certificate of this node")
}

fn data_dir_identity(cluster: &Cluster, name: &str) -> Identity {
    Identity::load_or_create(&cluster.file(name).join("data")).expect("an identity")
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// Waits until certificates that are issued from now on are later than everything that has happened so far.
fn next_second() {
    let now = unix_now();
    wait("the next second", || unix_now() > now);
}

fn is_connected(daemon: &Daemon, to: &Value) -> bool {
    daemon.peers().iter().any(|peer| peer["peer"] == to["peer"] && peer["connected"] == true)
}

#[test]
fn strangers_get_nothing_on_either_plane() {
    let cluster = Cluster::new();
    let seed = cluster.member("seed", "seed", &[]);
    let target = Target::of(&seed);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let tries = |identity: &Identity, own: Membership| {
        let shown = own.shown().clone();
        runtime.block_on(gets_in(identity, own, shown, &target))
    };

    cluster.issue("member", "node", "1h");
    let member = data_dir_identity(&cluster, "member");
    let certificate = cluster.file("member").join("data/membership");
    assert!(tries(&member, shown_in(&certificate, &member)), "a member gets in: {}", seed.log());

    let stranger = Identity::generate();
    let none = Membership::open(stranger.peer(), Role::Node, "default").expect("a valid zone");
    assert!(!tries(&stranger, none), "without a certificate");

    let thief = Identity::generate();
    let own = Membership::open(thief.peer(), Role::Node, "default").expect("a valid zone");
    let copied = shown_in(&certificate, &member).shown().clone();
    assert!(!runtime.block_on(gets_in(&thief, own, copied, &target)), "with a copy of a member's certificate");

    let other = Cluster::new();
    other.issue("outsider", "node", "1h");
    let outsider = data_dir_identity(&other, "outsider");
    let own = shown_in(&other.file("outsider").join("data/membership"), &outsider);
    assert!(!tries(&outsider, own), "with another cluster's certificate");

    cluster.issue("late", "node", "1s");
    let late = data_dir_identity(&cluster, "late");
    let own = shown_in(&cluster.file("late").join("data/membership"), &late);
    wait("its end", || unix_now() >= own.expires());
    assert!(!tries(&late, own), "with an expired certificate");

    let id = shoal::identity::to_text(&member.peer());
    let file = cluster.file("revocation");
    cluster.run(&["revoke", &id, "--out", file.to_str().expect("UTF-8")]);
    seed.ctl(&["revoke", file.to_str().expect("UTF-8")]);
    assert!(!tries(&member, shown_in(&certificate, &member)), "with a revoked certificate");
    assert_eq!(seed.status()["revocations"], 1);
    let refused = seed.try_ctl(&["revoke", certificate.to_str().expect("UTF-8")]);
    assert!(!refused.status.success(), "a certificate is no revocation");

    next_second();
    cluster.issue("member", "node", "1h");
    assert!(tries(&member, shown_in(&certificate, &member)), "a member with a new certificate gets in");
}

#[test]
fn members_read_and_a_revoked_one_is_cut_off() {
    if !can_mount("admission") {
        return;
    }
    let cluster = Cluster::new();
    let source = tree(11, 12, 200_000);
    let mut registry = Registry::start();
    registry.publish(source.path(), "1");
    registry.switch_on();

    let mut seed = cluster.member("seed", "seed", &[]);
    let join = seed.join();
    let first = cluster.member("first", "node", std::slice::from_ref(&join));
    let second = cluster.member("second", "node", std::slice::from_ref(&join));
    for node in [&first, &second] {
        node.wait_for_home();
        node.mount(&registry.reference("1"));
        assert_same(source.path(), &node.mountpoint());
        let status = node.status();
        assert_eq!(total_bytes(&status, "registry"), 0, "{status}");
        assert!(status["membership_expires"].as_u64().expect("a figure") > unix_now());
    }

    let (revoked, staying) = (second.status(), first.status());
    let socket = cluster.file("first").join("sock");
    let id = revoked["peer"].as_str().expect("a text");
    cluster.run(&["revoke", id, "--socket", socket.to_str().expect("UTF-8")]);
    for node in [&seed, &first] {
        wait("the revocation arrives", || node.status()["revocations"] == 1);
        wait("the revoked node is cut off", || !is_connected(node, &revoked));
    }
    assert!(is_connected(&first, &seed.status()) && is_connected(&seed, &staying), "the others stay");

    // Written down, so that a restart changes nothing; and told to who was not there.
    seed.stop();
    seed.start_again();
    assert_eq!(seed.status()["revocations"], 1);
    let join = seed.join();
    let third = cluster.member("third", "node", &[join]);
    third.wait_for_home();
    wait("the revocation is told to a newcomer", || third.status()["revocations"] == 1);
}

#[test]
fn certificates_expire_and_are_renewed_without_a_restart() {
    let cluster = Cluster::new();
    let seed = cluster.member("seed", "seed", &[]);
    cluster.issue("node", "node", "6s");
    let node = cluster.start("node", "node", &[seed.join()]);
    node.wait_for_home();
    let (id, brief) = (node.status(), node.status()["membership_expires"].as_u64().expect("a figure"));
    wait("the connection ends with the certificate", || unix_now() >= brief && !is_connected(&seed, &id));
    assert!(unix_now() >= brief);

    cluster.issue("node", "node", "1h");
    wait("the certificate is read again", || node.status()["membership_expires"].as_u64() > Some(brief + 60));
    node.wait_for_home();
    wait("it is let in again", || is_connected(&seed, &id));

    // Another zone would need a restart: the old certificate is kept.
    let before = node.status()["membership_expires"].clone();
    let data = cluster.file("node").join("data");
    cluster.run(&["issue", "--data-dir", data.to_str().expect("UTF-8"), "--zone", "elsewhere", "--valid", "2h"]);
    wait("the log says why", || node.log().contains("is not renewed"));
    assert_eq!(node.status()["membership_expires"], before);
}

#[test]
fn a_daemon_says_what_its_membership_lacks() {
    let cluster = Cluster::new();
    let start = |name: &str, zone: &str| {
        let data = cluster.file(name).join("data");
        fs::create_dir_all(&data).expect("a folder");
        let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
        command.args(["daemon", "--set", &cluster.public_key, "--set", &format!("zone={zone}"), "--data-dir"]);
        command.arg(&data).args(["--set", "data.listen=127.0.0.1:0", "--socket"]).arg(data.join("sock"));
        let output = command.output().expect("shoal runs");
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    let missing = start("new", "default");
    assert!(missing.contains("shoal cluster issue") && missing.contains("12D3"), "{missing}");
    cluster.issue("moved", "node", "1h");
    let moved = start("moved", "elsewhere");
    assert!(moved.contains("says zone default, the configuration says elsewhere"), "{moved}");
}
