//! One layer: from its bytes in the source to a blob in the target and a record. How a gzip layer gets an index instead,
//! `reference.rs` says.

use std::{
    collections::BTreeMap,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use shoal_proto::ObjectId;

use super::{
    ConvertError, ConvertEvent, ConvertedLayer, LayerFailure,
    image::Conversion,
    io_error,
    records::{Key, Record},
};
use crate::{
    Bootstrap, Builder, LayerNotes,
    archive::decompress,
    chunk_table_file_with,
    oci::{
        Descriptor, Placed, PushedLayer, RegistryError,
        source_image::SourceLayer,
        tube::{Hashed, through},
    },
};

/// A layer that was built, with its blob in a folder.
pub(super) struct Built {
    pub(super) record: Record,
    pub(super) work: tempfile::TempDir,
}

impl Conversion<'_> {
    /// Converts a layer, unless that was done before. Its blob is in the target then, and its record is kept.
    pub(super) async fn layer(&self, layer: &SourceLayer) -> Result<(Record, ConvertedLayer), ConvertError> {
        let dictionary = self.dictionary.as_ref().map(|dictionary| dictionary.id);
        let key = Key::new((layer.descriptor.id, layer.diff_id), &self.options.build, dictionary);
        let mut known = self.known(&key).await?;
        // That no index can be made over it is found by reading it, which is not done again.
        if self.options.oci_ref && !known.as_ref().is_some_and(|record| record.unindexable) {
            if let Some(indexed) = self.indexed_layer(layer).await? {
                return Ok(indexed);
            }
            if let Some(record) = &mut known {
                record.unindexable = true;
                self.records.store(&key, record).map_err(io_error("cannot keep the record of a layer"))?;
            }
        }
        if let Some(record) = known
            && let Some(placed) = self.blob_in_place(&record).await?
        {
            return Ok(self.finished(layer, key, record, (true, placed)));
        }
        let mut built = self.build(layer).await?;
        built.record.unindexable = self.options.oci_ref;
        self.keep(layer, key, built).await
    }

    /// Puts the blob of a layer that was built into the target, then keeps the record.
    pub(super) async fn keep(
        &self,
        layer: &SourceLayer,
        key: Key,
        Built { record, work }: Built,
    ) -> Result<(Record, ConvertedLayer), ConvertError> {
        let placed = match record.blob() {
            None => Placed::Existed,
            Some(blob) => {
                let file = blobs_of(work.path()).join(blob.id.to_string());
                match self.put_blob(&blob, &file).await? {
                    true => Placed::Existed,
                    false => Placed::Sent,
                }
            }
        };
        // Only now: a record says that its blob was in the target once.
        self.records.store(&key, &record).map_err(io_error("cannot keep the record of a layer"))?;
        Ok(self.finished(layer, key, record, (false, placed)))
    }

    pub(super) fn finished(
        &self,
        layer: &SourceLayer,
        key: Key,
        record: Record,
        (reused, placed): (bool, Placed),
    ) -> (Record, ConvertedLayer) {
        // What is mounted from the cache's repository is not sent.
        let existed = placed != Placed::Sent;
        let blob = record.blob().map(|blob| PushedLayer { id: blob.id, size: blob.size, existed });
        let Descriptor { id, size } = layer.descriptor;
        let indexed = record.is_index();
        let converted = ConvertedLayer { source: id, source_bytes: size, reused, indexed, blob };
        self.used(key, id);
        (self.on_event)(ConvertEvent::Layer(converted));
        (record, converted)
    }

    /// The record of this machine, or of the cache image.
    pub(super) async fn known(&self, key: &Key) -> Result<Option<Record>, ConvertError> {
        if let Some(record) = self.records.load(key) {
            return Ok(Some(record));
        }
        let Some(cache) = &self.cache else { return Ok(None) };
        let Some(record) = cache.record(self.registry, key).await? else { return Ok(None) };
        self.records.store(key, &record).map_err(io_error("cannot keep the record of a layer"))?;
        Ok(Some(record))
    }

    /// Sees to it that the target has the blob of a record. `None` when it is nowhere to be had.
    pub(super) async fn blob_in_place(&self, record: &Record) -> Result<Option<Placed>, RegistryError> {
        let Some(blob) = record.blob() else { return Ok(Some(Placed::Existed)) };
        if self.has_blob(&blob).await? {
            return Ok(Some(Placed::Existed));
        }
        let Some(cache) = &self.cache else { return Ok(None) };
        match self.bring_blob(cache.source(), &blob).await {
            Ok(placed) => Ok(Some(placed)),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Streams the layer through the builder.
    async fn build(&self, layer: &SourceLayer) -> Result<Built, ConvertError> {
        let Descriptor { id, .. } = layer.descriptor;
        let failed = |source| ConvertError::Layer { id, source };
        let work = self.records.work().map_err(|error| failed(error.into()))?;
        let on_event = Arc::clone(&self.on_event);
        let on_read = move |bytes| on_event(ConvertEvent::Read(bytes));
        let builder = match &self.dictionary {
            Some(dictionary) => Builder::new(self.options.build).chunk_dictionary(dictionary.images.clone()),
            None => Builder::new(self.options.build),
        };
        let name = format!("sha256:{id}");
        let (dir, diff_id) = (work.path().to_owned(), layer.diff_id);
        let work_on = move |stream: &mut dyn Read| build(stream, &builder, &name, diff_id, &dir);
        let built = through(self.registry, self.from.source(), &layer.descriptor, on_read, work_on).await?;
        self.count_read(layer.descriptor.size);
        let (bootstrap, notes) = built.map_err(failed)?;
        let earlier = self.dictionary.as_ref().map(|dictionary| dictionary.blobs_of(&bootstrap)).unwrap_or_default();
        let mut tables = BTreeMap::new();
        for blob in bootstrap.blobs() {
            let known = self.dictionary.as_ref().and_then(|dictionary| dictionary.chunk_table(blob.id));
            let file = || blobs_of(work.path()).join(blob.id.to_string());
            let table = match known {
                Some(table) => table,
                None => chunk_table_file_with(&file(), blob.cipher.as_ref()).map_err(|e| failed(e.into()))?.into(),
            };
            tables.insert(blob.id, table);
        }
        let record = Record { bootstrap, tables, notes, earlier, unindexable: false };
        Ok(Built { record, work })
    }
}

pub(super) fn blobs_of(work: &Path) -> PathBuf {
    work.join("blobs")
}

/// Builds a layer from its bytes. Whether they are the right ones is known only when the download has ended as well.
fn build(
    stream: &mut dyn Read,
    builder: &Builder,
    name: &str,
    diff_id: ObjectId,
    dir: &Path,
) -> Result<(Bootstrap, LayerNotes), LayerFailure> {
    let mut tar = Hashed::new(decompress(stream).map_err(LayerFailure::Start)?);
    let bootstrap = dir.join("bootstrap");
    let (_, notes) = builder.build_layer(&mut tar, Path::new(name), &bootstrap, &blobs_of(dir))?;
    match tar.digest() {
        found if found == diff_id => {}
        found => return Err(LayerFailure::DiffId { expected: diff_id, found }),
    }
    Ok((Bootstrap::open(&bootstrap)?, notes))
}
