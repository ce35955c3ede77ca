//! A node of the previous release: it knows the gossip of that release, by messages of its own, and no others.

use futures::StreamExt;
use libp2p::{
    Swarm,
    gossipsub::{self, IdentTopic, MessageAuthenticity},
    identify, ping,
    swarm::{self, NetworkBehaviour, SwarmEvent},
};
use prost::Message;
use shoal_rafs::oci::Reference;

use super::*;
use crate::control::{
    preheat::{Chosen, Preheat, Word},
    transport::{Reach, transport},
};

/// A lease as that release writes and reads it.
#[derive(Clone, PartialEq, Message)]
struct OldLease {
    #[prost(bytes = "vec", tag = "1")]
    membership: Vec<u8>,
    #[prost(uint32, tag = "2")]
    capacity: u32,
    #[prost(bytes = "vec", repeated, tag = "3")]
    addresses: Vec<Vec<u8>>,
    #[prost(uint64, tag = "4")]
    sequence: u64,
    #[prost(uint32, tag = "5")]
    length_ms: u32,
}

/// The same with something that neither release knows.
#[derive(Clone, PartialEq, Message)]
struct NewsOfALease {
    #[prost(string, tag = "90")]
    news: String,
}

#[derive(NetworkBehaviour)]
struct Protocols {
    identify: identify::Behaviour,
    ping: ping::Behaviour,
    gossip: gossipsub::Behaviour,
}

struct Previous {
    swarm: Swarm<Protocols>,
    shown: Vec<u8>,
    peer: PeerId,
}

impl Previous {
    /// A seed peer to be; needs a runtime.
    fn new(cluster: &Cluster) -> Self {
        let ControlOptions { identity, admission, .. } = cluster.options(Role::Seed, vec![]);
        let (keypair, shown) = (identity.keypair(), admission.own().shown().to_vec());
        let reach = Reach { policy: cluster.policy.clone(), insecure_open: false };
        let config = gossipsub::Config::default();
        let signed = MessageAuthenticity::Signed(keypair.clone());
        let protocols = Protocols {
            identify: identify::Behaviour::new(identify::Config::new("/shoal/1".into(), keypair.public())),
            ping: ping::Behaviour::default(),
            gossip: gossipsub::Behaviour::new(signed, config).unwrap(),
        };
        let transport = transport(keypair, Arc::new(Gate::new(admission)), reach).unwrap();
        let (id, config) = (keypair.public().to_peer_id(), swarm::Config::with_tokio_executor());
        let mut swarm = Swarm::new(transport, protocols, id, config);
        for topic in ["shoal/leases/1", "shoal/revocations/1"] {
            swarm.behaviour_mut().gossip.subscribe(&IdentTopic::new(topic)).unwrap();
        }
        Self { swarm, shown, peer: identity.peer() }
    }

    /// Says that it is a seed peer, as often as it takes for somebody to hear it.
    fn publish(&mut self, sequence: u64) {
        let lease = OldLease {
            membership: self.shown.clone(),
            capacity: 5,
            addresses: vec![vec![127, 0, 0, 1, 0x12, 0xc2]],
            sequence,
            length_ms: 60_000,
        };
        let news = NewsOfALease { news: "of a later release".into() };
        let message = [lease.encode_to_vec(), news.encode_to_vec()].concat();
        // Nobody may be subscribed yet.
        let _ = self.swarm.behaviour_mut().gossip.publish(IdentTopic::new("shoal/leases/1"), message);
    }

    /// Runs, and tells each lease that it hears, until that is stopped.
    async fn run(mut self, leases: mpsc::Sender<OldLease>) {
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        let mut sequence = 1;
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    self.publish(sequence);
                    sequence += 1;
                }
                event = self.swarm.select_next_some() => match event {
                    SwarmEvent::Behaviour(ProtocolsEvent::Gossip(gossipsub::Event::Message { message, .. })) => {
                        assert_eq!(message.topic, IdentTopic::new("shoal/leases/1").hash());
                        let lease = OldLease::decode(&message.data[..]).expect("a lease that is known");
                        leases.send(lease).await.expect("the test listens");
                    }
                    SwarmEvent::ConnectionClosed { cause, .. } => panic!("the connection ended: {cause:?}"),
                    _ => {}
                },
            }
        }
    }
}

#[test]
fn a_node_of_the_previous_release_leads_and_follows() {
    let cluster = Cluster::new();
    let mut seed = Node::start(cluster.options(Role::Seed, vec![]));
    let runtime = Runtime::new().unwrap();
    let _context = runtime.enter();
    let mut previous = Previous::new(&cluster);
    previous.swarm.dial(seed.address.clone()).unwrap();
    let peer = previous.peer;
    let (heard, mut leases) = mpsc::channel(1024);
    let running = runtime.spawn(previous.run(heard));

    seed.wait_for_peer(peer);
    let ControlEvent::Lease { zone, capacity, data_addresses, .. } = seed.wait_for_lease(peer) else {
        unreachable!("picked above")
    };
    assert_eq!((zone.as_str(), capacity), ("a", 5));
    assert_eq!(data_addresses, [SocketAddr::from((Ipv4Addr::LOCALHOST, 0x12c2))]);

    // A word about a preheat is gossip that it does not know, and hears nothing of.
    let digest = format!("sha256:{}", "5".repeat(64));
    let reference: Reference = format!("registry.test/app@{digest}").parse().unwrap();
    let lifetime = Duration::from_secs(60);
    let preheat = Preheat { id: [1; 16], reference, chosen: Chosen::All, lifetime };
    seed.runtime.block_on(seed.control.say(Word::Asked(preheat))).unwrap();
    let mut last = 0;
    for _ in 0..3 {
        let lease = runtime.block_on(async { tokio::time::timeout(PATIENCE, leases.recv()).await });
        let lease = lease.expect("a lease in time").expect("it runs");
        assert_eq!((lease.capacity, &lease.addresses[..]), (7, &[vec![127, 0, 0, 1, 0x12, 0xc2]][..]));
        assert!(lease.sequence > last && lease.length_ms == 3000);
        last = lease.sequence;
    }
    assert!(!running.is_finished());
    running.abort();
}
