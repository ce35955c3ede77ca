//! OCI and Docker images, as what is converted, and as what a converted image is compared with.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Value, json};
use shoal_proto::ObjectId;

use super::{
    Descriptor, ManifestError, Platform, Registry, RegistryError, Source,
    document::{self, Child, Content, Document, Link, Links},
};

/// Largest image config that is read.
pub(super) const MAX_CONFIG: u64 = 8 << 20;

/// Why an image cannot be read as one of tar layers.
#[derive(Debug, thiserror::Error)]
pub enum SourceImageError {
    /// A registry, layout or archive failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// It is something else, or contradicts itself.
    #[error("image sha256:{id}: {problem}")]
    Image {
        /// Its manifest.
        id: ObjectId,
        /// Why not.
        problem: String,
    },
}

impl SourceImageError {
    pub(super) fn new(id: ObjectId, problem: impl Into<String>) -> Self {
        Self::Image { id, problem: problem.into() }
    }
}

/// A layer of the source.
#[derive(Debug, Clone, Copy)]
pub(super) struct SourceLayer {
    pub(super) descriptor: Descriptor,
    /// The digest of its tar, by the image config.
    pub(super) diff_id: ObjectId,
}

/// The images to read: of an index those that are images, have one of the platforms asked for and are not marked as
/// Nydus, which is what an earlier conversion with `merge_index` left.
pub(super) fn choose(
    id: ObjectId,
    bytes: &Bytes,
    root: &Document,
    wanted: &[Platform],
) -> Result<Vec<Child>, RegistryError> {
    let children = match &root.content {
        Content::Image(_) => return Ok(vec![Child::alone(id, bytes.len() as u64, &root.media_type)]),
        Content::Index(children) => children,
    };
    let failed = |source| RegistryError::Manifest { id, source };
    let images = || children.iter().filter(|child| child.is_image() && !child.is_nydus);
    let accepts = |wanted: &Platform, child: &Child| child.platform.as_ref().is_some_and(|p| wanted.accepts(p));
    for platform in wanted {
        if !images().any(|child| accepts(platform, child)) {
            return Err(failed(document::no_platform(platform, children)));
        }
    }
    let chosen: Vec<_> = images()
        .filter(|child| wanted.is_empty() || wanted.iter().any(|platform| accepts(platform, child)))
        .cloned()
        .collect();
    match chosen.iter().any(Child::is_index) {
        true => Err(failed(ManifestError::NestedIndex)),
        false if chosen.is_empty() => Err(failed(ManifestError::NoImage)),
        false => Ok(chosen),
    }
}

/// An image of the source, for one platform.
pub(super) struct SourceImage {
    pub(super) media_type: String,
    /// The lowest first.
    pub(super) layers: Vec<SourceLayer>,
    pub(super) config: Bytes,
    /// What its manifest says besides.
    pub(super) annotations: BTreeMap<String, String>,
    /// As the source's index says it, else as the config does.
    pub(super) platform: Value,
}

#[derive(Deserialize)]
struct Config {
    rootfs: RootFs,
    os: Option<String>,
    architecture: Option<String>,
    variant: Option<String>,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

impl SourceImage {
    pub(super) async fn load(registry: &Registry, source: &Source, child: &Child) -> Result<Self, SourceImageError> {
        let id = child.descriptor.id;
        let bytes = registry.manifest(source, id).await?;
        let document = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
        let Content::Image(links) = document.content else { return Err(SourceImageError::new(id, "it is an index")) };
        let config = registry.blob(source, links.config.descriptor.id, MAX_CONFIG).await?;
        let parsed: Config = serde_json::from_slice(&config).map_err(|_| {
            SourceImageError::new(id, "its config is not that of an image: it has no rootfs.diff_ids")
        })?;
        let layers = layers(&links, &parsed.rootfs.diff_ids).map_err(|problem| SourceImageError::new(id, problem))?;
        let platform = match child.raw.get("platform") {
            Some(platform) => platform.clone(),
            None => {
                let mut platform = json!({
                    "os": parsed.os.as_deref().unwrap_or("linux"),
                    "architecture": parsed.architecture.as_deref().unwrap_or("amd64"),
                });
                if let Some(variant) = &parsed.variant {
                    platform["variant"] = json!(variant);
                }
                platform
            }
        };
        Ok(Self { media_type: document.media_type, layers, config, annotations: document.annotations, platform })
    }
}

/// The layers with the digests of their tars.
fn layers(links: &Links, diff_ids: &[String]) -> Result<Vec<SourceLayer>, String> {
    if links.layers.len() != diff_ids.len() {
        return Err(format!("it has {} layers, its config names {}", links.layers.len(), diff_ids.len()));
    }
    let layer = |(position, (link, diff_id)): (usize, (&Link, &String))| {
        let kind = cut(&link.media_type);
        if !is_tar(&link.media_type) {
            return Err(format!("layer {position} is {kind:?} and no tar"));
        }
        let diff_id = diff_id.strip_prefix("sha256:").and_then(|hex| hex.parse().ok());
        let diff_id = diff_id.ok_or_else(|| format!("the diff_id of layer {position} is no sha256 digest"))?;
        Ok(SourceLayer { descriptor: link.descriptor, diff_id })
    };
    links.layers.iter().zip(diff_ids).enumerate().map(layer).collect()
}

/// Layers of OCI and Docker, distributable or not, by their media types. How a tar is compressed shows in its bytes.
fn is_tar(media_type: &str) -> bool {
    let oci = media_type.strip_prefix("application/vnd.oci.image.layer.");
    let oci = oci.map(|rest| rest.strip_prefix("nondistributable.").unwrap_or(rest));
    let docker = media_type.strip_prefix("application/vnd.docker.image.rootfs.");
    matches!(oci, Some("v1.tar" | "v1.tar+gzip" | "v1.tar+zstd"))
        || matches!(docker, Some("diff.tar" | "diff.tar.gzip" | "diff.tar.zstd" | "foreign.diff.tar.gzip"))
}

fn cut(text: &str) -> String {
    text.chars().take(120).collect()
}
