//! Manifests and indexes of any image, read for what they name.
//!
//! [`Manifest`](super::Manifest) reads Nydus images and refuses all others; here nothing is asked of the layers, and what
//! is not known is kept: entries of an index go into a new index as they were.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Value, json};
use shoal_proto::ObjectId;

use super::{
    Descriptor, ManifestError, Platform,
    manifest::{NYDUS_ARTIFACT, NYDUS_OS_FEATURE},
};

pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Most things that one manifest or index may name; a manifest of 4 MiB has no room for many more.
const MAX_LINKS: usize = 16 * 1024;

/// A manifest or an index.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) media_type: String,
    pub(super) content: Content,
    /// What it says of itself besides.
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
pub(super) enum Content {
    Index(Vec<Child>),
    Image(Links),
}

/// What a manifest names.
#[derive(Debug, Clone)]
pub(super) struct Links {
    pub(super) config: Link,
    pub(super) layers: Vec<Link>,
}

/// A blob that a manifest names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) descriptor: Descriptor,
    pub(super) media_type: String,
    /// Whether its bytes are to be had elsewhere, so that the registry need not have them.
    pub(super) foreign: bool,
}

/// A manifest that an index names.
#[derive(Debug, Clone)]
pub(super) struct Child {
    pub(super) descriptor: Descriptor,
    pub(super) media_type: String,
    pub(super) platform: Option<Platform>,
    /// Whether it is marked as a Nydus image.
    pub(super) is_nydus: bool,
    /// The entry as it was.
    pub(super) raw: Value,
}

impl Document {
    /// Reads either kind; the size of `bytes` is the caller's to bound.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let value: Value = serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        let named = value.get("mediaType").and_then(Value::as_str).map(str::to_owned);
        let annotations = value.get("annotations").and_then(Value::as_object).into_iter().flatten();
        let annotations = annotations.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
        let annotations = annotations.collect();
        if let Some(entries) = value.get("manifests") {
            let entries = entries.as_array().map(Vec::as_slice).unwrap_or_default();
            let children = bounded(entries)?.iter().map(Child::parse).collect::<Result<_, _>>()?;
            let media_type = named.unwrap_or_else(|| OCI_INDEX.to_owned());
            return Ok(Self { media_type, content: Content::Index(children), annotations });
        }
        let raw = RawManifest::deserialize(&value).map_err(ManifestError::Malformed)?;
        let layers = bounded(&raw.layers)?.iter().map(RawLink::link).collect::<Result<_, _>>()?;
        let content = Content::Image(Links { config: raw.config.link()?, layers });
        Ok(Self { media_type: named.unwrap_or_else(|| OCI_MANIFEST.to_owned()), content, annotations })
    }
}

impl Document {
    /// The first manifest of an index that fits a platform, marked as Nydus or not.
    pub(super) fn select(&self, wanted: &Platform) -> Result<Descriptor, ManifestError> {
        let children = match &self.content {
            Content::Index(children) => children.as_slice(),
            Content::Image(_) => &[],
        };
        let fits = |child: &&Child| child.platform.as_ref().is_some_and(|platform| wanted.accepts(platform));
        let chosen = children.iter().find(fits).ok_or_else(|| no_platform(wanted, children))?;
        Ok(chosen.descriptor)
    }
}

/// The error that says what there is instead.
pub(super) fn no_platform(wanted: &Platform, children: &[Child]) -> ManifestError {
    let found = children.iter().filter_map(|child| child.platform.as_ref()).take(32);
    let found = found.map(|platform| platform.to_string().chars().take(60).collect()).collect();
    ManifestError::NoPlatform { wanted: wanted.to_string(), found }
}

impl Child {
    fn parse(entry: &Value) -> Result<Self, ManifestError> {
        let raw = RawChild::deserialize(entry).map_err(ManifestError::Malformed)?;
        let feature = |platform: &RawPlatform| platform.os_features.iter().any(|name| name == NYDUS_OS_FEATURE);
        let is_nydus =
            raw.artifact_type.as_deref() == Some(NYDUS_ARTIFACT) || raw.platform.as_ref().is_some_and(feature);
        let RawLink { media_type, .. } = &raw.link;
        Ok(Self {
            descriptor: raw.link.link()?.descriptor,
            media_type: media_type.clone(),
            platform: raw.platform.map(Platform::from),
            is_nydus,
            raw: entry.clone(),
        })
    }

    /// An image that no index names.
    pub(super) fn alone(id: ObjectId, size: u64, media_type: &str) -> Self {
        let link = Descriptor { id, size };
        let raw = descriptor(media_type, link);
        Self { descriptor: link, media_type: media_type.to_owned(), platform: None, is_nydus: false, raw }
    }

    /// Its entry in another index; `platform` is put into one that has none.
    pub(super) fn entry(&self, platform: Option<&Value>) -> Value {
        let mut entry = self.raw.clone();
        if let (None, Some(platform)) = (entry.get("platform"), platform) {
            entry["platform"] = platform.clone();
        }
        entry
    }

    /// Whether it is for any machine: BuildKit's attestations say `unknown/unknown`.
    pub(super) fn is_image(&self) -> bool {
        self.platform.as_ref().is_none_or(|platform| platform.os != "unknown")
    }

    /// Whether it is an index itself.
    pub(super) fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), OCI_INDEX | DOCKER_LIST)
    }
}

/// An OCI index over these entries.
pub(super) fn index(entries: &[Value]) -> bytes::Bytes {
    annotated_index(entries, &BTreeMap::new())
}

/// The same that says something of itself.
pub(super) fn annotated_index(entries: &[Value], annotations: &BTreeMap<String, String>) -> bytes::Bytes {
    let mut index = json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
    if !annotations.is_empty() {
        index["annotations"] = json!(annotations);
    }
    index.to_string().into()
}

/// Of the annotations of an image or an index, those that are as true of the same in another form: not how layers are to be
/// mounted, nor under which name a folder or a runtime has it.
pub(super) fn lasting(annotations: &BTreeMap<String, String>) -> BTreeMap<String, String> {
    const OTHERS: [&str; 3] = ["containerd.io/snapshot/", "io.containerd.", "dev.shoal."];
    let lasts =
        |key: &str| key != "org.opencontainers.image.ref.name" && !OTHERS.iter().any(|other| key.starts_with(other));
    annotations.iter().filter(|(key, _)| lasts(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// How an index names a Nydus image. With `marked`, clients that do not look for the mark take another entry: the new
/// ones by the artifact type, older ones by a feature that no operating system has.
pub(super) fn nydus_entry(image: Descriptor, platform: &Value, marked: bool) -> Value {
    let mut entry = descriptor(OCI_MANIFEST, image);
    entry["platform"] = platform.clone();
    if marked {
        entry["artifactType"] = json!(NYDUS_ARTIFACT);
        let mut features = platform.get("os.features").and_then(Value::as_array).cloned().unwrap_or_default();
        features.push(json!(NYDUS_OS_FEATURE));
        entry["platform"]["os.features"] = Value::Array(features);
    }
    entry
}

/// The fields with which a manifest or an index names something.
pub(super) fn descriptor(media_type: &str, descriptor: Descriptor) -> Value {
    json!({ "mediaType": media_type, "digest": format!("sha256:{}", descriptor.id), "size": descriptor.size })
}

fn bounded<T>(links: &[T]) -> Result<&[T], ManifestError> {
    if links.len() <= MAX_LINKS { Ok(links) } else { Err(ManifestError::TooMany { limit: MAX_LINKS }) }
}

#[derive(Deserialize)]
struct RawManifest {
    config: RawLink,
    #[serde(default)]
    layers: Vec<RawLink>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawLink {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    urls: Vec<String>,
}

impl RawLink {
    fn link(&self) -> Result<Link, ManifestError> {
        let id = self.digest.strip_prefix("sha256:").and_then(|hex| hex.parse().ok());
        let id = id.ok_or_else(|| ManifestError::Digest(self.digest.chars().take(80).collect()))?;
        let descriptor = Descriptor { id, size: self.size };
        Ok(Link { descriptor, media_type: self.media_type.clone(), foreign: !self.urls.is_empty() })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawChild {
    #[serde(flatten)]
    link: RawLink,
    artifact_type: Option<String>,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    os: String,
    architecture: String,
    variant: Option<String>,
    #[serde(rename = "os.features", default)]
    os_features: Vec<String>,
}

impl From<RawPlatform> for Platform {
    fn from(raw: RawPlatform) -> Self {
        // They are shown to people, and are a stranger's.
        let plain = |text: String| text.chars().filter(|c| !c.is_control()).take(64).collect();
        Self { os: plain(raw.os), architecture: plain(raw.architecture), variant: raw.variant.map(plain) }
    }
}

/// A platform as an index or a config says it; what is not said is `unknown`.
pub(super) fn platform(value: &Value) -> Platform {
    let unknown = || RawPlatform {
        os: "unknown".to_owned(),
        architecture: "unknown".to_owned(),
        variant: None,
        os_features: Vec::new(),
    };
    RawPlatform::deserialize(value).unwrap_or_else(|_| unknown()).into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(byte: u8) -> Value {
        json!({ "mediaType": "a/b", "digest": format!("sha256:{}", hex::encode([byte; 32])), "size": byte })
    }

    #[test]
    fn a_manifest_is_read_for_its_links() {
        let mut foreign = link(3);
        foreign["urls"] = json!(["https://elsewhere.example/layer"]);
        let bytes = json!({ "config": link(1), "layers": [link(2), foreign] }).to_string();
        let document = Document::parse(bytes.as_bytes()).unwrap();
        assert_eq!(document.media_type, OCI_MANIFEST, "nothing else is said");
        let Content::Image(links) = document.content else { panic!("a manifest") };
        assert_eq!(links.config.descriptor.size, 1);
        assert_eq!(links.layers.iter().map(|layer| layer.foreign).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn entries_of_an_index_are_kept_as_they_are() {
        let mut marked = link(2);
        marked["platform"] =
            json!({ "os": "linux", "architecture": "arm64", "variant": "v8", "os.features": [NYDUS_OS_FEATURE] });
        marked["annotations"] = json!({ "kept": "yes" });
        let mut attestation = link(3);
        attestation["platform"] = json!({ "os": "unknown", "architecture": "unknown" });
        let bytes = json!({ "mediaType": DOCKER_LIST, "manifests": [link(1), marked, attestation] }).to_string();
        let document = Document::parse(bytes.as_bytes()).unwrap();
        assert_eq!(document.media_type, DOCKER_LIST);
        let Content::Index(children) = document.content else { panic!("an index") };
        assert_eq!(children.iter().map(|child| child.is_nydus).collect::<Vec<_>>(), [false, true, false]);
        assert_eq!(children[1].platform.as_ref().map(Platform::to_string).as_deref(), Some("linux/arm64/v8"));
        assert_eq!(children.iter().map(Child::is_image).collect::<Vec<_>>(), [true, true, false]);
        assert_eq!(children[1].raw, marked);
        let again = index(&[children[1].raw.clone()]);
        assert_eq!(serde_json::from_slice::<Value>(&again).unwrap()["manifests"][0], marked);
    }

    #[test]
    fn what_names_nothing_is_refused() {
        let many = vec![link(1); MAX_LINKS + 1];
        let many = json!({ "manifests": many }).to_string();
        assert!(matches!(Document::parse(many.as_bytes()), Err(ManifestError::TooMany { .. })));
        for text in ["", "[]", "{}", r#"{"config":{"digest":"sha256:00","size":1}}"#, r#"{"manifests":[{}]}"#] {
            assert!(Document::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Document::parse(&bytes);
        }
    }
}
