//! Reverse: a Nydus image becomes an OCI image of plain tar layers, for clients that know nothing of Nydus.
//!
//! ```text
//! every blob holds the bootstrap of its layer (as BuildKit and nydusify make them), and these, merged, are the tree of the
//! image?   ──yes──> a tar layer for each Nydus layer, with its whiteouts
//!          ──no───> one tar layer with the whole tree
//! ```
//!
//! Images that Shoal converts keep no trees of their layers, and become one layer. The config is the image's, with the
//! `diff_ids` of the new layers and without what the conversion to Nydus had added to its history. The same image gives the
//! same bytes. Blobs lie in the folder for temporary files meanwhile, and one layer at a time beside them.

use std::io;

use bytes::Bytes;
use serde::Serialize;
use serde_json::{Value, json};
use shoal_proto::{BlobId, ObjectId};
use tempfile::TempDir;

use super::ConvertEvent;
use crate::{
    BlobDirError, BootstrapError, UnpackError,
    oci::{
        Descriptor, NydusSourceError, Platform, PushedLayer, Reference, Registry, RegistryError, Source,
        document::{self, Child, Document, descriptor},
        manifest::NYDUS_OS_FEATURE,
        nydus_image::BOOTSTRAP_COMMENT,
        nydus_source::{NydusSource, nydus_images},
        push::digest,
        registry::sha256,
        source_image::MAX_CONFIG,
    },
};
use layers::trees;

mod layers;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// How tar layers are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LayerCompression {
    /// Understood by every client.
    #[default]
    Gzip,
    /// Smaller and quicker to unpack, for clients of about 2020 and later.
    Zstd,
}

impl LayerCompression {
    fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// What was made of the image of one platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReversedImage {
    /// The platform.
    pub platform: String,
    /// The Nydus manifest.
    #[serde(serialize_with = "digest")]
    pub source: ObjectId,
    /// The OCI manifest.
    #[serde(serialize_with = "digest")]
    pub manifest: ObjectId,
    /// Whether each Nydus layer became a layer; otherwise the only layer has the whole tree.
    pub per_layer: bool,
    /// The layers, the lowest first.
    pub layers: Vec<PushedLayer>,
    /// Paths of sockets, which a tar cannot hold.
    pub left_out: Vec<String>,
}

/// What was converted back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReverseReport {
    /// Where to: with tag and digest.
    pub reference: String,
    /// Digest of the manifest or index under the tag.
    #[serde(serialize_with = "digest")]
    pub manifest: ObjectId,
    /// The images, in the order of the source's index.
    pub images: Vec<ReversedImage>,
    /// Bytes of blobs that were read from the source.
    pub read_bytes: u64,
    /// Bytes of layers that were sent to the target.
    pub sent_bytes: u64,
}

/// Why an image could not be converted back.
#[derive(Debug, thiserror::Error)]
pub enum ReverseError {
    /// A registry, layout or archive failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The Nydus image cannot be read.
    #[error(transparent)]
    Source(#[from] NydusSourceError),
    /// Its blobs cannot be read.
    #[error("image sha256:{id}")]
    Blobs {
        /// Its manifest.
        id: ObjectId,
        /// Why not.
        source: BlobDirError,
    },
    /// Its content cannot be read, or is not what the bootstrap names.
    #[error("image sha256:{id}")]
    Unpack {
        /// Its manifest.
        id: ObjectId,
        /// Why not.
        source: UnpackError,
    },
    /// It has what a layer cannot hold, or a config that is none.
    #[error("image sha256:{id}: {problem}")]
    Image {
        /// Its manifest.
        id: ObjectId,
        /// Which.
        problem: String,
    },
    /// The work folder failed.
    #[error("cannot use the work folder")]
    Io(#[from] io::Error),
}

impl ReverseError {
    fn image(id: ObjectId, problem: impl Into<String>) -> Self {
        Self::Image { id, problem: problem.into() }
    }

    fn broken(id: ObjectId, source: BootstrapError) -> Self {
        Self::Source(NydusSourceError::Bootstrap { id, source })
    }
}

/// Converts the Nydus image behind `from` back and puts it under the tag of `to`, `latest` without one; of an index the
/// images that are marked as Nydus, or all if none is. `platforms` chooses among them.
///
/// # Errors
/// Whatever a registry answers; an image that is no Nydus image or is damaged; names that mean something else in a layer.
/// The tag is then what it was. The same holds when the future is dropped.
pub async fn reverse(
    registry: &Registry,
    from: &Reference,
    to: &Reference,
    platforms: &[Platform],
    compression: LayerCompression,
    on_event: impl Fn(ConvertEvent) + Send + Sync,
) -> Result<ReverseReport, ReverseError> {
    let tagged = to.tagged().map_err(RegistryError::from)?;
    let (id, size) = registry.resolve(from).await?;
    let bytes = registry.manifest(from.source(), id).await?;
    let root = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
    let children = nydus_images((id, size), &root, platforms)?;
    let (mut images, mut entries, mut read_bytes, mut only) = (Vec::new(), Vec::new(), 0, Bytes::new());
    for child in &children {
        let back = Back { registry, from: from.source(), to: tagged.source(), child, compression };
        let (image, bytes, platform) = back.run(&on_event, &mut read_bytes).await?;
        let written = Descriptor { id: image.manifest, size: bytes.len() as u64 };
        entries.push(document::nydus_entry(written, &platform, false));
        if children.len() > 1 {
            registry.put_child(tagged.source(), document::OCI_MANIFEST, bytes.clone()).await?;
        }
        images.push(image);
        only = bytes;
    }
    let (media_type, bytes) = match children.len() {
        1 => (document::OCI_MANIFEST, only),
        _ => (document::OCI_INDEX, document::index(&entries)),
    };
    let manifest = registry.put_manifest(&tagged, media_type, bytes).await?;
    let layers = images.iter().flat_map(|image| &image.layers);
    let sent_bytes = layers.filter(|layer| !layer.existed).map(|layer| layer.size).sum();
    Ok(ReverseReport { reference: tagged.pinned(manifest).to_string(), manifest, images, read_bytes, sent_bytes })
}

/// The way back of one platform.
struct Back<'a> {
    registry: &'a Registry,
    from: &'a Source,
    to: &'a Source,
    child: &'a Child,
    compression: LayerCompression,
}

impl Back<'_> {
    /// Stores all of the image but its manifest. Gives that, and the platform as the index is to say it.
    async fn run(
        &self,
        on_event: &(impl Fn(ConvertEvent) + Sync),
        read_bytes: &mut u64,
    ) -> Result<(ReversedImage, Bytes, Value), ReverseError> {
        let id = self.child.descriptor.id;
        let image = NydusSource::load(self.registry, self.from, id).await?;
        let work = TempDir::with_prefix("shoal-reverse-")?;
        let blobs = blobs(&image);
        let layer_bytes = blobs.iter().map(|blob| blob.size).sum();
        on_event(ConvertEvent::Platform { layer_bytes });
        for blob in &blobs {
            let mut file = tokio::fs::File::create(work.path().join(blob.id.to_string())).await?;
            self.registry.blob_to(self.from, blob, &mut file).await?;
            on_event(ConvertEvent::Read(blob.size));
            *read_bytes += blob.size;
        }
        let (bootstrap, layers) = (image.bootstrap.clone(), layers_of(&image));
        let dir = work.path().to_owned();
        let trees = blocking(move || trees(id, bootstrap, &layers, &dir)).await?;
        let per_layer = trees.iter().all(|tree| tree.is_layer);
        let (mut layers, mut links, mut diff_ids, mut left_out) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for tree in trees {
            let (dir, compression) = (work.path().to_owned(), self.compression);
            let written = blocking(move || tree.write(id, &dir, compression)).await?;
            let existed = self.registry.upload_blob(self.to, &written.descriptor, written.file.path()).await?;
            let Descriptor { id, size } = written.descriptor;
            layers.push(PushedLayer { id, size, existed });
            links.push(descriptor(self.compression.media_type(), written.descriptor));
            diff_ids.push(written.diff_id);
            left_out.extend(written.left_out);
        }
        let config = self.registry.blob(self.from, image.manifest.config.id, MAX_CONFIG).await?;
        let config: Value = serde_json::from_slice(&config).unwrap_or_default();
        let platform = self.platform(&config);
        let config = plain_config(config, &diff_ids)
            .ok_or_else(|| ReverseError::image(id, "its config is no JSON object with a list of history"))?;
        let size = config.len() as u64;
        let (config, _) = self.registry.upload_bytes(self.to, config).await?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": document::OCI_MANIFEST,
            "config": descriptor(CONFIG, Descriptor { id: config, size }),
            "layers": links,
        });
        let bytes = Bytes::from(manifest.to_string());
        let (manifest, name) = (sha256(&bytes), document::platform(&platform).to_string());
        Ok((ReversedImage { platform: name, source: id, manifest, per_layer, layers, left_out }, bytes, platform))
    }

    /// As the source's index says it, without the mark of a Nydus image, else as the config does.
    fn platform(&self, config: &Value) -> Value {
        let Some(platform) = self.child.raw.get("platform") else {
            let known = |key: &&str| config.get(*key).is_some_and(Value::is_string);
            let fields = ["os", "architecture", "variant"].into_iter().filter(known);
            return fields.map(|key| (key.to_owned(), config[key].clone())).collect();
        };
        let mut platform = platform.clone();
        if let Some(fields) = platform.as_object_mut() {
            let features = fields.get_mut("os.features").and_then(Value::as_array_mut);
            let left = features.map(|features| {
                features.retain(|feature| feature != NYDUS_OS_FEATURE);
                features.len()
            });
            if left == Some(0) {
                fields.remove("os.features");
            }
        }
        platform
    }
}

/// All that has to be read: the blobs that the manifest lists, those that only the bootstrap names, and chunk tables beside
/// gzip layers.
fn blobs(image: &NydusSource) -> Vec<Descriptor> {
    let of = |id: BlobId, size| Descriptor { id: ObjectId::new(*id.as_bytes()), size };
    let mut all: Vec<_> = image.manifest.blobs.iter().map(|(id, size)| of(*id, *size)).collect();
    for blob in image.bootstrap.blobs() {
        let meta = blob.meta.map(|meta| of(meta.id, meta.size));
        for found in [Some(of(blob.id, image.size(blob))), meta].into_iter().flatten() {
            if !all.iter().any(|known| known.id == found.id) {
                all.push(found);
            }
        }
    }
    all
}

/// The blobs in the order of the layers, as often as they are there.
fn layers_of(image: &NydusSource) -> Vec<BlobId> {
    let layers = image.manifest.layers.split_last().map(|(_, layers)| layers).unwrap_or_default();
    layers.iter().map(|layer| BlobId::new(*layer.id.as_bytes())).collect()
}

/// The config with these layers. Its history has as many lines with content as there are layers, as the specification wants
/// it: where the source's does not, its lines become ones without, and one for each layer follows.
fn plain_config(mut config: Value, diff_ids: &[ObjectId]) -> Option<Bytes> {
    let fields = config.as_object_mut()?;
    let diff_ids: Vec<_> = diff_ids.iter().map(|id| format!("sha256:{id}")).collect();
    let layers = diff_ids.len();
    fields.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": diff_ids }));
    let Some(history) = fields.get_mut("history") else { return Some(config.to_string().into()) };
    let history = history.as_array_mut()?;
    history.retain(|line| line.get("comment").and_then(Value::as_str) != Some(BOOTSTRAP_COMMENT));
    let empty = |line: &Value| line.get("empty_layer").and_then(Value::as_bool).unwrap_or(false);
    if history.iter().filter(|line| !empty(line)).count() != layers {
        history.iter_mut().filter_map(Value::as_object_mut).for_each(|line| {
            line.insert("empty_layer".to_owned(), json!(true));
        });
        history.extend((0..layers).map(|_| json!({ "created_by": "shoal convert --reverse" })));
    }
    Some(config.to_string().into())
}

async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, ReverseError> + Send + 'static,
) -> Result<T, ReverseError> {
    let joined = tokio::task::spawn_blocking(operation).await;
    joined.unwrap_or_else(|error| Err(io::Error::other(error).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_history_has_a_line_with_content_for_each_layer() {
        let of = |config: Value, layers: u8| {
            let diff_ids: Vec<_> = (0..layers).map(|byte| ObjectId::new([byte; 32])).collect();
            let config = plain_config(config, &diff_ids).unwrap();
            let config: Value = serde_json::from_slice(&config).unwrap();
            assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), usize::from(layers));
            config["history"].clone()
        };
        let history = json!([
            { "created_by": "one" },
            { "created_by": "env", "empty_layer": true },
            { "created_by": "two" },
            { "created_by": "x", "comment": BOOTSTRAP_COMMENT },
        ]);
        let config = json!({ "history": history });
        assert_eq!(of(config.clone(), 2), Value::from(&history.as_array().unwrap()[..3]));
        let one = of(config, 1);
        let with_content = one.as_array().unwrap().iter().filter(|line| line.get("empty_layer").is_none());
        assert_eq!((one.as_array().unwrap().len(), with_content.count()), (4, 1));
        assert_eq!(of(json!({ "os": "linux" }), 1), Value::Null);
        assert!(plain_config(json!([]), &[]).is_none());
        assert!(plain_config(json!({ "history": {} }), &[]).is_none());
    }
}
