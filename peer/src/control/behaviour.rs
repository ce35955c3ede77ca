//! The protocols of the control plane, each with its bounds.

use std::time::Duration;

use libp2p::{
    StreamProtocol,
    connection_limits::{self, ConnectionLimits},
    gossipsub::{self, MessageAuthenticity, ValidationMode, WhitelistSubscriptionFilter},
    identify,
    identity::Keypair,
    kad::{self, store::MemoryStore},
    mdns, ping,
    swarm::{NetworkBehaviour, behaviour::toggle::Toggle},
};

use super::{ControlError, provider};

const PROTOCOL: &str = "/shoal/1";
const KAD_PROTOCOL: StreamProtocol = StreamProtocol::new("/shoal/kad/1");

/// Leases are gossiped under this topic.
const LEASES: &str = "shoal/leases/1";

/// Revocations are gossiped under this topic, lists of at most [`MAX_LISTED`].
const REVOCATIONS: &str = "shoal/revocations/1";

/// Preheats are gossiped under this topic. No other topic is known here.
const PREHEATS: &str = "shoal/preheats/1";

/// Revocations in one message; each has less than 160 bytes.
pub(super) const MAX_LISTED: usize = 24;

/// Largest gossip message. A lease has some 300 bytes, a preheat that names its nodes 3000.
const MAX_GOSSIP_BYTES: usize = 4096;

/// Neighbours outside the mesh, at least, and what part of them, to whom each heartbeat names the messages of the last three: half
/// of the usual. Leases come every few seconds, so with the usual numbers the names are more messages than the leases; and
/// whoever misses one has the next.
const LAZY: usize = 3;
const LAZY_PART: f64 = 0.1;

/// Connections of a node, in all. One that is idle is closed soon, so a bootstrap peer serves many more.
const MAX_CONNECTIONS: u32 = 1024;

/// Handshakes that others may have under way here. A stranger holds one for ten seconds at most.
const MAX_HANDSHAKES: u32 = 256;

/// Both sides may dial at the same time, by more than one address.
const MAX_CONNECTIONS_PER_PEER: u32 = 4;

pub(super) type Gossip = gossipsub::Behaviour<gossipsub::IdentityTransform, WhitelistSubscriptionFilter>;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    limits: connection_limits::Behaviour,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) kad: kad::Behaviour<MemoryStore>,
    pub(super) gossip: Gossip,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
}

impl Behaviour {
    pub(super) fn new(keypair: &Keypair, mdns: bool) -> Result<Self, ControlError> {
        let peer = keypair.public().to_peer_id();
        let mdns = mdns.then(|| mdns::tokio::Behaviour::new(mdns::Config::default(), peer)).transpose();
        Ok(Self {
            limits: connection_limits::Behaviour::new(limits()),
            identify: identify::Behaviour::new(
                identify::Config::new(PROTOCOL.into(), keypair.public())
                    .with_agent_version(concat!("shoal/", env!("CARGO_PKG_VERSION")).into()),
            ),
            ping: ping::Behaviour::new(ping::Config::new().with_timeout(Duration::from_secs(10))),
            kad: kad(peer),
            gossip: gossip(keypair)?,
            mdns: mdns.map_err(ControlError::Mdns)?.into(),
        })
    }
}

/// The topic of the leases.
pub(super) fn leases() -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(LEASES)
}

/// The topic of the revocations.
pub(super) fn revocations() -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(REVOCATIONS)
}

/// The topic of the preheats.
pub(super) fn preheats() -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(PREHEATS)
}

fn limits() -> ConnectionLimits {
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(MAX_HANDSHAKES))
        .with_max_pending_outgoing(Some(MAX_HANDSHAKES))
        .with_max_established(Some(MAX_CONNECTIONS))
        .with_max_established_per_peer(Some(MAX_CONNECTIONS_PER_PEER))
}

fn kad(peer: libp2p::PeerId) -> kad::Behaviour<MemoryStore> {
    let mut config = kad::Config::new(KAD_PROTOCOL);
    config
        .set_provider_record_ttl(Some(provider::RECORD_TTL))
        .set_provider_publication_interval(Some(provider::ANNOUNCE_EVERY))
        .set_query_timeout(Duration::from_secs(20))
        // Records come by the loop, which drops values and cuts the addresses of providers down.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        .set_caching(kad::Caching::Disabled)
        .set_replication_interval(None)
        .set_publication_interval(None);
    let store = MemoryStore::with_config(peer, provider::store_limits());
    let mut kad = kad::Behaviour::with_config(peer, store, config);
    kad.set_mode(Some(kad::Mode::Server));
    kad
}

fn gossip(keypair: &Keypair) -> Result<Gossip, ControlError> {
    let config = gossipsub::ConfigBuilder::default()
        .max_transmit_size(MAX_GOSSIP_BYTES)
        .validation_mode(ValidationMode::Strict)
        .validate_messages()
        .heartbeat_initial_delay(Duration::from_millis(200))
        .gossip_lazy(LAZY)
        .gossip_factor(LAZY_PART)
        .connection_handler_queue_len(256)
        .build()
        .map_err(|error| ControlError::Gossip(error.to_string()))?;
    let topics = [leases(), revocations(), preheats()];
    let known = WhitelistSubscriptionFilter(topics.iter().map(gossipsub::IdentTopic::hash).collect());
    let signed = MessageAuthenticity::Signed(keypair.clone());
    let mut gossip = Gossip::new_with_subscription_filter(signed, config, known)
        .map_err(|error| ControlError::Gossip(error.to_owned()))?;
    for topic in topics {
        gossip.subscribe(&topic).map_err(|error| ControlError::Gossip(error.to_string()))?;
    }
    Ok(gossip)
}
