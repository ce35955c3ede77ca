//! The cache image: records and their blobs, for conversions on other machines.
//!
//! ```text
//! manifest   layer: record              annotated with its key, its source layer and its blob
//!            layer: blob of a record    so that the registry keeps it
//! ```
//!
//! It is as good as whoever may write it: a record names chunks by their digests, and nobody but the builder can say that
//! they are the source's. `check` with the source compares the trees.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use serde_json::{Value, json};
use shoal_proto::ObjectId;

use super::{
    ConvertError, io_error,
    records::{Key, Record, Records},
};
use crate::oci::{
    Descriptor, Reference, Registry, RegistryError, Source,
    document::{self, descriptor},
    manifest::{BLOB_LAYER, BLOB_MARK},
};

const RECORD_LAYER: &str = "application/vnd.shoal.layer.record.v1";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// The key of a record.
const KEY: &str = "containerd.io/snapshot/nydus-cache";
const SOURCE: &str = "containerd.io/snapshot/nydus-source-digest";
const BLOB_DIGEST: &str = "containerd.io/snapshot/nydus-blob-digest";
const BLOB_SIZE: &str = "containerd.io/snapshot/nydus-blob-size";
/// Most records in a cache image; the oldest go first. It stays well below the largest manifest.
const MAX_RECORDS: usize = 256;
/// Largest record that is read.
const MAX_RECORD: u64 = 256 << 20;

/// A cache image as it was found.
pub(super) struct Cache {
    reference: Reference,
    records: Vec<Entry>,
}

/// A record in the cache image.
struct Entry {
    key: String,
    source: String,
    record: Descriptor,
    blob: Option<Descriptor>,
}

impl Cache {
    /// Reads the list of records. No image under the reference is an empty one.
    pub(super) async fn load(registry: &Registry, reference: &Reference) -> Result<Self, RegistryError> {
        let reference = reference.tagged()?;
        let (id, _) = match registry.resolve(&reference).await {
            // A layout folder that is yet to be made has no index.
            Err(RegistryError::NotFound { .. } | RegistryError::Layout { .. }) => {
                return Ok(Self { reference, records: Vec::new() });
            }
            resolved => resolved?,
        };
        let bytes = registry.manifest(reference.source(), id).await?;
        let manifest: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let layers = manifest.get("layers").and_then(Value::as_array);
        let records = layers.into_iter().flatten().filter_map(entry).take(MAX_RECORDS).collect();
        Ok(Self { reference, records })
    }

    /// Where the blobs of its records are.
    pub(super) fn source(&self) -> &Source {
        self.reference.source()
    }

    /// The record with this key, if the cache has a sound one.
    pub(super) async fn record(&self, registry: &Registry, key: &Key) -> Result<Option<Record>, RegistryError> {
        let Some(entry) = self.records.iter().find(|entry| entry.key == key.to_string()) else { return Ok(None) };
        match registry.blob(self.source(), entry.record.id, MAX_RECORD).await {
            Ok(bytes) => Ok(Record::read(&bytes)),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Puts the records in `used` first, with their blobs, and keeps of the others as many as fit.
    pub(super) async fn update(
        &self,
        registry: &Registry,
        blobs: &Source,
        records: &Records,
        used: &BTreeMap<Key, ObjectId>,
    ) -> Result<(), ConvertError> {
        let (mut layers, mut seen) = (Vec::new(), HashSet::new());
        for (key, layer) in used {
            let file = std::fs::read(records.path(key)).map_err(io_error("cannot read the record of a layer"))?;
            let bytes = Bytes::from(file);
            let size = bytes.len() as u64;
            let blob = Record::read(&bytes).and_then(|record| record.blob());
            let (id, _) = registry.upload_bytes(self.source(), bytes).await?;
            if let Some(blob) = blob {
                registry.copy_blob(blobs, self.source(), &blob).await?;
            }
            let (key, source) = (key.to_string(), format!("sha256:{layer}"));
            seen.insert(key.clone());
            push(&mut layers, &Entry { key, source, record: Descriptor { id, size }, blob });
        }
        let room = MAX_RECORDS.saturating_sub(used.len());
        for entry in self.records.iter().filter(|entry| !seen.contains(&entry.key)).take(room) {
            push(&mut layers, entry);
        }
        let config = Bytes::from(json!({ "architecture": "unknown", "os": "unknown" }).to_string());
        let size = config.len() as u64;
        let (id, _) = registry.upload_bytes(self.source(), config).await?;
        let config = descriptor(CONFIG, Descriptor { id, size });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": document::OCI_MANIFEST, "config": config, "layers": layers,
        });
        let bytes = Bytes::from(manifest.to_string());
        registry.put_manifest(&self.reference, document::OCI_MANIFEST, bytes).await?;
        Ok(())
    }
}

fn entry(layer: &Value) -> Option<Entry> {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let digest = |text: &str| text.strip_prefix("sha256:")?.parse::<ObjectId>().ok();
    let annotations = layer.get("annotations")?;
    let record = Descriptor { id: digest(layer.get("digest")?.as_str()?)?, size: layer.get("size")?.as_u64()? };
    let blob = text(annotations.get(BLOB_DIGEST)).zip(text(annotations.get(BLOB_SIZE)));
    let blob = blob.and_then(|(id, size)| Some(Descriptor { id: digest(&id)?, size: size.parse().ok()? }));
    Some(Entry { key: text(annotations.get(KEY))?, source: text(annotations.get(SOURCE))?, record, blob })
}

fn push(layers: &mut Vec<Value>, entry: &Entry) {
    let mut record = descriptor(RECORD_LAYER, entry.record);
    record["annotations"] = json!({ KEY: entry.key, SOURCE: entry.source });
    if let Some(blob) = entry.blob {
        record["annotations"][BLOB_DIGEST] = json!(format!("sha256:{}", blob.id));
        record["annotations"][BLOB_SIZE] = json!(blob.size.to_string());
    }
    layers.push(record);
    if let Some(blob) = entry.blob {
        let mut layer = descriptor(BLOB_LAYER, blob);
        layer["annotations"] = json!({ BLOB_MARK: "true" });
        layers.push(layer);
    }
}
