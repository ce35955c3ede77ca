//! The dictionary: an earlier Nydus image whose chunks a new one reads from where they are.
//!
//! Chunks that it has are neither stored nor sent again: layers name them in its blobs, and the new image lists those blobs
//! among its layers. Where the new image goes to another repository of the same registry the blobs are mounted there; to
//! another registry or a layout they are copied, since an image's blobs lie where its manifest does.

use std::collections::{BTreeSet, HashMap, hash_map::Entry};

use bytes::Bytes;
use shoal_proto::{BlobId, ObjectId};

use super::{ConvertError, image::Conversion};
use crate::{
    Bootstrap, BuildOptions,
    oci::{
        CopiedBlobs, Descriptor, NydusSourceError, Reference, Registry, RegistryError, Source,
        document::Document,
        nydus_source::{NydusSource, nydus_images},
    },
};

/// Most platforms of a dictionary.
const MAX_IMAGES: usize = 32;

/// An earlier image, all its platforms.
pub(super) struct Dictionary {
    source: Source,
    /// Of its manifest or index: part of the key of every record that was made with it.
    pub(super) id: ObjectId,
    pub(super) images: Vec<Bootstrap>,
    blobs: HashMap<BlobId, EarlierBlob>,
}

struct EarlierBlob {
    size: u64,
    table: Bytes,
}

impl Dictionary {
    /// Reads bootstraps and chunk tables; of the blobs no more than tables that are missing from a bootstrap layer.
    pub(super) async fn load(
        registry: &Registry,
        reference: &Reference,
        build: &BuildOptions,
    ) -> Result<Self, ConvertError> {
        let failed = |source| ConvertError::Dictionary { reference: reference.to_string(), source };
        Self::read(registry, reference, build).await.map_err(failed)
    }

    async fn read(
        registry: &Registry,
        reference: &Reference,
        build: &BuildOptions,
    ) -> Result<Self, NydusSourceError> {
        let source = reference.source().clone();
        let (id, size) = registry.resolve(reference).await?;
        let bytes = registry.manifest(&source, id).await?;
        let root = Document::parse(&bytes).map_err(|source| RegistryError::Manifest { id, source })?;
        let children = nydus_images((id, size), &root, &[])?;
        if children.len() > MAX_IMAGES {
            let problem = format!("it has more than {MAX_IMAGES} platforms");
            return Err(NydusSourceError::Unfit { id, problem });
        }
        let (mut images, mut blobs) = (Vec::new(), HashMap::new());
        for child in &children {
            let image = NydusSource::load(registry, &source, child.descriptor.id).await?;
            fits(&image, build)?;
            for blob in image.bootstrap.blobs() {
                if let Entry::Vacant(new) = blobs.entry(blob.id) {
                    let table = image.chunk_table(registry, &source, blob).await?;
                    new.insert(EarlierBlob { size: image.size(blob), table });
                }
            }
            images.push(image.bootstrap);
        }
        Ok(Self { source, id, images, blobs })
    }

    /// Which of an image's blobs are of the dictionary.
    pub(super) fn blobs_of(&self, image: &Bootstrap) -> BTreeSet<BlobId> {
        image.blobs().iter().map(|blob| blob.id).filter(|id| self.blobs.contains_key(id)).collect()
    }

    /// The chunk table of one of its blobs.
    pub(super) fn chunk_table(&self, id: BlobId) -> Option<Bytes> {
        self.blobs.get(&id).map(|blob| blob.table.clone())
    }
}

fn fits(image: &NydusSource, build: &BuildOptions) -> Result<(), NydusSourceError> {
    let unfit = |problem| Err(NydusSourceError::Unfit { id: image.id, problem });
    let found = image.bootstrap.chunk_size();
    if found != build.chunk_size {
        return unfit(format!("its chunks have {found} bytes, those of the new image {}", build.chunk_size));
    }
    // Such a blob is two files, of which a layer has no place for the second.
    if let Some(blob) = image.bootstrap.blobs().iter().find(|blob| blob.is_gzip_layer() || !blob.has_chunk_table()) {
        return unfit(format!("its blob {} is a gzip layer, a tar or of RAFS v5", blob.id));
    }
    Ok(())
}

impl Conversion<'_> {
    /// Sees to it that the target has what a merged image reads from the dictionary, and corrects the sizes of those blobs
    /// to those of their files.
    pub(super) async fn place_dictionary(&self, blobs: &mut [Descriptor]) -> Result<CopiedBlobs, ConvertError> {
        let mut placed = CopiedBlobs::default();
        let Some(dictionary) = &self.dictionary else { return Ok(placed) };
        for blob in blobs {
            let Some(known) = dictionary.blobs.get(&BlobId::new(*blob.id.as_bytes())) else { continue };
            blob.size = known.size;
            placed.add(self.bring_blob(&dictionary.source, blob).await?, blob.size);
        }
        Ok(placed)
    }
}
