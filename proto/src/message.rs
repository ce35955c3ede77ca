//! The messages of the data plane as the rest of the program sees them: every value of these types is within its
//! limits when it came through [`decode_header`](crate::decode_header), which is the only way in from a socket.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use prost::bytes::Bytes;

use crate::{Bitfield, BlobId, Fingerprint, ObjectId, PeerId, Priority, Role, StartTrace};

/// The version of the protocol that this code speaks best.
pub const VERSION: u32 = 1;
/// The oldest version that it still speaks.
pub const MIN_VERSION: u32 = 1;
/// Bit of [`Hello::features`]: the peer knows hash lists and pieces of plain blobs.
pub const FEATURE_HASH_LISTS: u64 = 1;
/// Bit of [`Hello::features`]: the peer knows traces of starts.
pub const FEATURE_START_TRACES: u64 = 2;
/// Most pieces in one request, and fewest is one.
pub const MAX_RUN: usize = 64;
/// Most requests that one side of a TCP connection has open; more are a violation.
pub const MAX_OPEN: usize = 1024;
/// Most addresses of one peer.
pub const MAX_ADDRESSES: usize = 8;
/// Most peers in one message.
pub const MAX_CONTACTS: usize = 32;
/// Most labels of one peer.
pub const MAX_LABELS: usize = 16;
/// Most bytes of a zone, of the key or value of a label, and of a node's name.
pub const MAX_NAME: usize = 128;
/// Most bytes of a certificate of membership.
pub const MAX_MEMBERSHIP: usize = 4096;
/// Most bytes of a registry's or a repository's name. `oci:` layouts have a path for a registry, hence the width.
pub const MAX_SOURCE: usize = 1024;
/// Most bytes of a reason.
pub const MAX_REASON: usize = 512;
/// Most bytes of an answered piece or object, encoded. What is really expected is known from the chunk table or
/// descriptor and checked by who asked.
pub const MAX_ANSWER: u64 = 1 << 30;
/// [`Request::lacks`] of who has nothing of a blob.
pub const LACKS_ALL: u16 = 1000;
/// Longest time on the wire; longer ones are sent as this.
pub const MAX_WAIT: Duration = Duration::from_secs(3600);

/// A frame's header. Only [`Message::Data`] is followed by raw bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// First on every connection, both ways.
    Hello(Hello),
    /// Opens a request; first on its stream.
    Request(Request),
    /// A part of a piece or object.
    Data(Data),
    /// The peer does not hold this piece under the fingerprint asked for.
    NotHave {
        /// The request answered.
        request: u64,
        /// The piece that is not there.
        piece: u32,
    },
    /// The peer is getting what was asked for: patience.
    Pending {
        /// The request answered.
        request: u64,
        /// Expected time until data flows.
        eta: Duration,
    },
    /// Not now, not here. Ends the request.
    Busy {
        /// The request answered.
        request: u64,
        /// When to come again.
        retry_after: Duration,
        /// Peers that received the same pieces a short while ago.
        alternates: Vec<Contact>,
    },
    /// The peer is not home to these pieces. Ends the request.
    NotMyHome {
        /// The request answered.
        request: u64,
        /// Who the peer believes to be the live seed peers of the zone.
        members: Vec<PeerId>,
    },
    /// The peer is home but may not or cannot read this registry. Ends the request.
    CannotSource {
        /// The request answered.
        request: u64,
        /// For the log of who asked.
        reason: String,
    },
    /// The last message of an answer.
    End {
        /// The request answered.
        request: u64,
        /// How it went.
        status: Status,
    },
    /// Who asked no longer cares.
    Cancel {
        /// The request to forget.
        request: u64,
    },
    /// What the sender can serve, whole or since the last time.
    Have(Have),
    /// The sender wants to hear [`Message::Have`] about this blob.
    Interest {
        /// The bootstrap layer whose fingerprints name the pieces.
        bootstrap: ObjectId,
        /// The blob.
        blob: BlobId,
    },
    /// Peer exchange: others that hold pieces of this blob.
    Peers {
        /// The blob.
        blob: BlobId,
        /// Who, at most [`MAX_CONTACTS`].
        contacts: Vec<Contact>,
    },
    /// What a start of an image touched first. Peers whose hello lacks [`FEATURE_START_TRACES`] take it for a violation.
    Trace {
        /// The image's bootstrap layer.
        bootstrap: ObjectId,
        /// Its pieces, in order.
        trace: StartTrace,
    },
    /// The last message over TCP; QUIC says the same itself.
    Close {
        /// Why, as a number.
        code: u32,
        /// Why, in words.
        reason: String,
    },
}

impl Message {
    /// The number of raw bytes that follow the header.
    pub fn payload_len(&self) -> usize {
        match self {
            Self::Data(data) => data.length as usize,
            _ => 0,
        }
    }

    /// The bits that a peer's [`Hello::features`] must have for it to be sent this: whoever does not know a message ends the
    /// connection.
    pub fn needs(&self) -> u64 {
        match self {
            Self::Trace { .. } => FEATURE_START_TRACES,
            Self::Request(request) => request.what.needs(),
            _ => 0,
        }
    }

    /// The request that this message opens, answers or cancels.
    pub fn request(&self) -> Option<u64> {
        match self {
            Self::Request(request) => Some(request.id),
            Self::Data(data) => Some(data.request),
            Self::NotHave { request, .. }
            | Self::Pending { request, .. }
            | Self::Busy { request, .. }
            | Self::NotMyHome { request, .. }
            | Self::CannotSource { request, .. }
            | Self::End { request, .. }
            | Self::Cancel { request } => Some(*request),
            Self::Hello(_)
            | Self::Have(_)
            | Self::Interest { .. }
            | Self::Peers { .. }
            | Self::Trace { .. }
            | Self::Close { .. } => None,
        }
    }
}

/// Where a peer can be reached on the data plane.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Contact {
    /// Who.
    pub peer: PeerId,
    /// Where, at most [`MAX_ADDRESSES`], best first.
    pub addresses: Vec<SocketAddr>,
}

/// Who a peer is, apart from its identity, which the connection's certificate shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The version that it speaks best.
    pub version: u32,
    /// The oldest version that it speaks.
    pub min_version: u32,
    /// Optional abilities, one bit each; unknown bits are ignored.
    pub features: u64,
    /// Its certificate of membership, empty in an open cluster.
    pub membership: Bytes,
    /// What it does for others.
    pub role: Role,
    /// Its zone.
    pub zone: String,
    /// Free labels, such as its rack or host.
    pub labels: BTreeMap<String, String>,
    /// Where its data plane listens.
    pub data_addresses: Vec<SocketAddr>,
    /// Its name in logs.
    pub name: String,
}

impl Hello {
    /// The newest version that both sides speak.
    pub fn common_version(&self, other: &Self) -> Option<u32> {
        let version = self.version.min(other.version);
        (version >= self.min_version.max(other.min_version)).then_some(version)
    }
}

/// Where an image's bytes come from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageSource {
    /// The registry, `host[:port]`, or `oci:` and a folder.
    pub registry: String,
    /// The repository in it.
    pub repository: String,
}

/// Asks for pieces or an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Chosen by who asks, repeated in every answer.
    pub id: u64,
    /// Where a home would read.
    pub image: ImageSource,
    /// What is asked for.
    pub what: Asked,
    /// How urgent it is.
    pub priority: Priority,
    /// Asks the receiver as the home: it is to read the registry for everyone if it must.
    pub source: bool,
    /// How long the asker will wait.
    pub deadline: Duration,
    /// Thousandths of the blob that the asker lacks, at most [`LACKS_ALL`]: who is behind is given more by those that have
    /// much to send. 0 from who does not say, as earlier versions do.
    pub lacks: u16,
}

/// What a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// A run of pieces.
    Pieces {
        /// The bootstrap layer that names them, for a home that has yet to load it.
        bootstrap: ObjectId,
        /// The blob.
        blob: BlobId,
        /// The first piece.
        first: u32,
        /// What each piece from `first` on must be: 1 to [`MAX_RUN`], all below `u32::MAX`.
        fingerprints: Vec<Fingerprint>,
        /// The manifest of an image whose bootstrap layer is encrypted: it has the layer's key, for a home that may open it.
        /// Homes that do not know this field cannot read the registry for the asker.
        manifest: Option<ObjectId>,
    },
    /// An object, answered as piece 0.
    Object {
        /// Its digest; of a hash list that of the blob, of a trace that of the bootstrap layer.
        id: ObjectId,
        /// Where the registry keeps it.
        kind: ObjectKind,
    },
}

impl Asked {
    /// As [`Message::needs`].
    pub fn needs(&self) -> u64 {
        match self {
            Self::Object { kind: ObjectKind::HashList, .. } => FEATURE_HASH_LISTS,
            Self::Object { kind: ObjectKind::StartTrace, .. } => FEATURE_START_TRACES,
            Self::Object { kind: ObjectKind::Manifest | ObjectKind::Blob, .. } | Self::Pieces { .. } => 0,
        }
    }
}

/// What an object is: which of a registry's two stores holds it, or that it is about what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKind {
    /// `/v2/<name>/manifests/`.
    Manifest,
    /// `/v2/<name>/blobs/`.
    Blob,
    /// The [`HashList`](crate::HashList) of the blob with the digest asked for. Peers whose hello lacks
    /// [`FEATURE_HASH_LISTS`] take it for a violation.
    HashList,
    /// The [`StartTrace`] of the image with this bootstrap layer, which is in no registry. Peers whose hello lacks
    /// [`FEATURE_START_TRACES`] take it for a violation.
    StartTrace,
}

/// A part of an answer; `length` raw bytes follow it. The parts of a piece come in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data {
    /// The request answered.
    pub request: u64,
    /// Which piece; 0 for an object.
    pub piece: u32,
    /// Bytes of the whole piece, encoded; at most [`MAX_ANSWER`].
    pub total: u64,
    /// Where in the piece this part starts.
    pub offset: u64,
    /// Bytes of this part, at most [`MAX_PAYLOAD`](crate::MAX_PAYLOAD); 0 only if the piece is empty.
    pub length: u32,
}

impl Data {
    /// Whether the piece is complete with this part.
    pub fn is_last(&self) -> bool {
        self.offset + u64::from(self.length) == self.total
    }
}

/// How an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Every piece was answered.
    Complete,
    /// Cancelled by who asked.
    Cancelled,
    /// The server failed.
    Failed,
    /// The server refuses this request.
    Refused,
}

/// What a peer can serve of a blob, in a window of at most [`MAX_WIRE_PIECES`](crate::MAX_WIRE_PIECES) pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Have {
    /// The bootstrap layer whose fingerprints name the pieces.
    pub bootstrap: ObjectId,
    /// The blob.
    pub blob: BlobId,
    /// Whether this replaces all that was known of the window, rather than adds to it.
    pub full: bool,
    /// The first piece of the window.
    pub first: u32,
    /// The pieces, counted from `first`.
    pub pieces: Bitfield,
}
