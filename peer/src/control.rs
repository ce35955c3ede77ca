//! The control plane: libp2p over TCP. It tells the node who is there, which seed peers hold a lease, and who has a
//! blob; bytes of images never come this way.
//!
//! ```text
//!   Control (handle, cloned freely) --commands--> Plane (one task, owns the swarm) --ControlEvent--> the node
//! ```
//!
//! - **Membership first.** It is a step of the connection upgrade (`admission`); strangers reach no protocol.
//! - **identify** carries the address of the data plane, next to the plane's own; **ping** finds dead connections.
//! - **Kademlia** holds provider records (`provider`). No read waits for it.
//! - **gossipsub** carries leases of seed peers (`lease`), revocations and preheats (`preheat`).
//! - **mDNS**, or a list of addresses and names (`bootstrap`), is the way in.
//!
//! Not here: what to do about any of it. A peer that is lost here may well be alive on the data plane: in a large
//! cluster idle connections of this plane are closed, and a seed peer is current for as long as its lease, not its
//! connection.
//!
//! Everything is bounded: commands and events by their channels (the swarm is not polled while the node is behind
//! with its events, but commands are, so the two cannot wait for each other), tables by the constants next to them.

mod addresses;
mod admission;
mod behaviour;
mod bootstrap;
mod lease;
mod peers;
mod plane;
mod preheat;
mod provider;
mod transport;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::Multiaddr;
use shoal_proto::{BlobId, PeerId, Role};
use tokio::sync::{mpsc, oneshot};

use self::admission::Gate;
pub use self::preheat::{Chosen, MAX_NAMED, Preheat, PreheatId, Standing, Word};
use crate::{admission::Admission, identity::Identity, membership::MembershipError};

/// Commands that wait for the plane.
const COMMANDS: usize = 64;

/// Events that wait for the node.
const EVENTS: usize = 256;

/// What a node's control plane is started with.
#[derive(Debug, Clone)]
pub struct ControlOptions {
    /// The node's key.
    pub identity: Identity,
    /// What it shows to others (role and zone are taken from here), and whom it lets in.
    pub admission: Admission,
    /// Whether a cluster without a key may reach beyond loopback.
    pub insecure_open: bool,
    /// TCP multiaddresses to listen on. Port 0 takes any free one; none at all only dials.
    pub listen: Vec<Multiaddr>,
    /// TCP multiaddresses to join through, with an address or a name, with or without `/p2p/ID`.
    pub bootstrap_peers: Vec<Multiaddr>,
    /// Whether to find peers on the local network by multicast DNS.
    pub mdns: bool,
    /// Weight of a seed peer when homes are chosen. At least 1; of no meaning for other nodes.
    pub capacity: u32,
    /// How long a seed peer's lease lasts; default 15 s, at least 1 s, at most 5 min. Renewed at every third of it.
    pub lease: Duration,
    /// Where the data plane listens. With an unspecified address, the port on every address of this plane.
    pub data_address: SocketAddr,
}

/// What the node learns. In no case is an answer missing: a look-up is always followed by its `Providers`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ControlEvent {
    /// This plane listens on these addresses (first at the start, then with every change).
    Listening(Vec<Multiaddr>),
    /// A member is connected and has said where its data plane is; again if that changes.
    PeerSeen {
        /// Who.
        peer: PeerId,
        /// As its membership says.
        role: Role,
        /// As its membership says.
        zone: String,
        /// As the peer says; whoever answers there has yet to prove that it is the peer.
        data_addresses: Vec<SocketAddr>,
    },
    /// The last connection of this plane to the peer is gone.
    PeerLost {
        /// Who.
        peer: PeerId,
    },
    /// A seed peer (this node, if it is one, included) has a current lease, or renewed it.
    Lease {
        /// Who.
        peer: PeerId,
        /// As its membership says.
        zone: String,
        /// Its weight, at least 1.
        capacity: u32,
        /// As the peer says.
        data_addresses: Vec<SocketAddr>,
        /// When it ends unless it is renewed.
        until: Instant,
    },
    /// The lease ran out, or the seed peer withdrew it.
    LeaseEnded {
        /// Who.
        peer: PeerId,
    },
    /// Another node said something about a preheat.
    Preheat {
        /// Who.
        peer: PeerId,
        /// What.
        word: Word,
    },
    /// The answer to [`Control::find_providers`].
    Providers {
        /// What was looked for.
        blob: BlobId,
        /// Who has announced it in this node's zone, this node excepted; at most 32.
        peers: Vec<PeerId>,
    },
}

/// A connected peer, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Who.
    pub peer: PeerId,
    /// As its membership says.
    pub role: Role,
    /// As its membership says.
    pub zone: String,
    /// Name and version of its program; empty until it has said so.
    pub agent: String,
    /// Where its control plane listens, as it says.
    pub control_addresses: Vec<Multiaddr>,
    /// Where its data plane listens, as it says.
    pub data_addresses: Vec<SocketAddr>,
    /// As the last ping took, if there was one.
    pub round_trip: Option<Duration>,
    /// Whether it is a seed peer with a current lease.
    pub has_lease: bool,
}

/// Why the control plane did not start, or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// An address that an open cluster must not use.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// The membership is that of another node.
    #[error("the membership names {membership}, but this node is {identity}")]
    OtherMembership {
        /// Whom the membership names.
        membership: PeerId,
        /// Who this node is.
        identity: PeerId,
    },
    /// Not a TCP multiaddress of the expected form.
    #[error("{address} is not of the form /ip4|ip6|dns/HOST/tcp/PORT[/p2p/ID]")]
    Address {
        /// The address as configured.
        address: Multiaddr,
    },
    /// A lease that renewals could not keep up with, or that would outlive a dead seed peer for too long.
    #[error("a lease of {length:?} is not between 1 s and 5 min")]
    Lease {
        /// The length as configured.
        length: Duration,
    },
    /// The plane cannot listen there.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address as configured.
        address: Multiaddr,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The secure channel could not be set up with this key.
    #[error("cannot use the node's key for secure channels")]
    Noise(#[from] libp2p::noise::Error),
    /// Multicast DNS could not be started.
    #[error("cannot start multicast DNS")]
    Mdns(#[source] io::Error),
    /// Gossip could not be set up.
    #[error("cannot set gossip up: {0}")]
    Gossip(String),
    /// No more can be announced, or looked up at the same time.
    #[error("too many {0}")]
    Full(&'static str),
    /// The control plane has stopped.
    #[error("the control plane has stopped")]
    Stopped,
}

/// A handle on the running control plane. When the last one is dropped, or the receiver of the events is, it stops.
#[derive(Debug, Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
    gate: Arc<Gate>,
}

#[derive(Debug)]
enum Command {
    Announce(BlobId, oneshot::Sender<Result<(), ControlError>>),
    Withdraw(BlobId),
    FindProviders(BlobId, oneshot::Sender<Result<(), ControlError>>),
    Peers(oneshot::Sender<Vec<PeerStatus>>),
    Revoke(Bytes),
    Say(Word),
    Stop(oneshot::Sender<()>),
}

impl Control {
    /// Starts to listen and then to dial. When it returns, the first event, [`ControlEvent::Listening`], is there.
    ///
    /// # Errors
    /// An address is not one or may not be used, the membership is another node's, or a port is taken.
    pub async fn start(options: ControlOptions) -> Result<(Self, mpsc::Receiver<ControlEvent>), ControlError> {
        let (commands, command_receiver) = mpsc::channel(COMMANDS);
        let (event_sender, events) = mpsc::channel(EVENTS);
        let gate = Arc::new(Gate::new(options.admission.clone()));
        let mut plane = plane::Plane::new(options, gate.clone())?;
        plane.listen().await?;
        tokio::spawn(plane.run(command_receiver, event_sender));
        Ok((Self { commands, gate }, events))
    }

    /// Tells the DHT that this node has `blob`, and goes on telling it until it is withdrawn.
    ///
    /// # Errors
    /// Too many blobs are announced already, or the plane has stopped.
    pub async fn announce(&self, blob: BlobId) -> Result<(), ControlError> {
        self.ask(|reply| Command::Announce(blob, reply)).await?
    }

    /// Stops to announce `blob`. Others find the node for up to half an hour still.
    ///
    /// # Errors
    /// The plane has stopped.
    pub async fn withdraw(&self, blob: BlobId) -> Result<(), ControlError> {
        self.commands.send(Command::Withdraw(blob)).await.map_err(|_| ControlError::Stopped)
    }

    /// Looks up who has `blob`. The answer is a [`ControlEvent::Providers`], after 20 s at the latest; questions
    /// about a blob that is being looked up share its answer.
    ///
    /// # Errors
    /// Too many look-ups are under way, or the plane has stopped.
    pub async fn find_providers(&self, blob: BlobId) -> Result<(), ControlError> {
        self.ask(|reply| Command::FindProviders(blob, reply)).await?
    }

    /// The peers that are connected now, by identity.
    ///
    /// # Errors
    /// The plane has stopped.
    pub async fn peers(&self) -> Result<Vec<PeerStatus>, ControlError> {
        self.ask(Command::Peers).await
    }

    /// Passes a signed revocation on to everyone. The node itself has taken it in before ([`Admission::revoke`]).
    ///
    /// # Errors
    /// The plane has stopped.
    pub async fn revoke(&self, signed: Bytes) -> Result<(), ControlError> {
        self.commands.send(Command::Revoke(signed)).await.map_err(|_| ControlError::Stopped)
    }

    /// Tells everyone something about a preheat. Who is not there now does not hear it.
    ///
    /// # Errors
    /// The plane has stopped.
    pub async fn say(&self, word: Word) -> Result<(), ControlError> {
        self.commands.send(Command::Say(word)).await.map_err(|_| ControlError::Stopped)
    }

    /// How many connections were refused for want of membership, since the start.
    pub fn refused(&self) -> u64 {
        self.gate.refused()
    }

    /// Withdraws the lease, stops announcing, and closes all connections. Records that others keep run out on their
    /// own; Kademlia has no way to take them back.
    pub async fn stop(&self) {
        // A plane that has stopped already needs no telling.
        let _ = self.ask(Command::Stop).await;
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, ControlError> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| ControlError::Stopped)?;
        answer.await.map_err(|_| ControlError::Stopped)
    }
}

#[cfg(test)]
mod tests;
