//! What follows the chunks of a blob: chunk table, digests, bootstrap, table of contents.
//!
//! ```text
//! chunk data          [header "image.blob"]          headers of 512 bytes, with inlined metadata or a table of contents
//! chunk table, header [header "blob.meta"]
//! digests of chunks   [header "blob.digest"]         with a table of contents
//! bootstrap           [header "image.boot"]          with inlined metadata
//! table of contents   [header "rafs.blob.toc"]
//! ```
//!
//! A blob without chunks has none of the first three, and is no blob at all unless it has a bootstrap inside. The meta blob of
//! a gzip layer has the same parts, but for the first.

use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;
use zerocopy::FromZeros;

use super::blob::BlobWriter;
use super::output::BlobFile;
use super::{BuildError, BuildOptions};
use crate::blob::{self, Contexts, EncodedTable, Toc, TocEntry};
use crate::codec::{Compressor, Encoder};
use crate::layout::{self, BlobEntry, CI_HEADER, ChunkRecord, features};

/// A blob with everything but what a bootstrap is needed for.
pub(super) struct OpenBlob {
    file: BlobFile,
    options: BuildOptions,
    toc: Vec<TocEntry>,
    /// How a bootstrap inside the blob describes it; none without chunks.
    entry: Option<BlobEntry>,
    /// The chunks, by index.
    pub(super) records: Vec<ChunkRecord>,
}

/// A stored blob.
pub(super) struct FinishedBlob {
    pub(super) id: BlobId,
    pub(super) encoded_size: u64,
    /// How other bootstraps describe it; none without chunks.
    pub(super) entry: Option<BlobEntry>,
}

impl OpenBlob {
    /// Ends the chunks of a blob: appends their table and, as the options say, their digests.
    pub(super) fn new(writer: BlobWriter) -> Result<Self, BuildError> {
        if writer.records.is_empty() {
            return Ok(Self::without_chunks(writer.file, writer.options));
        }
        let batches = writer.batches();
        let (data_size, decoded_size) = (writer.encoded_size(), writer.decoded_size());
        let options = writer.options;
        let batched = if batches.is_empty() { 0 } else { features::CHUNK_INFO_V2 | features::BATCH };
        let encrypted = if writer.cipher.is_some() { features::CHUNK_INFO_V2 | features::ENCRYPTED } else { 0 };
        let bits = options.features() | batched | encrypted;
        let offset = data_size + if options.has_tar_headers() { blob::TAR_HEADER } else { 0 };
        let (contexts, codec) =
            (Contexts::of_batches(&batches), (options.table_compressor(), writer.cipher.as_ref()));
        let table = EncodedTable::new(writer.chunks(), &contexts, bits, offset, codec);
        let table = table.map_err(BuildError::io("encode the chunk table of a blob in", writer.file.place()))?;
        let entry = entry(&options, &table, writer.records.len(), decoded_size);
        let entry = writer.cipher.as_ref().map_or(entry, |cipher| entry.encrypted(cipher.key()));
        let BlobWriter { file, records, .. } = writer;
        let mut blob = Self { file, options, toc: Vec::new(), entry: Some(entry), records };
        blob.data_header(data_size, decoded_size)?;
        blob.table(&table)?;
        Ok(blob)
    }

    /// A file with the chunk table of a blob that lies elsewhere, which `entry` describes.
    pub(super) fn of_meta(
        file: BlobFile,
        options: BuildOptions,
        (table, entry): (&EncodedTable, BlobEntry),
        records: Vec<ChunkRecord>,
    ) -> Result<Self, BuildError> {
        let mut blob = Self { file, options, toc: Vec::new(), entry: Some(entry), records };
        blob.table(table)?;
        Ok(blob)
    }

    /// A file without chunks.
    pub(super) fn without_chunks(file: BlobFile, options: BuildOptions) -> Self {
        Self { file, options, toc: Vec::new(), entry: None, records: Vec::new() }
    }

    /// How a bootstrap inside the blob describes it: by a name that stands for whatever it will be, and by the bytes before
    /// the bootstrap.
    /// A gzip layer is known by its own name.
    pub(super) fn inlined_entry(&self) -> Option<BlobEntry> {
        let inlined = |entry: BlobEntry| (entry.features.get() | features::INLINED_META).into();
        self.entry.map(|entry| match entry.features.get() & features::SEPARATE {
            0 => BlobEntry {
                blob_id: layout::OWN_BLOB,
                features: inlined(entry),
                encoded_size: self.file.len().into(),
                ..entry
            },
            _ => BlobEntry { features: inlined(entry), ..entry },
        })
    }

    /// Appends the bootstrap, if it belongs there, and the table of contents, and gives the file its name. Nothing where
    /// there is neither a chunk nor a bootstrap.
    pub(super) fn finish(mut self, bootstrap: Option<&[u8]>) -> Result<Option<FinishedBlob>, BuildError> {
        if self.entry.is_none() && bootstrap.is_none() {
            return Ok(None);
        }
        if let Some(bootstrap) = bootstrap {
            self.bootstrap(bootstrap)?;
        }
        let toc = if self.options.toc { Some(self.table_of_contents()?) } else { None };
        let (found, limit) = (self.file.len(), layout::MAX_ENCODED);
        if found > limit {
            return Err(BuildError::TooLarge { what: "bytes of chunks and metadata", found, limit });
        }
        let id = self.file.finish()?;
        let described = self.entry.map(|entry| {
            let (toc_size, toc_digest) = toc.unwrap_or_default();
            let entry = BlobEntry { toc_size: toc_size.into(), toc_digest, ..entry };
            match entry.features.get() & features::SEPARATE {
                0 => BlobEntry { blob_id: layout::blob_id(id), encoded_size: found.into(), ..entry },
                _ => BlobEntry { meta_digest: *id.as_bytes(), meta_size: found.into(), ..entry },
            }
        });
        Ok(Some(FinishedBlob { id, encoded_size: found, entry: described }))
    }

    /// The header behind the chunks. Other builders digest it with them.
    fn data_header(&mut self, data_size: u64, decoded_size: u64) -> Result<(), BuildError> {
        self.header(blob::DATA_NAME, data_size)?;
        let (name, range) = (blob::DATA_NAME.into(), 0..data_size);
        let sha256 = self.file.sha256();
        self.toc.push(TocEntry { name, compressor: Compressor::None, sha256, range, decoded_size });
        Ok(())
    }

    fn table(&mut self, table: &EncodedTable) -> Result<(), BuildError> {
        self.part(blob::TABLE_NAME, table.compressor, &table.decoded, table.stored())?;
        self.part(blob::TABLE_HEADER_NAME, Compressor::None, &table.header_block(), &table.stored_header())?;
        self.header(blob::TABLE_NAME, table.stored().len() as u64 + CI_HEADER)?;
        if self.options.toc { self.digests() } else { Ok(()) }
    }

    fn digests(&mut self) -> Result<(), BuildError> {
        let digests: Vec<u8> = self.records.iter().flat_map(|record| record.digest).collect();
        self.part(blob::DIGESTS_NAME, Compressor::None, &digests, &digests)?;
        self.header(blob::DIGESTS_NAME, digests.len() as u64)
    }

    /// Only the table of contents can say that the bootstrap is compressed.
    fn bootstrap(&mut self, bootstrap: &[u8]) -> Result<(), BuildError> {
        let mut compressed = None;
        if self.options.toc {
            let packed = Encoder::new(Compressor::Zstd).and_then(|mut encoder| encoder.encode(bootstrap));
            compressed = packed.map_err(BuildError::io("compress the bootstrap of a blob in", self.file.place()))?;
        }
        let compressor = if compressed.is_some() { Compressor::Zstd } else { Compressor::None };
        let stored = compressed.as_deref().unwrap_or(bootstrap);
        self.part(blob::BOOTSTRAP_NAME, compressor, bootstrap, stored)?;
        self.header(blob::BOOTSTRAP_NAME, stored.len() as u64)
    }

    /// Size and sha256 of the table of contents, both with its header.
    fn table_of_contents(&mut self) -> Result<(u32, [u8; 32]), BuildError> {
        let toc = Toc { entries: std::mem::take(&mut self.toc) }.encode();
        let mut bytes = toc.map_err(BuildError::io("write the contents of a blob in", self.file.place()))?;
        let header = blob::tar_header(blob::TOC_NAME, bytes.len() as u64);
        bytes.extend(header.map_err(BuildError::io("write the contents of a blob in", self.file.place()))?);
        self.file.write(&bytes)?;
        Ok((bytes.len() as u32, Sha256::digest(&bytes).into()))
    }

    fn part(&mut self, name: &str, compressor: Compressor, decoded: &[u8], stored: &[u8]) -> Result<(), BuildError> {
        let start = self.file.len();
        self.toc.push(TocEntry {
            name: name.into(),
            compressor,
            sha256: Sha256::digest(decoded).into(),
            range: start..start + stored.len() as u64,
            decoded_size: decoded.len() as u64,
        });
        self.file.write(stored)
    }

    /// The header of the `size` bytes before it, in blobs that have headers.
    fn header(&mut self, name: &str, size: u64) -> Result<(), BuildError> {
        if !self.options.has_tar_headers() {
            return Ok(());
        }
        let header = blob::tar_header(name, size).map_err(BuildError::io("write a blob in", self.file.place()))?;
        self.file.write(&header)
    }
}

/// What a bootstrap says of a blob, but for its name and size.
pub(super) fn entry(options: &BuildOptions, table: &EncodedTable, chunks: usize, decoded_size: u64) -> BlobEntry {
    BlobEntry {
        chunk_size: options.chunk_size.into(),
        chunk_count: (chunks as u32).into(),
        compressor: options.compressor.code().into(),
        digester: layout::digester(options.algorithm).into(),
        features: (table.header.features.get() & !features::INLINED_META).into(),
        decoded_size: decoded_size.into(),
        ci_compressor: table.header.compressor,
        ci_offset: table.header.offset,
        ci_encoded_size: table.header.encoded_size,
        ci_decoded_size: table.header.decoded_size,
        ..BlobEntry::new_zeroed()
    }
}

impl BuildOptions {
    /// Whether the parts of a blob have names.
    fn has_tar_headers(&self) -> bool {
        self.inline_meta || self.toc
    }

    /// How the chunk table is compressed. Converters take it out of a blob with a table of contents by themselves, and those
    /// in Go know zstd and nothing else.
    fn table_compressor(&self) -> Compressor {
        match self.compressor {
            Compressor::Lz4 if self.toc => Compressor::Zstd,
            compressor => compressor,
        }
    }

    /// Feature bits of a blob without batches.
    pub(super) fn features(&self) -> u32 {
        let bit = |set, bits| if set { bits } else { 0 };
        features::ALIGNED
            | features::CAP_TAR_TOC
            | bit(self.inline_meta, features::INLINED_META)
            | bit(self.has_tar_headers(), features::HAS_TAR_HEADER)
            | bit(self.toc, features::HAS_TOC | features::INLINED_DIGESTS)
    }
}
