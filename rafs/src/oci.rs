//! Images as registries know them: references, registries and OCI layout folders, manifests, bootstrap layers, push.
//!
//! ```text
//!  Reference ──resolve──> manifest digest ──manifest──> ImageManifest ┬─ bootstrap layer ─> bootstrap, chunk tables
//!  host/repo:tag                                                      └─ blob layers ─> blob_range, as reads need them
//! ```
//!
//! One [`Registry`] answers for registries over HTTP and for layout folders (`oci:DIR`), so that callers need not care.
//! What is named by a digest is verified here, whole, except blobs that are read in ranges: those are verified piece by
//! piece by whoever has the chunk table. Not here: anonymous names without a host (`alpine`), content
//! encodings, and any cache.

mod archive;
mod auth;
mod backend;
mod blob_file;
mod blob_place;
mod bootstrap_layer;
mod check;
mod convert;
mod copy;
mod document;
mod error;
mod http;
mod layer_index;
mod layout;
mod manifest;
mod mirrors;
mod nydus_image;
mod nydus_source;
mod options;
mod passage;
mod proxy;
mod push;
mod reference;
mod referrers;
mod registry;
mod seal;
mod source_image;
mod stream;
mod tube;
mod upload;

pub use archive::{LayoutArchiveError, Location, OpenLocation};
pub use auth::{Authfile, AuthfileError, Credentials, Keyring, Offer, SharedCredentials};
pub use backend::{BackendRule, CredentialsFileError};
pub use blob_place::{BlobPlace, BlobPlaceError, Bucket};
pub use bootstrap_layer::{BootstrapLayer, LayerError, LayerLimits, WrittenLayer};
pub use bootstrap_layer::{open_bootstrap_layer, read_bootstrap_layer, write_bootstrap_layer};
pub use check::{CheckImageError, CheckedImage, ComparedTree, ImageCheckReport, check_image};
pub use convert::{
    ConvertError, ConvertEvent, ConvertOptions, ConvertReport, ConvertedImage, ConvertedLayer, LayerFailure, convert,
};
pub use convert::{LayerCompression, ReverseError, ReverseReport, ReversedImage, reverse};
pub use copy::{CopiedBlobs, CopyReport, copy};
pub use error::RegistryError;
pub use http::{Access, Described, Probe, is_loopback_registry, is_public_registry};
pub use layer_index::{LayerIndex, Ordinary, OrdinaryManifest};
pub use layout::{Layout, LayoutEntry};
pub use manifest::{BLOB_MARK, BOOTSTRAP_MARK, Descriptor, ImageManifest, Index, Manifest, ManifestError, Platform};
pub use nydus_source::NydusSourceError;
pub use options::RegistryOptions;
pub use proxy::{ProxyForm, ProxyOptions, ProxyStats};
pub use push::{PushError, PushOptions, PushReport, PushedLayer, push};
pub use reference::{Reference, ReferenceError, Source};
pub use registry::{Image, Registry};
pub use seal::{DecryptionKeys, KeyError, LayerSeal, Recipients, SealError};
pub use source_image::SourceImageError;
pub use stream::BlobStream;
pub use upload::Placed;

#[cfg(test)]
mod tests;
