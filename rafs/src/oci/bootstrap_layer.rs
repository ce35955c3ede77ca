//! The bootstrap layer: a tar.gz with `image/image.boot` and a chunk table per blob, `image/<blob id>.blob.meta`.
//!
//! The bytes have the digest that the manifest names, but whoever made the manifest may be anybody: sizes are bounded
//! after decompression, and nothing but the known paths is accepted. Tar extension headers (long names, sparse maps)
//! are not interpreted: none is needed for these names, and they are where tar readers spend memory on a stranger's word.

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
};

use bytes::Bytes;
use flate2::{Compression, GzBuilder, read::MultiGzDecoder};
use sha2::{Digest, Sha256};
use shoal_proto::{BlobId, ObjectId};
use tar::{EntryType, Header};
use tempfile::NamedTempFile;

use super::{BlobPlace, DecryptionKeys, LayerSeal, Recipients, SealError};
use crate::blob::is_header_alone;

const BOOTSTRAP: &str = "image/image.boot";
const TABLE_SUFFIX: &str = ".blob.meta";
/// Where the blobs are, if not in the registry.
const BACKEND: &str = "image/backend.json";
/// Bound on `backend.json`, and on extension headers, which are passed over.
const MAX_IGNORED: u64 = 64 * 1024;
/// Bound on what follows the end of the tar; its records are padded to 10 KiB by most writers.
const MAX_PADDING: u64 = 1 << 20;
/// Bound on the number of tar entries: a table for each of 254 blobs, with an extension header each, and some.
const MAX_ENTRIES: usize = 1024;

/// Why a bootstrap layer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Broken gzip or tar, or an error of the reader below.
    #[error("broken bootstrap layer")]
    Io(#[from] io::Error),
    /// Something that does not belong there.
    #[error("unexpected {what} {path:?} in the bootstrap layer")]
    Unexpected {
        /// What kind of thing.
        what: &'static str,
        /// Its path, cut to a sane length.
        path: String,
    },
    /// Larger than the limits allow.
    #[error("{path:?} in the bootstrap layer is larger than {limit} bytes")]
    TooLarge {
        /// The path.
        path: String,
        /// The limit that it breaks.
        limit: u64,
    },
    /// More entries than any image has.
    #[error("the bootstrap layer has more than {MAX_ENTRIES} entries")]
    TooMany,
    /// The same path twice.
    #[error("{path:?} is twice in the bootstrap layer")]
    Twice {
        /// The path.
        path: String,
    },
    /// No bootstrap in it.
    #[error("the bootstrap layer has no image/image.boot")]
    Missing,
    /// It is encrypted, and cannot be read.
    #[error(transparent)]
    Seal(#[from] SealError),
}

/// How much a bootstrap layer may hold once decompressed.
#[derive(Debug, Clone, Copy)]
pub struct LayerLimits {
    /// Bytes of the bootstrap. Default 1 GiB.
    pub bootstrap: u64,
    /// Bytes of all chunk tables together. Default 1 GiB.
    pub chunk_tables: u64,
}

impl Default for LayerLimits {
    fn default() -> Self {
        Self { bootstrap: 1 << 30, chunk_tables: 1 << 30 }
    }
}

/// What a bootstrap layer holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootstrapLayer {
    /// The bootstrap, not yet looked at.
    pub bootstrap: Bytes,
    /// Chunk tables by blob, not yet looked at. Layers of older converters have none; what has lost its content is left out.
    pub chunk_tables: BTreeMap<BlobId, Bytes>,
    /// Where it says that its blobs are, if not in the registry, and if that is a kind of place that is known here.
    pub backend: Option<BlobPlace>,
    /// The sha256 of the tar: what `rootfs.diff_ids` of the image's config should have for it.
    pub diff_id: ObjectId,
}

/// A bootstrap layer that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WrittenLayer {
    /// The sha256 of the tar.gz: its digest in the registry.
    pub id: ObjectId,
    /// Bytes of the tar.gz.
    pub size: u64,
    /// The sha256 of the tar: its place in `rootfs.diff_ids` of the config.
    pub diff_id: ObjectId,
}

/// Decrypts a bootstrap layer, in its own memory, if the manifest says that it is encrypted: by `seal`.
///
/// # Errors
/// [`SealError`].
pub fn open_bootstrap_layer(
    layer: ObjectId,
    bytes: Bytes,
    seal: Option<&LayerSeal>,
    keys: &DecryptionKeys,
) -> Result<Bytes, SealError> {
    match seal {
        Some(seal) => {
            let mut bytes = Vec::from(bytes);
            seal.open(layer, &mut bytes, keys)?;
            Ok(bytes.into())
        }
        None => Ok(bytes),
    }
}

/// Reads a bootstrap layer.
pub fn read_bootstrap_layer(reader: impl Read, limits: &LayerLimits) -> Result<BootstrapLayer, LayerError> {
    // Room for the headers and padding; beyond, the tar ends early and is broken.
    let slack = (MAX_ENTRIES as u64) * (1024 + MAX_IGNORED);
    let all = limits.bootstrap.saturating_add(limits.chunk_tables).saturating_add(slack);
    let mut archive = tar::Archive::new(Hashed::new(MultiGzDecoder::new(reader).take(all)));
    let (mut bootstrap, mut chunk_tables, mut backend) = (None, BTreeMap::new(), None);
    let mut tables_left = limits.chunk_tables;
    for (count, entry) in archive.entries()?.raw(true).enumerate() {
        let mut entry = entry?;
        if count >= MAX_ENTRIES {
            return Err(LayerError::TooMany);
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        match classify(entry.header().entry_type(), &path)? {
            Kind::Ignored if entry.size() > MAX_IGNORED => {
                return Err(LayerError::TooLarge { path: cut(&path), limit: MAX_IGNORED });
            }
            Kind::Ignored => {}
            Kind::Backend => {
                let bytes = content(&mut entry, &path, MAX_IGNORED)?;
                if backend.replace(BlobPlace::of_backend_file(&bytes)).is_some() {
                    return Err(LayerError::Twice { path });
                }
            }
            Kind::Bootstrap => {
                let bytes = content(&mut entry, &path, limits.bootstrap)?;
                if bootstrap.replace(bytes).is_some() {
                    return Err(LayerError::Twice { path });
                }
            }
            Kind::Table(blob) => {
                let bytes = content(&mut entry, &path, tables_left)?;
                tables_left -= bytes.len() as u64;
                if chunk_tables.insert(blob, bytes).is_some() {
                    return Err(LayerError::Twice { path });
                }
            }
        }
    }
    // To the end, where gzip has its checksum.
    let mut tar = archive.into_inner();
    let padding = io::copy(&mut tar.by_ref().take(MAX_PADDING + 1), &mut io::sink())?;
    if padding > MAX_PADDING {
        return Err(LayerError::TooLarge { path: "padding".to_owned(), limit: MAX_PADDING });
    }
    let diff_id = ObjectId::new(tar.hasher.finalize().into());
    let bootstrap = bootstrap.ok_or(LayerError::Missing)?;
    // As good as none: who needs it reads it from the blob.
    chunk_tables.retain(|_, table: &mut Bytes| !is_header_alone(table));
    Ok(BootstrapLayer { bootstrap, chunk_tables, backend: backend.flatten(), diff_id })
}

enum Kind {
    Bootstrap,
    Table(BlobId),
    Backend,
    Ignored,
}

fn classify(kind: EntryType, path: &str) -> Result<Kind, LayerError> {
    let unexpected = |what| Err(LayerError::Unexpected { what, path: cut(path) });
    let name = path.strip_prefix("./").unwrap_or(path);
    match kind {
        // Times and owners of the entry that follows; its name and size fit the plain header.
        EntryType::XHeader | EntryType::XGlobalHeader => Ok(Kind::Ignored),
        EntryType::Directory if matches!(name.trim_end_matches('/'), "image" | "" | ".") => Ok(Kind::Ignored),
        EntryType::Directory => unexpected("directory"),
        EntryType::Regular => {
            if name == BOOTSTRAP {
                return Ok(Kind::Bootstrap);
            }
            if name == BACKEND {
                return Ok(Kind::Backend);
            }
            let hex = name.strip_prefix("image/").and_then(|name| name.strip_suffix(TABLE_SUFFIX));
            match hex.and_then(|hex| hex.parse().ok()) {
                Some(blob) => Ok(Kind::Table(blob)),
                None => unexpected("file"),
            }
        }
        _ => unexpected("special file"),
    }
}

fn content(entry: &mut tar::Entry<'_, impl Read>, path: &str, limit: u64) -> Result<Bytes, LayerError> {
    let size = entry.size();
    if size > limit {
        return Err(LayerError::TooLarge { path: cut(path), limit });
    }
    // The header's word is not yet memory spent.
    let mut bytes = Vec::with_capacity(size.min(1 << 20) as usize);
    entry.read_to_end(&mut bytes)?;
    if bytes.len() as u64 != size {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(bytes.into())
}

fn cut(text: &str) -> String {
    text.chars().take(120).collect()
}

/// Writes a bootstrap layer: the same input gives the same bytes, whatever the clock and the user. `backend` is where the
/// blobs are if not in the registry.
pub fn write_bootstrap_layer(
    bootstrap: &[u8],
    chunk_tables: &BTreeMap<BlobId, Bytes>,
    backend: Option<&BlobPlace>,
    out: impl Write,
) -> io::Result<WrittenLayer> {
    write_packed(bootstrap, chunk_tables, backend, (out, Compression::default()))
}

/// Like [`write_bootstrap_layer`], compressed more or less.
pub(super) fn write_packed(
    bootstrap: &[u8],
    chunk_tables: &BTreeMap<BlobId, Bytes>,
    backend: Option<&BlobPlace>,
    (out, compression): (impl Write, Compression),
) -> io::Result<WrittenLayer> {
    // 255: unknown operating system, as Go's writer says.
    let gzip = GzBuilder::new().mtime(0).operating_system(255).write(Hashed::new(out), compression);
    let mut tar = tar::Builder::new(Hashed::new(gzip));
    tar.append(&header("image/", EntryType::Directory, 0o755, 0)?, io::empty())?;
    let mut files: BTreeMap<String, &[u8]> =
        chunk_tables.iter().map(|(blob, table)| (format!("image/{blob}{TABLE_SUFFIX}"), &table[..])).collect();
    files.insert(BOOTSTRAP.to_owned(), bootstrap);
    let backend = backend.map(BlobPlace::backend_file);
    files.extend(backend.as_deref().map(|file| (BACKEND.to_owned(), file)));
    for (path, bytes) in files {
        tar.append(&header(&path, EntryType::Regular, 0o444, bytes.len() as u64)?, bytes)?;
    }
    let (gzip, diff_id, _) = tar.into_inner()?.finish();
    let mut compressed = gzip.finish()?;
    compressed.flush()?;
    let (_, id, size) = compressed.finish();
    Ok(WrittenLayer { id, size, diff_id })
}

/// A bootstrap layer in a file, as it is sent.
#[derive(Debug)]
pub(super) struct LayerFile {
    /// Of an encrypted layer, digest and size are those of what is sent.
    pub(super) layer: WrittenLayer,
    /// How it is encrypted, if it is.
    pub(super) seal: Option<LayerSeal>,
    pub(super) file: NamedTempFile,
}

impl LayerFile {
    /// Writes a layer, encrypted for `recipients` if there are any; then all of it is in memory meanwhile.
    pub(super) fn write(
        bootstrap: &[u8],
        chunk_tables: &BTreeMap<BlobId, Bytes>,
        backend: Option<&BlobPlace>,
        recipients: Option<&Recipients>,
    ) -> io::Result<Self> {
        let mut file = NamedTempFile::new()?;
        let Some(recipients) = recipients else {
            let out = io::BufWriter::new(file.as_file_mut());
            let layer = write_bootstrap_layer(bootstrap, chunk_tables, backend, out)?;
            return Ok(Self { layer, seal: None, file });
        };
        let mut bytes = Vec::new();
        let layer = write_bootstrap_layer(bootstrap, chunk_tables, backend, &mut bytes)?;
        let seal = LayerSeal::seal(&mut bytes, recipients).map_err(io::Error::other)?;
        file.write_all(&bytes)?;
        let id = ObjectId::new(Sha256::digest(&bytes).into());
        Ok(Self { layer: WrittenLayer { id, ..layer }, seal: Some(seal), file })
    }
}

/// A tar header that says nothing of the clock and the user.
pub(super) fn header(path: &str, kind: EntryType, mode: u32, size: u64) -> io::Result<Header> {
    let mut header = Header::new_ustar();
    header.set_path(path)?;
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    Ok(header)
}

/// A reader or writer that hashes what passes; a writer also counts it.
pub(super) struct Hashed<T> {
    inner: T,
    hasher: Sha256,
    written: u64,
}

impl<T> Hashed<T> {
    pub(super) fn new(inner: T) -> Self {
        Self { inner, hasher: Sha256::new(), written: 0 }
    }

    /// What is below, and the digest and number of the bytes that passed.
    pub(super) fn finish(self) -> (T, ObjectId, u64) {
        (self.inner, ObjectId::new(self.hasher.finalize().into()), self.written)
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.hasher.update(&bytes[..read]);
        Ok(read)
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests;
