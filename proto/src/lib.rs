//! The wire contract of Shoal: identities, messages, frames of bounded size, bitfields. A leaf crate without a runtime.

mod id;

pub use id::{Algorithm, BlobId, Digest, Fingerprint, IdError, ObjectId, PeerId, Priority, Role};
