//! What the scheduler is told and what it wants done.
//!
//! An action that expects an answer carries a [`RequestId`] that every answer repeats. Answers to requests that the
//! scheduler has given up are ignored, so the shell never has to ask whether one is still alive.

use std::{collections::BTreeMap, fmt, ops::Range, sync::Arc, time::Duration};

use shoal_proto::{Bitfield, BlobId, ObjectId, PeerId, Priority, Role};

use crate::{Limits, Time};

/// A blob as this node keeps it. An object is a blob of one piece.
///
/// Two images that disagree about what a blob id holds have different variants of it; a variant is a matter of this
/// node alone and never on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobKey {
    /// The blob's or object's sha256. Homes depend on it, and not on the variant.
    pub id: [u8; 32],
    /// Which of the images that disagree; 0 for the first.
    pub variant: u32,
}

impl From<BlobId> for BlobKey {
    fn from(id: BlobId) -> Self {
        Self { id: *id.as_bytes(), variant: 0 }
    }
}

impl From<ObjectId> for BlobKey {
    fn from(id: ObjectId) -> Self {
        Self { id: *id.as_bytes(), variant: 0 }
    }
}

impl fmt::Debug for BlobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}.{}", BlobId::new(self.id), self.variant)
    }
}

/// A piece of a blob: the unit of everything here. Ordered by piece first, since that tells most apart at once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Item {
    /// The piece; 0 for an object.
    pub piece: u32,
    /// The blob.
    pub blob: BlobKey,
}

impl fmt::Debug for Item {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}#{}", self.blob, self.piece)
    }
}

/// Names a want; chosen by the shell, not used again while the want is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WantId(pub u64);

/// Names a request; chosen by the scheduler, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// On whose behalf a piece is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// Of this node: a reader, a prefetch.
    Local,
    /// Of another node that asked this one as its home. Homes are never asked for it (one hop, so that differing
    /// views cannot make a cycle): it comes from a neighbour that announced the piece, or from the registry.
    ForPeer,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The shell can now verify and keep pieces of this blob. A second time for the same blob adds pieces that were
    /// unnamed, and what is present.
    BlobAdded {
        /// The blob.
        blob: BlobKey,
        /// For each piece its encoded byte range in the blob; empty where no image on this node names the piece. An
        /// object of unknown size has one range of any positive length.
        extents: Arc<[Range<u64>]>,
        /// The pieces that are already here.
        present: Bitfield,
    },
    /// All pieces of the blob have one home: whoever reads any of it at the registry has to read all of it. To be said
    /// again when the blob is added again after it was removed.
    OneHome {
        /// The blob.
        blob: BlobKey,
    },
    /// The blob is gone; its open wants end with an error.
    BlobRemoved {
        /// The blob.
        blob: BlobKey,
    },
    /// Somebody needs a piece. Ends with one [`Action::Complete`], unless an [`Event::Unwant`] comes first. An id
    /// that is open already is ignored.
    Want {
        /// Its name.
        want: WantId,
        /// The piece.
        item: Item,
        /// On-demand or prefetch.
        priority: Priority,
        /// When to give up.
        deadline: Time,
        /// For whom.
        origin: Origin,
    },
    /// Nobody needs it any more; no [`Action::Complete`] follows. What is in flight may still arrive.
    Unwant {
        /// Its name.
        want: WantId,
    },
    /// Other limits count from now on, for what is not under way.
    Limits(Limits),
    /// The piece arrived by another way than a request.
    Present {
        /// The piece.
        item: Item,
    },
    /// The piece is no longer here: found damaged, or there was no room to keep it.
    Lost {
        /// The piece.
        item: Item,
    },
    /// No piece of the blob is here any more: it was evicted. What is wanted or on its way goes on.
    Evicted {
        /// The blob.
        blob: BlobKey,
    },
    /// A connection to a peer is up and its hello accepted.
    PeerUp {
        /// Who.
        peer: PeerId,
        /// Its role.
        role: Role,
        /// Its zone.
        zone: String,
        /// Its labels.
        labels: BTreeMap<String, String>,
    },
    /// What a peer said before turned out to be a lie, as when a piece is wrong.
    Lied {
        /// Who.
        peer: PeerId,
        /// About what.
        item: Item,
    },
    /// The connection is gone; its requests count as failed without further answers.
    PeerDown {
        /// Who.
        peer: PeerId,
    },
    /// A peer said what it can serve. Ignored for a blob that is not added: ask again (`Interest`) after adding it.
    PeerHave {
        /// Who.
        peer: PeerId,
        /// The blob, in our variant.
        blob: BlobKey,
        /// The first piece that `have` speaks of.
        first: u32,
        /// The pieces, counted from `first`.
        have: Bitfield,
        /// Whether it replaces what was known of that window, rather than adds to it.
        full: bool,
    },
    /// A seed peer is alive. **The shell feeds this node's own leases, too**, or it would not know itself as a home.
    Lease {
        /// Who.
        peer: PeerId,
        /// Its zone; leases of other zones are remembered but no home here.
        zone: String,
        /// Its weight in the hash, at least 1.
        capacity: u64,
        /// When it ends unless renewed.
        until: Time,
    },
    /// A lease was withdrawn.
    LeaseEnded {
        /// Whose.
        peer: PeerId,
    },
    /// A piece of a request was verified and stored (or, on a full disk, at least verified and handed to its
    /// waiters). True even if the request was given up meanwhile.
    Delivered {
        /// The request.
        request: RequestId,
        /// The piece.
        item: Item,
        /// Encoded bytes received for it.
        bytes: u64,
    },
    /// Bytes of a request arrived though no piece is whole yet; puts off hedging. Optional, as often as the shell
    /// likes.
    Progress {
        /// The request.
        request: RequestId,
    },
    /// The peer does not have this piece.
    NotHave {
        /// The request.
        request: RequestId,
        /// The piece.
        item: Item,
    },
    /// The peer is getting it; wait this long before doubting.
    Pending {
        /// The request.
        request: RequestId,
        /// Expected time until data flows.
        eta: Duration,
    },
    /// The peer refuses for now; ends the request.
    Busy {
        /// The request.
        request: RequestId,
        /// How long not to ask it.
        retry_after: Duration,
        /// Peers that have the pieces asked for, probably.
        alternates: Vec<PeerId>,
    },
    /// The peer does not think it is the home; ends the request.
    NotMyHome {
        /// The request.
        request: RequestId,
        /// Whom it believes to be the seed peers.
        members: Vec<PeerId>,
    },
    /// The home cannot read this registry; ends the request.
    CannotSource {
        /// The request.
        request: RequestId,
    },
    /// The request failed; ends it.
    Failed {
        /// The request.
        request: RequestId,
        /// Why.
        reason: Failure,
    },
    /// The answer is complete; pieces that were not delivered are missing from it. Ends the request. Need not be sent
    /// after the last piece was delivered, but does no harm.
    Finished {
        /// The request.
        request: RequestId,
    },
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// The connection or stream broke, or the peer broke the protocol without lying about bytes.
    Transport,
    /// The bytes do not match their digest: the peer is banned.
    WrongBytes,
    /// The registry did not answer well.
    Registry {
        /// How long it asked not to be asked again.
        retry_after: Option<Duration>,
        /// Whether asking again is of no use (not found, unauthorised).
        permanent: bool,
    },
    /// Verified bytes could be neither kept nor handed on.
    Store,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Ask a connected peer. Answer with any of the events that carry a request id.
    Request {
        /// The id that answers repeat.
        request: RequestId,
        /// Whom.
        peer: PeerId,
        /// The blob.
        blob: BlobKey,
        /// Consecutive pieces, ascending, 1 to 64.
        pieces: Vec<u32>,
        /// How urgent.
        priority: Priority,
        /// Whether it is asked as the home, which reads the registry if it must.
        source: bool,
        /// When the last waiter gives up.
        deadline: Time,
        /// Thousandths of the blob that are missing here, at least 1: what to tell the peer, see [`Ask`](crate::Ask).
        lacks: u16,
    },
    /// Stop a request. No answer is expected; one that was under way is ignored.
    Cancel {
        /// Which.
        request: RequestId,
    },
    /// Read the registry: one ranged request for `range` of the blob, from which `pieces` are taken. Every piece that
    /// verifies is a [`Event::Delivered`] at once, not at the end.
    BackToSource {
        /// The id that answers repeat.
        request: RequestId,
        /// The blob.
        blob: BlobKey,
        /// Pieces in ascending order of number and offset, 1 to 64; gaps between them are read and thrown away.
        pieces: Vec<u32>,
        /// From the first byte of the first piece to the last byte of the last.
        range: Range<u64>,
        /// How urgent.
        priority: Priority,
        /// When the last waiter gives up.
        deadline: Time,
    },
    /// A want is over, exactly once.
    Complete {
        /// Which.
        want: WantId,
        /// Its piece.
        item: Item,
        /// Present, or why not.
        outcome: Result<(), WantError>,
    },
    /// The peer served wrong bytes: report it, drop the connection, refuse it until then.
    Ban {
        /// Who.
        peer: PeerId,
        /// Until when.
        until: Time,
        /// For the log.
        reason: BanReason,
    },
    /// We would ask this peer if there were a connection: a home, or an alternate that a home named. Answered by
    /// [`Event::PeerUp`]; not waited for longer than `connect_timeout`.
    Connect {
        /// Who.
        peer: PeerId,
    },
}

/// Why a peer is banned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BanReason {
    /// This piece did not match its digest, or what a list says of its blob did not.
    WrongBytes(Item),
}

/// Where a try went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Source {
    /// A neighbour, asked for what it has.
    Peer(PeerId),
    /// A peer asked as the home.
    Home(PeerId),
    /// The registry.
    Registry,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer(peer) => write!(f, "peer {peer:?}"),
            Self::Home(peer) => write!(f, "home {peer:?}"),
            Self::Registry => f.write_str("registry"),
        }
    }
}

/// How a try ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Why {
    /// Still under way at the end.
    #[error("not answered yet")]
    Open,
    /// The connection broke.
    #[error("connection broken")]
    Transport,
    /// It could not be reached.
    #[error("unreachable")]
    Unreachable,
    /// No byte and no word in the progress interval.
    #[error("no progress")]
    Stalled,
    /// Wrong bytes.
    #[error("wrong bytes")]
    WrongBytes,
    /// It does not have the piece.
    #[error("does not have it")]
    NotHave,
    /// It was busy.
    #[error("busy")]
    Busy,
    /// It is not the home.
    #[error("not the home")]
    NotMyHome,
    /// It cannot read the registry.
    #[error("cannot read the registry")]
    CannotSource,
    /// The answer ended without the piece.
    #[error("ended early")]
    EndedEarly,
    /// The registry failed, and might not the next time.
    #[error("registry error")]
    Registry,
    /// The registry refuses for good.
    #[error("refused by the registry")]
    RegistryRefused,
    /// The local store failed.
    #[error("store error")]
    Store,
}

/// Why a want ended without its piece, and all that was tried (the last 16 tries).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantError {
    /// What ended it.
    pub reason: WantFailure,
    /// Sources in the order they were asked, and how each ended.
    pub tries: Vec<(Source, Why)>,
}

impl std::error::Error for WantError {}

impl fmt::Display for WantError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.reason)?;
        for (at, (source, why)) in self.tries.iter().enumerate() {
            write!(f, "{} {source}: {why}", if at == 0 { "; tried" } else { "," })?;
        }
        Ok(())
    }
}

/// What ended a want without its piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum WantFailure {
    /// Its deadline passed.
    #[error("deadline passed")]
    Deadline,
    /// The registry refuses for good and nobody else has it.
    #[error("no source left")]
    NoSource,
    /// The blob was removed.
    #[error("blob removed")]
    Removed,
    /// The blob is not added, or no image on this node names the piece.
    #[error("unknown piece")]
    Unknown,
    /// Too many wants are open.
    #[error("too many wants")]
    Overloaded,
}
