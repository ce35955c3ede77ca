//! The two documents of a Nydus image, config and manifest, as nydusify and the snapshotter's converter write them
//! (format note, section 12).

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use serde_json::{Value, json};
use shoal_proto::ObjectId;

use super::{
    Descriptor, LayerSeal, Platform, WrittenLayer,
    document::{OCI_MANIFEST, descriptor},
    manifest::{BLOB_LAYER, BLOB_MARK, BOOTSTRAP_MARK, ENCRYPTED_BLOB, FS_VERSION, REFERENCE},
    seal::ENCRYPTED,
};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// The config's media type in an index that serves both kinds of client: one that containerd does not know, so that it
/// passes the manifest over without the snapshotter that can use it.
pub(super) const NYDUS_CONFIG: &str = "application/vnd.nydus.image.config.v1+json";
/// What the line says that a conversion adds to the history.
pub(super) const BOOTSTRAP_COMMENT: &str = "Nydus bootstrap layer";
const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The layers of an image.
#[derive(Debug, Clone)]
pub(super) struct NydusImage {
    /// In the order of the bootstrap's blob table; for a gzip layer that is read as it is, its meta blob.
    pub(super) blobs: Vec<Descriptor>,
    /// By meta blob, the gzip layer.
    pub(super) references: BTreeMap<ObjectId, ObjectId>,
    pub(super) bootstrap: WrittenLayer,
    /// How the bootstrap layer is encrypted, if it is.
    pub(super) seal: Option<LayerSeal>,
    /// Which of the blobs are encrypted.
    pub(super) encrypted: BTreeSet<ObjectId>,
    /// Whether the blobs lie elsewhere, so that they are no layers: registries refuse manifests that name what they have not.
    pub(super) blobs_elsewhere: bool,
}

/// What a manifest says besides its layers.
#[derive(Debug, Clone, Default)]
pub(super) struct ManifestExtras {
    pub(super) annotations: BTreeMap<String, String>,
    /// The manifest that this one is another form of.
    pub(super) subject: Option<Value>,
    /// What the manifest is, among the referrers of its subject. Default: nothing is said.
    pub(super) artifact_type: Option<&'static str>,
    /// Default: that of OCI images.
    pub(super) config_media_type: Option<&'static str>,
}

impl NydusImage {
    /// The blobs that are layers.
    fn blob_layers(&self) -> &[Descriptor] {
        if self.blobs_elsewhere { &[] } else { &self.blobs }
    }

    pub(super) fn bootstrap_descriptor(&self) -> Descriptor {
        Descriptor { id: self.bootstrap.id, size: self.bootstrap.size }
    }

    /// The image config: that of `base` with other layers and one more line of history. `diff_ids` are the blobs' own
    /// digests and the digest of the bootstrap layer's tar. Without a base it is an empty one for this machine; `None`
    /// when the base is no config.
    pub(super) fn config(&self, base: Option<&[u8]>, created_by: &str) -> Option<Bytes> {
        let platform = Platform::here();
        let mut config = match base {
            Some(base) => serde_json::from_slice(base).ok()?,
            None => json!({ "architecture": platform.architecture, "os": platform.os, "config": {} }),
        };
        let fields = config.as_object_mut()?;
        let blobs = self.blob_layers().iter().map(|blob| blob.id);
        let diff_ids: Vec<_> = blobs.chain([self.bootstrap.diff_id]).map(|id| format!("sha256:{id}")).collect();
        fields.insert("rootfs".to_owned(), json!({ "type": "layers", "diff_ids": diff_ids }));
        let history = fields.entry("history").or_insert_with(|| json!([]));
        let item = json!({ "created_by": created_by, "comment": BOOTSTRAP_COMMENT });
        history.as_array_mut()?.push(item);
        Some(config.to_string().into())
    }

    pub(super) fn manifest(&self, config: Descriptor, extras: &ManifestExtras) -> Bytes {
        let layer = |media_type: &str, layer: Descriptor, annotations: Value| {
            let mut value = descriptor(media_type, layer);
            value["annotations"] = annotations;
            value
        };
        let blobs = self.blob_layers().iter().map(|blob| {
            let mut marks = json!({ BLOB_MARK: "true" });
            if let Some(reference) = self.references.get(&blob.id) {
                marks[REFERENCE] = json!(format!("sha256:{reference}"));
            }
            if self.encrypted.contains(&blob.id) {
                marks[ENCRYPTED_BLOB] = json!("true");
            }
            layer(BLOB_LAYER, *blob, marks)
        });
        let mut mark = BTreeMap::from([(BOOTSTRAP_MARK, "true"), (FS_VERSION, "6")]);
        let mut media_type = GZIP_LAYER.to_owned();
        if let Some(seal) = &self.seal {
            media_type.push_str(ENCRYPTED);
            mark.extend(seal.annotations().iter().map(|(name, value)| (&name[..], &value[..])));
        }
        let bootstrap = layer(&media_type, self.bootstrap_descriptor(), json!(mark));
        let layers: Vec<_> = blobs.chain([bootstrap]).collect();
        let config = descriptor(extras.config_media_type.unwrap_or(CONFIG), config);
        let mut manifest =
            json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": layers });
        if let Some(kind) = extras.artifact_type {
            manifest["artifactType"] = json!(kind);
        }
        if let Some(subject) = &extras.subject {
            manifest["subject"] = subject.clone();
        }
        if !extras.annotations.is_empty() {
            manifest["annotations"] = json!(extras.annotations);
        }
        manifest.to_string().into()
    }
}
