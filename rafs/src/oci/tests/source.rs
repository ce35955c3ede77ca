//! Small images of tar layers, as sources of conversions.

use std::io::Write;

use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::*;
use crate::oci::{Descriptor, document};

/// A tar under construction.
#[derive(Default)]
pub(super) struct Tar(Vec<u8>);

impl Tar {
    fn entry(
        mut self,
        kind: EntryType,
        path: &str,
        link: &str,
        content: &[u8],
        change: impl Fn(&mut Header),
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_path(path).unwrap();
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o750 } else { 0o640 });
        header.set_uid(1000);
        header.set_gid(1001);
        header.set_mtime(1_700_000_000);
        header.set_size(content.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(EntryType::Regular, path, "", content, |_| {})
    }

    /// A file of `size` bytes, of which the last ones are `content`, as GNU tar writes it.
    pub(super) fn sparse(self, path: &str, size: u64, content: &[u8]) -> Self {
        self.entry(EntryType::GNUSparse, path, "", content, |header| {
            let gnu = header.as_gnu_mut().unwrap();
            let octal = |field: &mut [u8], number: u64| field.copy_from_slice(format!("{number:011o}\0").as_bytes());
            octal(&mut gnu.realsize, size);
            octal(&mut gnu.sparse[0].offset, size - content.len() as u64);
            octal(&mut gnu.sparse[0].numbytes, content.len() as u64);
        })
    }

    pub(super) fn dir(self, path: &str) -> Self {
        self.entry(EntryType::Directory, path, "", b"", |_| {})
    }

    pub(super) fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, target, b"", |_| {})
    }

    pub(super) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, target, b"", |_| {})
    }

    pub(super) fn device(self, path: &str, major: u32, minor: u32) -> Self {
        self.entry(EntryType::Char, path, "", b"", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layer as a registry has it.
#[derive(Clone)]
pub(super) struct Layer {
    pub(super) media_type: &'static str,
    pub(super) stored: Vec<u8>,
    pub(super) diff_id: ObjectId,
}

impl Layer {
    pub(super) fn gzip(tar: &[u8]) -> Self {
        let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        Self { media_type, stored: gzip(tar), diff_id: sha256(tar) }
    }

    pub(super) fn id(&self) -> ObjectId {
        sha256(&self.stored)
    }
}

pub(super) fn noise(seed: u8, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let algorithm = proptest::test_runner::RngAlgorithm::ChaCha;
    proptest::test_runner::TestRng::from_seed(algorithm, &[seed; 32]).fill_bytes(&mut bytes);
    bytes
}

/// What real images have: three kinds of compression, whiteouts of both kinds, hard links across directories and layers,
/// replaced files, directories that a layer does not describe, a layer that is there twice.
pub(super) fn layers() -> Vec<Layer> {
    let base = Tar::default()
        .dir("./")
        .dir("bin/")
        .file("bin/tool", &noise(1, 300_000))
        .hard_link("bin/alias", "bin/tool")
        .dir("etc/")
        .file("etc/keep", b"keep")
        .file("etc/replaced", b"old")
        .file("etc/gone", b"gone")
        .dir("usr/")
        .dir("usr/lib/")
        .file("usr/lib/old", &noise(2, 70_000))
        .hard_link("usr/lib/across", "bin/tool")
        .symlink("lib", "usr/lib")
        .device("null", 1, 3)
        .end();
    let empty = Tar::default().end();
    let middle = Tar::default()
        .dir("etc/")
        .file("etc/replaced", &noise(3, 5_000))
        .file("etc/.wh.gone", b"")
        .dir("usr/")
        .dir("usr/lib/")
        .file("usr/lib/.wh..wh..opq", b"")
        .file("usr/lib/new", &noise(1, 300_000))
        .end();
    let top = Tar::default().dir("app/").file("app/main", &noise(4, 100_000)).hard_link("app/again", "app/main");
    let top =
        top.hard_link("bin/below", "usr/lib/new").hard_link("bin/third", "bin/below").file("bin/more", b"more").end();
    let zstd = Layer {
        media_type: "application/vnd.oci.image.layer.v1.tar+zstd",
        stored: zstd::encode_all(&middle[..], 3).unwrap(),
        diff_id: sha256(&middle),
    };
    let plain = Layer { media_type: "application/vnd.oci.image.layer.v1.tar", diff_id: sha256(&top), stored: top };
    vec![Layer::gzip(&base), Layer::gzip(&empty), zstd, Layer::gzip(&empty), plain]
}

/// Stores the manifest of an image and all that it names; gives the manifest's digest and size.
pub(super) async fn store(registry: &Registry, source: &Source, layers: &[Layer], architecture: &str) -> Descriptor {
    let mut links = Vec::new();
    for layer in layers {
        let bytes = Bytes::from(layer.stored.clone());
        let size = bytes.len() as u64;
        let (id, _) = registry.upload_bytes(source, bytes).await.unwrap();
        links.push(document::descriptor(layer.media_type, Descriptor { id, size }));
    }
    let diff_ids: Vec<_> = layers.iter().map(|layer| format!("sha256:{}", layer.diff_id)).collect();
    let config = Bytes::from(
        json!({
            "architecture": architecture, "os": "linux", "config": { "Env": ["A=b"], "Cmd": ["/bin/tool"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids }, "history": [{ "created_by": "a test" }],
        })
        .to_string(),
    );
    let size = config.len() as u64;
    let (id, _) = registry.upload_bytes(source, config).await.unwrap();
    let config = document::descriptor("application/vnd.oci.image.config.v1+json", Descriptor { id, size });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": document::OCI_MANIFEST, "config": config, "layers": links,
    });
    let bytes = Bytes::from(manifest.to_string());
    let size = bytes.len() as u64;
    let id = registry.put_child(source, document::OCI_MANIFEST, bytes).await.unwrap();
    Descriptor { id, size }
}

/// Puts a stored manifest under a tag.
pub(super) async fn tag(registry: &Registry, reference: &Reference, manifest: Descriptor) {
    let bytes = registry.manifest(reference.source(), manifest.id).await.unwrap();
    registry.put_manifest(reference, document::OCI_MANIFEST, bytes).await.unwrap();
}

/// An image of one platform under a tag.
pub(super) async fn image(registry: &Registry, reference: &Reference, layers: &[Layer]) -> Descriptor {
    let manifest = store(registry, reference.source(), layers, "amd64").await;
    tag(registry, reference, manifest).await;
    manifest
}

/// An index of two platforms and an attestation under a tag.
pub(super) async fn index(registry: &Registry, reference: &Reference) -> [Descriptor; 3] {
    let source = reference.source();
    let layers = layers();
    let amd64 = store(registry, source, &layers, "amd64").await;
    let arm64 = store(registry, source, &layers[..3], "arm64").await;
    let attestation = store(registry, source, &[], "unknown").await;
    let entry = |manifest: Descriptor, platform: Value| {
        let mut entry = document::descriptor(document::OCI_MANIFEST, manifest);
        entry["platform"] = platform;
        entry
    };
    let entries = [
        entry(amd64, json!({ "os": "linux", "architecture": "amd64" })),
        entry(arm64, json!({ "os": "linux", "architecture": "arm64", "variant": "v8" })),
        entry(attestation, json!({ "os": "unknown", "architecture": "unknown" })),
    ];
    registry.put_manifest(reference, document::OCI_INDEX, document::index(&entries)).await.unwrap();
    [amd64, arm64, attestation]
}
