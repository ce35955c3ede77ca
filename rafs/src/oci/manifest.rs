//! Manifests and indexes, read as Nydus images.
//!
//! Where upstream's tools write more than one form, all are read: OCI and Docker media types, and in an index both ways
//! of marking a Nydus manifest (nydusify --merge-platform, nydus-snapshotter pkg/converter).

use std::{collections::BTreeMap, fmt, str::FromStr};

use oci_spec::image as spec;
use serde::Deserialize;
use shoal_proto::{BlobId, ObjectId};

use super::seal::{ENCRYPTED, LayerSeal};

/// Media type of a data blob layer.
pub(super) const BLOB_LAYER: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// Says "true" on a data blob layer. containerd makes a label of the snapshot of it.
pub const BLOB_MARK: &str = "containerd.io/snapshot/nydus-blob";
/// Says "true" on the bootstrap layer. containerd makes a label of the snapshot of it.
pub const BOOTSTRAP_MARK: &str = "containerd.io/snapshot/nydus-bootstrap";
/// Says "6" on the bootstrap layer.
pub(super) const FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";

/// Says "true" on a blob layer that is encrypted.
pub(super) const ENCRYPTED_BLOB: &str = "containerd.io/snapshot/nydus-encrypted-blob";

/// On a blob layer that is the index over a gzip layer: the digest of that layer, which the registry has as it is.
pub(super) const REFERENCE: &str = "containerd.io/snapshot/nydus-ref";

/// Docker's name of a gzip layer.
const DOCKER_GZIP_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
/// How an index marks a Nydus manifest.
pub(super) const NYDUS_ARTIFACT: &str = "application/vnd.nydus.image.manifest.v1+json";
/// How indexes marked it before nydus 2.3.5.
pub(super) const NYDUS_OS_FEATURE: &str = "nydus.remoteimage.v1";
/// Most bytes of a blob (format note, section 5).
const MAX_BLOB: u64 = 1 << 40;

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not of the right shape.
    #[error("not a manifest")]
    Malformed(#[source] serde_json::Error),
    /// The image has only the usual tar layers.
    #[error("this image has no Nydus form: the last of its {layers} layers is no bootstrap; convert it first")]
    NotNydus {
        /// How many layers it has.
        layers: usize,
    },
    /// A RAFS version that is not read here.
    #[error("RAFS version {0:?} is not supported, only \"6\"")]
    Version(String),
    /// A layer of an unknown kind in front of the bootstrap layer.
    #[error("layer {index} is {media_type:?} and no Nydus blob")]
    UnexpectedLayer {
        /// Position of the layer.
        index: usize,
        /// What it is.
        media_type: String,
    },
    /// A digest other than sha256.
    #[error("digest {0:?} is not sha256")]
    Digest(String),
    /// A blob larger than the format allows.
    #[error("blob {id} of {size} bytes is too large")]
    TooLarge {
        /// Which blob.
        id: BlobId,
        /// Its size.
        size: u64,
    },
    /// No entry of an index fits.
    #[error("no image for {wanted}, only for {}", .found.join(", "))]
    NoPlatform {
        /// This machine, or what was asked for.
        wanted: String,
        /// What there is.
        found: Vec<String>,
    },
    /// An index in an index.
    #[error("the index names another index")]
    NestedIndex,
    /// Nothing in an index is an image that can be converted.
    #[error("the index names no OCI image")]
    NoImage,
    /// More entries than any image has.
    #[error("it names more than {limit} things")]
    TooMany {
        /// The limit.
        limit: usize,
    },
}

/// Something named by digest, and its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// The sha256 of its bytes.
    pub id: ObjectId,
    /// Its size in bytes.
    pub size: u64,
}

impl TryFrom<&spec::Descriptor> for Descriptor {
    type Error = ManifestError;

    fn try_from(descriptor: &spec::Descriptor) -> Result<Self, ManifestError> {
        let id = descriptor.as_digest_sha256().and_then(|hex| hex.parse().ok());
        let id = id.ok_or_else(|| ManifestError::Digest(descriptor.digest().to_string()))?;
        Ok(Self { id, size: descriptor.size() })
    }
}

/// What is behind a tag or a digest.
#[derive(Debug, Clone)]
pub enum Manifest {
    /// A Nydus image for one platform.
    Image(ImageManifest),
    /// A list of images.
    Index(Index),
}

impl Manifest {
    /// Parses either; an image that is no Nydus image is an error.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let value: serde_json::Value = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        if value.get("manifests").is_some() {
            Index::parse(bytes).map(Self::Index)
        } else {
            ImageManifest::parse(bytes).map(Self::Image)
        }
    }
}

/// A Nydus image: data blobs and a bootstrap layer.
#[derive(Debug, Clone)]
pub struct ImageManifest {
    /// Its own media type, OCI's or Docker's.
    pub media_type: String,
    /// The image's config.
    pub config: Descriptor,
    /// The layer with the bootstrap and the chunk tables.
    pub bootstrap: Descriptor,
    /// How that layer is encrypted, if it is.
    pub seal: Option<LayerSeal>,
    /// All layers in their order, the bootstrap layer last; a blob may be listed more than once.
    pub layers: Vec<Descriptor>,
    /// The data blobs, in layer order, each once. The blob table of a merged bootstrap may have another order.
    pub blobs: Vec<(BlobId, u64)>,
    /// Of these, the meta blobs of gzip layers that are read as they are: the layer, and its meta blob.
    pub references: Vec<(BlobId, BlobId)>,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
}

impl ImageManifest {
    /// Parses a manifest and recognises its layers (format note, section 12).
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let manifest: spec::ImageManifest = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        let layers = manifest.layers();
        let Some((bootstrap, blob_layers)) = layers.split_last().filter(|(last, _)| is_bootstrap_layer(last)) else {
            return Err(ManifestError::NotNydus { layers: layers.len() });
        };
        if let Some(version) = annotation(bootstrap, FS_VERSION).filter(|version| *version != "6") {
            return Err(ManifestError::Version(version.chars().take(16).collect()));
        }
        let mut blobs: Vec<(BlobId, u64)> = Vec::new();
        let mut references = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for (index, layer) in blob_layers.iter().enumerate() {
            if layer.media_type().as_ref() != BLOB_LAYER {
                let media_type = layer.media_type().as_ref().chars().take(120).collect();
                return Err(ManifestError::UnexpectedLayer { index, media_type });
            }
            let Descriptor { id, size } = layer.try_into()?;
            let id = BlobId::new(*id.as_bytes());
            if size > MAX_BLOB {
                return Err(ManifestError::TooLarge { id, size });
            }
            if seen.insert(id) {
                blobs.push((id, size));
                if let Some(layer) = annotation(layer, REFERENCE) {
                    let parsed = layer.strip_prefix("sha256:").and_then(|hex| hex.parse().ok());
                    let layer = parsed.ok_or_else(|| ManifestError::Digest(layer.chars().take(80).collect()))?;
                    references.push((layer, id));
                }
            }
        }
        Ok(Self {
            media_type: manifest.media_type().as_ref().unwrap_or(&spec::MediaType::ImageManifest).to_string(),
            config: manifest.config().try_into()?,
            bootstrap: bootstrap.try_into()?,
            seal: seal(bootstrap),
            layers: layers.iter().map(Descriptor::try_from).collect::<Result<_, _>>()?,
            blobs,
            references,
            annotations: manifest.annotations().clone().unwrap_or_default().into_iter().collect(),
        })
    }
}

/// How a layer is encrypted, if its media type says that it is.
fn seal(layer: &spec::Descriptor) -> Option<LayerSeal> {
    let encrypted = layer.media_type().as_ref().ends_with(ENCRYPTED);
    encrypted.then(|| LayerSeal::new(layer.annotations().iter().flatten()))
}

fn is_bootstrap_layer(layer: &spec::Descriptor) -> bool {
    let media_type = layer.media_type().as_ref();
    let plain = media_type.strip_suffix(ENCRYPTED).unwrap_or(media_type);
    let gzip = plain == spec::MediaType::ImageLayerGzip.as_ref() || plain == DOCKER_GZIP_LAYER;
    gzip && annotation(layer, BOOTSTRAP_MARK) == Some("true")
}

fn annotation<'a>(descriptor: &'a spec::Descriptor, key: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(key).map(String::as_str)
}

/// A list of images for several platforms.
///
/// Its entries have types of their own here: those of `oci-spec` do not read the key `os.features`.
#[derive(Debug, Clone, Deserialize)]
pub struct Index {
    manifests: Vec<Entry>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    digest: String,
    size: u64,
    artifact_type: Option<String>,
    platform: Option<EntryPlatform>,
}

#[derive(Debug, Clone, Deserialize)]
struct EntryPlatform {
    os: String,
    architecture: String,
    #[serde(rename = "os.features", default)]
    os_features: Vec<String>,
}

impl Index {
    /// Parses an OCI index or a Docker manifest list.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        serde_json::from_slice(bytes).map_err(ManifestError::Malformed)
    }

    /// The manifest for a platform: the first that is marked as Nydus, else the first at all, which may turn out to be
    /// a Nydus image without a mark (BuildKit writes such indexes).
    pub fn select(&self, platform: &Platform) -> Result<Descriptor, ManifestError> {
        let mut fitting = self.manifests.iter().filter(|entry| platform.fits(entry));
        let first = fitting.clone().next();
        let Some(entry) = fitting.find(|entry| entry.is_marked_nydus()).or(first) else {
            let found = self.manifests.iter().filter_map(|entry| entry.platform.as_ref()).take(32);
            let found = found.map(|p| format!("{}/{}", p.os, p.architecture).chars().take(60).collect()).collect();
            return Err(ManifestError::NoPlatform { wanted: platform.to_string(), found });
        };
        let id = entry.digest.strip_prefix("sha256:").and_then(|hex| hex.parse().ok());
        let id = id.ok_or_else(|| ManifestError::Digest(entry.digest.chars().take(80).collect()))?;
        Ok(Descriptor { id, size: entry.size })
    }
}

impl Entry {
    fn is_marked_nydus(&self) -> bool {
        let feature =
            |platform: &EntryPlatform| platform.os_features.iter().any(|feature| feature == NYDUS_OS_FEATURE);
        self.artifact_type.as_deref() == Some(NYDUS_ARTIFACT) || self.platform.as_ref().is_some_and(feature)
    }
}

/// An operating system and a processor, in Go's words as everywhere in OCI: `linux/amd64`, `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, ...
    pub architecture: String,
    /// `v7`, `v8`, ...; as a wish, none means any.
    pub variant: Option<String>,
}

impl Platform {
    /// Containers on this machine.
    pub fn here() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant: None }
    }

    fn fits(&self, entry: &Entry) -> bool {
        entry.platform.as_ref().is_some_and(|p| p.os == self.os && p.architecture == self.architecture)
    }

    /// Whether an image for `offered` is what is wished for here.
    pub(super) fn accepts(&self, offered: &Self) -> bool {
        let same = self.os == offered.os && self.architecture == offered.architecture;
        same && (self.variant.is_none() || self.variant == offered.variant)
    }
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let word = |word: &str| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
            (!word.is_empty() && word.len() <= 32 && word.bytes().all(plain)).then(|| word.to_owned())
        };
        let parts: Option<Vec<_>> = text.split('/').map(word).collect();
        match parts.as_deref() {
            Some([os, architecture]) => {
                Ok(Self { os: os.clone(), architecture: architecture.clone(), variant: None })
            }
            Some([os, architecture, variant]) => {
                Ok(Self { os: os.clone(), architecture: architecture.clone(), variant: Some(variant.clone()) })
            }
            _ => Err("must be OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT, as in linux/arm64".to_owned()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn digest(byte: u8) -> String {
        format!("sha256:{}", hex::encode([byte; 32]))
    }

    fn layer(media_type: &str, byte: u8, annotations: Value) -> Value {
        json!({ "mediaType": media_type, "digest": digest(byte), "size": 1000 + u64::from(byte), "annotations": annotations })
    }

    fn manifest(layers: Vec<Value>) -> Vec<u8> {
        let config =
            json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(9), "size": 9 });
        serde_json::to_vec(&json!({ "schemaVersion": 2, "config": config, "layers": layers })).unwrap()
    }

    fn bootstrap(media_type: &str) -> Value {
        layer(media_type, 8, json!({ BOOTSTRAP_MARK: "true", FS_VERSION: "6" }))
    }

    #[test]
    fn a_nydus_image_is_recognised_in_both_dialects() {
        for media_type in ["application/vnd.oci.image.layer.v1.tar+gzip", DOCKER_GZIP_LAYER] {
            let blob = |byte| layer(BLOB_LAYER, byte, json!({ BLOB_MARK: "true" }));
            let bytes = manifest(vec![blob(1), blob(2), blob(1), bootstrap(media_type)]);
            let Ok(Manifest::Image(image)) = Manifest::parse(&bytes) else { panic!("{media_type}") };
            assert_eq!(image.blobs, [(BlobId::new([1; 32]), 1001), (BlobId::new([2; 32]), 1002)]);
            assert_eq!(image.bootstrap, Descriptor { id: ObjectId::new([8; 32]), size: 1008 });
            assert!(image.references.is_empty());
            assert_eq!(image.layers.iter().map(|layer| layer.size).collect::<Vec<_>>(), [1001, 1002, 1001, 1008]);
            assert_eq!(
                (image.config.size, image.media_type.as_str()),
                (9, "application/vnd.oci.image.manifest.v1+json")
            );
        }
        let alone = ImageManifest::parse(&manifest(vec![bootstrap(DOCKER_GZIP_LAYER)])).unwrap();
        assert!(alone.blobs.is_empty());
    }

    #[test]
    fn a_meta_blob_says_which_layer_it_is_the_index_of() {
        let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
        let meta = |layer: &str| layer_of(1, layer);
        let image = ImageManifest::parse(&manifest(vec![meta(&digest(7)), bootstrap(gzip)])).unwrap();
        assert_eq!(image.references, [(BlobId::new([7; 32]), BlobId::new([1; 32]))]);
        for strange in ["", "sha256:", "sha512:00"] {
            let refused = ImageManifest::parse(&manifest(vec![meta(strange), bootstrap(gzip)]));
            assert!(matches!(refused, Err(ManifestError::Digest(_))), "{strange:?}");
        }
    }

    fn layer_of(byte: u8, reference: &str) -> Value {
        layer(BLOB_LAYER, byte, json!({ BLOB_MARK: "true", REFERENCE: reference }))
    }

    #[test]
    fn other_images_are_refused_with_the_reason() {
        let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
        let plain = manifest(vec![layer(gzip, 1, json!({}))]);
        assert!(matches!(Manifest::parse(&plain), Err(ManifestError::NotNydus { layers: 1 })));
        assert!(matches!(Manifest::parse(&manifest(vec![])), Err(ManifestError::NotNydus { layers: 0 })));
        let zstd = manifest(vec![bootstrap("application/vnd.oci.image.layer.v1.tar+zstd")]);
        assert!(matches!(Manifest::parse(&zstd), Err(ManifestError::NotNydus { .. })));
        let v5 = manifest(vec![layer(gzip, 1, json!({ BOOTSTRAP_MARK: "true", FS_VERSION: "5" }))]);
        assert!(matches!(Manifest::parse(&v5), Err(ManifestError::Version(v)) if v == "5"));
        let mixed = manifest(vec![layer(gzip, 1, json!({})), bootstrap(gzip)]);
        assert!(matches!(Manifest::parse(&mixed), Err(ManifestError::UnexpectedLayer { index: 0, .. })));
        let mut huge = layer(BLOB_LAYER, 1, json!({}));
        huge["size"] = json!(MAX_BLOB + 1);
        let huge = manifest(vec![huge, bootstrap(gzip)]);
        assert!(matches!(Manifest::parse(&huge), Err(ManifestError::TooLarge { .. })));
        assert!(matches!(Manifest::parse(b"[]"), Err(ManifestError::Malformed(_))));
    }

    fn entry(byte: u8, architecture: &str, extra: Value) -> Value {
        let mut entry = json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(byte), "size": 7,
            "platform": { "os": "linux", "architecture": architecture },
        });
        if extra.is_array() {
            entry["platform"]["os.features"] = extra;
        } else if extra.is_string() {
            entry["artifactType"] = extra;
        }
        entry
    }

    fn selected(entries: Vec<Value>) -> Result<u8, ManifestError> {
        let bytes = serde_json::to_vec(&json!({ "schemaVersion": 2, "manifests": entries })).unwrap();
        let Ok(Manifest::Index(index)) = Manifest::parse(&bytes) else { panic!("an index") };
        let platform: Platform = "linux/amd64".parse().unwrap();
        index.select(&platform).map(|descriptor| descriptor.id.as_bytes()[0])
    }

    #[test]
    fn the_nydus_manifest_of_the_platform_is_taken_from_an_index() {
        let plain = |byte, architecture| entry(byte, architecture, Value::Null);
        let marked = |byte, architecture| entry(byte, architecture, json!(NYDUS_ARTIFACT));
        let older = entry(5, "amd64", json!([NYDUS_OS_FEATURE]));
        assert_eq!(selected(vec![plain(1, "amd64"), marked(2, "arm64"), marked(3, "amd64")]).unwrap(), 3);
        assert_eq!(selected(vec![plain(1, "amd64"), older]).unwrap(), 5);
        assert_eq!(selected(vec![plain(4, "arm64"), plain(1, "amd64")]).unwrap(), 1);
        let error = selected(vec![marked(2, "arm64")]).unwrap_err();
        assert_eq!(error.to_string(), "no image for linux/amd64, only for linux/arm64");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Manifest::parse(&bytes);
        }
    }
}
