//! A lazy pull where no kubelet asks for one: `shoal ctl rpull`.
//!
//! It does what containerd's own client does when it pulls, but for layers: manifest and config go into the content
//! store, the snapshotter is asked for each layer's snapshot, of which none needs unpacking, and a name is given to it
//! all. As usual, garbage collection follows labels: name -> manifest -> config -> topmost snapshot. Until the name is
//! there, a lease holds the parts.
//!
//! An image that is not lazy is pulled where the snapshotter reads it all the same, by what is published next to it.
//!
//! The name stands for the lazy manifest itself, also where the reference is that of an index: an index that has both an
//! ordinary and a lazy manifest for a platform does not tell containerd which of them is meant. In such an index the config of the
//! lazy one has a media type that keeps others away, and containerd too: it gets a copy of the manifest without that.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use shoal_proto::{ObjectId, ObjectKind};
use shoal_rafs::oci::{BLOB_MARK, BOOTSTRAP_MARK, OrdinaryManifest, Reference};
use tonic::Status;

use super::{
    client::{Client, Labels},
    types::Descriptor,
};
use crate::{
    images::{FoundManifest, ImageError, Images},
    snapshotter::{CRI_LAYER, CRI_MANIFEST, CRI_REFERENCE, TARGET, chain_id},
};

/// Most bytes of an image's config, as containerd's own limit has it.
const MAX_CONFIG: u64 = 8 << 20;
/// Media types of configs that containerd reads.
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// After this time containerd drops the lease of a pull that never ended.
const LEASE_EXPIRES: Duration = Duration::from_secs(3600);

/// Why an image was not pulled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PullError {
    #[error("{0} is a folder of this machine, containerd only knows images in registries")]
    Layout(String),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the config of {reference} is no image config")]
    Config {
        reference: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("the config of {reference} names {found} layers, its manifest {expected}")]
    Layers { reference: String, expected: usize, found: usize },
    #[error("containerd wants to unpack layer {0} itself: is its snapshotter {1:?} this daemon?")]
    NotLazy(ObjectId, String),
    #[error(
        "{0} has no Nydus form, and nothing that can be used is published next to it to read it lazily by: see `shoal image \
         convert --oci-ref --with-referrer`"
    )]
    NoIndex(String),
    #[error("containerd: {}", .0.message())]
    Containerd(#[from] Status),
}

/// An image that containerd knows now.
#[derive(Debug)]
pub(crate) struct Pulled {
    /// What it is called there.
    pub(crate) name: String,
    /// Digest of its manifest.
    pub(crate) manifest: ObjectId,
}

/// What of a config is needed here.
#[derive(Debug, Deserialize)]
struct Config {
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// Makes the image that `reference` names at present known to containerd, with all its snapshots. With `lazy_oci` it need not be
/// lazy.
///
/// # Errors
/// It is no lazy image or cannot be had, or containerd refuses a part.
pub(crate) async fn pull(
    client: &Client,
    images: &Images,
    reference: &Reference,
    lazy_oci: bool,
) -> Result<Pulled, PullError> {
    let source = reference.source();
    if source.is_layout() {
        return Err(PullError::Layout(reference.to_string()));
    }
    let resolved = images.resolve(reference).await?;
    let found = match images.manifest(source, resolved).await {
        Err(ImageError::Manifest { .. }) if lazy_oci => Found::ordinary(images.ordinary(source, resolved).await?),
        found => Found::from(found?),
    };
    let config = images.object(source, found.config, ObjectKind::Blob, MAX_CONFIG).await?;
    let diff_ids = diff_ids(reference, &found, &config)?;

    let pull = Pull { client, reference, found: &found };
    let id = format!("shoal-{}-{:016x}", found.id, rand::random::<u64>());
    let expires = humantime::format_rfc3339_seconds(SystemTime::now() + LEASE_EXPIRES).to_string();
    let leased = client.lease(&id, Labels::from([("containerd.io/gc.expire".to_owned(), expires)])).await?;
    let pulled = Pull { client: &leased, ..pull }.run(&config, &diff_ids, &id).await;
    if let Err(status) = client.end_lease(&id).await {
        tracing::warn!("containerd keeps the lease {id} for an hour: {}", status.message());
    }
    pulled
}

/// A manifest, as far as it is needed here.
struct Found {
    id: ObjectId,
    bytes: Bytes,
    media_type: String,
    config: ObjectId,
    layers: Vec<ObjectId>,
    /// None where the image is not lazy.
    bootstrap: Option<ObjectId>,
}

impl From<FoundManifest> for Found {
    fn from(FoundManifest { id, bytes, manifest }: FoundManifest) -> Self {
        let layers = manifest.layers.iter().map(|layer| layer.id).collect();
        let (media_type, bootstrap) = (manifest.media_type, Some(manifest.bootstrap.id));
        Self { id, bytes, media_type, config: manifest.config.id, layers, bootstrap }
    }
}

impl Found {
    fn ordinary((id, bytes, manifest): (ObjectId, Bytes, OrdinaryManifest)) -> Self {
        let layers = manifest.layers.iter().map(|layer| layer.id).collect();
        let (media_type, config) = (manifest.media_type, manifest.config.id);
        Self { id, bytes, media_type, config, layers, bootstrap: None }
    }
}

/// The manifest as containerd can read it; as it is, if it can.
fn readable(manifest: &Bytes) -> Bytes {
    let Ok(mut value) = serde_json::from_slice::<serde_json::Value>(manifest) else { return manifest.clone() };
    match value.pointer_mut("/config/mediaType") {
        Some(kind) if !kind.as_str().is_some_and(|kind| CONFIGS.contains(&kind)) => *kind = CONFIGS[0].into(),
        _ => return manifest.clone(),
    }
    value.to_string().into()
}

fn diff_ids(reference: &Reference, found: &Found, config: &[u8]) -> Result<Vec<ObjectId>, PullError> {
    let broken = |source| PullError::Config { reference: reference.to_string(), source };
    let config: Config = serde_json::from_slice(config).map_err(broken)?;
    let parse = |text: &String| text.strip_prefix("sha256:")?.parse().ok();
    let diff_ids: Vec<_> = config.rootfs.diff_ids.iter().filter_map(parse).collect();
    let expected = found.layers.len();
    if diff_ids.len() == expected && config.rootfs.diff_ids.len() == expected {
        return Ok(diff_ids);
    }
    Err(PullError::Layers { reference: reference.to_string(), expected, found: diff_ids.len() })
}

struct Pull<'a> {
    client: &'a Client,
    reference: &'a Reference,
    found: &'a Found,
}

impl Pull<'_> {
    async fn run(&self, config: &[u8], diff_ids: &[ObjectId], key: &str) -> Result<Pulled, PullError> {
        let top = self.unpack(diff_ids, key).await?;
        let (client, found) = (self.client, self.found);
        let config_digest = format!("sha256:{}", found.config);
        let snapshot = format!("containerd.io/gc.ref.snapshot.{}", client.snapshotter());
        client.put_content(&config_digest, config.to_vec(), Labels::from([(snapshot, top)])).await?;
        let bytes = readable(&found.bytes);
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        let to_config = ("containerd.io/gc.ref.content.config".to_owned(), config_digest);
        client.put_content(&digest, bytes.to_vec(), Labels::from([to_config])).await?;
        let media_type = found.media_type.clone();
        let name = self.name();
        client.put_image(&name, Descriptor { media_type, digest, size: bytes.len() as i64 }).await?;
        Ok(Pulled { name, manifest: found.id })
    }

    /// Asks for the snapshot of each layer; gives the chain id of the last.
    async fn unpack(&self, diff_ids: &[ObjectId], key: &str) -> Result<String, PullError> {
        let mut parent = String::new();
        for (layer, diff_id) in self.found.layers.iter().zip(diff_ids) {
            let chain = chain_id(Some(parent.as_str()).filter(|parent| !parent.is_empty()), *diff_id);
            if !self.client.has_snapshot(&chain).await? {
                let key = format!("{key} {chain}");
                if self.client.prepare(&key, &parent, self.labels(*layer, &chain)).await? {
                    self.client.remove(&key).await?;
                    return Err(match self.found.bootstrap {
                        Some(_) => PullError::NotLazy(*layer, self.client.snapshotter().to_owned()),
                        None => PullError::NoIndex(self.reference.to_string()),
                    });
                }
            }
            parent = chain;
        }
        Ok(parent)
    }

    /// As the CRI plugin would describe the layer.
    fn labels(&self, layer: ObjectId, chain: &str) -> Labels {
        let mark = |bootstrap| if layer == bootstrap { BOOTSTRAP_MARK } else { BLOB_MARK };
        let mark = self.found.bootstrap.map(|bootstrap| (mark(bootstrap), "true".to_owned()));
        let digest = |id| format!("sha256:{id}");
        let labels = [
            (TARGET, chain.to_owned()),
            (CRI_REFERENCE, self.reference.to_string()),
            (CRI_MANIFEST, digest(self.found.id)),
            (CRI_LAYER, digest(layer)),
        ];
        labels.into_iter().chain(mark).map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn name(&self) -> String {
        match (self.reference.tag(), self.reference.digest()) {
            (None, None) => format!("{}:latest", self.reference),
            _ => self.reference.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use shoal_rafs::oci::ImageManifest;

    use super::*;

    fn found(layers: u8) -> Found {
        let digest = |byte: u8| format!("sha256:{}", hex::encode([byte; 32]));
        let blob = |byte| json!({ "mediaType": "application/vnd.oci.image.layer.nydus.blob.v1", "digest": digest(byte), "size": 1 });
        let bootstrap = json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest(9), "size": 1,
            "annotations": { BOOTSTRAP_MARK: "true" },
        });
        let config =
            json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(8), "size": 1 });
        let layers: Vec<_> = (0..layers).map(blob).chain([bootstrap]).collect();
        let bytes = json!({ "schemaVersion": 2, "config": config, "layers": layers }).to_string();
        let manifest = ImageManifest::parse(bytes.as_bytes()).unwrap();
        FoundManifest { id: ObjectId::new([7; 32]), bytes: Bytes::from(bytes), manifest }.into()
    }

    #[test]
    fn a_config_of_a_kind_of_its_own_is_none_to_containerd() {
        let manifest =
            |kind: &str| Bytes::from(json!({ "layers": [], "config": { "mediaType": kind, "size": 1 } }).to_string());
        for known in CONFIGS {
            assert_eq!(readable(&manifest(known)), manifest(known));
        }
        assert_eq!(readable(&manifest("application/vnd.nydus.image.config.v1+json")), manifest(CONFIGS[0]));
        for other in ["{}", "no JSON", r#"{"config": []}"#] {
            assert_eq!(readable(&Bytes::from(other)), other);
        }
    }

    #[test]
    fn a_config_must_have_a_diff_id_for_each_layer() {
        let reference: Reference = "localhost:5000/app".parse().unwrap();
        let config = |ids: &[&str]| json!({ "rootfs": { "type": "layers", "diff_ids": ids } }).to_string();
        let id = format!("sha256:{}", "ab".repeat(32));
        let read = |text: String| diff_ids(&reference, &found(1), text.as_bytes());
        assert_eq!(read(config(&[&id, &id])).unwrap(), [id[7..].parse().unwrap(); 2]);
        for ids in [&[id.as_str()][..], &[&id, "sha256:00"], &[&id, &id, "md5:00"]] {
            assert!(matches!(read(config(ids)), Err(PullError::Layers { expected: 2, .. })), "{ids:?}");
        }
        assert!(matches!(read("{}".into()), Err(PullError::Config { .. })));
    }
}
