//! The image: RAFS v6 as it lies on disk, read, built, checked, unpacked and mounted.

#[cfg(feature = "oci")]
pub mod oci;
mod source;

pub use source::{ChunkError, ChunkId, ChunkReply, ChunkSource};
