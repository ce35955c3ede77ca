//! The wire contract of Shoal: identities, messages, frames of bounded size, bitfields. A leaf crate without a
//! runtime.
//!
//! # The data plane on one page
//!
//! Two peers keep one connection, mutually authenticated. Its first stream, opened by who dialled, carries [`Hello`]
//! both ways and then notices both ways; nothing else is looked at before the other side's hello was accepted. Every
//! request is a stream of its own (or, over TCP, frames that interleave; each names its request).
//!
//! ```text
//! who asks                                   who serves
//!   Request{id, image, what, priority, ..} ->
//!                                          <- Pending{eta}                       any number of times between pieces, patience
//!                                          <- Data{piece, total, offset, length} + raw bytes, a piece's parts in order
//!                                          <- NotHave{piece}                     instead of that piece's data
//!                                          <- End{status}                        every piece was answered, or not
//!                                     or   <- Busy | NotMyHome | CannotSource    and that is the end
//!   Cancel{id} ->                          <- End{Cancelled}
//!
//! notices: Interest{blob} -> Have{blob, full} at once, then deltas in batches; Peers{blob, contacts} at any time
//!          Trace{bootstrap, pieces} to a seed peer, some time after a start
//! ```
//!
//! Over TCP there is one stream. Who is dialled says nothing before the other side's hello, and nobody anything but a
//! hello before both were accepted. Whoever cancels a request hears its `End`; until then it counts as open, of which each
//! side has at most [`MAX_OPEN`]. `Close` says why a connection ends.
//!
//! - Pieces are named by number and by [`Fingerprint`]; who holds something else under the number answers `NotHave`.
//!   Objects are named by their sha256 and answered as piece 0.
//! - A blob that no image describes (an ordinary layer) is cut into pieces by its [`HashList`], an object that is asked for by
//!   the blob's digest and answered only by who has verified the whole blob. Where pieces of such a blob are spoken of, the blob
//!   stands for its own bootstrap layer. Whoever knows this has [`FEATURE_HASH_LISTS`] in its hello.
//! - What a start of an image touches first is told to a seed peer as a [`StartTrace`], and asked of it, under the name of the image's
//!   bootstrap layer, by who starts the image later. Whoever knows this has [`FEATURE_START_TRACES`] in its hello.
//! - Where the bootstrap layer of an image is encrypted, a request for its pieces also names the manifest, which has the layer's
//!   key for those that may open it. Who does not know that field is no home for such an image.
//! - Who asks says how much of the blob it lacks, so that who is behind the others can be given more.
//! - `source: true` asks the receiver *as the home*: it reads the registry once for everyone. Only a home answers
//!   `NotMyHome` or `CannotSource`; without `source` a peer answers from what it has. `Pending` is said by a home that is at it,
//!   and by whoever holds an answer up to keep a limit.
//! - **Limits.** A header has at most 64 KiB, a payload 256 KiB ([`MAX_HEADER`], [`MAX_PAYLOAD`]); every list and
//!   text has a limit named in this crate and checked in `convert.rs` on both ways. Breaking one ends the connection.
//! - **Versions.** A hello names the newest and oldest version spoken; the newest common one is used ([`VERSION`],
//!   [`MIN_VERSION`]). Unknown fields and feature bits are ignored; unknown messages, and unknown values where one is needed, end
//!   the connection, so a new one needs a feature bit and is sent only to who has it ([`Message::needs`]). A field that is not
//!   there means what was meant before there was one. So daemons of a release and of the one before it understand each other;
//!   `previous/` has the schema of the latter, and tests hold this one to it.

mod bitfield;
mod codec;
mod convert;
mod generated;
mod hash_list;
mod id;
mod message;
mod start_trace;

pub use bitfield::{Bitfield, BitfieldError, MAX_WIRE_PIECES};
pub use codec::{CodecError, MAX_HEADER, MAX_PAYLOAD, PREFIX, decode_body, decode_header, encode_header, header_len};
pub use convert::ConvertError;
pub use generated::control;
pub use hash_list::{HashList, HashListError};
pub use id::{Algorithm, BlobId, DecodedId, Digest, Fingerprint, IdError, ObjectId, PeerId, Priority, Role};
pub use message::{
    Asked, Contact, Data, FEATURE_HASH_LISTS, FEATURE_START_TRACES, Have, Hello, ImageSource, LACKS_ALL,
    MAX_ADDRESSES, MAX_ANSWER, MAX_CONTACTS, MAX_LABELS, MAX_MEMBERSHIP, MAX_NAME, MAX_OPEN, MAX_REASON, MAX_RUN,
    MAX_SOURCE, MAX_WAIT, MIN_VERSION, Message, ObjectKind, Request, Status, VERSION,
};
pub use start_trace::{StartTrace, StartTraceError};
