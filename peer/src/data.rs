//! The data plane: pieces and objects between nodes, with mutual TLS bound to the node's identity, over QUIC (quinn) or
//! TCP ([`Transport`]).
//!
//! A [`DataPlane`] keeps one connection per peer. It carries hellos, then notices and requests, each apart from the
//! others, so that an answer that somebody waits for never queues behind a bulk one: over QUIC each is a stream, over
//! TCP their frames take turns. The protocol is on one page in `shoal_proto`.
//!
//! ```text
//! DataPlane::request -> client: AnswerStream <- frames <- peer's server: AnswerSender <- peer's Service
//! PeerEvent          <- connection: hello, notices          DataPlane::notify -> notices
//! table: who is connected, being dialled, backed off from, banned     slots: what the server spends at most
//! endpoint: the transports' sockets     wire, frames: a connection and its streams, over either of quic and tcp
//! ```
//!
//! - **Trust.** A peer is who its certificate says. Before anything else it shows its membership; until that is
//!   accepted it can say nothing else, and has five seconds for it. Bytes are handed on unverified: the caller checks them.
//! - **Bounds.** Connections, handshakes, dials, requests (per peer and in all), bytes of answers in memory, and
//!   queued notices are bounded; prefetch leaves room for on-demand everywhere. Who breaks the protocol loses its
//!   connection.
//! - **Events** of a peer come in order: up, what it says, down. Whoever does not receive them slows the peers down. Who says
//!   too much is slowed down alone, and named ([`PeerEvent::Flood`]).
//!
//! Not here: which peer to ask for what (scheduler), verification and storage, back-to-source.

mod client;
mod closing;
mod connection;
mod dial;
mod endpoint;
mod event;
mod frames;
mod ledger;
mod limits;
mod link;
mod pace;
mod quic;
mod server;
mod slots;
mod table;
mod tcp;
mod throttle;
mod tls;
mod wire;

use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::identity::Keypair;
use shoal_proto::{Hello, Message, PeerId, Request};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use client::{Answer, AnswerError, AnswerStream, RequestError};
pub use closing::{Closing, Gone};
pub use endpoint::Transport;
pub use event::PeerEvent;
pub use ledger::Violation;
pub use limits::Limits;
pub use link::ConnectionStatus;
pub use server::{AnswerSender, PeerContext, SendError, Service};
pub(crate) use slots::{Budget, Room};
pub(crate) use throttle::Throttle;
pub use tls::TlsError;

use self::{
    connection::HandshakeError,
    endpoint::Endpoint,
    event::EventRoom,
    link::Link,
    slots::Slots,
    table::{Entry, Table},
};
use crate::membership::Admitted;

/// Events that may wait for the receiver.
const EVENTS: usize = 1024;
/// How long stopping may take to tell the peers.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Decides whether a peer, whose identity is proved, may join with the membership that it shows; otherwise says why
/// not, for both sides' logs.
pub type Admit = Arc<dyn Fn(&PeerId, &[u8]) -> Result<Admitted, String> + Send + Sync>;

/// What a data plane starts from.
pub struct DataOptions {
    /// The node's identity.
    pub keypair: Keypair,
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// How to reach others, and be reached.
    pub transport: Transport,
    /// What this node says of itself. Addresses with port 0 get the port that is listened on.
    pub hello: Hello,
    /// Who may join.
    pub admit: Admit,
    /// What it may spend.
    pub limits: Limits,
}

/// Why a data plane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The address cannot be listened on.
    #[error("cannot listen on {transport} {address}")]
    Listen {
        /// UDP or TCP.
        transport: &'static str,
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No TLS.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Identities other than ed25519 are not used.
    #[error("the identity is not an ed25519 key")]
    Identity,
}

/// Why a notice was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// There is no connection to the peer.
    #[error("not connected")]
    NotConnected,
    /// The peer reads too slowly; what it should know has to be sent whole at a better time.
    #[error("too many notices wait for the peer")]
    Full,
    /// A daemon of an earlier release does not know it.
    #[error("the peer does not know this notice")]
    Unknown,
    /// Only `Have`, `Interest`, `Peers` and `Trace` are notices.
    #[error("not a notice")]
    NotANotice,
}

/// A running data plane. Cheap to clone; when the last clone is dropped it stops.
#[derive(Clone)]
pub struct DataPlane(Arc<Handle>);

struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What all tasks share.
struct Shared {
    endpoint: Endpoint,
    hello: Hello,
    /// What the hello shows of it at present; held for a copy only.
    membership: Mutex<Bytes>,
    admit: Admit,
    /// Held for a copy, or until a change has reached all connections.
    limits: Mutex<Limits>,
    service: Arc<dyn Service>,
    /// Held for a look-up or a change, never across a wait.
    table: Mutex<Table<Arc<Link>>>,
    /// Who tells of a change of the table has room before it changes it, and tells before anybody else can change it: so events come
    /// in the order of the changes, and nobody waits behind a lock for another's room.
    events: mpsc::Sender<PeerEvent>,
    slots: Arc<Slots>,
    budget: Budget,
    upload: Arc<Throttle>,
    strangers: Arc<Semaphore>,
    /// Ends everything that waits, and every connection.
    stopping: CancellationToken,
    tasks: TaskTracker,
}

impl DataPlane {
    /// Listens, and answers peers through `service`. Needs a Tokio runtime.
    ///
    /// # Errors
    /// [`DataError`] if the address cannot be bound or the identity not be used.
    pub fn start(
        options: DataOptions,
        service: Arc<dyn Service>,
    ) -> Result<(Self, mpsc::Receiver<PeerEvent>), DataError> {
        let DataOptions { keypair, listen, transport, mut hello, admit, limits } = options;
        let key = keypair.public().try_into_ed25519().map_err(|_| DataError::Identity)?;
        let me = PeerId::new(key.to_bytes());
        let tasks = TaskTracker::new();
        let endpoint = Endpoint::bind(listen, transport, &tls::configure(&keypair)?, &tasks)?;
        for shown in hello.data_addresses.iter_mut().filter(|shown| shown.port() == 0) {
            shown.set_port(endpoint.address.port());
        }
        let (events, received) = mpsc::channel(EVENTS);
        let shared = Arc::new(Shared {
            endpoint,
            membership: Mutex::new(hello.membership.clone()),
            hello,
            admit,
            service,
            table: Mutex::new(Table::new(me, limits.connections)),
            events,
            slots: Slots::new(limits.requests),
            budget: Budget::new(limits.answer_bytes),
            upload: Arc::new(Throttle::new("upload", limits.upload)),
            strangers: Arc::new(Semaphore::new(limits.strangers)),
            stopping: CancellationToken::new(),
            tasks,
            limits: Mutex::new(limits),
        });
        shared.tasks.spawn(dial::accept(shared.clone()));
        Ok((Self(Arc::new(Handle(shared))), received))
    }

    /// Where it listens.
    pub fn local_address(&self) -> SocketAddr {
        self.shared().endpoint.address
    }

    /// Sees to it that there is a connection to `peer`: dials `addresses`, the best first, unless it is connected,
    /// being dialled, banned, or failed a moment ago. Success is a [`PeerEvent::Up`].
    pub fn connect(&self, peer: PeerId, addresses: &[SocketAddr]) {
        let shared = self.shared();
        let dials = shared.limits().dials;
        if shared.table().dial(peer, dials, Instant::now()) {
            let addresses = addresses.iter().copied().take(shoal_proto::MAX_ADDRESSES).collect();
            shared.tasks.spawn(dial::dial(shared.clone(), peer, addresses));
        }
    }

    /// Keeps other limits from now on, also for what is under way. Whoever has more than it now may have keeps it.
    pub fn adjust(&self, limits: Limits) {
        let shared = self.shared();
        let mut kept = shared.limits.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = limits;
        shared.slots.resize(limits.requests);
        shared.upload.set(limits.upload);
        let mut table = shared.table();
        table.resize(limits.connections);
        table.links().for_each(|(_, entry)| entry.link.welcome(&limits));
    }

    /// What it may spend at present.
    pub fn limits(&self) -> Limits {
        self.shared().limits()
    }

    /// Closes the connection to `peer`, if there is one.
    pub fn disconnect(&self, peer: PeerId) {
        if let Some(link) = self.shared().link(&peer) {
            link.close(Closing::Disconnected, "");
        }
    }

    /// Closes the connection to `peer` and refuses it for `time`.
    pub fn ban(&self, peer: PeerId, time: Duration) {
        let link = self.shared().table().ban(peer, time, Instant::now());
        if let Some(link) = link {
            link.close(Closing::Banned, "");
        }
    }

    /// Shows `membership` from now on, on connections yet to come.
    pub fn renew(&self, membership: Bytes) {
        *self.shared().membership.lock().unwrap_or_else(PoisonError::into_inner) = membership;
    }

    /// Closes the connection to a peer that may not stay, because of `why`.
    pub fn expel(&self, peer: PeerId, why: Closing) {
        if let Some(link) = self.shared().link(&peer) {
            link.close(why, "");
        }
    }

    /// Queues a notice: `Have`, `Interest`, `Peers` or `Trace`.
    ///
    /// # Errors
    /// [`NotifyError`]; nothing is queued then.
    pub fn notify(&self, peer: PeerId, notice: Message) -> Result<(), NotifyError> {
        use Message::{Have, Interest, Peers, Trace};
        if !matches!(notice, Have(_) | Interest { .. } | Peers { .. } | Trace { .. }) {
            return Err(NotifyError::NotANotice);
        }
        let link = self.shared().link(&peer).ok_or(NotifyError::NotConnected)?;
        if !link.knows(notice.needs()) {
            return Err(NotifyError::Unknown);
        }
        if link.notify(notice) { Ok(()) } else { Err(NotifyError::Full) }
    }

    /// Asks `peer`. The request's id is chosen here. `limits` has for each piece asked for, in order, the greatest
    /// length that its answer may have; for an object it has one. Dropping the stream cancels the request.
    ///
    /// # Errors
    /// [`RequestError`] if the request cannot be sent.
    pub async fn request(
        &self,
        peer: PeerId,
        request: Request,
        limits: Vec<u64>,
    ) -> Result<AnswerStream, RequestError> {
        let link = self.shared().link(&peer).ok_or(RequestError::NotConnected(peer))?;
        client::ask(link, request, limits).await
    }

    /// Whether `peer` is connected and its hello has this bit among its features.
    pub fn has_feature(&self, peer: PeerId, feature: u64) -> bool {
        self.shared().link(&peer).is_some_and(|link| link.knows(feature))
    }

    /// Whether there is a connection to `peer`.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.shared().link(&peer).is_some()
    }

    /// How many peers are connected.
    pub fn connected(&self) -> usize {
        self.shared().table().links().count()
    }

    /// How many peers are being dialled.
    pub(crate) fn dials(&self) -> usize {
        self.shared().table().dials()
    }

    /// All connections, in the order of the peers' ids.
    pub fn connections(&self) -> Vec<ConnectionStatus> {
        let mut all: Vec<_> = self.shared().table().links().map(|(_, entry)| ConnectionStatus::of(entry)).collect();
        all.sort_by_key(|status| status.peer);
        all
    }

    /// Closes every connection and waits, not for long, until the peers are told. Nothing works afterwards.
    pub async fn stop(&self) {
        let shared = self.shared();
        shared.stop();
        shared.tasks.close();
        // Who does not acknowledge in time finds out by itself.
        let _ = tokio::time::timeout(STOP_TIMEOUT, async {
            if let Some(quic) = &shared.endpoint.quic {
                quic.wait_idle().await;
            }
            shared.tasks.wait().await;
        })
        .await;
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }
}

impl fmt::Debug for DataPlane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataPlane").field("address", &self.local_address()).finish_non_exhaustive()
    }
}

impl Shared {
    fn stop(&self) {
        self.stopping.cancel();
        if let Some(quic) = &self.endpoint.quic {
            quic.close();
        }
    }

    /// Lets a peer whose hello was accepted ask. A change of the limits comes before or after it.
    fn welcome(&self, link: &Link) {
        link.welcome(&self.limits.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, Table<Arc<Link>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn link(&self, peer: &PeerId) -> Option<Arc<Link>> {
        self.table().link(peer).cloned()
    }

    /// What this node says of itself.
    fn hello(&self) -> Hello {
        let membership = self.membership.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Hello { membership, ..self.hello.clone() }
    }

    /// Makes a connection known, or closes it.
    async fn enter(&self, link: &Arc<Link>, dialled: bool) -> Result<(), HandshakeError> {
        let peer = link.peer();
        let mut room = self.room(2).await;
        let mut table = self.table();
        let entry = Entry { dialled, since: Instant::now(), link: link.clone() };
        let replaced = table.enter(peer, entry).map_err(|why| {
            link.close(why, "");
            HandshakeError::refused(why, "")
        })?;
        if let Some(replaced) = replaced {
            let (why, detail) = (Closing::Duplicate, "replaced by another connection".to_owned());
            replaced.close(why, &detail);
            room.tell(PeerEvent::Down { peer, why: Gone::Ours { why, detail } });
        }
        room.tell(PeerEvent::Up { peer, hello: link.hello().clone() });
        Ok(())
    }

    /// Takes a connection out that has ended.
    async fn leave(&self, link: &Arc<Link>, why: Gone) {
        let peer = link.peer();
        let mut room = self.room(1).await;
        let mut table = self.table();
        let current = table.leave(&peer, link);
        if let Gone::Ours { why: Closing::Violation, detail } = &why {
            tracing::warn!(%peer, "disconnected for breaking the protocol: {detail}");
            table.avoid(peer, Instant::now());
        }
        if current {
            room.tell(PeerEvent::Down { peer, why });
        }
    }

    /// Tells what a peer said, unless its connection has been replaced.
    async fn tell(&self, link: &Arc<Link>, event: PeerEvent) {
        let mut room = self.room(1).await;
        let table = self.table();
        if table.link(&link.peer()) == Some(link) {
            room.tell(event);
        }
    }

    /// Waits for room for so many events. Without a receiver nobody wants to know of them.
    async fn room(&self, events: usize) -> EventRoom<'_> {
        EventRoom::of(&self.events, events).await
    }
}

#[cfg(test)]
mod tests;
