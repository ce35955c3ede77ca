//! Check: a Nydus image as a registry has it, down to every chunk, and against the image that it was made from.
//!
//! ```text
//! manifest     media types and marks of layers
//! config       diff_ids: the blobs' digests and that of the bootstrap layer's tar
//! bootstrap    every structure, as `check` does for files
//! chunk tables those in the bootstrap layer against those in the blobs
//! blobs        size and sha256, every chunk; of a gzip layer that is read as it is, the meta blob and the layer
//! source       its layers, applied one over the other, against the tree and the bytes of all files
//! ```
//!
//! The source is applied by code of its own here, which knows nothing of the builder: what both get wrong in the same way
//! is all that it cannot find. What is wrong with an image is a problem in the report; an error is what kept the check
//! from its work. Blobs are kept in a folder while they are checked.

use std::{collections::BTreeMap, io, path::Path};

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use serde::Serialize;
use serde_json::Value;
use shoal_proto::{BlobId, ObjectId};
use tempfile::TempDir;

use super::{
    BootstrapLayer, Descriptor, ImageManifest, LayerError, LayerLimits, Platform, Reference, Registry, RegistryError,
    Source, SourceImageError,
    document::{self, Child, Document},
    manifest::{BLOB_LAYER, BLOB_MARK, BOOTSTRAP_MARK},
    nydus_source::{MAX_LAYER, nydus_images},
    push::digest,
    read_bootstrap_layer,
    source_image::{MAX_CONFIG, SourceImage, choose},
    tube::{Hashed, through},
};
use crate::{
    ArchiveError, Blob, BlobDirReader, Bootstrap, CheckReport, Cipher, Problem, chain, chunk_table_file_with,
};
use comparison::compare;
use source_tree::SourceTree;

mod comparison;
mod source_tree;

pub use comparison::ComparedTree;

/// What a check of an image found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageCheckReport {
    /// Whether nothing is wrong with any image.
    pub ok: bool,
    /// What was checked, with its digest.
    pub reference: String,
    /// One image, or those of an index.
    pub images: Vec<CheckedImage>,
}

/// What was found of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckedImage {
    /// Whether nothing is wrong.
    pub ok: bool,
    /// Its platform.
    pub platform: String,
    /// Its manifest.
    #[serde(serialize_with = "digest")]
    pub manifest: ObjectId,
    /// What is wrong with manifest, config and bootstrap layer, and where the tree is not the source's.
    pub problems: Vec<Problem>,
    /// Bootstrap and blobs.
    pub image: CheckReport,
    /// How much was compared with the source.
    pub compared: Option<ComparedTree>,
}

/// What kept a check from its work.
#[derive(Debug, thiserror::Error)]
pub enum CheckImageError {
    /// A registry, layout or archive failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The source is no OCI image.
    #[error(transparent)]
    Source(#[from] SourceImageError),
    /// A layer of the source cannot be read.
    #[error("layer sha256:{id} of the source")]
    Layer {
        /// Which layer.
        id: ObjectId,
        /// What is wrong with it.
        source: ArchiveError,
    },
    /// The work folder failed.
    #[error("cannot use the work folder")]
    Io(#[from] io::Error),
}

/// Checks the Nydus image behind a reference; of an index those that are marked as Nydus, or all if none is. `platforms`
/// chooses among them. With `source` the tree must be that of the image there.
///
/// # Errors
/// Whatever a registry answers; an image that is no Nydus image; a source that cannot be read. What is wrong with the
/// image itself is in the report.
pub async fn check_image(
    registry: &Registry,
    reference: &Reference,
    source: Option<&Reference>,
    platforms: &[Platform],
) -> Result<ImageCheckReport, CheckImageError> {
    let (id, size) = registry.resolve(reference).await?;
    let bytes = registry.manifest(reference.source(), id).await?;
    let root = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
    let children = nydus_images((id, size), &root, platforms)?;
    let mut images = Vec::new();
    for child in &children {
        let check = ImageCheck { registry, source: reference.source(), child, work: TempDir::new()? };
        images.push(check.run(source).await?);
    }
    let ok = images.iter().all(|image| image.ok);
    Ok(ImageCheckReport { ok, reference: reference.pinned(id).to_string(), images })
}

/// The check of one image.
struct ImageCheck<'a> {
    registry: &'a Registry,
    source: &'a Source,
    child: &'a Child,
    work: TempDir,
}

impl ImageCheck<'_> {
    async fn run(&self, source: Option<&Reference>) -> Result<CheckedImage, CheckImageError> {
        let id = self.child.descriptor.id;
        let bytes = self.registry.manifest(self.source, id).await?;
        let manifest = ImageManifest::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
        let mut problems = Problems::default();
        let document: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        marks(&document, &mut problems);
        let config = self.registry.blob(self.source, manifest.config.id, MAX_CONFIG).await?;
        let config: Value = serde_json::from_slice(&config).unwrap_or_default();
        let platform = document::platform(self.child.raw.get("platform").unwrap_or(&config));
        let layer = self.registry.blob(self.source, manifest.bootstrap.id, MAX_LAYER).await?;
        if layer.len() as u64 != manifest.bootstrap.size {
            problems.add(
                "bootstrap layer",
                format!("{} bytes, the manifest says {}", layer.len(), manifest.bootstrap.size),
            );
        }
        let (mut image, mut compared) = (CheckReport::default(), None);
        let layer = self.registry.open_layer(manifest.bootstrap.id, layer, manifest.seal.as_ref());
        let layer = layer.map_err(LayerError::from).and_then(|layer| {
            diff_ids(&config, &manifest, &layer, &mut problems);
            read_bootstrap_layer(&layer[..], &LayerLimits::default())
        });
        match layer {
            Err(error) => problems.add("bootstrap layer", chain(&error)),
            Ok(layer) => {
                if let Some(place) = &layer.backend
                    && !self.registry.note_backend(self.source, place)
                    && !self.registry.has_backend(self.source)
                {
                    let problem = format!("its blobs are in {place}: give that with --blob-backend");
                    problems.add("image/backend.json", problem);
                }
                self.fetch_blobs(&manifest, &layer, &mut problems).await?;
                let (bootstrap, dir) = (layer.bootstrap.clone(), self.work.path().to_owned());
                let checked = tokio::task::spawn_blocking(move || crate::check(bootstrap, Some(&dir))).await;
                image = checked.map_err(io::Error::other)?;
                if let (Some(source), true) = (source, image.ok) {
                    let tree = self.source_tree(source, &platform, &mut problems).await?;
                    compared = Some(self.compare(tree, layer.bootstrap, &mut problems).await?);
                }
            }
        }
        let ok = problems.list.is_empty() && image.ok;
        let platform = platform.to_string();
        Ok(CheckedImage { ok, platform, manifest: id, problems: problems.list, image, compared })
    }

    /// Brings the blobs into the work folder and compares them with what manifest and bootstrap layer say of them.
    async fn fetch_blobs(
        &self,
        manifest: &ImageManifest,
        layer: &BootstrapLayer,
        problems: &mut Problems,
    ) -> Result<(), CheckImageError> {
        let mut sizes: BTreeMap<BlobId, u64> = manifest.blobs.iter().copied().collect();
        let elsewhere = sizes.is_empty() && (layer.backend.is_some() || self.registry.has_backend(self.source));
        let (mut gzip_layers, mut ciphers) = (Vec::new(), BTreeMap::new());
        if let Ok(bootstrap) = Bootstrap::parse(layer.bootstrap.clone()) {
            for blob in bootstrap.blobs() {
                ciphers.extend(blob.cipher.clone().map(|cipher| (blob.id, cipher)));
                if blob.is_gzip_layer() {
                    gzip_layer(blob, manifest, layer, problems);
                    gzip_layers.push((blob.id, blob.encoded_size));
                    continue;
                }
                match sizes.get(&blob.id) {
                    // Blobs outside of the registry are no layers.
                    None if elsewhere => {
                        sizes.insert(blob.id, blob.encoded_size);
                    }
                    None => problems.add("manifest", format!("blob {} of the bootstrap is no layer", blob.id)),
                    // Of a blob that holds its layer's bootstrap, a merge may know only what comes before that: whether it is
                    // so, the check of the files tells.
                    Some(size) if *size != blob.encoded_size && (*size < blob.encoded_size || blob.toc.is_some()) => {
                        let said = blob.encoded_size;
                        problems
                            .add("manifest", format!("blob {} has {size} bytes, the bootstrap says {said}", blob.id));
                    }
                    Some(_) => {}
                }
                // BuildKit writes none. Without batches the bootstrap says as much.
                if blob.needs_chunk_table() && !layer.chunk_tables.contains_key(&blob.id) {
                    problems.add("bootstrap layer", format!("no chunk table of blob {}", blob.id));
                }
            }
        }
        for (id, size) in sizes.iter().chain(gzip_layers.iter().map(|(id, size)| (id, size))) {
            let path = self.work.path().join(id.to_string());
            let mut file = tokio::fs::File::create(&path).await?;
            let descriptor = Descriptor { id: ObjectId::new(*id.as_bytes()), size: *size };
            match self.registry.blob_to(self.source, &descriptor, &mut file).await {
                Ok(()) => table(*id, (&path, ciphers.get(id)), layer, problems),
                Err(error @ (RegistryError::WrongDigest { .. } | RegistryError::NotFound { .. })) => {
                    problems.add(format!("blob {id}"), chain(&error));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Applies the layers of the source.
    async fn source_tree(
        &self,
        source: &Reference,
        platform: &Platform,
        problems: &mut Problems,
    ) -> Result<SourceTree, CheckImageError> {
        let registry = self.registry;
        let (id, _) = registry.resolve(source).await?;
        let bytes = registry.manifest(source.source(), id).await?;
        let root = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
        let chosen = choose(id, &bytes, &root, std::slice::from_ref(platform))?;
        let image = SourceImage::load(registry, source.source(), &chosen[0]).await?;
        let mut tree = SourceTree::default();
        for layer in &image.layers {
            let apply = move |stream: &mut dyn io::Read| apply(tree, stream);
            let applied = through(registry, source.source(), &layer.descriptor, |_| {}, apply).await?;
            let id = layer.descriptor.id;
            let (next, found) = applied.map_err(|source| CheckImageError::Layer { id, source })?;
            if found != layer.diff_id {
                let problem =
                    format!("its tar has the digest sha256:{found}, the config says sha256:{}", layer.diff_id);
                problems.add(format!("layer sha256:{id} of the source"), problem);
            }
            tree = next;
        }
        Ok(tree)
    }

    /// Compares a sound image with the tree of its source.
    async fn compare(
        &self,
        tree: SourceTree,
        bootstrap: Bytes,
        problems: &mut Problems,
    ) -> Result<ComparedTree, CheckImageError> {
        let dir = self.work.path().to_owned();
        let compared = tokio::task::spawn_blocking(move || {
            let bootstrap = Bootstrap::parse(bootstrap).map_err(io::Error::other)?;
            let reader = BlobDirReader::open(&bootstrap, &dir).map_err(io::Error::other)?;
            let mut problems = Problems::default();
            let compared = compare(&tree, &bootstrap, &reader, &mut problems).map_err(io::Error::other)?;
            Ok::<_, io::Error>((compared, problems))
        });
        let (compared, found) = compared.await.map_err(io::Error::other)??;
        found.list.into_iter().for_each(|Problem { place, problem }| problems.add(place, problem));
        Ok(compared)
    }
}

fn apply(mut tree: SourceTree, stream: &mut dyn io::Read) -> Result<(SourceTree, ObjectId), ArchiveError> {
    let place = || "its start".to_owned();
    let stream = crate::archive::decompress(stream);
    let mut tar = Hashed::new(stream.map_err(|source| ArchiveError::Read { place: place(), source })?);
    tree.apply(&mut tar)?;
    Ok((tree, tar.digest()))
}

/// What is wrong, as far as it is listed.
#[derive(Debug, Default)]
struct Problems {
    list: Vec<Problem>,
}

impl Problems {
    /// Most that are listed.
    const MOST: usize = 1000;

    fn add(&mut self, place: impl Into<String>, problem: impl Into<String>) {
        if self.list.len() < Self::MOST {
            self.list.push(Problem { place: place.into(), problem: problem.into() });
        }
    }
}

/// Media types and annotations of layers.
fn marks(manifest: &Value, problems: &mut Problems) {
    let layers = manifest.get("layers").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let Some((bootstrap, blobs)) = layers.split_last() else { return };
    let mark = |layer: &Value, key: &str| layer.get("annotations")?.get(key)?.as_str().map(str::to_owned);
    for (position, layer) in blobs.iter().enumerate() {
        let place = format!("layer {position} of the manifest");
        if layer.get("mediaType").and_then(Value::as_str) != Some(BLOB_LAYER) {
            problems.add(&place, format!("its media type is not {BLOB_LAYER}"));
        }
        if mark(layer, BLOB_MARK).as_deref() != Some("true") {
            problems.add(&place, format!("no annotation {BLOB_MARK}"));
        }
    }
    // A version that is not 6 was refused, and BuildKit writes none.
    if mark(bootstrap, BOOTSTRAP_MARK).as_deref() != Some("true") {
        problems.add("bootstrap layer", format!("the annotation {BOOTSTRAP_MARK} is not true"));
    }
}

fn diff_ids(config: &Value, manifest: &ImageManifest, layer: &Bytes, problems: &mut Problems) {
    let mut tar = Hashed::new(MultiGzDecoder::new(&layer[..]));
    if io::copy(&mut io::Read::take(&mut tar, MAX_LAYER * 4), &mut io::sink()).is_err() {
        return problems.add("bootstrap layer", "it is no gzip");
    }
    let blobs = manifest.blobs.iter().map(|(id, _)| id.to_string());
    let expected: Vec<_> = blobs.chain([tar.digest().to_string()]).map(|hex| format!("sha256:{hex}")).collect();
    let found = config.get("rootfs").and_then(|rootfs| rootfs.get("diff_ids")).and_then(Value::as_array);
    let found: Vec<_> = found.into_iter().flatten().map(|id| id.as_str().unwrap_or_default()).collect();
    if found != expected {
        problems
            .add("config", format!("its {} diff_ids are not those of the {} layers", found.len(), expected.len()));
    }
}

/// A gzip layer is no layer of the manifest, but its meta blob is, and names it.
fn gzip_layer(blob: &Blob, manifest: &ImageManifest, layer: &BootstrapLayer, problems: &mut Problems) {
    let id = blob.id;
    match blob.meta {
        None if layer.chunk_tables.contains_key(&id) => {}
        None => problems.add("bootstrap layer", format!("no chunk table of the gzip layer {id}")),
        Some(meta) => {
            if !manifest.references.contains(&(id, meta.id)) {
                let problem = format!("no layer is marked as the meta blob {} of the gzip layer {id}", meta.id);
                problems.add("manifest", problem);
            }
            if manifest.blobs.iter().any(|(found, size)| *found == meta.id && *size != meta.size) {
                problems.add("manifest", format!("meta blob {} has another size in the bootstrap", meta.id));
            }
        }
    }
}

/// The chunk table in the bootstrap layer must be that in the blob.
fn table(id: BlobId, (path, cipher): (&Path, Option<&Cipher>), layer: &BootstrapLayer, problems: &mut Problems) {
    let Some(copy) = layer.chunk_tables.get(&id) else { return };
    match chunk_table_file_with(path, cipher) {
        Ok(own) if own == copy[..] => {}
        Ok(_) => problems.add("bootstrap layer", format!("the chunk table of blob {id} is not the one in the blob")),
        Err(error) => problems.add(format!("blob {id}"), chain(&error)),
    }
}
