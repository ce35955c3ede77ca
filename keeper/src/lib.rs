//! The keeper: a small process that holds the connections of FUSE mounts while the daemon that serves them is away, and the
//! group by which the kernel asks for what is missing of native ones.
//!
//! ```text
//!   daemon ── Keep: device, mountpoint, record ──> keeper      a descriptor of the connection goes along (SCM_RIGHTS)
//!          <── Done | Refused ────────────────────
//!          ── Next: after which device ───────────>            what a new daemon asks, until it has seen all
//!          <── Kept: device, mountpoint, record ──             with a copy of the descriptor
//!          <── End ───────────────────────────────
//!          ── Forget: device ─────────────────────>            the mount is gone; said twice it does no harm
//!          ── Guard ──────────────────────────────>            a fanotify group goes along
//!          ── Group ──────────────────────────────>            a new daemon asks for it: Group with a copy, or End
//!          ── Release ────────────────────────────>            nothing is marked any more
//!          ── Take ───────────────────────────────>            this connection is for events from now on:
//!          <── Event: id, number, offset, length ──             with a descriptor of the file; all that wait, then as they come
//!          ── Answer: id, allow or deny ──────────>            has no reply
//!          ── Stop ───────────────────────────────>            refused while anything is kept or guarded
//! ```
//!
//! A mount lives as long as somebody has its connection open. The keeper has it open and never reads from it: requests wait
//! in the kernel until a daemon takes them. What the record means is the daemon's matter, so a keeper need not be replaced
//! when the daemon is.
//!
//! **Events** are the kernel's question whether a range of a file may be read. The keeper is the only one who reads them, since an
//! answer names an event by a number that means something to its reader only. It passes them on to the daemon, to the next one again if
//! it dies, and denies those that nobody has answered within its patience. It has no use for the file itself. While it holds a
//! group it does not end for want of a daemon, but denies everything: without the group, readers would be given holes as zeros.
//!
//! **A holder** is a second process of this kind, which a keeper with a group starts: it has the group open and nothing else to do, so
//! that readers wait, rather than see zeros, when daemon and keeper are killed at once. See [`Holder`].
//!
//! **The wire.** A Unix socket of packets (SOCK_SEQPACKET). Every packet is a message: a byte with the [version](VERSION), a
//! byte with the kind, and fields of a length (two bytes, little-endian) and that many bytes. Each request has one answer, in
//! order. Both sides check that the other is of the same user, or root. Who sends what cannot be read is cut off.
//!
//! **Whether a daemon is there** is known by its connection, which it leaves open: when the last one has been closed for longer
//! than the keeper's *patience*, nobody is expected to come back, and the keeper ends. Readers then get errors rather than wait
//! for ever.
//!
//! Not here: serving a mount, deciding which mounts should exist, starting a daemon.

mod client;
mod group;
mod holder;
mod message;
mod packet;
mod peer_user;
mod pending;
mod server;
mod table;

pub use client::{Client, ClientError, Taker, Told};
pub use group::{Event, Group, MAX_DESCRIPTORS, Verdict};
pub use holder::{Holder, held, holder_socket};
pub use message::{
    MAX_DEVICE, MAX_PACKET, MAX_PATH, MAX_REASON, MAX_RECORD, Malformed, Mount, Reply, Request, VERSION,
};
pub use pending::{MAX_PENDING, Pending, Waiting};
pub use server::{DEFAULT_PATIENCE, Ended, Keeper, KeeperError};
pub use table::{MAX_MOUNTS, Table};
