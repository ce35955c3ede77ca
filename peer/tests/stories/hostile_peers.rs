//! Seed peers that do harm in other ways than by wrong bytes: whoever has to do with one reads all the same, within bounds, and
//! says who it was.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

use serde_json::Value;
use shoal::{
    admission::Admission,
    control::{Control, ControlOptions},
    data::{AnswerSender, DataOptions, DataPlane, Limits, NotifyError, PeerContext, PeerEvent, Service, Transport},
    identity::Identity,
    membership::{self, Membership, Policy},
};
use shoal_proto::{
    Asked, Bitfield, BlobId, Contact, FEATURE_HASH_LISTS, FEATURE_START_TRACES, Have, Hello, MIN_VERSION, Message,
    ObjectId, PeerId, Request, Role, StartTrace, VERSION,
};
use tokio::runtime::Runtime;

use crate::support::{Daemon, Registry, assert_same, can_mount, metric, peak, total_bytes, tree, wait};

/// Pieces of the image.
const FILES: usize = 30;

/// How a double answers a request for pieces. Of objects it says that it cannot read the registry.
#[derive(Clone, Copy)]
enum Manner {
    /// With more bytes than a piece has.
    Endless,
    /// With bytes that are wrong, but as many as they should be at most.
    Long,
    /// It has none of them.
    Empty,
}

impl Service for Manner {
    fn handle(&self, _: PeerContext, request: Request, mut answers: AnswerSender) {
        let manner = *self;
        tokio::spawn(async move {
            // The asker may hang up at any time.
            let _ = match request.what {
                Asked::Object { .. } => answers.cannot_source("no".into()).await,
                Asked::Pieces { first, fingerprints, .. } => {
                    for piece in (first..).take(fingerprints.len()) {
                        let sent = match manner {
                            Self::Endless => answers.send_data(piece, vec![0xee; 8 << 20].into()).await,
                            Self::Long => answers.send_data(piece, vec![0xee; 200_000].into()).await,
                            Self::Empty => answers.not_have(piece).await,
                        };
                        if sent.is_err() {
                            return;
                        }
                    }
                    answers.end().await
                }
            };
        });
    }
}

/// A seed peer of the double's, whose events come to the test.
struct Double {
    data: DataPlane,
    control: Control,
    events: tokio::sync::mpsc::Receiver<PeerEvent>,
    /// For others to join through.
    address: String,
    peer: String,
}

impl Double {
    /// `shown` is where others are told that its data plane is, given where it is.
    async fn start(manner: Manner, transport: Transport, shown: impl FnOnce(SocketAddr) -> SocketAddr) -> Self {
        let identity = Identity::generate();
        let membership = Membership::open(identity.peer(), Role::Seed, "default").expect("a valid zone");
        let listen = ([127, 0, 0, 1], 0).into();
        let hello = Hello {
            version: VERSION,
            min_version: MIN_VERSION,
            features: FEATURE_HASH_LISTS | FEATURE_START_TRACES,
            membership: membership.shown().clone(),
            role: Role::Seed,
            zone: "default".into(),
            labels: Default::default(),
            data_addresses: Vec::new(),
            name: "double".into(),
        };
        let options = DataOptions {
            keypair: identity.keypair().clone(),
            listen,
            transport,
            hello,
            admit: Arc::new(|peer, shown| {
                membership::verify(&Policy::Open, shown, peer, 0).map_err(|refusal| refusal.to_string())
            }),
            limits: Limits::default(),
        };
        let (data, events) = DataPlane::start(options, Arc::new(manner)).expect("a data plane");
        let options = ControlOptions {
            identity: identity.clone(),
            admission: Admission::new(Policy::Open, membership),
            insecure_open: false,
            listen: vec!["/ip4/127.0.0.1/tcp/0".parse().expect("an address")],
            bootstrap_peers: Vec::new(),
            mdns: false,
            capacity: 100,
            lease: Duration::from_secs(3),
            data_address: shown(data.local_address()),
        };
        let (control, mut heard) = Control::start(options).await.expect("a control plane");
        let listening = heard.recv().await;
        let Some(shoal::control::ControlEvent::Listening(addresses)) = listening else { panic!("{listening:?}") };
        tokio::spawn(async move { while heard.recv().await.is_some() {} });
        let peer = shoal::identity::to_libp2p(&identity.peer()).expect("an ed25519 key").to_string();
        let address = format!("control.bootstrap_peers=[\"{}/p2p/{peer}\"]", addresses[0]);
        Self { data, control, events, address, peer }
    }

    /// What a daemon says of it.
    fn seen_by(&self, daemon: &Daemon) -> Value {
        let peers = daemon.peers();
        peers.into_iter().find(|peer| peer["peer"] == self.peer.as_str()).expect("it is known")
    }

    /// Waits until the daemon has named it for this, in one of these words.
    fn wait_for_fault(&self, daemon: &Daemon, key: &str, fault: &str, said: &[&str]) {
        let is_said = |text: &str| said.iter().any(|said| text.contains(said));
        wait("it is named", || self.seen_by(daemon)[key].as_u64().expect("a figure") > 0);
        let last = self.seen_by(daemon)["last_fault"].clone();
        assert!(is_said(last.as_str().expect("a text")), "{last}");
        let name = format!("shoal_peer_faults_total{{peer=\"{}\",fault=\"{fault}\"}}", self.peer);
        assert!(metric(daemon, &name) >= 1.0, "{name}");
        let text = String::from_utf8(daemon.ctl(&["peers"]).stdout).expect("UTF-8");
        let line = text.lines().find(|line| line.starts_with(&self.peer)).expect("its line");
        assert!(is_said(line), "{line}");
    }

    async fn stop(self) {
        self.control.stop().await;
        self.data.stop().await;
    }
}

/// A daemon that knows a registry and, of other nodes, the double alone.
struct Bed {
    runtime: Runtime,
    source: tempfile::TempDir,
    registry: Registry,
    encoded: u64,
    folder: tempfile::TempDir,
}

impl Bed {
    fn new(test: &str) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        let source = tree(31, FILES, 150_000);
        let mut registry = Registry::start();
        let encoded = registry.publish(source.path(), "1");
        registry.switch_on();
        let folder = tempfile::tempdir().expect("a temporary folder");
        Some(Self { runtime: Runtime::new().expect("a runtime"), source, registry, encoded, folder })
    }

    fn victim(&self, double: &Double, settings: &[&str]) -> Daemon {
        let settings = settings.iter().map(ToString::to_string).chain([double.address.clone()]).collect::<Vec<_>>();
        let daemon = Daemon::start("victim", self.folder.path(), &settings);
        daemon.wait_for_home();
        daemon
    }

    /// Everything can be read, and the registry has sent it once.
    fn assert_reads(&self, daemon: &Daemon) {
        daemon.mount(&self.registry.reference("1"));
        assert_same(self.source.path(), &daemon.mountpoint());
        let status = daemon.status();
        assert_eq!(status["mounts"][0]["read_errors"], 0, "{status}");
        assert_eq!(total_bytes(&status, "seed"), 0, "{status}");
        assert!(total_bytes(&status, "registry") <= self.encoded, "{status}");
    }
}

#[test]
fn endless_bytes_end_the_connection_and_cost_no_memory() {
    let Some(bed) = Bed::new("hostile_endless") else { return };
    for transport in ["tcp", "quic"] {
        let double = bed.runtime.block_on(Double::start(Manner::Endless, Transport::Auto, |at| at));
        let mut daemon = bed.victim(&double, &[&format!("data.transport={transport}")]);
        let before = peak(&daemon);
        bed.assert_reads(&daemon);
        double.wait_for_fault(
            &daemon,
            "violations",
            "violation",
            &["more data than was asked for", "at most 150000"],
        );
        assert!(peak(&daemon) - before < 128 << 20, "{} bytes more", peak(&daemon) - before);
        daemon.stop();
        std::fs::remove_dir_all(bed.folder.path().join("victim")).expect("the daemon has gone");
        bed.runtime.block_on(double.stop());
    }
}

/// Passes connections on to `to`, and of what comes back only so many bytes on each.
fn stalling(to: SocketAddr, bytes: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback can be listened on");
    let address = listener.local_addr().expect("its address");
    thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(mut client), Ok(mut server)) = (client, TcpStream::connect(to)) else { return };
            let (Ok(mut from_client), Ok(mut to_server)) = (client.try_clone(), server.try_clone()) else { return };
            thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
            thread::spawn(move || {
                let (mut left, mut buffer) = (bytes, [0; 4096]);
                while left > 0 {
                    let Ok(read @ 1..) = server.read(&mut buffer[..left.min(4096)]) else { return };
                    if client.write_all(&buffer[..read]).is_err() {
                        return;
                    }
                    left -= read;
                }
                // Both connections stay open.
                thread::sleep(Duration::from_secs(600));
                drop((client, server));
            });
        }
    });
    address
}

#[test]
fn who_stalls_in_the_midst_of_a_piece_is_not_waited_for() {
    let Some(bed) = Bed::new("hostile_stalling") else { return };
    // Enough for the handshake and half of a piece.
    let started = Double::start(Manner::Long, Transport::Tcp, |at| stalling(at, 80_000));
    let double = bed.runtime.block_on(started);
    // What somebody waits for is soon asked for elsewhere as well, which is nobody's fault: so that much is fetched ahead.
    let mut daemon = bed.victim(&double, &["data.transport=tcp", "read.ahead_bytes=16777216"]);
    bed.assert_reads(&daemon);
    double.wait_for_fault(&daemon, "stalls", "stall", &["silent for"]);
    daemon.stop();
    bed.runtime.block_on(double.stop());
}

/// Tells everybody who is interested that everything is here, and again after each question.
async fn claim_all(data: DataPlane, mut events: tokio::sync::mpsc::Receiver<PeerEvent>) {
    let mut interested: Vec<(PeerId, ObjectId, BlobId)> = Vec::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(PeerEvent::Interest { peer, bootstrap, blob }) => interested.push((peer, bootstrap, blob)),
                Some(_) => {}
                None => return,
            },
            _ = ticks.tick() => for &(peer, bootstrap, blob) in &interested {
                let pieces = Bitfield::full(FILES as u32);
                let have = Have { bootstrap, blob, full: true, first: 0, pieces };
                // It may have hung up.
                let _ = data.notify(peer, Message::Have(have));
            },
        }
    }
}

#[test]
fn who_claims_all_and_serves_none_is_found_out() {
    let Some(bed) = Bed::new("hostile_claiming") else { return };
    let mut double = bed.runtime.block_on(Double::start(Manner::Empty, Transport::Auto, |at| at));
    let (_, nothing) = tokio::sync::mpsc::channel(1);
    let events = std::mem::replace(&mut double.events, nothing);
    bed.runtime.spawn(claim_all(double.data.clone(), events));
    let mut daemon = bed.victim(&double, &["read.ahead_bytes=0"]);
    bed.assert_reads(&daemon);
    double.wait_for_fault(&daemon, "broken_promises", "broken_promise", &["has not got piece"]);
    daemon.stop();
    bed.runtime.block_on(double.stop());
}

/// Says as much as there is room for: interest in blobs that nobody has, peers that are nowhere, pieces and starts of images
/// that do not exist.
async fn chatter(data: &DataPlane, to: PeerId, messages: u64) {
    let id = |n: u64| {
        let mut id = [7; 32];
        id[..8].copy_from_slice(&n.to_le_bytes());
        id
    };
    for n in 0..messages {
        let (bootstrap, blob) = (ObjectId::new(id(n)), BlobId::new(id(n + 1)));
        let contact = |k| Contact { peer: PeerId::new(id(n * 32 + k)), addresses: vec![([127, 0, 0, 1], 9).into()] };
        let message = match n % 4 {
            0 => Message::Interest { bootstrap, blob },
            1 => Message::Peers { blob, contacts: (0..32).map(contact).collect() },
            2 => Message::Have(Have { bootstrap, blob, full: true, first: 0, pieces: Bitfield::full(1 << 16) }),
            _ => Message::Trace { bootstrap, trace: StartTrace::of((0..4000).map(|piece| (0, piece * 2))) },
        };
        say(data, to, message).await;
    }
}

/// Says what is a lot of work, as fast as it is heard.
async fn flood(data: &DataPlane, to: PeerId, messages: u64) {
    let (bootstrap, blob) = (ObjectId::new([8; 32]), BlobId::new([9; 32]));
    let pieces = Bitfield::full(shoal_proto::MAX_WIRE_PIECES);
    let message = Message::Have(Have { bootstrap, blob, full: true, first: 0, pieces });
    for _ in 0..messages {
        say(data, to, message.clone()).await;
    }
}

async fn say(data: &DataPlane, to: PeerId, message: Message) {
    loop {
        match data.notify(to, message.clone()) {
            Err(NotifyError::Full) => tokio::time::sleep(Duration::from_millis(1)).await,
            said => break said.expect("the daemon listens"),
        }
    }
}

#[test]
fn a_flood_of_notices_fills_no_memory_and_keeps_nobody_from_reading() {
    let Some(bed) = Bed::new("hostile_chatter") else { return };
    let mut double = bed.runtime.block_on(Double::start(Manner::Empty, Transport::Tcp, |at| at));
    let mut daemon = bed.victim(&double, &["role=seed"]);
    let before = peak(&daemon);
    let to = bed.runtime.block_on(async {
        loop {
            if let Some(PeerEvent::Up { peer, .. }) = double.events.recv().await {
                return peer;
            }
        }
    });
    let (data, runtime) = (double.data.clone(), bed.runtime.handle().clone());
    let flood = thread::spawn(move || {
        runtime.block_on(async {
            chatter(&data, to, 4000).await;
            flood(&data, to, 600).await;
        });
    });
    bed.assert_reads(&daemon);
    flood.join().expect("all of it is said");
    double.wait_for_fault(&daemon, "floods", "flood", &["says more than anybody needs to"]);
    assert_eq!(daemon.status()["start_traces"]["images"], 0, "of images that it has not heard of");
    assert!(metric(&daemon, "shoal_start_traces_heard_total{taken=\"no\"}") > 500.0);
    let grown = peak(&daemon) - before;
    assert!(grown < 128 << 20, "{grown} bytes more");

    // Of an image that it has, it takes in what can be true.
    let bootstrap = bed.runtime.block_on(async {
        loop {
            if let Some(PeerEvent::Interest { bootstrap, .. }) = double.events.recv().await {
                return bootstrap;
            }
        }
    });
    for pieces in [vec![(0, 1), (0, 9999)], vec![(1, 0)], vec![(0, 2), (0, 1)]] {
        let trace = Message::Trace { bootstrap, trace: StartTrace::of(pieces) };
        double.data.notify(to, trace).expect("room for a notice");
    }
    wait("one is taken in", || metric(&daemon, "shoal_start_traces_heard_total{taken=\"yes\"}") == 1.0);
    assert_eq!(daemon.status()["start_traces"]["starts"], 1);
    daemon.stop();
    bed.runtime.block_on(double.stop());
}
