//! The task that owns the swarm: one loop over commands, the swarm, resolved names and deadlines. What the swarm says
//! is taken in by [`incoming`]; nothing is decided here that a table next door could decide.

mod incoming;
mod members;
mod words;

use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, Swarm, TransportError, kad,
    multiaddr::Protocol,
    swarm::{self, DialError, SwarmEvent, dial_opts::DialOpts},
};
use shoal_proto::{BlobId, PeerId, Role};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use self::{members::Members, words::Pace};
use super::{
    Command, ControlError, ControlEvent, ControlOptions,
    addresses::{self, MAX_ADDRESSES},
    admission::Gate,
    behaviour::{self, Behaviour},
    bootstrap::Bootstrap,
    lease::{self, Change, Lease, Leases},
    peers::Peers,
    provider::{self, Lookups},
    transport::{Reach, transport},
};

/// Events that wait for room in the channel before the swarm is left waiting as well.
const BACKLOG: usize = 512;

/// How long an idle connection is kept. Those in the gossip mesh are never idle.
const IDLE: Duration = Duration::from_secs(60);

/// Addresses that are taken from one name, and how long resolving it may last.
const MAX_RESOLVED: usize = 16;
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Shortest pause between two leases, however many peers turn up.
const LEASE_PAUSE: Duration = Duration::from_millis(500);

/// How long the last messages of a stopping node have to leave it; gossip tells nobody when they have.
const FAREWELL: Duration = Duration::from_millis(250);

/// State of the control plane; see the module.
pub(super) struct Plane {
    swarm: Swarm<Behaviour>,
    options: ControlOptions,
    gate: Arc<Gate>,
    peers: Peers,
    leases: Leases,
    lookups: Lookups,
    bootstrap: Bootstrap,
    /// Names being resolved: the target, its address, and what the name leads to.
    resolving: JoinSet<(usize, Multiaddr, Vec<IpAddr>)>,
    /// Of a seed peer's own lease.
    renewal: Option<Renewal>,
    members: Members,
    pace: Pace,
    backlog: VecDeque<ControlEvent>,
}

struct Renewal {
    last: Option<Instant>,
    next: Instant,
    sequence: u64,
}

impl Plane {
    pub(super) fn new(options: ControlOptions, gate: Arc<Gate>) -> Result<Self, ControlError> {
        let reach = Reach { policy: options.admission.policy().clone(), insecure_open: options.insecure_open };
        check(&options, &reach)?;
        let keypair = options.identity.keypair();
        let swarm = Swarm::new(
            transport(keypair, gate.clone(), reach)?,
            Behaviour::new(keypair, options.mdns)?,
            keypair.public().to_peer_id(),
            swarm::Config::with_tokio_executor().with_idle_connection_timeout(IDLE),
        );
        let now = Instant::now();
        let is_seed = options.admission.own().role() == Role::Seed;
        let phase = options.identity.peer().as_bytes()[0];
        Ok(Self {
            bootstrap: Bootstrap::new(options.bootstrap_peers.clone(), phase, now),
            members: Members::new(now),
            pace: Pace::default(),
            renewal: is_seed.then_some(Renewal { last: None, next: now, sequence: 0 }),
            swarm,
            options,
            gate,
            peers: Peers::default(),
            leases: Leases::default(),
            lookups: Lookups::default(),
            resolving: JoinSet::new(),
            backlog: VecDeque::new(),
        })
    }

    /// Starts to listen, and waits until the addresses are known.
    pub(super) async fn listen(&mut self) -> Result<(), ControlError> {
        let mut waiting = HashMap::new();
        for address in self.options.listen.clone() {
            let failed = |source| ControlError::Listen { address: address.clone(), source };
            let listener = self.swarm.listen_on(address.clone()).map_err(|error| match error {
                TransportError::Other(error) => failed(error),
                TransportError::MultiaddrNotSupported(_) => failed(io::ErrorKind::Unsupported.into()),
            })?;
            waiting.insert(listener, address);
        }
        let data = self.options.data_address;
        if !data.ip().is_unspecified() {
            self.swarm.add_external_address(addresses::from_data(data));
        }
        while !waiting.is_empty() {
            let event = self.swarm.select_next_some().await;
            match &event {
                SwarmEvent::NewListenAddr { listener_id, .. } => {
                    waiting.remove(listener_id);
                }
                SwarmEvent::ListenerClosed { listener_id, reason: Err(error), .. } => {
                    if let Some(address) = waiting.remove(listener_id) {
                        return Err(ControlError::Listen { address, source: error.kind().into() });
                    }
                }
                _ => {}
            }
            self.handle(event);
        }
        if self.options.listen.is_empty() {
            self.backlog.push_back(ControlEvent::Listening(Vec::new()));
        }
        Ok(())
    }

    /// The loop. It ends when it is told to, or when nobody can tell it anything or hear of it any more.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>, events: mpsc::Sender<ControlEvent>) {
        let mut changes = self.options.admission.changes();
        let stopped = loop {
            self.handle_timeout(Instant::now());
            let deadline = tokio::time::Instant::from_std(self.deadline());
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Stop(reply)) => break Some(reply),
                    Some(command) => self.obey(command),
                    None => break None,
                },
                event = self.swarm.select_next_some(), if self.backlog.len() < BACKLOG => self.handle(event),
                permit = events.reserve(), if !self.backlog.is_empty() => match (permit, self.backlog.pop_front()) {
                    (Ok(permit), Some(event)) => permit.send(event),
                    _ => break None,
                },
                () = events.closed() => break None,
                // The sender lives as long as the options of this plane.
                _ = changes.changed() => self.members.look_now(),
                Some(resolved) = self.resolving.join_next() => {
                    if let Ok((index, address, ips)) = resolved {
                        self.dial_target(index, ips.into_iter().map(|ip| addresses::with_ip(&address, ip)));
                    }
                }
                () = tokio::time::sleep_until(deadline) => {}
            }
        };
        self.say_farewell(stopped).await;
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Announce(blob, reply) => {
                let key = self.provider_key(&blob);
                let started = self.swarm.behaviour_mut().kad.start_providing(key);
                // Who asked may have gone; the announcement stands. The same below.
                let _ = reply.send(started.map(|_| ()).map_err(|_| ControlError::Full("announced blobs")));
            }
            Command::Withdraw(blob) => {
                let key = self.provider_key(&blob);
                self.swarm.behaviour_mut().kad.stop_providing(&key);
            }
            Command::FindProviders(blob, reply) => {
                let _ = reply.send(self.look_up(blob));
            }
            Command::Peers(reply) => {
                let _ = reply.send(self.peers.status(|peer| self.leases.is_current(peer)));
            }
            Command::Say(word) => self.say(&word),
            Command::Revoke(signed) => self.tell_revocations(crate::admission::single(signed)),
            // The loop takes it before it comes here.
            Command::Stop(reply) => drop(reply),
        }
    }

    fn provider_key(&self, blob: &BlobId) -> kad::RecordKey {
        provider::key(blob, self.options.admission.own().zone())
    }

    fn look_up(&mut self, blob: BlobId) -> Result<(), ControlError> {
        if self.lookups.runs(&blob) {
            return Ok(());
        }
        if self.lookups.is_full() {
            return Err(ControlError::Full("look-ups at a time"));
        }
        let key = self.provider_key(&blob);
        let query = self.swarm.behaviour_mut().kad.get_providers(key);
        self.lookups.start(query, blob);
        Ok(())
    }

    /// When there will be something to do without anything having happened.
    fn deadline(&self) -> Instant {
        let renewal = self.renewal.as_ref().map(|renewal| renewal.next);
        let others = [self.leases.deadline(), self.bootstrap.deadline(self.peers.len())];
        renewal.into_iter().chain(others.into_iter().flatten()).fold(self.members.deadline(), Instant::min)
    }

    fn handle_timeout(&mut self, now: Instant) {
        if self.renewal.as_ref().is_some_and(|renewal| renewal.next <= now) {
            self.publish(now, self.options.lease);
        }
        self.look_after_members(now);
        let ended = self.leases.expire(now);
        self.backlog.extend(ended.into_iter().map(|peer| ControlEvent::LeaseEnded { peer }));
        for (index, address) in self.bootstrap.due(now, self.peers.len()) {
            if addresses::host_name(&address).is_some() {
                self.resolving.spawn(resolve(index, address));
            } else {
                self.dial_target(index, std::iter::once(address));
            }
        }
    }

    /// Dials every address that a target has.
    fn dial_target(&mut self, index: usize, target: impl Iterator<Item = Multiaddr>) {
        for address in target {
            let options = match addresses::peer(&address) {
                Some(peer) if peer == *self.swarm.local_peer_id() => return self.bootstrap.give_up(index),
                Some(peer) => {
                    let always = swarm::dial_opts::PeerCondition::Always;
                    DialOpts::peer_id(peer).condition(always).addresses(vec![address]).build()
                }
                None => DialOpts::unknown_peer_id().address(address).build(),
            };
            let connection = options.connection_id();
            match self.swarm.dial(options) {
                Ok(()) => self.bootstrap.dialing(index, connection),
                Err(DialError::LocalPeerId { .. }) => return self.bootstrap.give_up(index),
                Err(error) => tracing::warn!(%error, "cannot dial a bootstrap peer"),
            }
        }
        self.bootstrap.dialed(index, Instant::now());
    }

    /// Tells everyone that this seed peer's lease lasts for `length` from now.
    fn publish(&mut self, now: Instant, length: Duration) {
        let data_addresses = self.own_data_addresses();
        let Some(renewal) = &mut self.renewal else { return };
        let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis());
        renewal.sequence = u64::try_from(unix_ms).unwrap_or(0).max(renewal.sequence + 1);
        renewal.last = Some(now);
        renewal.next = now + length / 3;
        let membership = self.options.admission.own();
        let lease = Lease {
            peer: membership.peer(),
            zone: membership.zone().to_owned(),
            capacity: self.options.capacity,
            data_addresses,
            sequence: renewal.sequence,
            length,
        };
        let message = lease.encode(membership.shown());
        if let Err(error) = self.swarm.behaviour_mut().gossip.publish(behaviour::leases(), message) {
            // Nobody is subscribed yet, as a rule; whoever subscribes is told.
            tracing::debug!(%error, "the lease reached nobody");
        }
        self.lease(now, lease);
    }

    /// The lease is told to a peer that has just turned up, and to those that turn up with it.
    fn renew_soon(&mut self, now: Instant) {
        if let Some(renewal) = &mut self.renewal {
            let soon = renewal.last.map_or(now, |last| last + LEASE_PAUSE);
            renewal.next = renewal.next.min(soon.max(now));
        }
    }

    /// Takes a lease into the table and reports what it changed.
    fn lease(&mut self, now: Instant, lease: Lease) -> Change {
        let change = self.leases.handle(now, lease.peer, lease.sequence, lease.length);
        let Lease { peer, zone, capacity, data_addresses, .. } = lease;
        match change {
            Change::Until(until) => {
                let event = ControlEvent::Lease { peer, zone, capacity, data_addresses, until };
                self.backlog.push_back(event);
            }
            Change::Ended => self.backlog.push_back(ControlEvent::LeaseEnded { peer }),
            Change::Nothing | Change::Full => {}
        }
        change
    }

    /// Where this node's data plane is reached; loopback only if there is nothing else.
    fn own_data_addresses(&self) -> Vec<SocketAddr> {
        let mut all: Vec<_> = self.swarm.external_addresses().filter_map(addresses::to_data).collect();
        all.sort();
        if all.iter().any(|address| !address.ip().is_loopback()) {
            all.retain(|address| !address.ip().is_loopback());
        }
        all.truncate(MAX_ADDRESSES);
        all
    }

    async fn say_farewell(mut self, stopped: Option<oneshot::Sender<()>>) {
        if self.renewal.is_some() {
            self.publish(Instant::now(), Duration::ZERO);
            let leave = async {
                loop {
                    self.swarm.select_next_some().await;
                }
            };
            // Always ends by the time limit.
            let _ = tokio::time::timeout(FAREWELL, leave).await;
        }
        drop(self);
        if let Some(stopped) = stopped {
            // Who asked may have gone.
            let _ = stopped.send(());
        }
    }
}

/// Refuses at the start what would fail again and again later, or open the node to strangers.
fn check(options: &ControlOptions, reach: &Reach) -> Result<(), ControlError> {
    let (identity, membership) = (options.identity.peer(), options.admission.own().peer());
    if identity != membership {
        return Err(ControlError::OtherMembership { membership, identity });
    }
    if !(Duration::from_secs(1)..=lease::MAX_LENGTH).contains(&options.lease) {
        return Err(ControlError::Lease { length: options.lease });
    }
    if let Some(address) = options.listen.iter().find(|address| !addresses::is_listener(address)) {
        return Err(ControlError::Address { address: address.clone() });
    }
    if let Some(address) = options.bootstrap_peers.iter().find(|address| !addresses::is_control(address)) {
        return Err(ControlError::Address { address: address.clone() });
    }
    for ip in options.listen.iter().chain(&options.bootstrap_peers).filter_map(addresses::ip) {
        reach.permits(ip)?;
    }
    Ok(())
}

/// What the host name in `address` leads to now; nothing if it cannot be resolved.
async fn resolve(index: usize, address: Multiaddr) -> (usize, Multiaddr, Vec<IpAddr>) {
    let name = addresses::host_name(&address).unwrap_or_default();
    let family = address.iter().next();
    let wanted = |ip: &IpAddr| match family {
        Some(Protocol::Dns4(_)) => ip.is_ipv4(),
        Some(Protocol::Dns6(_)) => ip.is_ipv6(),
        _ => true,
    };
    let found = match tokio::time::timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((name.as_str(), 0))).await {
        Ok(Ok(found)) => found.map(|address| address.ip()).filter(wanted).take(MAX_RESOLVED).collect(),
        Ok(Err(error)) => {
            tracing::warn!(name, %error, "cannot resolve a bootstrap peer");
            Vec::new()
        }
        Err(_) => {
            tracing::warn!(name, "resolving a bootstrap peer took too long");
            Vec::new()
        }
    };
    (index, address, found)
}

/// For who deals in libp2p's names: the peer, if it is one of ours.
fn known(peer: &libp2p::PeerId) -> Option<PeerId> {
    crate::identity::from_libp2p(peer).ok()
}
