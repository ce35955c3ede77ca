//! Control planes on loopback, with real sockets: they find each other, leases come and go, records are found, and
//! strangers get nowhere.

mod previous;
mod strangers;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use libp2p::identity::Keypair;
use shoal_proto::{BlobId, Role};
use tokio::{runtime::Runtime, sync::mpsc};

use super::*;
use crate::membership::{self, Certificate, Membership, Policy};

/// Far beyond what any step takes; only a failure waits that long.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster with a key, and nodes to be.
struct Cluster {
    key: Keypair,
    policy: Policy,
}

impl Cluster {
    fn new() -> Self {
        let key = libp2p::identity::ed25519::Keypair::generate();
        Self { policy: Policy::Key(key.public()), key: key.into() }
    }

    fn options(&self, role: Role, bootstrap_peers: Vec<Multiaddr>) -> ControlOptions {
        let identity = Identity::generate();
        let expires = membership::unix_now() + 3600;
        let peer = identity.peer();
        let shown = certificate(peer, role, expires).sign(&self.key).unwrap();
        let membership = Membership::certified(&self.policy, shown, &peer, membership::unix_now()).unwrap();
        ControlOptions {
            identity,
            admission: Admission::new(self.policy.clone(), membership),
            insecure_open: false,
            listen: vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()],
            bootstrap_peers,
            mdns: false,
            capacity: 7,
            lease: Duration::from_secs(3),
            data_address: SocketAddr::from((Ipv4Addr::LOCALHOST, 4802)),
        }
    }
}

fn certificate(peer: PeerId, role: Role, expires: u64) -> Certificate {
    Certificate { peer, role, zone: "a".into(), issued: membership::unix_now() - 10, expires }
}

/// A node with a runtime of its own, so that it can be killed with all that it does.
struct Node {
    runtime: Runtime,
    control: Control,
    events: mpsc::Receiver<ControlEvent>,
    peer: PeerId,
    address: Multiaddr,
}

impl Node {
    fn start(options: ControlOptions) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let peer = options.identity.peer();
        let (control, mut events) = runtime.block_on(Control::start(options)).unwrap();
        let Some(ControlEvent::Listening(addresses)) = runtime.block_on(events.recv()) else { panic!("not first") };
        Self { runtime, control, events, peer, address: addresses[0].clone() }
    }

    /// The first event that `wanted` picks; those before it are dropped.
    fn wait<T>(&mut self, what: &str, mut wanted: impl FnMut(ControlEvent) -> Option<T>) -> T {
        let search = async {
            loop {
                let event = self.events.recv().await.expect("the plane runs");
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
        };
        let found = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, search).await });
        found.unwrap_or_else(|_| panic!("no {what}"))
    }

    fn wait_for_peer(&mut self, peer: PeerId) -> ControlEvent {
        self.wait("peer", |event| match &event {
            ControlEvent::PeerSeen { peer: seen, .. } if *seen == peer => Some(event),
            _ => None,
        })
    }

    fn wait_for_lease(&mut self, seed: PeerId) -> ControlEvent {
        self.wait("lease", |event| match &event {
            ControlEvent::Lease { peer, .. } if *peer == seed => Some(event),
            _ => None,
        })
    }

    fn wait_for_end(&mut self, seed: PeerId) {
        self.wait("end of the lease", |event| (event == ControlEvent::LeaseEnded { peer: seed }).then_some(()));
    }

    fn peers(&self) -> Vec<PeerStatus> {
        self.runtime.block_on(self.control.peers()).unwrap()
    }

    fn kill(self) {
        self.runtime.shutdown_background();
    }
}

#[test]
fn two_nodes_meet_and_part() {
    let cluster = Cluster::new();
    let mut seed = Node::start(cluster.options(Role::Seed, vec![]));
    let mut node = Node::start(cluster.options(Role::Node, vec![seed.address.clone()]));
    let data_addresses = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 4802))];
    let zone = "a".to_owned();
    let seen = ControlEvent::PeerSeen { peer: seed.peer, role: Role::Seed, zone, data_addresses };
    assert_eq!(node.wait_for_peer(seed.peer), seen);
    seed.wait_for_peer(node.peer);

    let status = node.peers();
    assert_eq!((status.len(), status[0].peer, status[0].role), (1, seed.peer, Role::Seed));
    assert_eq!(status[0].control_addresses, [seed.address.clone()]);
    assert!(status[0].agent.starts_with("shoal/"), "{}", status[0].agent);

    let gone = node.peer;
    node.runtime.block_on(node.control.stop());
    seed.wait("loss", |event| (event == ControlEvent::PeerLost { peer: gone }).then_some(()));
    assert!(seed.peers().is_empty());
    assert!(matches!(node.runtime.block_on(node.control.peers()), Err(ControlError::Stopped)));
}

#[test]
fn three_nodes_find_each_other_through_one_and_look_providers_up() {
    let cluster = Cluster::new();
    let first = Node::start(cluster.options(Role::Node, vec![]));
    let mut others = [(); 2].map(|()| Node::start(cluster.options(Role::Node, vec![first.address.clone()])));
    let [a, b] = &mut others;
    a.wait_for_peer(b.peer);
    b.wait_for_peer(a.peer);

    let (blob, unknown) = (BlobId::new([1; 32]), BlobId::new([2; 32]));
    a.runtime.block_on(a.control.announce(blob)).unwrap();
    // The announcement travels; who asks too early hears of nobody and asks again.
    let mut look_up = |blob| {
        b.runtime.block_on(b.control.find_providers(blob)).unwrap();
        b.wait("answer", |event| match event {
            ControlEvent::Providers { blob: found, peers } if found == blob => Some(peers),
            _ => None,
        })
    };
    let patient = Instant::now() + PATIENCE;
    let mut found = look_up(blob);
    while found.is_empty() && Instant::now() < patient {
        std::thread::sleep(Duration::from_millis(20));
        found = look_up(blob);
    }
    assert_eq!(found, [a.peer]);
    assert_eq!(look_up(unknown), []);
    a.runtime.block_on(a.control.withdraw(blob)).unwrap();
}

#[test]
fn a_lease_reaches_a_third_node_and_ends_with_its_seed() {
    let cluster = Cluster::new();
    let middle = Node::start(cluster.options(Role::Node, vec![]));
    let seed_options = cluster.options(Role::Seed, vec![middle.address.clone()]);
    let mut seed = Node::start(seed_options.clone());
    let mut node = Node::start(cluster.options(Role::Node, vec![middle.address.clone()]));

    let ControlEvent::Lease { zone, capacity, data_addresses, until, .. } = node.wait_for_lease(seed.peer) else {
        unreachable!("picked above")
    };
    assert_eq!((zone.as_str(), capacity), ("a", 7));
    assert_eq!(data_addresses, [SocketAddr::from((Ipv4Addr::LOCALHOST, 4802))]);
    assert!(until <= Instant::now() + seed_options.lease);
    seed.wait_for_lease(seed.peer);
    assert!(node.peers().iter().all(|status| status.has_lease == (status.peer == seed.peer)));

    let gone = seed.peer;
    seed.kill();
    node.wait_for_end(gone);

    // The same seed again: its sequence goes on, so it is believed at once; and it takes its leave when it stops.
    let seed = Node::start(ControlOptions { bootstrap_peers: vec![middle.address.clone()], ..seed_options });
    node.wait_for_lease(seed.peer);
    seed.runtime.block_on(seed.control.stop());
    node.wait_for_end(seed.peer);
}

#[test]
fn a_bootstrap_peer_that_returns_is_found_again() {
    let cluster = Cluster::new();
    let mut options = cluster.options(Role::Node, vec![]);
    let first = Node::start(options.clone());
    let port = first.address.clone();
    let name: Multiaddr = port.to_string().replace("/ip4/127.0.0.1", "/dns4/localhost").parse().unwrap();
    let mut node = Node::start(cluster.options(Role::Node, vec![name]));
    node.wait_for_peer(first.peer);
    let gone = first.peer;
    first.kill();
    node.wait("loss", |event| (event == ControlEvent::PeerLost { peer: gone }).then_some(()));
    options.listen = vec![port];
    // A killed process leaves its port to the next at once; here the runtime may take a moment to let go of it.
    let patient = Instant::now() + PATIENCE;
    let first = loop {
        let runtime = Runtime::new().unwrap();
        match runtime.block_on(Control::start(options.clone())) {
            Ok(started) => break (runtime, started),
            Err(error) => assert!(Instant::now() < patient, "{error:?}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    node.wait_for_peer(gone);
    drop(first);
}

#[test]
fn a_node_that_is_told_to_join_itself_does_not() {
    let cluster = Cluster::new();
    let mut options = cluster.options(Role::Node, vec![]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let own: Multiaddr = format!("/ip4/127.0.0.1/tcp/{free}").parse().unwrap();
    let id = options.identity.keypair().public().to_peer_id();
    options.listen = vec![own.clone()];
    options.bootstrap_peers = vec![own.clone(), own.with_p2p(id).unwrap()];
    let mut node = Node::start(options);
    let other = Node::start(cluster.options(Role::Node, vec![node.address.clone()]));
    node.wait_for_peer(other.peer);
    assert_eq!(node.peers().iter().map(|status| status.peer).collect::<Vec<_>>(), [other.peer]);
}

#[test]
fn what_cannot_work_is_refused_at_the_start() {
    let runtime = Runtime::new().unwrap();
    let cluster = Cluster::new();
    let good = cluster.options(Role::Node, vec![]);
    let start = |options: ControlOptions| runtime.block_on(Control::start(options)).map(|_| ()).unwrap_err();

    let open = Membership::open(good.identity.peer(), Role::Node, "a").unwrap();
    let open = ControlOptions { admission: Admission::new(Policy::Open, open), ..good.clone() };
    let outside: Multiaddr = "/ip4/0.0.0.0/tcp/0".parse().unwrap();
    let exposed = ControlOptions { listen: vec![outside.clone()], ..open.clone() };
    assert!(matches!(start(exposed), ControlError::Membership(MembershipError::OpenCluster { .. })));
    let far = ControlOptions { bootstrap_peers: vec!["/ip4/10.0.0.1/tcp/1".parse().unwrap()], ..open.clone() };
    assert!(matches!(start(far), ControlError::Membership(MembershipError::OpenCluster { .. })));
    let wanted = ControlOptions { listen: vec![outside], insecure_open: true, ..open };
    runtime.block_on(Control::start(wanted)).unwrap();

    let udp = ControlOptions { listen: vec!["/ip4/127.0.0.1/udp/0/quic-v1".parse().unwrap()], ..good.clone() };
    assert!(matches!(start(udp), ControlError::Address { .. }));
    let other = ControlOptions { identity: Identity::generate(), ..good.clone() };
    assert!(matches!(start(other), ControlError::OtherMembership { .. }));
    let brief = ControlOptions { lease: Duration::from_millis(10), ..good.clone() };
    assert!(matches!(start(brief), ControlError::Lease { .. }));

    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("/ip4/127.0.0.1/tcp/{}", taken.local_addr().unwrap().port());
    let blocked = ControlOptions { listen: vec![listen.parse().unwrap()], ..good };
    assert!(matches!(start(blocked), ControlError::Listen { .. }));
}

#[test]
fn an_open_cluster_works_on_loopback() {
    let open = |bootstrap_peers| {
        let options = Cluster::new().options(Role::Node, bootstrap_peers);
        let membership = Membership::open(options.identity.peer(), Role::Node, "b").unwrap();
        ControlOptions { admission: Admission::new(Policy::Open, membership), ..options }
    };
    let first = Node::start(open(vec![]));
    let mut second = Node::start(open(vec![first.address.clone()]));
    second.wait_for_peer(first.peer);
    let zones: BTreeSet<_> = second.peers().into_iter().map(|status| status.zone).collect();
    assert_eq!(zones, ["b".to_owned()].into());
}
