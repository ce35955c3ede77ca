//! Who is no member reaches no protocol, and does no harm.

use std::io::{Read, Write};

use futures::StreamExt;
use libp2p::{
    Swarm, identify,
    swarm::{self, DialError, SwarmEvent},
};

use super::*;
use crate::{
    control::transport::{Reach, transport},
    membership::Refusal,
};

/// How a dial by a stranger ended, and what it heard of the other side's protocols until then.
struct Outcome {
    error: String,
    identified: bool,
}

/// A swarm that speaks the membership step but shows whatever it is told, and believes anybody.
fn knock(identity: &Identity, shown: Vec<u8>, target: &Multiaddr) -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _context = runtime.enter();
    let own = Membership::open(identity.peer(), Role::Node, "a").unwrap();
    let gate = Arc::new(Gate::new(Admission::new(Policy::Open, own.showing(shown.into()))));
    let reach = Reach { policy: Policy::Open, insecure_open: true };
    let config = identify::Config::new("/shoal/1".into(), identity.keypair().public());
    let mut swarm = Swarm::new(
        transport(identity.keypair(), gate, reach).unwrap(),
        identify::Behaviour::new(config),
        identity.keypair().public().to_peer_id(),
        swarm::Config::with_tokio_executor(),
    );
    swarm.dial(target.clone()).unwrap();
    let mut identified = false;
    let ending = async {
        loop {
            match swarm.select_next_some().await {
                SwarmEvent::Behaviour(identify::Event::Received { .. } | identify::Event::Sent { .. }) => {
                    identified = true;
                }
                SwarmEvent::OutgoingConnectionError { error: DialError::Transport(errors), .. } => {
                    return errors.iter().map(|(_, error)| format!("{error:?}")).collect();
                }
                SwarmEvent::ConnectionClosed { cause, .. } => return format!("{cause:?}"),
                _ => {}
            }
        }
    };
    let error = runtime.block_on(async { tokio::time::timeout(PATIENCE, ending).await }).expect("an end");
    Outcome { error, identified }
}

/// The node still serves members, and the first peer that it ever saw is this one.
fn assert_unharmed(cluster: &Cluster, node: &mut Node) {
    let member = Node::start(cluster.options(Role::Node, vec![node.address.clone()]));
    let first = node.wait("first peer", |event| match event {
        ControlEvent::PeerSeen { peer, .. } => Some(peer),
        _ => None,
    });
    assert_eq!(first, member.peer);
}

#[test]
fn strangers_are_turned_away_before_any_protocol() {
    let cluster = Cluster::new();
    let mut node = Node::start(cluster.options(Role::Node, vec![]));
    let stranger = Identity::generate();
    let peer = stranger.peer();
    let certificate = |cluster: &Cluster, peer, expires| {
        certificate(peer, Role::Seed, expires).sign(&cluster.key).unwrap().to_vec()
    };
    let later = membership::unix_now() + 3600;
    let cases = [
        (vec![], Refusal::Missing),
        (Membership::open(peer, Role::Seed, "a").unwrap().shown().to_vec(), Refusal::Missing),
        (b"let me in".to_vec(), Refusal::Malformed),
        (vec![0; 5000], Refusal::TooLong),
        (certificate(&Cluster::new(), peer, later), Refusal::BadSignature),
        (certificate(&cluster, peer, membership::unix_now() - 1), Refusal::Expired),
        (certificate(&cluster, node.peer, later), Refusal::WrongPeer),
    ];
    let count = cases.len() as u64;
    for (shown, refusal) in cases {
        let outcome = knock(&stranger, shown, &node.address);
        assert!(!outcome.identified, "{refusal}");
        // A certificate that is far too long is not read to its end, so the reset may overtake the verdict.
        let told = outcome.error.contains(&format!("{refusal:?}"));
        assert!(told || refusal == Refusal::TooLong, "{refusal}: {}", outcome.error);
    }
    assert_eq!(node.control.refused(), count);
    assert!(node.peers().is_empty());
    assert_unharmed(&cluster, &mut node);
}

#[test]
fn a_node_that_dials_a_stranger_turns_away_as_well() {
    let cluster = Cluster::new();
    let stranger = Node::start(Cluster::new().options(Role::Seed, vec![]));
    let mut node = Node::start(cluster.options(Role::Node, vec![stranger.address.clone()]));
    assert_unharmed(&cluster, &mut node);
    let patient = Instant::now() + PATIENCE;
    while (node.control.refused(), stranger.control.refused()) < (1, 1) && Instant::now() < patient {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(node.control.refused() > 0 && stranger.control.refused() > 0);
    assert!(stranger.peers().is_empty());
}

#[test]
fn garbage_does_no_harm() {
    let cluster = Cluster::new();
    let mut node = Node::start(cluster.options(Role::Node, vec![]));
    let listening = node.address.iter().last();
    let Some(libp2p::multiaddr::Protocol::Tcp(port)) = listening else { panic!("{listening:?}") };
    let host = Ipv4Addr::LOCALHOST;
    let mut endless = vec![0xff; 1 << 16];
    endless[..20].copy_from_slice(b"\x13/multistream/1.0.0\n");
    let silent: Vec<_> = (0..20).map(|_| std::net::TcpStream::connect((host, port)).unwrap()).collect();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &endless, b"\x13/multistream/1.0.0\n\x07/noise\n"] {
        let mut socket = std::net::TcpStream::connect((host, port)).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        // The node may hang up half-way through; that is the point.
        let _ = socket.write_all(bytes);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert!(answer.len() < 100, "a stranger was told {} bytes", answer.len());
    }
    assert_unharmed(&cluster, &mut node);
    drop(silent);
}
