//! Convert: the OCI or Docker image behind one reference becomes a Nydus image behind another.
//!
//! ```text
//! source layer ──stream, verify──> builder ──> blob ──> target registry         several layers at a time
//!                                         '──> bootstrap and chunk table ──> record
//! records of all layers ──merge──> bootstrap layer ──> config ──> manifest  \
//!      the same for the other platforms                                      > index ──> the tag
//!      with `merge_index`: the source's own manifests, as they are          /
//! ```
//!
//! A layer is not stored before it is converted, and its blob goes away when the target has it. What stays of a layer is
//! its *record*, a few percent of it and all that merging needs: in a folder for the next run, and in a cache image for
//! other machines. A layer with a record whose blob the target has, or can get from the cache, is not read again; so a
//! conversion that was cut off goes on where it was, and one of a converted image sends nothing. The tag comes last.
//!
//! With `oci_ref` gzip layers stay what they are: of such a layer the target gets an index, its *meta blob*, in the place of a
//! blob, and the layer itself as the source has it.
//!
//! Every byte of the source is compared with the digest that names it, and the tar of each layer with the image
//! config's `diff_ids`.

use std::{io, path::PathBuf, sync::Arc};

use bytes::Bytes;
use serde::Serialize;
use shoal_proto::ObjectId;

use super::{
    BlobPlace, CopiedBlobs, Descriptor, NydusSourceError, Platform, PushedLayer, Recipients, Reference,
    ReferenceError, Registry, RegistryError, SourceImageError,
    copy::Copier,
    document::{self, Child, Content, Document},
    nydus_image::NYDUS_CONFIG,
    push::digest,
    source_image::choose,
};
use crate::{BootstrapError, BuildError, BuildOptions, ChunkTableError, Encryption, MergeError};
use dictionary::Dictionary;
use image::Conversion;
use records::Records;

mod blobs;
mod cache;
mod dictionary;
mod image;
mod layer;
mod records;
mod reference;
mod reverse;
mod same_tree;

pub use reverse::{LayerCompression, ReverseError, ReverseReport, ReversedImage, reverse};

/// How to convert an image.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// How layers are built.
    pub build: BuildOptions,
    /// Which platforms of an index. Default: all of them.
    pub platforms: Vec<Platform>,
    /// Put an index under the tag that names the source's manifests as well as the Nydus ones, which are marked, so that
    /// clients that know nothing of them take the former.
    pub merge_index: bool,
    /// Convert no gzip layer, but make an index over it.
    pub oci_ref: bool,
    /// Name the source's manifest as the subject of the Nydus one, so that it is found as its referrer. With `oci_ref` there is
    /// one for each layer, with the image up to there: the form in which an unmodified image is read lazily.
    pub with_referrer: bool,
    /// Memory for the chunks of all layers that are converted at the same time, in bytes; one layer goes on in any case.
    /// Names and chunk tables come on top, as for any build. Default: 256 MiB.
    pub memory_bytes: u64,
    /// Folder of records, made if missing. Default: none is kept.
    pub state: Option<PathBuf>,
    /// An image of records and their blobs, which is read first and brought up to date at the end.
    pub cache: Option<Reference>,
    /// An earlier Nydus image: chunks that it has are read from its blobs, and neither stored nor sent again.
    pub chunk_dict: Option<Reference>,
    /// Encrypt bootstrap layers for them; what is built with encryption, or with the dictionary of an encrypted image, needs it.
    pub recipients: Option<Recipients>,
    /// Put blobs there instead of into the target; it must be one of the client's places.
    pub blob_backend: Option<BlobPlace>,
}

impl Default for ConvertOptions {
    fn default() -> Self {
        Self {
            build: BuildOptions::default(),
            platforms: Vec::new(),
            merge_index: false,
            oci_ref: false,
            with_referrer: false,
            memory_bytes: 256 << 20,
            state: None,
            cache: None,
            chunk_dict: None,
            recipients: None,
            blob_backend: None,
        }
    }
}

impl ConvertOptions {
    /// What cannot go together with encryption, which is to keep the image from whoever can read the target.
    fn check_encryption(&self) -> Result<(), ConvertError> {
        if self.build.encryption == Encryption::None {
            return Ok(());
        }
        let refused = [
            (self.recipients.is_none(), NO_RECIPIENTS),
            (self.cache.is_some(), "a cache image would have the keys of encrypted blobs in the clear"),
            (self.merge_index, "an index of both kinds would have the layers in the clear"),
            (self.oci_ref, "layers that stay as they are cannot be encrypted"),
        ];
        match refused.into_iter().find(|(refused, _)| *refused) {
            Some((_, problem)) => Err(ConvertError::Encryption { problem }),
            None => Ok(()),
        }
    }
}

/// Why an image with encrypted blobs is not put anywhere.
const NO_RECIPIENTS: &str = "the bootstrap has the keys of encrypted blobs: say whom to encrypt it for";

/// What happens while an image is converted.
#[derive(Debug, Clone, Copy)]
pub enum ConvertEvent {
    /// Layers of one platform are about to be converted.
    Platform {
        /// Their bytes in the source.
        layer_bytes: u64,
    },
    /// Bytes of a source layer were read.
    Read(u64),
    /// A layer is in its place. What was read of it, if it had a record, has not been told.
    Layer(ConvertedLayer),
}

/// A layer that is in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ConvertedLayer {
    /// The source's layer.
    #[serde(serialize_with = "digest")]
    pub source: ObjectId,
    /// Its bytes in the source.
    pub source_bytes: u64,
    /// Whether there was a record of it, so that it was not read.
    pub reused: bool,
    /// Whether it stays what it is, and the blob is an index over it.
    pub indexed: bool,
    /// The blob that it became; none for a layer without file content.
    pub blob: Option<PushedLayer>,
}

/// The Nydus image of one platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConvertedImage {
    /// The platform.
    pub platform: String,
    /// The source's manifest.
    #[serde(serialize_with = "digest")]
    pub source: ObjectId,
    /// The Nydus manifest.
    #[serde(serialize_with = "digest")]
    pub manifest: ObjectId,
    /// Its layers, the lowest first, each once.
    pub layers: Vec<ConvertedLayer>,
    /// The bootstrap layer.
    pub bootstrap_layer: PushedLayer,
    /// Blobs of the dictionary that it names.
    pub dictionary: CopiedBlobs,
    /// Bytes of the blobs that the image names and of the bootstrap layer; gzip layers that stay what they are do not count.
    pub encoded_bytes: u64,
}

/// What was converted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConvertReport {
    /// Where to: with tag and digest.
    pub reference: String,
    /// Digest of the manifest or index under the tag.
    #[serde(serialize_with = "digest")]
    pub manifest: ObjectId,
    /// The images, in the order of the source's index.
    pub images: Vec<ConvertedImage>,
    /// The source's own blobs, with `merge_index` or `oci_ref`.
    pub copied: CopiedBlobs,
    /// Bytes of layers that were read from the source.
    pub read_bytes: u64,
    /// Bytes of blobs and bootstrap layers that were sent to the target, each once; those of a dictionary if it could not
    /// mount them.
    pub sent_bytes: u64,
}

/// Why an image could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// A registry, layout or archive failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The image cannot be converted as it is.
    #[error(transparent)]
    Image(#[from] SourceImageError),
    /// The dictionary cannot be used.
    #[error("the dictionary {reference}")]
    Dictionary {
        /// Its name.
        reference: String,
        /// Why not.
        source: NydusSourceError,
    },
    /// A layer could not be converted.
    #[error("layer sha256:{id}")]
    Layer {
        /// Which layer.
        id: ObjectId,
        /// Why not.
        source: LayerFailure,
    },
    /// The layers could not be merged.
    #[error("cannot merge the layers of sha256:{id}")]
    Merge {
        /// The manifest.
        id: ObjectId,
        /// Why not.
        source: MergeError,
    },
    /// What was asked for would put keys or content into the target in the clear.
    #[error("{problem}")]
    Encryption {
        /// How.
        problem: &'static str,
    },
    /// A file of the work folder could not be read or written.
    #[error("{what}")]
    Io {
        /// What was done to which file.
        what: String,
        /// The cause.
        source: io::Error,
    },
}

/// Why a layer could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum LayerFailure {
    /// It is no tar that becomes an image.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// It is no gzip, so that there is nothing to make an index over.
    #[error("it is no gzip")]
    NotGzip,
    /// Its tar is not the one that the image config names.
    #[error("its tar has the digest sha256:{found}, the image config says sha256:{expected}")]
    DiffId {
        /// By the config.
        expected: ObjectId,
        /// Of the bytes.
        found: ObjectId,
    },
    /// What was built cannot be read back.
    #[error("cannot read back the bootstrap")]
    Bootstrap(#[from] BootstrapError),
    /// What was built cannot be read back.
    #[error("cannot read back the chunk table")]
    ChunkTable(#[from] ChunkTableError),
    /// Its first bytes could not be read, or are of a compression that is not supported.
    #[error("cannot begin to read it")]
    Start(#[source] io::Error),
    /// A file could not be read or written.
    #[error("cannot use the work folder")]
    Io(#[from] io::Error),
}

impl From<ReferenceError> for ConvertError {
    fn from(error: ReferenceError) -> Self {
        Self::Registry(error.into())
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ConvertError {
    let what = what.into();
    move |source| ConvertError::Io { what, source }
}

/// Converts the image behind `from` and puts it under the tag of `to`, `latest` without one. `on_event` is called from
/// several threads.
///
/// # Errors
/// Whatever a registry answers; an image that is no OCI or Docker image, or a Nydus image already; layers that are not
/// what their digests say or that cannot become an image. The tag is then what it was, and what was finished need not be
/// done again. The same holds when the future is dropped.
pub async fn convert(
    registry: &Registry,
    from: &Reference,
    to: &Reference,
    options: &ConvertOptions,
    on_event: impl Fn(ConvertEvent) + Send + Sync + 'static,
) -> Result<ConvertReport, ConvertError> {
    options.check_encryption()?;
    let tagged = to.tagged()?;
    let (id, _) = registry.resolve(from).await?;
    let bytes = registry.manifest(from.source(), id).await?;
    let root = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
    let records = Records::open(options.state.as_deref()).map_err(io_error("cannot make the folder of records"))?;
    let cache = match &options.cache {
        Some(reference) => Some(cache::Cache::load(registry, reference).await?),
        None => None,
    };
    let dictionary = match &options.chunk_dict {
        Some(reference) => Some(Dictionary::load(registry, reference, &options.build).await?),
        None => None,
    };
    let known = (records, cache, dictionary);
    let conversion = Conversion::new(registry, (from, tagged.source()), options, known, Arc::new(on_event));
    let chosen = choose(id, &bytes, &root, &options.platforms)?;
    let mut converted = Vec::new();
    for child in &chosen {
        converted.push(conversion.image(child).await?);
    }
    let (media_type, bytes, copied) = conversion.top(&root, &chosen, &converted).await?;
    conversion.update_cache().await?;
    let manifest = registry.put_manifest(&tagged, &media_type, bytes).await?;
    let images: Vec<_> = converted.into_iter().map(|image| image.report).collect();
    Ok(ConvertReport {
        reference: tagged.pinned(manifest).to_string(),
        manifest,
        read_bytes: conversion.read_bytes(),
        sent_bytes: sent_bytes(&images),
        images,
        copied,
    })
}

fn sent_bytes(images: &[ConvertedImage]) -> u64 {
    let blobs = images.iter().flat_map(|image| image.layers.iter().filter_map(|layer| layer.blob));
    let all = blobs.chain(images.iter().map(|image| image.bootstrap_layer));
    let new: std::collections::BTreeMap<_, _> =
        all.filter(|layer| !layer.existed).map(|layer| (layer.id, layer.size)).collect();
    new.values().sum::<u64>() + images.iter().map(|image| image.dictionary.sent_bytes).sum::<u64>()
}

/// An image that was converted, and how an index names it.
struct Converted {
    report: ConvertedImage,
    descriptor: Descriptor,
    bytes: Bytes,
    /// The platform as the source's index or config says it.
    platform: serde_json::Value,
    /// The same image up to each of its lower layers, with `oci_ref` and `with_referrer`.
    stages: Vec<reference::Stage>,
}

impl Conversion<'_> {
    /// What comes under the tag: media type and bytes. The manifests that it names are put in their places.
    async fn top(
        &self,
        root: &Document,
        chosen: &[Child],
        converted: &[Converted],
    ) -> Result<(String, Bytes, CopiedBlobs), ConvertError> {
        let progress = |_, _| {};
        let mut copier = Copier::new(self.registry, self.from.source(), self.to, &progress);
        if self.options.oci_ref && self.from.source() != self.to {
            // The layers are read there, and what no manifest names a registry may throw away.
            for child in chosen {
                copier.document(child.descriptor.id, 1).await?;
            }
        }
        for image in converted.iter().filter(|_| self.options.with_referrer) {
            if self.options.oci_ref {
                self.publish(image).await?;
                continue;
            }
            let mut entry = document::descriptor(document::OCI_MANIFEST, image.descriptor);
            entry["artifactType"] = NYDUS_CONFIG.into();
            self.registry.put_referring(self.to, image.bytes.clone(), image.report.source, entry).await?;
        }
        if !self.options.merge_index
            && let [only] = converted
        {
            return Ok((document::OCI_MANIFEST.to_owned(), only.bytes.clone(), copier.blobs));
        }
        let mut entries = Vec::new();
        if self.options.merge_index {
            // With a choice of platforms only these; else all that the source has, attestations too.
            let all = match &root.content {
                Content::Index(children) if self.options.platforms.is_empty() => children.as_slice(),
                _ => chosen,
            };
            for child in all.iter().filter(|child| !child.is_nydus) {
                copier.document(child.descriptor.id, 1).await?;
                let own = converted.iter().find(|image| image.report.source == child.descriptor.id);
                entries.push(child.entry(own.map(|image| &image.platform)));
            }
        }
        for image in converted {
            self.registry.put_child(self.to, document::OCI_MANIFEST, image.bytes.clone()).await?;
            entries.push(document::nydus_entry(image.descriptor, &image.platform, self.options.merge_index));
        }
        let annotations = match &root.content {
            Content::Index(_) => document::lasting(&root.annotations),
            // Those of the one image, which are in its manifest.
            Content::Image(_) => Default::default(),
        };
        Ok((document::OCI_INDEX.to_owned(), document::annotated_index(&entries, &annotations), copier.blobs))
    }
}
