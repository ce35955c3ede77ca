//! An ordinary image in a registry, and where a mirror listens.

use std::net::SocketAddr;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shoal_rafs::oci::Source;

use super::client::get;
use crate::{
    registry_server::{RegistryServer, free_address},
    support::noise,
};

/// Where a mirror shall listen, and the setting that says so.
pub(crate) fn mirror_settings() -> (SocketAddr, Vec<String>) {
    let address = free_address();
    (address, vec![format!("mirror.listen=\"{address}\"")])
}

/// An image of three layers: one that is smaller than a piece, and two of several, the last piece of which is a short one.
pub(crate) struct OrdinaryImage {
    repository: String,
    tag: String,
    pub(crate) manifest: Vec<u8>,
    pub(crate) manifest_id: String,
    blobs: Vec<(String, Vec<u8>)>,
}

impl OrdinaryImage {
    pub(crate) fn push(registry: &RegistryServer, repository: &str, tag: &str) -> Self {
        let layers = [(1, 300_000), (2, 4_200_001), (3, 9_999_999)].map(|(seed, len)| noise(seed, len));
        let config = json!({ "architecture": "amd64", "os": "linux", "config": {}, "rootfs": { "type": "layers", "diff_ids": [] } });
        let mut blobs: Vec<_> = [config.to_string().into_bytes()].into_iter().chain(layers).map(named).collect();
        let described = |(id, bytes): &(String, Vec<u8>), kind: &str| json!({ "mediaType": kind, "digest": format!("sha256:{id}"), "size": bytes.len() });
        let layer = "application/vnd.oci.image.layer.v1.tar";
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": described(&blobs[0], "application/vnd.oci.image.config.v1+json"),
            "layers": blobs[1..].iter().map(|blob| described(blob, layer)).collect::<Vec<Value>>(),
        });
        let (manifest_id, manifest) = named(manifest.to_string().into_bytes());
        let source = Source::new(&registry.host, repository).expect("a name");
        let client = registry.client();
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            for (_, bytes) in &blobs {
                client.upload_bytes(&source, bytes.clone().into()).await.expect("it takes the blob");
            }
            let reference = format!("{}/{repository}:{tag}", registry.host).parse().expect("a reference");
            client
                .put_manifest(&reference, manifest_type, manifest.clone().into())
                .await
                .expect("it takes the manifest");
        });
        blobs.sort_by_key(|(_, bytes)| bytes.len());
        Self { repository: repository.into(), tag: tag.into(), manifest, manifest_id, blobs }
    }

    /// Bytes of all blobs and the manifest.
    pub(crate) fn bytes(&self) -> u64 {
        (self.manifest.len() + self.blobs.iter().map(|(_, bytes)| bytes.len()).sum::<usize>()) as u64
    }

    /// The largest layer, with its digest.
    pub(crate) fn largest(&self) -> (&str, &Vec<u8>) {
        self.blobs.last().map(|(id, bytes)| (id.as_str(), bytes)).expect("there are some")
    }

    /// Pulls it as clients do, tag first, and compares every byte; says `log` where it differs.
    pub(crate) fn pull(&self, mirror: SocketAddr, host: &str, shown: Option<&str>, log: &dyn Fn() -> String) {
        let headers: Vec<_> = shown.map(|shown| ("Authorization", shown)).into_iter().collect();
        let manifest = get(mirror, &format!("/v2/{}/manifests/{}?ns={host}", self.repository, self.tag), &headers);
        assert_eq!(manifest.status, 200, "{}: {}", String::from_utf8_lossy(&manifest.body), log());
        assert_eq!(manifest.header("docker-content-digest"), Some(&*format!("sha256:{}", self.manifest_id)));
        assert_eq!(manifest.header("content-type"), Some("application/vnd.oci.image.manifest.v1+json"));
        assert!(manifest.body == self.manifest);
        for (id, bytes) in &self.blobs {
            let blob = get(mirror, &format!("/v2/{}/blobs/sha256:{id}?ns={host}", self.repository), &headers);
            assert_eq!((blob.status, blob.body.len()), (200, bytes.len()), "sha256:{id}: {}", log());
            assert!(blob.body == *bytes, "sha256:{id} differs");
        }
    }
}

fn named(bytes: Vec<u8>) -> (String, Vec<u8>) {
    (hex::encode(Sha256::digest(&bytes)), bytes)
}
