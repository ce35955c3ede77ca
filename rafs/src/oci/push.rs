//! Push: a bootstrap and its blobs become an image in a registry or a layout folder.
//!
//! What is written is what nydusify and the snapshotter's converter write (format note, section 12): blob layers, then
//! the bootstrap layer, always with the chunk table of every blob. The same input gives the same digests. Blobs that are
//! there already are not sent again, and their files need not be here: of blobs of earlier images only the chunk table is
//! read, from the registry. The manifest goes last, so a broken push leaves no image with holes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use serde::{Serialize, Serializer};
use shoal_proto::{BlobId, ObjectId};

use super::{
    BlobPlace, Descriptor, Recipients, Reference, Registry, RegistryError, Source,
    backend::Backend,
    bootstrap_layer::LayerFile,
    document::OCI_MANIFEST,
    nydus_image::{ManifestExtras, NydusImage},
    nydus_source::stored_chunk_table,
};
use crate::{Blob, Bootstrap, BootstrapError, ChunkTableError, chunk_table_file_with};

/// Why an image could not be pushed.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The registry or the layout folder failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A file could not be read or written.
    #[error("{what}")]
    Io {
        /// What was done to which file.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The bootstrap is broken.
    #[error("cannot use the bootstrap {path}")]
    Bootstrap {
        /// The file.
        path: String,
        /// What is wrong.
        source: BootstrapError,
    },
    /// A blob is not as long as the bootstrap says.
    #[error("{place} has {found} bytes, the bootstrap says {expected}")]
    BlobSize {
        /// Its file, or its name in the registry.
        place: String,
        /// Bytes by the bootstrap.
        expected: u64,
        /// Bytes that it has.
        found: u64,
    },
    /// A blob is nowhere.
    #[error("blob {id} is neither in {dir} nor in {repository}")]
    MissingBlob {
        /// The blob.
        id: BlobId,
        /// The folder of blobs.
        dir: String,
        /// Where the image shall be.
        repository: String,
    },
    /// The chunk table of a blob cannot be read.
    #[error("cannot read the chunk table of {place}")]
    ChunkTable {
        /// The blob's file, or its name in the registry.
        place: String,
        /// What is wrong.
        source: ChunkTableError,
    },
    /// A blob of a kind that is read from files only.
    #[error("blob {id} is {kind}, of which no image can be pushed")]
    Kind {
        /// The blob.
        id: BlobId,
        /// What it is.
        kind: &'static str,
    },
    /// The keys of its blobs would be in the clear.
    #[error("blobs of the image are encrypted, and its bootstrap has their keys: say whom to encrypt that for")]
    Keys,
    /// The image config to start from is no JSON object.
    #[error("the image config is not a JSON object")]
    Config,
}

/// What a push adds to the layers.
#[derive(Debug, Clone, Default)]
pub struct PushOptions {
    /// The image config to start from, for its environment, command and so on; its layers are replaced. Default: an
    /// empty one for this machine's platform.
    pub config: Option<Bytes>,
    /// Encrypt the bootstrap layer for them; an image whose blobs are encrypted needs it. Default: for nobody, in the clear.
    pub recipients: Option<Recipients>,
    /// Put blobs there instead of into the registry; it must be one of the client's places. They are no layers then, and the
    /// bootstrap layer says where they are.
    pub blob_backend: Option<BlobPlace>,
}

/// A layer that is in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PushedLayer {
    /// Its digest.
    #[serde(serialize_with = "digest")]
    pub id: ObjectId,
    /// Its bytes.
    pub size: u64,
    /// Whether it was there before, or in another repository of the registry, which it was mounted from.
    pub existed: bool,
}

/// What was pushed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PushReport {
    /// Where to: with tag and digest.
    pub reference: String,
    /// Digest of the manifest.
    #[serde(serialize_with = "digest")]
    pub manifest: ObjectId,
    /// The data blobs, in the order of the bootstrap's blob table.
    pub blobs: Vec<PushedLayer>,
    /// The bootstrap layer.
    pub bootstrap_layer: PushedLayer,
    /// Bytes of blobs and bootstrap layer together: what a node without anything has to read for all of the image.
    pub encoded_bytes: u64,
    /// Of these, bytes that were there before.
    pub existing_bytes: u64,
}

pub(super) fn digest<S: Serializer>(id: &ObjectId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("sha256:{id}"))
}

/// Pushes the image of `bootstrap`, whose blobs lie in `blob_dir` under their ids, or are in the registry already. Without a tag in `reference` the tag
/// is `latest`. Calls `progress` after each layer, the bootstrap layer last.
pub async fn push(
    registry: &Registry,
    bootstrap: &Path,
    blob_dir: &Path,
    reference: &Reference,
    options: PushOptions,
    mut progress: impl FnMut(&PushedLayer),
) -> Result<PushReport, PushError> {
    let tagged = reference.tagged().map_err(RegistryError::from)?;
    let source = reference.source();
    let (path, dir) = (bootstrap.to_owned(), blob_dir.to_owned());
    let mut files = blocking(move || Files::read(&path, &dir)).await?;
    if files.bootstrap.is_encrypted() && options.recipients.is_none() {
        return Err(PushError::Keys);
    }
    let backend = options.blob_backend.as_ref().map(|place| registry.backend_at(place)).transpose()?;
    files.find_elsewhere(registry, source, (blob_dir, backend)).await?;
    let (elsewhere, recipients) = (options.blob_backend.clone(), options.recipients.clone());
    let prepared = blocking(move || files.prepare(elsewhere, recipients.as_ref())).await?;
    let mut blobs = Vec::new();
    for (descriptor, file) in &prepared.blobs {
        let layer = match file {
            Some(file) => match backend {
                Some(backend) => {
                    let existed = backend.put(&registry.http, descriptor, file).await?;
                    PushedLayer { id: descriptor.id, size: descriptor.size, existed }
                }
                None => place(registry, source, descriptor, file).await?,
            },
            None => PushedLayer { id: descriptor.id, size: descriptor.size, existed: true },
        };
        progress(&layer);
        blobs.push(layer);
    }
    let file = prepared.bootstrap_layer.file.path();
    let image = prepared.image();
    let bootstrap_layer = place(registry, source, &image.bootstrap_descriptor(), file).await?;
    progress(&bootstrap_layer);
    let config = image.config(options.config.as_deref(), "shoal push").ok_or(PushError::Config)?;
    let (config_id, _) = registry.upload_bytes(source, config.clone()).await?;
    let config = Descriptor { id: config_id, size: config.len() as u64 };
    let bytes = image.manifest(config, &ManifestExtras::default());
    let manifest = registry.put_manifest(&tagged, OCI_MANIFEST, bytes).await?;
    let layers = || blobs.iter().chain([&bootstrap_layer]);
    Ok(PushReport {
        reference: tagged.pinned(manifest).to_string(),
        manifest,
        encoded_bytes: layers().map(|layer| layer.size).sum(),
        existing_bytes: layers().filter(|layer| layer.existed).map(|layer| layer.size).sum(),
        blobs,
        bootstrap_layer,
    })
}

async fn place(
    registry: &Registry,
    source: &Source,
    descriptor: &Descriptor,
    file: &Path,
) -> Result<PushedLayer, RegistryError> {
    let existed = registry.upload_blob(source, descriptor, file).await?;
    Ok(PushedLayer { id: descriptor.id, size: descriptor.size, existed })
}

async fn blocking<T: Send + 'static>(
    operation: impl FnOnce() -> Result<T, PushError> + Send + 'static,
) -> Result<T, PushError> {
    let joined = tokio::task::spawn_blocking(operation).await;
    joined.map_err(|error| io_error("cannot prepare the layers")(io::Error::other(error)))?
}

/// What is here of an image.
struct Files {
    bootstrap: Bootstrap,
    /// In the order of the blob table; none where the file is missing.
    blobs: Vec<Option<PathBuf>>,
    tables: BTreeMap<BlobId, Bytes>,
}

impl Files {
    fn read(path: &Path, blob_dir: &Path) -> Result<Self, PushError> {
        let name = path.display().to_string();
        let bytes = Bytes::from(fs::read(path).map_err(io_error(format!("cannot read {name}")))?);
        let bootstrap = Bootstrap::parse(bytes).map_err(|source| PushError::Bootstrap { path: name, source })?;
        let (mut blobs, mut tables) = (Vec::new(), BTreeMap::new());
        for blob in bootstrap.blobs() {
            let no_digests = "a tar of which no chunk has a digest";
            let kind = [
                (blob.meta.is_some(), "a gzip layer"),
                (blob.is_v5(), "of RAFS v5"),
                (!bootstrap.has_digests(), no_digests),
            ];
            if let Some((_, kind)) = kind.into_iter().find(|(is_it, _)| *is_it) {
                return Err(PushError::Kind { id: blob.id, kind });
            }
            let file = blob_dir.join(blob.id.to_string());
            let place = file.display().to_string();
            match fs::metadata(&file) {
                Ok(metadata) => {
                    check_size(blob, metadata.len(), &place)?;
                    if blob.has_chunk_table() {
                        let table = chunk_table_file_with(&file, blob.cipher.as_ref());
                        let table = table.map_err(|source| PushError::ChunkTable { place, source })?;
                        tables.insert(blob.id, table.into());
                    }
                    blobs.push(Some(file));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => blobs.push(None),
                Err(error) => return Err(io_error(format!("cannot look at {place}"))(error)),
            }
        }
        Ok(Self { bootstrap, blobs, tables })
    }

    /// Looks for the blobs that are not here where they would be sent to, and reads their chunk tables there.
    async fn find_elsewhere(
        &mut self,
        registry: &Registry,
        source: &Source,
        (blob_dir, backend): (&Path, Option<&Backend>),
    ) -> Result<(), PushError> {
        for (blob, _) in self.bootstrap.blobs().iter().zip(&self.blobs).filter(|(_, file)| file.is_none()) {
            let id = descriptor(blob).id;
            let found = match backend {
                Some(backend) => backend.size(&registry.http, id).await?,
                None => registry.blob_size(source, id).await?,
            };
            let Some(found) = found else {
                let (dir, repository) = (blob_dir.display().to_string(), source.to_string());
                return Err(PushError::MissingBlob { id: blob.id, dir, repository });
            };
            let place = format!("{source}@sha256:{}", blob.id);
            check_size(blob, found, &place)?;
            if !blob.has_chunk_table() {
                continue;
            }
            let table = stored_chunk_table(registry, source, blob, found).await?;
            let table = table.map_err(|source| PushError::ChunkTable { place, source })?;
            self.tables.insert(blob.id, table);
        }
        Ok(())
    }

    fn prepare(self, backend: Option<BlobPlace>, recipients: Option<&Recipients>) -> Result<Prepared, PushError> {
        let bytes = self.bootstrap.as_bytes();
        let bootstrap_layer = LayerFile::write(bytes, &self.tables, backend.as_ref(), recipients)
            .map_err(io_error("cannot write the bootstrap layer"))?;
        let encrypted = self.bootstrap.blobs().iter().filter(|blob| blob.cipher.is_some());
        let encrypted = encrypted.map(|blob| descriptor(blob).id).collect();
        let blobs = self.bootstrap.blobs().iter().map(descriptor).zip(self.blobs).collect();
        Ok(Prepared { blobs, bootstrap_layer, encrypted, blobs_elsewhere: backend.is_some() })
    }
}

fn check_size(blob: &Blob, found: u64, place: &str) -> Result<(), PushError> {
    if found == blob.encoded_size {
        return Ok(());
    }
    Err(PushError::BlobSize { place: place.to_owned(), expected: blob.encoded_size, found })
}

/// The layers, ready to be sent.
struct Prepared {
    /// With their files; none for what is in its place already.
    blobs: Vec<(Descriptor, Option<PathBuf>)>,
    bootstrap_layer: LayerFile,
    encrypted: BTreeSet<ObjectId>,
    blobs_elsewhere: bool,
}

impl Prepared {
    fn image(&self) -> NydusImage {
        let blobs = self.blobs.iter().map(|(blob, _)| *blob).collect();
        NydusImage {
            blobs,
            references: BTreeMap::new(),
            bootstrap: self.bootstrap_layer.layer,
            seal: self.bootstrap_layer.seal.clone(),
            encrypted: self.encrypted.clone(),
            blobs_elsewhere: self.blobs_elsewhere,
        }
    }
}

fn descriptor(blob: &Blob) -> Descriptor {
    Descriptor { id: ObjectId::new(*blob.id.as_bytes()), size: blob.encoded_size }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> PushError {
    let what = what.into();
    move |source| PushError::Io { what, source }
}
