//! The peers that the node is connected to on this plane, as far as they have said who they are.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use libp2p::{Multiaddr, identify, swarm::ConnectionId};

use super::{ControlEvent, PeerStatus, addresses};
use crate::membership::Admitted;

/// Longest name and version of a peer that is kept, in bytes.
const MAX_AGENT_BYTES: usize = 64;

/// All connected peers. The swarm's limits bound it.
#[derive(Debug, Default)]
pub(super) struct Peers {
    peers: HashMap<libp2p::PeerId, Peer>,
}

#[derive(Debug)]
struct Peer {
    admitted: Admitted,
    /// The connections, and the address that each leads to.
    connections: BTreeMap<ConnectionId, Option<IpAddr>>,
    /// Whether it has said what its addresses are, and so was reported.
    seen: bool,
    agent: String,
    control_addresses: BTreeSet<Multiaddr>,
    data_addresses: BTreeSet<SocketAddr>,
    round_trip: Option<Duration>,
}

/// What an identify message changed: the addresses of the peer for the routing table, and whether to report it.
#[derive(Debug)]
pub(super) struct Identified {
    pub(super) added: Vec<Multiaddr>,
    pub(super) removed: Vec<Multiaddr>,
    pub(super) seen: Option<ControlEvent>,
}

impl Peers {
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    pub(super) fn connected(
        &mut self,
        peer: libp2p::PeerId,
        admitted: Admitted,
        connection: ConnectionId,
        remote: Option<IpAddr>,
    ) {
        let entry = self.peers.entry(peer).or_insert_with(|| Peer {
            admitted: admitted.clone(),
            connections: BTreeMap::new(),
            seen: false,
            agent: String::new(),
            control_addresses: BTreeSet::new(),
            data_addresses: BTreeSet::new(),
            round_trip: None,
        });
        entry.admitted = admitted;
        entry.connections.insert(connection, remote);
    }

    /// A connection is gone. With the last one the peer is, and is reported as lost if it was ever reported.
    pub(super) fn closed(&mut self, peer: &libp2p::PeerId, connection: ConnectionId) -> Option<ControlEvent> {
        let entry = self.peers.get_mut(peer)?;
        entry.connections.remove(&connection);
        if !entry.connections.is_empty() {
            return None;
        }
        let entry = self.peers.remove(peer)?;
        entry.seen.then_some(ControlEvent::PeerLost { peer: entry.admitted.peer })
    }

    pub(super) fn identified(
        &mut self,
        peer: &libp2p::PeerId,
        connection: ConnectionId,
        info: &identify::Info,
    ) -> Option<Identified> {
        let entry = self.peers.get_mut(peer)?;
        let remote = entry.connections.get(&connection).copied().flatten();
        let (control, data) = addresses::sort(&info.listen_addrs, remote);
        let changed = !entry.seen || data != entry.data_addresses;
        let added = control.difference(&entry.control_addresses).cloned().collect();
        let removed = entry.control_addresses.difference(&control).cloned().collect();
        entry.agent = info.agent_version.chars().filter(|c| !c.is_control()).take(MAX_AGENT_BYTES / 4).collect();
        entry.control_addresses = control;
        entry.data_addresses = data;
        entry.seen = true;
        let seen = changed.then(|| ControlEvent::PeerSeen {
            peer: entry.admitted.peer,
            role: entry.admitted.role,
            zone: entry.admitted.zone.clone(),
            data_addresses: entry.data_addresses.iter().copied().collect(),
        });
        Some(Identified { added, removed, seen })
    }

    pub(super) fn measured(&mut self, peer: &libp2p::PeerId, round_trip: Duration) {
        if let Some(entry) = self.peers.get_mut(peer) {
            entry.round_trip = Some(round_trip);
        }
    }

    /// Everyone, as what it was let in, and where its control plane listens.
    pub(super) fn members(&self) -> impl Iterator<Item = (&libp2p::PeerId, &Admitted, &BTreeSet<Multiaddr>)> {
        self.peers.iter().map(|(peer, entry)| (peer, &entry.admitted, &entry.control_addresses))
    }

    /// For `ctl peers`, in the order of identities.
    pub(super) fn status(&self, has_lease: impl Fn(&shoal_proto::PeerId) -> bool) -> Vec<PeerStatus> {
        let mut status: Vec<_> = self.peers.values().map(|entry| entry.status(&has_lease)).collect();
        status.sort_by_key(|status| status.peer);
        status
    }
}

impl Peer {
    fn status(&self, has_lease: impl Fn(&shoal_proto::PeerId) -> bool) -> PeerStatus {
        PeerStatus {
            peer: self.admitted.peer,
            role: self.admitted.role,
            zone: self.admitted.zone.clone(),
            agent: self.agent.clone(),
            control_addresses: self.control_addresses.iter().cloned().collect(),
            data_addresses: self.data_addresses.iter().copied().collect(),
            round_trip: self.round_trip,
            has_lease: has_lease(&self.admitted.peer),
        }
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;
    use shoal_proto::{PeerId, Role};

    use super::*;

    fn info(addresses: &[&str]) -> identify::Info {
        identify::Info {
            public_key: Keypair::generate_ed25519().public(),
            protocol_version: String::new(),
            agent_version: "shoal/1\n\u{1b}[31m".into(),
            listen_addrs: addresses.iter().map(|text| text.parse().unwrap()).collect(),
            protocols: Vec::new(),
            observed_addr: Multiaddr::empty(),
            signed_peer_record: None,
        }
    }

    fn admitted(n: u8) -> Admitted {
        Admitted { peer: PeerId::new([n; 32]), role: Role::Node, zone: "a".into(), issued: 0, expires: u64::MAX }
    }

    #[test]
    fn a_peer_is_seen_when_it_has_spoken_and_lost_with_its_last_connection() {
        let (mut peers, id) = (Peers::default(), libp2p::PeerId::random());
        let peer = PeerId::new([1; 32]);
        let admitted = admitted(1);
        let connections = [1, 2].map(ConnectionId::new_unchecked);
        for connection in connections {
            peers.connected(id, admitted.clone(), connection, Some([127, 0, 0, 1].into()));
        }
        let first = info(&["/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/udp/2/quic-v1"]);
        let identified = peers.identified(&id, connections[0], &first).unwrap();
        assert_eq!((identified.added.len(), identified.removed.len()), (1, 0));
        let data_addresses = vec!["127.0.0.1:2".parse().unwrap()];
        let seen = ControlEvent::PeerSeen { peer, role: Role::Node, zone: "a".into(), data_addresses };
        assert_eq!(identified.seen, Some(seen));

        let moved = info(&["/ip4/127.0.0.1/tcp/9", "/ip4/127.0.0.1/udp/2/quic-v1"]);
        let identified = peers.identified(&id, connections[1], &moved).unwrap();
        assert_eq!((identified.added.len(), identified.removed.len(), identified.seen), (1, 1, None));

        assert_eq!(peers.status(|_| true)[0].agent, "shoal/1[31m");
        assert_eq!(peers.closed(&id, connections[0]), None);
        assert_eq!(peers.closed(&id, connections[1]), Some(ControlEvent::PeerLost { peer }));
        assert_eq!((peers.len(), peers.closed(&id, connections[1])), (0, None));
    }

    #[test]
    fn a_peer_that_never_spoke_is_never_lost() {
        let (mut peers, id) = (Peers::default(), libp2p::PeerId::random());
        let admitted = admitted(1);
        let connection = ConnectionId::new_unchecked(1);
        peers.connected(id, admitted, connection, None);
        assert_eq!(peers.closed(&id, connection), None);
    }
}
