//! One connection to an admitted peer, as all its tasks share it.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use shoal_proto::{Hello, Message, PeerId};
use tokio::sync::mpsc;

use super::{
    Closing, Limits,
    slots::{Budget, Slot, Slots},
    table::Entry,
    throttle::Throttle,
    wire::Wire,
};
use crate::membership::Admitted;

/// Notices that may wait for the network.
const NOTICES: usize = 256;
/// Bytes of answers that may wait for one peer, read and not acknowledged.
const BUDGET: u32 = 4 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Link {
    wire: Wire,
    admitted: Admitted,
    hello: Hello,
    notices: mpsc::Sender<Message>,
    slots: Arc<Slots>,
    budget: Budget,
    upload: Throttle,
    next_request: AtomicU64,
    received: AtomicU64,
    sent: AtomicU64,
    uses: AtomicUsize,
    /// Held for a store and a load only.
    last_used: Mutex<Instant>,
}

impl PartialEq for Link {
    fn eq(&self, other: &Self) -> bool {
        self.wire == other.wire
    }
}

impl Link {
    /// The link and the notices that are to be sent over it.
    pub(super) fn new(
        wire: Wire,
        admitted: Admitted,
        hello: Hello,
        limits: &Limits,
    ) -> (Arc<Self>, mpsc::Receiver<Message>) {
        let (notices, outgoing) = mpsc::channel(NOTICES);
        let link = Self {
            wire,
            admitted,
            hello,
            notices,
            slots: Slots::new(limits.requests_per_peer),
            budget: Budget::new(BUDGET),
            upload: Throttle::new("upload_per_peer", limits.upload_per_peer),
            next_request: AtomicU64::new(1),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            uses: AtomicUsize::new(0),
            last_used: Mutex::new(Instant::now()),
        };
        (Arc::new(link), outgoing)
    }

    pub(super) fn wire(&self) -> &Wire {
        &self.wire
    }

    pub(super) fn peer(&self) -> PeerId {
        self.admitted.peer
    }

    pub(super) fn admitted(&self) -> &Admitted {
        &self.admitted
    }

    pub(super) fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Whether the peer has all these features.
    pub(super) fn knows(&self, features: u64) -> bool {
        self.hello.features & features == features
    }

    pub(super) fn next_request(&self) -> u64 {
        self.next_request.fetch_add(1, Relaxed)
    }

    /// A place among the requests of this peer.
    pub(super) fn slot(&self, priority: shoal_proto::Priority) -> Option<Slot> {
        self.slots.take(priority)
    }

    /// This peer's allowance of the server's memory.
    pub(super) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// The limit of what is sent to this peer.
    pub(super) fn upload(&self) -> &Throttle {
        &self.upload
    }

    /// Lets a peer whose hello was accepted ask, within these limits from now on.
    pub(super) fn welcome(&self, limits: &Limits) {
        self.slots.resize(limits.requests_per_peer);
        self.upload.set(limits.upload_per_peer);
        self.wire.welcome(limits.streams_per_peer());
    }

    /// Queues a notice; false if the queue is full or the connection gone.
    pub(super) fn notify(&self, notice: Message) -> bool {
        self.notices.try_send(notice).is_ok()
    }

    pub(super) fn count_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }

    pub(super) fn count_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    /// Payload bytes received and sent.
    pub(super) fn traffic(&self) -> (u64, u64) {
        (self.received.load(Relaxed), self.sent.load(Relaxed))
    }

    /// Requests under way, in both directions.
    pub(super) fn uses(&self) -> usize {
        self.uses.load(Relaxed)
    }

    /// Keeps the connection from counting as idle while it lives.
    pub(super) fn using(self: &Arc<Self>) -> Using {
        self.uses.fetch_add(1, Relaxed);
        Using(self.clone())
    }

    /// Notes that something went over the connection.
    pub(super) fn touch(&self) {
        *self.last_used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How long nothing has used it.
    pub(super) fn idle(&self) -> Duration {
        if self.uses() > 0 {
            return Duration::ZERO;
        }
        self.last_used.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    /// Closes the connection, which ends everything on it at both ends. Does nothing to one that has ended.
    pub(super) fn close(&self, why: Closing, detail: &str) {
        self.wire.close(why, detail);
    }
}

/// A connection, for people to look at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionStatus {
    /// Who is at the other end.
    pub peer: PeerId,
    /// As what it was let in.
    pub admitted: Admitted,
    /// Its name in logs.
    pub name: String,
    /// Where it is.
    pub address: SocketAddr,
    /// What carries it: `quic` or `tcp`.
    pub transport: &'static str,
    /// Whether this node dialled.
    pub dialled: bool,
    /// How long it has been up.
    pub age: Duration,
    /// Round trip time.
    pub rtt: Duration,
    /// Piece and object bytes received.
    pub received_bytes: u64,
    /// Piece and object bytes sent.
    pub sent_bytes: u64,
    /// Requests under way, both ways.
    pub requests: usize,
}

impl ConnectionStatus {
    pub(super) fn of(entry: &Entry<Arc<Link>>) -> Self {
        let link = &entry.link;
        let (received_bytes, sent_bytes) = link.traffic();
        Self {
            peer: link.peer(),
            admitted: link.admitted().clone(),
            name: link.hello().name.clone(),
            address: link.wire().remote_address(),
            transport: link.wire().transport(),
            dialled: entry.dialled,
            age: entry.since.elapsed(),
            rtt: link.wire().rtt(),
            received_bytes,
            sent_bytes,
            requests: link.uses(),
        }
    }
}

/// See [`Link::using`].
#[derive(Debug)]
pub(super) struct Using(Arc<Link>);

impl Drop for Using {
    fn drop(&mut self) {
        self.0.touch();
        self.0.uses.fetch_sub(1, Relaxed);
    }
}
