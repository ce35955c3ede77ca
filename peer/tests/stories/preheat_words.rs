//! What nodes say about a preheat is sometimes lost: who waits for its end asks again, and whoever is asked by its name says again how
//! far it is. One side is a double that only talks.

use std::process::{Child, Command, Stdio};

use shoal::{
    admission::Admission,
    control::{Chosen, Control, ControlEvent, ControlOptions, Preheat, PreheatId, Standing, Word},
    identity::{self, Identity},
    membership::{Membership, Policy},
};
use shoal_proto::{PeerId, Role};
use tokio::{runtime::Runtime, sync::mpsc};

use crate::support::{Daemon, Registry, tree, wait};

/// A node that talks, and has no data plane.
struct Talker {
    control: Control,
    events: mpsc::Receiver<ControlEvent>,
    /// For others to join through.
    address: String,
}

impl Talker {
    async fn start() -> Self {
        let identity = Identity::generate();
        let membership = Membership::open(identity.peer(), Role::Node, "talkers").expect("a valid zone");
        let options = ControlOptions {
            identity: identity.clone(),
            admission: Admission::new(Policy::Open, membership),
            insecure_open: false,
            listen: vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")],
            bootstrap_peers: Vec::new(),
            mdns: false,
            capacity: 1,
            lease: std::time::Duration::from_secs(3),
            data_address: ([127, 0, 0, 1], 9).into(),
        };
        let (control, mut events) = Control::start(options).await.expect("a control plane");
        let listening = events.recv().await;
        let Some(ControlEvent::Listening(addresses)) = listening else { panic!("{listening:?}") };
        let peer = identity::to_libp2p(&identity.peer()).expect("an ed25519 key");
        let address = format!("control.bootstrap_peers=[\"{}/p2p/{peer}\"]", addresses[0]);
        Self { control, events, address }
    }

    async fn word(&mut self) -> Word {
        loop {
            if let ControlEvent::Preheat { word, .. } = self.events.recv().await.expect("the plane runs") {
                return word;
            }
        }
    }

    /// Waits until it is asked for a preheat, of everybody or by name.
    async fn asked(&mut self, by_name: bool) -> Preheat {
        loop {
            if let Word::Asked(preheat) = self.word().await
                && matches!(preheat.chosen, Chosen::Nodes(_)) == by_name
            {
                return preheat;
            }
        }
    }

    /// Waits until somebody says that it is done.
    async fn done(&mut self, of: PreheatId) -> Standing {
        loop {
            if let Word::Stands(id, standing) = self.word().await
                && id == of
                && standing.over
            {
                return standing;
            }
        }
    }
}

fn bed() -> (Registry, tempfile::TempDir, Runtime) {
    let mut registry = Registry::start();
    registry.publish(tree(911, 2, 50_000).path(), "1");
    registry.switch_on();
    (registry, tempfile::tempdir().expect("a temporary folder"), Runtime::new().expect("a runtime"))
}

fn preheat(through: &Daemon, reference: &str) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shoal"));
    command.args(["preheat", reference, "--all", "--wait", "--socket"]).arg(through.socket());
    command.stdout(Stdio::null()).spawn().expect("shoal preheat runs")
}

#[test]
fn whoever_is_not_known_to_be_done_is_asked_again_by_name() {
    let (registry, folder, runtime) = bed();
    let mut talker = runtime.block_on(Talker::start());
    let mut daemon = Daemon::start("asked", folder.path(), std::slice::from_ref(&talker.address));
    wait("the talker is known", || daemon.peers().iter().any(|peer| peer["zone"] == "talkers"));
    let mut preheat = preheat(&daemon, &registry.reference("1"));
    runtime.block_on(async {
        let asked = talker.asked(false).await;
        // It is done, and nobody hears of it.
        let again = talker.asked(true).await;
        assert_eq!((again.id, &again.reference), (asked.id, &asked.reference));
        let done = Standing { bytes: 9, present_bytes: 9, over: true, trouble: String::new() };
        talker.control.say(Word::Stands(asked.id, done)).await.expect("the plane runs");
    });
    assert!(preheat.wait().expect("it ends").success(), "{}", daemon.log());
    daemon.stop();
    runtime.block_on(talker.control.stop());
}

#[test]
fn who_is_asked_again_by_name_says_again_that_it_is_done() {
    let (registry, folder, runtime) = bed();
    let mut talker = runtime.block_on(Talker::start());
    let mut daemon = Daemon::start("node", folder.path(), std::slice::from_ref(&talker.address));
    let me: PeerId = identity::from_text(daemon.status()["peer"].as_str().expect("an id")).expect("an id");
    // What it is at present, for everybody to read the same.
    daemon.ctl(&["pin", &registry.reference("1")]);
    let manifest = daemon.store_usage()["pins"][0]["manifest"].as_str().expect("a digest").to_owned();
    let reference = format!("{}@{manifest}", registry.reference("1")).parse().expect("a reference");
    let ask = |chosen| Preheat { id: [7; 16], reference, chosen, lifetime: std::time::Duration::from_secs(60) };
    let asked = ask(Chosen::All);
    runtime.block_on(async {
        loop {
            talker.control.say(Word::Asked(asked.clone())).await.expect("the plane runs");
            // Nobody is subscribed at first.
            let second = std::time::Duration::from_secs(1);
            if tokio::time::timeout(second, talker.done(asked.id)).await.is_ok_and(|done| done.trouble.is_empty()) {
                break;
            }
        }
        let by_name = Preheat { chosen: Chosen::Nodes(vec![me]), ..asked.clone() };
        talker.control.say(Word::Asked(by_name)).await.expect("the plane runs");
        let again = tokio::time::timeout(std::time::Duration::from_secs(30), talker.done(asked.id)).await;
        let again = again.expect("it says so again");
        assert!(again.bytes > 0 && again.bytes == again.present_bytes && again.trouble.is_empty());
    });
    daemon.stop();
    runtime.block_on(talker.control.stop());
}
