//! What the data plane tells the node, and room for it.

use shoal_proto::{BlobId, Contact, Have, Hello, ObjectId, PeerId, StartTrace};
use tokio::sync::mpsc;

use super::Gone;

/// What peers do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerEvent {
    /// A connection is up, whoever dialled. Nothing is known of what was said on an earlier one.
    Up {
        /// Who.
        peer: PeerId,
        /// What it says of itself; role and zone are those of its membership.
        hello: Hello,
    },
    /// The connection is gone, and with it every request on it.
    Down {
        /// Who.
        peer: PeerId,
        /// Why.
        why: Gone,
    },
    /// A peer can serve these pieces.
    Have {
        /// Who.
        peer: PeerId,
        /// What.
        have: Have,
    },
    /// A peer wants to hear what this node can serve of a blob.
    Interest {
        /// Who.
        peer: PeerId,
        /// The bootstrap layer whose fingerprints name the pieces.
        bootstrap: ObjectId,
        /// The blob.
        blob: BlobId,
    },
    /// A peer says more than it may, and goes on when it is slowed down. Told once in a while.
    Flood {
        /// Who.
        peer: PeerId,
    },
    /// A peer tells what its start of an image touched first.
    Trace {
        /// Who.
        peer: PeerId,
        /// The image's bootstrap layer.
        bootstrap: ObjectId,
        /// Its pieces, in order.
        trace: StartTrace,
    },
    /// A peer names others that hold pieces of a blob.
    Peers {
        /// Who.
        peer: PeerId,
        /// The blob.
        blob: BlobId,
        /// The others.
        contacts: Vec<Contact>,
    },
}

/// Room for events, which need not be used.
pub(super) struct EventRoom<'a>(Option<mpsc::PermitIterator<'a, PeerEvent>>);

impl<'a> EventRoom<'a> {
    /// Waits for it. Without a receiver nobody wants to know, and there is none.
    pub(super) async fn of(events: &'a mpsc::Sender<PeerEvent>, count: usize) -> Self {
        Self(events.reserve_many(count).await.ok())
    }

    pub(super) fn tell(&mut self, event: PeerEvent) {
        if let Some(permit) = self.0.as_mut().and_then(Iterator::next) {
            permit.send(event);
        }
    }
}
