//! What the swarm says, protocol by protocol.

use std::time::Instant;

use libp2p::{
    Multiaddr,
    gossipsub::{self, MessageAcceptance},
    identify,
    kad::{self, GetProvidersOk, InboundRequest, QueryResult, store::RecordStore},
    mdns,
    multiaddr::Protocol,
    ping,
    swarm::{ConnectionId, DialError, SwarmEvent, dial_opts::DialOpts},
};

use super::{Plane, known};
use crate::{
    control::{
        ControlEvent,
        addresses::{self, MAX_ADDRESSES},
        behaviour::{self, BehaviourEvent},
        lease::{Change, Lease, LeaseError},
    },
    membership,
};

/// Providers, or neighbours found by mDNS, that are dialed at once because of one message.
const MAX_DIALS: usize = 8;

impl Plane {
    pub(super) fn handle(&mut self, event: SwarmEvent<BehaviourEvent>) {
        let now = Instant::now();
        match event {
            SwarmEvent::Behaviour(event) => self.handle_protocol(now, event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.handle_established(now, peer_id, connection_id, endpoint.get_remote_address());
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, num_established, .. } => {
                self.backlog.extend(self.peers.closed(&peer_id, connection_id));
                if num_established == 0 {
                    self.bootstrap.lost(&peer_id, now);
                }
            }
            SwarmEvent::OutgoingConnectionError { connection_id, error, .. } => {
                self.handle_failed_dial(now, connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                tracing::debug!(from = %send_back_addr, error = &error as &dyn std::error::Error, "not let in");
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                for address in self.advertised(address) {
                    self.swarm.add_external_address(address);
                }
                self.addresses_changed();
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                for address in self.advertised(address) {
                    self.swarm.remove_external_address(&address);
                }
                self.addresses_changed();
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "trouble on a listening socket"),
            SwarmEvent::ListenerClosed { addresses, reason: Err(error), .. } => {
                tracing::error!(%error, ?addresses, "a listening socket is gone");
            }
            _ => {}
        }
    }

    fn handle_protocol(&mut self, now: Instant, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received { peer_id, connection_id, info }) => {
                self.handle_identified(peer_id, connection_id, &info);
            }
            BehaviourEvent::Ping(ping::Event { peer, connection, result }) => match result {
                Ok(round_trip) => self.peers.measured(&peer, round_trip),
                Err(ping::Failure::Unsupported) => {}
                Err(error) => {
                    tracing::debug!(%peer, %error, "no answer to a ping; the connection is closed");
                    self.swarm.close_connection(connection);
                }
            },
            BehaviourEvent::Kad(event) => self.handle_kad(event),
            BehaviourEvent::Gossip(gossipsub::Event::Message { propagation_source, message_id, message }) => {
                let acceptance = self.handle_gossip(now, &message);
                let gossip = &mut self.swarm.behaviour_mut().gossip;
                gossip.report_message_validation_result(&message_id, &propagation_source, acceptance);
            }
            BehaviourEvent::Gossip(gossipsub::Event::Subscribed { .. }) => {
                self.renew_soon(now);
                self.members.tell_soon(now);
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => self.handle_neighbours(found),
            _ => {}
        }
    }

    fn handle_established(
        &mut self,
        now: Instant,
        peer: libp2p::PeerId,
        connection: ConnectionId,
        remote: &Multiaddr,
    ) {
        let Some(admitted) = self.gate.admitted(&peer) else {
            // Crowded out between the upgrade and here by a thousand others; it may come again.
            self.swarm.close_connection(connection);
            self.bootstrap.failed(connection, now);
            return;
        };
        self.peers.connected(peer, admitted, connection, addresses::ip(remote));
        self.bootstrap.connected(connection, peer);
    }

    fn handle_failed_dial(&mut self, now: Instant, connection: ConnectionId, error: &DialError) {
        if matches!(error, DialError::LocalPeerId { .. }) {
            self.bootstrap.is_own(connection, Instant::now());
        } else if self.bootstrap.failed(connection, now) {
            tracing::warn!(%error, "a bootstrap peer cannot be reached");
        } else {
            tracing::debug!(%error, "a peer cannot be reached");
        }
    }

    fn handle_identified(&mut self, peer: libp2p::PeerId, connection: ConnectionId, info: &identify::Info) {
        let Some(identified) = self.peers.identified(&peer, connection, info) else { return };
        let kad = &mut self.swarm.behaviour_mut().kad;
        // In this order, since a peer leaves the routing table with its last address.
        for address in identified.added {
            kad.add_address(&peer, address);
        }
        for address in identified.removed {
            kad.remove_address(&peer, &address);
        }
        self.backlog.extend(identified.seen);
    }

    fn handle_kad(&mut self, event: kad::Event) {
        match event {
            kad::Event::InboundRequest { request: InboundRequest::AddProvider { record: Some(mut record) } } => {
                record.addresses.retain(addresses::is_control);
                record.addresses.truncate(MAX_ADDRESSES);
                if let Err(error) = self.swarm.behaviour_mut().kad.store_mut().add_provider(record) {
                    tracing::debug!(%error, "a provider record is not kept");
                }
            }
            kad::Event::OutboundQueryProgressed { id, result: QueryResult::GetProviders(result), step, .. } => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    self.handle_providers(&id, providers.into_iter().collect());
                }
                if step.last
                    && let Some((blob, peers)) = self.lookups.finish(&id)
                {
                    self.backlog.push_back(ControlEvent::Providers { blob, peers });
                }
            }
            _ => {}
        }
    }

    /// Who was found is dialed, since only identify tells where its data plane is.
    fn handle_providers(&mut self, query: &kad::QueryId, mut providers: Vec<libp2p::PeerId>) {
        providers.retain(|peer| peer != self.swarm.local_peer_id());
        let strangers = providers.iter().filter(|peer| !self.swarm.is_connected(peer)).take(MAX_DIALS);
        for peer in strangers.copied().collect::<Vec<_>>() {
            self.dial(DialOpts::peer_id(peer).build());
        }
        self.lookups.found(query, providers.iter().filter_map(known));
    }

    /// Takes a lease in, revocations, or a word about a preheat. What is neither stops here; what is old news is not passed on either.
    fn handle_gossip(&mut self, now: Instant, message: &gossipsub::Message) -> MessageAcceptance {
        let Some(author) = message.source.as_ref().and_then(known) else { return MessageAcceptance::Reject };
        if message.topic == behaviour::revocations().hash() {
            return self.handle_revocations(&author, &message.data);
        }
        if message.topic == behaviour::preheats().hash() {
            return self.handle_word(now, author, &message.data);
        }
        let lease = Lease::decode(&message.data, &author, &self.options.admission, membership::unix_now());
        match lease {
            Ok(lease) => match self.lease(now, lease) {
                Change::Nothing => MessageAcceptance::Ignore,
                Change::Until(_) | Change::Ended | Change::Full => MessageAcceptance::Accept,
            },
            // Clocks differ, and news travels: the next node may know better, and who passed it on is not to blame.
            Err(LeaseError::Membership(membership::Refusal::Expired | membership::Refusal::Revoked)) => {
                MessageAcceptance::Ignore
            }
            Err(error) => {
                tracing::debug!(%author, %error, "not a lease");
                MessageAcceptance::Reject
            }
        }
    }

    fn handle_neighbours(&mut self, found: Vec<(libp2p::PeerId, Multiaddr)>) {
        for (peer, address) in found.into_iter().filter(|(_, address)| addresses::is_control(address)).take(MAX_DIALS)
        {
            self.dial(DialOpts::peer_id(peer).addresses(vec![address]).build());
        }
    }

    pub(super) fn dial(&mut self, options: DialOpts) {
        match self.swarm.dial(options) {
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => tracing::debug!(%error, "a peer cannot be dialed"),
        }
    }

    /// What is told to others because this plane listens on `address`: itself, and a data plane that listens on all
    /// addresses.
    fn advertised(&self, address: Multiaddr) -> Vec<Multiaddr> {
        let data = self.options.data_address;
        let ip = addresses::ip(&address).filter(|ip| data.is_ipv6() || ip.is_ipv4());
        let data = ip.filter(|_| data.ip().is_unspecified()).map(|ip| addresses::from_data((ip, data.port()).into()));
        std::iter::once(address).chain(data).collect()
    }

    fn addresses_changed(&mut self) {
        let tcp = |address: &&Multiaddr| address.iter().any(|part| matches!(part, Protocol::Tcp(_)));
        let mut listening: Vec<_> = self.swarm.listeners().filter(tcp).cloned().collect();
        listening.sort();
        self.backlog.push_back(ControlEvent::Listening(listening));
        let connected: Vec<_> = self.swarm.connected_peers().copied().collect();
        self.swarm.behaviour_mut().identify.push(connected);
        self.renew_soon(Instant::now());
    }
}
