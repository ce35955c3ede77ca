//! One platform: its layers, merged and put in their place.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    num::NonZeroUsize,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use shoal_proto::{BlobId, ObjectId};
use tempfile::NamedTempFile;

use super::{
    ConvertError, ConvertEvent, ConvertOptions, Converted, ConvertedImage, ConvertedLayer, LayerFailure,
    NO_RECIPIENTS,
    cache::Cache,
    dictionary::Dictionary,
    io_error,
    records::{Key, Record, Records, stored},
};
use crate::{
    Bootstrap, BuildOptions, MergeError, MergeOptions, merge_with,
    oci::{
        BlobPlace, Descriptor, PushedLayer, Recipients, Reference, Registry, RegistryError, Source,
        bootstrap_layer::LayerFile,
        document::{Child, descriptor, lasting, no_platform, platform},
        layer_index::{LAYERS, OCI_REF_ARTIFACT},
        nydus_image::{ManifestExtras, NYDUS_CONFIG, NydusImage},
        registry::sha256,
        source_image::{SourceImage, SourceImageError, SourceLayer},
    },
};

/// Most layers that are converted at the same time: beyond, they only wait for processors and the registry.
const MAX_AT_ONCE: u64 = 8;
/// Memory of a layer besides its chunks: buffers, and the state of compressors.
const LAYER_OVERHEAD: u64 = 8 << 20;

const SOURCE_DIGEST: &str = "containerd.io/snapshot/nydus-source-digest";
const SOURCE_REFERENCE: &str = "containerd.io/snapshot/nydus-source-reference";
const IMAGE_FS_VERSION: &str = "containerd.io/snapshot/nydus-fs-version";

/// What all layers and platforms of a conversion share.
pub(super) struct Conversion<'a> {
    pub(super) registry: &'a Registry,
    pub(super) from: &'a Reference,
    pub(super) to: &'a Source,
    pub(super) options: &'a ConvertOptions,
    pub(super) records: Records,
    pub(super) cache: Option<Cache>,
    pub(super) dictionary: Option<Dictionary>,
    pub(super) on_event: Arc<dyn Fn(ConvertEvent) + Send + Sync>,
    read_bytes: AtomicU64,
    /// The records of this conversion with their source layers, for the cache image. Held for an insertion only.
    used: Mutex<BTreeMap<Key, ObjectId>>,
}

impl<'a> Conversion<'a> {
    pub(super) fn new(
        registry: &'a Registry,
        (from, to): (&'a Reference, &'a Source),
        options: &'a ConvertOptions,
        (records, cache, dictionary): (Records, Option<Cache>, Option<Dictionary>),
        on_event: Arc<dyn Fn(ConvertEvent) + Send + Sync>,
    ) -> Self {
        let (read_bytes, used) = Default::default();
        Self { registry, from, to, options, records, cache, dictionary, on_event, read_bytes, used }
    }

    pub(super) fn count_read(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn read_bytes(&self) -> u64 {
        self.read_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn used(&self, key: Key, layer: ObjectId) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(key, layer);
    }

    /// Brings the cache image up to date.
    pub(super) async fn update_cache(&self) -> Result<(), ConvertError> {
        let Some(cache) = &self.cache else { return Ok(()) };
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner).clone();
        cache.update(self.registry, self.to, &self.records, &used).await
    }

    /// Converts the image of one platform, and stores all of it but the manifest.
    pub(super) async fn image(&self, child: &Child) -> Result<Converted, ConvertError> {
        let id = child.descriptor.id;
        let image = SourceImage::load(self.registry, self.from.source(), child).await?;
        self.is_wanted(child, &image)?;
        let layer_bytes = image.layers.iter().map(|layer| layer.descriptor.size).sum();
        (self.on_event)(ConvertEvent::Platform { layer_bytes });
        let (layers, order) = once(&image.layers);
        let at_once = layers_at_once(&self.options.build, self.options.memory_bytes);
        let converted = stream::iter(&layers).map(|layer| self.layer(layer)).buffered(at_once);
        let converted: Vec<(Record, ConvertedLayer)> = converted.try_collect().await?;
        let (records, layers): (Vec<_>, Vec<_>) = converted.into_iter().unzip();
        let stack: Vec<_> = order.iter().map(|position| records[*position].clone()).collect();
        let stages = self.stages(&image, child, &stack).await?;
        let mut merged = self.merge(id, stack).await?;
        let dictionary = self.place_dictionary(&mut merged.image.blobs).await?;
        let bootstrap_layer = self.put_bootstrap(&merged).await?;
        let bytes = self.manifest(&image, child, &merged.image, order.len()).await?;
        let manifest = sha256(&bytes);
        let blobs = merged.image.blobs.iter().map(|blob| blob.size).sum::<u64>();
        let report = ConvertedImage {
            platform: platform(&image.platform).to_string(),
            source: id,
            manifest,
            layers,
            bootstrap_layer,
            dictionary,
            encoded_bytes: blobs + bootstrap_layer.size,
        };
        let descriptor = Descriptor { id: manifest, size: bytes.len() as u64 };
        Ok(Converted { report, descriptor, bytes, platform: image.platform, stages })
    }

    pub(super) async fn put_bootstrap(&self, merged: &Merged) -> Result<PushedLayer, RegistryError> {
        let Descriptor { id, size } = merged.image.bootstrap_descriptor();
        let existed = self.registry.upload_blob(self.to, &Descriptor { id, size }, merged.file.path()).await?;
        Ok(PushedLayer { id, size, existed })
    }

    /// An image that no index names has its platform in its config.
    fn is_wanted(&self, child: &Child, image: &SourceImage) -> Result<(), RegistryError> {
        let (wanted, offered) = (&self.options.platforms, platform(&image.platform));
        match wanted.first() {
            Some(first) if !wanted.iter().any(|wanted| wanted.accepts(&offered)) => {
                let offered = Child { platform: Some(offered), ..child.clone() };
                let source = no_platform(first, &[offered]);
                Err(RegistryError::Manifest { id: child.descriptor.id, source })
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn merge(&self, id: ObjectId, stack: Vec<Record>) -> Result<Merged, ConvertError> {
        let work = self.records.work().map_err(io_error("cannot make a work folder"))?;
        let output = work.path().join("bootstrap");
        let (backend, recipients) = (self.options.blob_backend.clone(), self.options.recipients.clone());
        let to = move |stack| merge(stack, (backend.as_ref(), recipients.as_ref()), &output);
        let merged = tokio::task::spawn_blocking(move || to(stack)).await;
        let merged = merged.unwrap_or_else(|error| Err(Unmerged::Io(io::Error::other(error))));
        merged.map_err(|unmerged| unmerged.error(id))
    }

    /// Stores the config and makes the manifest of the image up to so many layers.
    pub(super) async fn manifest(
        &self,
        source: &SourceImage,
        child: &Child,
        image: &NydusImage,
        layers: usize,
    ) -> Result<Bytes, ConvertError> {
        let id = child.descriptor.id;
        let config = image.config(Some(&source.config), "shoal convert");
        let config =
            config.ok_or_else(|| SourceImageError::new(id, "its config is no JSON object with a list of history"))?;
        let size = config.len() as u64;
        let (config, _) = self.registry.upload_bytes(self.to, config).await?;
        let mut annotations = lasting(&source.annotations);
        annotations.insert(SOURCE_DIGEST.to_owned(), format!("sha256:{id}"));
        annotations.insert(IMAGE_FS_VERSION.to_owned(), "6".to_owned());
        // The name of a folder of this machine means nothing elsewhere.
        if !self.from.source().is_layout() {
            annotations.insert(SOURCE_REFERENCE.to_owned(), self.from.to_string());
        }
        let subject = self.options.with_referrer.then(|| descriptor(&source.media_type, child.descriptor));
        let published = self.options.oci_ref && self.options.with_referrer;
        if published {
            annotations.insert(LAYERS.to_owned(), layers.to_string());
        }
        let extras = ManifestExtras {
            annotations,
            subject,
            artifact_type: published.then_some(OCI_REF_ARTIFACT),
            config_media_type: self.options.merge_index.then_some(NYDUS_CONFIG),
        };
        Ok(image.manifest(Descriptor { id: config, size }, &extras))
    }
}

/// Each layer once, and for each position which of them it is. Empty layers are often there several times.
fn once(layers: &[SourceLayer]) -> (Vec<SourceLayer>, Vec<usize>) {
    let (mut unique, mut known) = (Vec::new(), HashMap::new());
    let position = |layer: &SourceLayer| {
        *known.entry((layer.descriptor.id, layer.diff_id)).or_insert_with(|| {
            unique.push(*layer);
            unique.len() - 1
        })
    };
    let order = layers.iter().map(position).collect();
    (unique, order)
}

/// With `t` threads a build holds `2 t + 2` chunks and `t + 2` batches, decoded and encoded.
fn layers_at_once(build: &BuildOptions, memory_bytes: u64) -> usize {
    let threads = build.threads.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let (threads, batch) = (threads as u64, u64::from(build.batch_size.unwrap_or(0)));
    let layer = 2 * ((2 * threads + 2) * u64::from(build.chunk_size) + (threads + 2) * batch) + LAYER_OVERHEAD;
    (memory_bytes / layer).clamp(1, MAX_AT_ONCE) as usize
}

/// A merged image, its bootstrap layer in a file.
pub(super) struct Merged {
    pub(super) image: NydusImage,
    file: NamedTempFile,
}

enum Unmerged {
    Keys,
    Merge(MergeError),
    Layer(LayerFailure),
    Io(io::Error),
}

impl Unmerged {
    fn error(self, id: ObjectId) -> ConvertError {
        match self {
            Self::Keys => ConvertError::Encryption { problem: NO_RECIPIENTS },
            Self::Merge(source) => ConvertError::Merge { id, source },
            Self::Layer(source) => ConvertError::Layer { id, source },
            Self::Io(source) => io_error("cannot write the bootstrap layer")(source),
        }
    }
}

fn merge(
    stack: Vec<Record>,
    (backend, recipients): (Option<&BlobPlace>, Option<&Recipients>),
    output: &std::path::Path,
) -> Result<Merged, Unmerged> {
    let layers: Vec<_> = stack.iter().map(|record| record.bootstrap.clone()).collect();
    let notes = stack.iter().map(|record| record.notes.clone()).collect();
    merge_with(&layers, &MergeOptions { notes, ..MergeOptions::default() }, output).map_err(Unmerged::Merge)?;
    let merged = Bootstrap::open(output).map_err(|error| Unmerged::Layer(error.into()))?;
    let mut tables: BTreeMap<BlobId, Bytes> = stack.into_iter().flat_map(|record| record.tables).collect();
    tables.retain(|id, _| merged.blobs().iter().any(|blob| blob.id == *id));
    // A dictionary may have brought some.
    if merged.is_encrypted() && recipients.is_none() {
        return Err(Unmerged::Keys);
    }
    let encrypted = merged.blobs().iter().filter(|blob| blob.cipher.is_some()).map(|blob| stored(blob).id).collect();
    let blobs = merged.blobs().iter().map(stored).collect();
    let references = merged.blobs().iter().filter(|blob| blob.meta.is_some());
    let references = references.map(|blob| (stored(blob).id, ObjectId::new(*blob.id.as_bytes()))).collect();
    let written = LayerFile::write(merged.as_bytes(), &tables, backend, recipients).map_err(Unmerged::Io)?;
    let LayerFile { layer: bootstrap, seal, file } = written;
    let blobs_elsewhere = backend.is_some();
    Ok(Merged { image: NydusImage { blobs, references, bootstrap, seal, encrypted, blobs_elsewhere }, file })
}
