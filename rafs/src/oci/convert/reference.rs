//! Gzip layers that stay what they are: an index over each, and what is published next to an unmodified image.
//!
//! ```text
//! gzip layer ──stream, verify──> meta blob ──> target registry       in the manifest, with the layer's digest beside it
//!                           '──> bootstrap ──> record, merged as any other
//! anything else, and what no index can be made over: converted as ever, so that the image has both kinds
//! ```
//!
//! A snapshotter that mounts an unmodified image is asked for its layers one by one, and another image may go on from any of
//! them. So there is a *stage* for each layer: the image up to there, a bootstrap over the same meta blobs. Each is a
//! manifest of its own with the source's as its subject.

use std::{
    io::Read,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use shoal_proto::BlobId;

use super::{
    ConvertError, ConvertEvent, Converted, ConvertedLayer, LayerFailure,
    image::Conversion,
    layer::{Built, blobs_of},
    records::{Key, Record},
};
use crate::{
    Bootstrap, BuildError, Builder,
    oci::{
        Descriptor, RegistryError,
        document::{self, Child},
        layer_index,
        registry::sha256,
        source_image::{SourceImage, SourceLayer},
        tube::through,
    },
};

/// How a gzip stream begins (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// The manifest of an image up to one of its layers.
pub(super) struct Stage {
    layers: usize,
    bytes: Bytes,
}

impl Conversion<'_> {
    /// Makes an index over a layer, unless that was done before. `None` if it is no gzip, or one that cannot be read as it is.
    pub(super) async fn indexed_layer(
        &self,
        layer: &SourceLayer,
    ) -> Result<Option<(Record, ConvertedLayer)>, ConvertError> {
        let key = Key::of_index(layer.descriptor.id, layer.diff_id, &self.options.build);
        if let Some(record) = self.known(&key).await?
            && let Some(placed) = self.blob_in_place(&record).await?
        {
            return Ok(Some(self.finished(layer, key, record, (true, placed))));
        }
        match self.index(layer).await? {
            Some(built) => self.keep(layer, key, built).await.map(Some),
            None => Ok(None),
        }
    }

    /// Streams the layer through the builder.
    async fn index(&self, layer: &SourceLayer) -> Result<Option<Built>, ConvertError> {
        let SourceLayer { descriptor, diff_id } = *layer;
        let failed = |source| ConvertError::Layer { id: descriptor.id, source };
        let work = self.records.work().map_err(|error| failed(error.into()))?;
        let on_event = self.on_event.clone();
        let read = Arc::new(AtomicU64::new(0));
        let counted = read.clone();
        let on_read = move |bytes| {
            counted.fetch_add(bytes, Ordering::Relaxed);
            on_event(ConvertEvent::Read(bytes));
        };
        let (builder, layer) = (Builder::new(self.options.build), BlobId::new(*descriptor.id.as_bytes()));
        let dir = work.path().to_owned();
        let work_on = move |stream: &mut dyn Read| index(stream, layer, &builder, &dir);
        let indexed = through(self.registry, self.from.source(), &descriptor, on_read, work_on).await?;
        // Of what turns out to be no gzip, the beginning alone.
        self.count_read(read.load(Ordering::Relaxed));
        match indexed {
            Err(LayerFailure::NotGzip) => Ok(None),
            Err(LayerFailure::Build(error @ BuildError::Unsupported { .. })) => {
                tracing::info!("converted, as it cannot be read as it is: {error}");
                Ok(None)
            }
            Err(error) => Err(failed(error)),
            Ok((_, found)) if found != diff_id => Err(failed(LayerFailure::DiffId { expected: diff_id, found })),
            Ok((record, _)) => Ok(Some(Built { record, work })),
        }
    }

    /// The image up to each of its lower layers, with its bootstrap layer in the target; none where nothing is published.
    pub(super) async fn stages(
        &self,
        source: &SourceImage,
        child: &Child,
        stack: &[Record],
    ) -> Result<Vec<Stage>, ConvertError> {
        let mut stages = Vec::new();
        if !(self.options.oci_ref && self.options.with_referrer) {
            return Ok(stages);
        }
        for layers in 1..stack.len() {
            let mut merged = self.merge(child.descriptor.id, stack[..layers].to_vec()).await?;
            self.place_dictionary(&mut merged.image.blobs).await?;
            self.put_bootstrap(&merged).await?;
            let bytes = self.manifest(source, child, &merged.image, layers).await?;
            stages.push(Stage { layers, bytes });
        }
        Ok(stages)
    }

    /// Makes the image and its stages referrers of the source's manifest, the whole image last: what is there by then is
    /// complete.
    pub(super) async fn publish(&self, image: &Converted) -> Result<(), RegistryError> {
        let subject = image.report.source;
        // No stage is wanted without a layer, and an image without layers is its own only stage.
        let last = Stage { layers: image.stages.len() + 1, bytes: image.bytes.clone() };
        for Stage { layers, bytes } in image.stages.iter().chain([&last]) {
            let descriptor = Descriptor { id: sha256(bytes), size: bytes.len() as u64 };
            let mut entry = document::descriptor(document::OCI_MANIFEST, descriptor);
            layer_index::describe(&mut entry, *layers);
            self.registry.put_referring(self.to, bytes.clone(), subject, entry).await?;
        }
        Ok(())
    }
}

/// Builds the index over a layer from its bytes, whose digest others verify; also gives the digest of its tar.
fn index(
    stream: &mut dyn Read,
    layer: BlobId,
    builder: &Builder,
    dir: &Path,
) -> Result<(Record, shoal_proto::ObjectId), LayerFailure> {
    let mut magic = Vec::new();
    stream.take(GZIP_MAGIC.len() as u64).read_to_end(&mut magic)?;
    if magic != GZIP_MAGIC {
        return Err(LayerFailure::NotGzip);
    }
    let (bootstrap, whole) = (dir.join("bootstrap"), magic.as_slice().chain(stream));
    let (name, blobs) = (format!("sha256:{layer}"), blobs_of(dir));
    let (_, notes, diff_id) = builder.build_reference_layer(whole, layer, Path::new(&name), &bootstrap, &blobs)?;
    let bootstrap = Bootstrap::open(&bootstrap)?;
    let (tables, earlier) = Default::default();
    Ok((Record { bootstrap, tables, notes, earlier, unindexable: false }, diff_id))
}
