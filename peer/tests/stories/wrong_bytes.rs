//! A seed peer that serves wrong bytes: its pieces are rejected, the read succeeds from elsewhere, and the peer is
//! reported and banned for a while.

use std::{sync::Arc, time::Duration};

use crate::support::{Daemon, Registry, assert_same, can_mount, total_bytes, tree, wait};
use bytes::Bytes;
use shoal::{
    admission::Admission,
    control::{Control, ControlOptions},
    data::{AnswerSender, DataOptions, DataPlane, Limits, PeerContext, Service, Transport},
    identity::Identity,
    membership::{self, Membership, Policy},
};
use shoal_proto::{Asked, FEATURE_HASH_LISTS, Hello, MIN_VERSION, Request, Role, VERSION};

/// Speaks the protocol, and lies about every piece. Of objects it says that it cannot read the registry.
pub(crate) struct Liar;

impl Service for Liar {
    fn handle(&self, _: PeerContext, request: Request, mut answers: AnswerSender) {
        tokio::spawn(async move {
            match request.what {
                Asked::Object { .. } => answers.cannot_source("no".into()).await,
                Asked::Pieces { first, fingerprints, .. } => {
                    for piece in (first..).take(fingerprints.len()) {
                        if answers.send_data(piece, Bytes::from_static(b"not what you asked for")).await.is_err() {
                            return;
                        }
                    }
                    answers.end().await
                }
            }
            // The asker may hang up as soon as it has seen the lie.
            .ok();
        });
    }
}

/// A seed peer that answers as `service` does; gives the address for others to join through.
pub(crate) async fn impostor(service: Arc<dyn Service>) -> (DataPlane, Control, String) {
    let identity = Identity::generate();
    let membership = Membership::open(identity.peer(), Role::Seed, "default").expect("a valid zone");
    let listen = ([127, 0, 0, 1], 0).into();
    let hello = Hello {
        version: VERSION,
        min_version: MIN_VERSION,
        features: FEATURE_HASH_LISTS,
        membership: membership.shown().clone(),
        role: Role::Seed,
        zone: "default".into(),
        labels: Default::default(),
        data_addresses: vec![listen],
        name: "liar".into(),
    };
    let admission = Admission::new(Policy::Open, membership.clone());
    let options = DataOptions {
        keypair: identity.keypair().clone(),
        listen,
        transport: Transport::Auto,
        hello,
        admit: Arc::new(|peer, shown| {
            membership::verify(&Policy::Open, shown, peer, 0).map_err(|refusal| refusal.to_string())
        }),
        limits: Limits::default(),
    };
    let (data, mut peer_events) = DataPlane::start(options, service).expect("a data plane");
    let options = ControlOptions {
        identity: identity.clone(),
        admission,
        insecure_open: false,
        listen: vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")],
        bootstrap_peers: Vec::new(),
        mdns: false,
        capacity: 100,
        lease: Duration::from_secs(3),
        data_address: data.local_address(),
    };
    let (control, mut events) = Control::start(options).await.expect("a control plane");
    let listening = events.recv().await;
    let Some(shoal::control::ControlEvent::Listening(addresses)) = listening else { panic!("{listening:?}") };
    tokio::spawn(async move { while peer_events.recv().await.is_some() {} });
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    let id = shoal::identity::to_libp2p(&identity.peer()).expect("an ed25519 key");
    (data, control, format!("{}/p2p/{id}", addresses[0]).replace("/p2p/p2p", "/p2p"))
}

#[test]
fn the_liar_is_banned_and_the_read_succeeds() {
    if !can_mount("wrong_bytes") {
        return;
    }
    let source = tree(5, 12, 200_000);
    let mut registry = Registry::start();
    let encoded = registry.publish(source.path(), "1");
    registry.switch_on();

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let (data, control, address) = runtime.block_on(impostor(Arc::new(Liar)));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("victim", folder.path(), &[format!("control.bootstrap_peers=[\"{address}\"]")]);
    daemon.wait_for_home();

    daemon.mount(&registry.reference("1"));
    assert_same(source.path(), &daemon.mountpoint());

    let status = daemon.status();
    assert!(status["total"]["rejected_chunks"].as_u64().expect("a figure") >= 1, "{status}");
    assert_eq!(total_bytes(&status, "seed"), 0, "{status}");
    assert!(total_bytes(&status, "registry") <= encoded, "{status}");
    wait_for_ban(&daemon);
    assert!(daemon.log().contains("rejected"), "{}", daemon.log());
    daemon.stop();
    runtime.block_on(async {
        control.stop().await;
        data.stop().await;
    });
}

/// Waits until the daemon has banned the only seed peer that it knows.
pub(crate) fn wait_for_ban(daemon: &Daemon) {
    wait("the liar is banned", || {
        let peers = daemon.peers();
        let liar = peers.iter().find(|peer| peer["role"] == "seed").expect("it is known");
        let banned = liar["banned_seconds"].as_u64().expect("a figure") > 0;
        banned && liar["connected"] == false && liar["ban_reason"].as_str().expect("a text").contains("wrong bytes")
    });
}
