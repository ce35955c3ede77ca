//! The client against registries: doubles that lie, cut and ask for passwords, a layout folder, and the real thing.

mod answers;
mod auth;
mod backend;
mod bed;
mod check_json;
mod convert;
mod copy;
mod cuts;
mod dictionary;
mod docker_registry;
mod double;
mod encrypted;
mod layout;
mod mirrors;
mod nginx;
mod oci_ref;
mod probe;
mod proxy;
mod proxy_double;
mod registry_double;
mod reverse;
mod servers;
mod source;
mod through_registry;
mod token_registry;
mod uploads;

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use bytes::Bytes;
use proptest::prelude::Rng;
use shoal_proto::{BlobId, ObjectId};
use tempfile::TempDir;

use self::double::Double;
use super::{
    LayerLimits, PushError, Reference, Registry, RegistryOptions, Source, push, read_bootstrap_layer,
    registry::sha256,
};
use crate::{Bootstrap, BuildOptions, Builder};

/// Options that make a test wait for nothing.
fn options() -> RegistryOptions {
    RegistryOptions { retries: 2, max_wait: Duration::from_secs(2), ..Default::default() }
}

fn client() -> Registry {
    Registry::new(options()).unwrap()
}

fn blob_id(bytes: &[u8]) -> BlobId {
    BlobId::new(*sha256(bytes).as_bytes())
}

/// A small image on disk.
struct Fixture {
    dir: TempDir,
    blob: BlobId,
}

impl Fixture {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let source = dir.path().join("source");
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("text"), "hello").unwrap();
        let mut noise = vec![0; 300_000];
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha)
            .fill_bytes(&mut noise);
        std::fs::write(source.join("noise"), noise).unwrap();
        let options = BuildOptions { chunk_size: 0x1_0000, ..Default::default() };
        let bootstrap = dir.path().join("image.boot");
        let report = Builder::new(options).build(&source, &bootstrap, &dir.path().join("blobs")).unwrap();
        Self { blob: report.blob.unwrap(), dir }
    }

    fn bootstrap(&self) -> PathBuf {
        self.dir.path().join("image.boot")
    }

    fn blob_file(&self) -> PathBuf {
        self.dir.path().join("blobs").join(self.blob.to_string())
    }

    /// Pushes, looks the image up, and reads all of it back: what every kind of registry must do.
    async fn round_trip(&self, registry: &Registry, reference: &Reference) {
        let blobs = self.dir.path().join("blobs");
        let mut layers = Vec::new();
        let bootstrap = self.bootstrap();
        let report = push(registry, &bootstrap, &blobs, reference, Default::default(), |layer| layers.push(*layer));
        let report = report.await.unwrap();
        assert_eq!(layers, [report.blobs[0], report.bootstrap_layer]);
        assert!(layers.iter().all(|layer| !layer.existed));
        assert_eq!(report.encoded_bytes, layers.iter().map(|layer| layer.size).sum::<u64>());
        assert_eq!(report.blobs[0].id, ObjectId::new(*self.blob.as_bytes()));

        let again = push(registry, &bootstrap, &blobs, reference, Default::default(), |_| ()).await.unwrap();
        assert_eq!((again.manifest, again.existing_bytes), (report.manifest, report.encoded_bytes));

        let (id, _) = registry.resolve(reference).await.unwrap();
        assert_eq!(id, report.manifest);
        let pinned: Reference = report.reference.parse().unwrap();
        let image = registry.image(&pinned).await.unwrap();
        assert_eq!((image.resolved, image.id, &image.source), (id, id, reference.source()));
        let stored = std::fs::read(self.blob_file()).unwrap();
        assert_eq!(image.manifest.blobs, [(self.blob, stored.len() as u64)]);
        self.layer_is_right(registry, &image).await;
        self.blob_is_right(registry, &image.source, &stored).await;
        self.next_version_needs_no_old_file(registry, reference).await;
    }

    /// Pushes an image that uses what the first one has, from where only the new blob is.
    async fn next_version_needs_no_old_file(&self, registry: &Registry, reference: &Reference) {
        let dir = TempDir::new().unwrap();
        let (source, bootstrap, blobs) =
            (self.dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
        std::fs::write(source.join("new"), "new").unwrap();
        let options = BuildOptions { chunk_size: 0x1_0000, ..Default::default() };
        let builder = Builder::new(options).chunk_dictionary(vec![Bootstrap::open(&self.bootstrap()).unwrap()]);
        let built = builder.build(&source, &bootstrap, &blobs).unwrap();
        assert_eq!((built.unique_chunks, built.shared_chunks), (1, 6));
        let report = push(registry, &bootstrap, &blobs, reference, Default::default(), |_| ()).await.unwrap();
        let existed: Vec<_> = report.blobs.iter().map(|blob| (blob.id.to_string(), blob.existed)).collect();
        assert_eq!(existed, [(built.blob.unwrap().to_string(), false), (self.blob.to_string(), true)]);
        let image = registry.image(reference).await.unwrap();
        let layer = registry.blob(&image.source, image.manifest.bootstrap.id, 1 << 20).await.unwrap();
        let tables = read_bootstrap_layer(&layer[..], &LayerLimits::default()).unwrap().chunk_tables;
        assert_eq!(tables[&self.blob], Bytes::from(crate::chunk_table_file(&self.blob_file()).unwrap()));
        assert_eq!(tables.len(), 2);
        // Elsewhere the old blob is missing.
        let elsewhere = format!("oci:{}:v1", dir.path().join("other").display()).parse().unwrap();
        let error = push(registry, &bootstrap, &blobs, &elsewhere, Default::default(), |_| ()).await.unwrap_err();
        assert!(matches!(error, PushError::MissingBlob { id, .. } if id == self.blob), "{error}");
    }

    async fn layer_is_right(&self, registry: &Registry, image: &super::Image) {
        let layer = image.manifest.bootstrap;
        let bytes = registry.blob(&image.source, layer.id, 1 << 20).await.unwrap();
        assert_eq!(bytes.len() as u64, layer.size);
        let unpacked = read_bootstrap_layer(&bytes[..], &LayerLimits::default()).unwrap();
        assert_eq!(unpacked.bootstrap, std::fs::read(self.bootstrap()).unwrap());
        let table = Bytes::from(crate::chunk_table_file(&self.blob_file()).unwrap());
        assert_eq!(unpacked.chunk_tables, BTreeMap::from([(self.blob, table)]));
        let config = registry.blob(&image.source, image.manifest.config.id, 1 << 20).await.unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][0], format!("sha256:{}", self.blob));
        let mut tar = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&bytes[..]), &mut tar).unwrap();
        assert_eq!(config["rootfs"]["diff_ids"][1], format!("sha256:{}", sha256(&tar)));
    }

    async fn blob_is_right(&self, registry: &Registry, source: &Source, stored: &[u8]) {
        let size = stored.len() as u64;
        // First byte, last byte, everything, nothing, a piece in the middle.
        for range in [0..1, size - 1..size, 0..size, 5..5, 4000..70_000] {
            let stream = registry.blob_range(source, self.blob, range.clone()).await.unwrap();
            assert_eq!(stream.len(), range.end - range.start);
            let bytes = stream.collect(u64::MAX).await.unwrap();
            assert_eq!(bytes, stored[range.start as usize..range.end as usize], "{range:?}");
        }
        for beyond in [size - 1..size + 1, size..size + 1] {
            let read = registry.blob_range(source, self.blob, beyond.clone()).await;
            assert!(matches!(read, Err(super::RegistryError::WrongRange { .. })), "{beyond:?}: {read:?}");
        }
        let mut whole = Vec::new();
        let descriptor = super::Descriptor { id: ObjectId::new(*self.blob.as_bytes()), size };
        registry.blob_to(source, &descriptor, &mut whole).await.unwrap();
        assert_eq!(whole, stored);
        let absent = registry.blob(source, ObjectId::new([1; 32]), 1 << 20).await;
        assert!(matches!(absent, Err(super::RegistryError::NotFound { .. })), "{absent:?}");
    }
}
