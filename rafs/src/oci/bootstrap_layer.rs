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
mod tests {
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;
    use crate::{BuildOptions, Builder, chunk_table_file};

    fn tables(bytes: &[u8]) -> BTreeMap<BlobId, Bytes> {
        [1, 2].map(|id| (BlobId::new([id; 32]), Bytes::copy_from_slice(bytes))).into()
    }

    fn written(bootstrap: &[u8]) -> (Vec<u8>, WrittenLayer) {
        let mut out = Vec::new();
        let layer = write_bootstrap_layer(bootstrap, &tables(b"table"), None, &mut out).unwrap();
        (out, layer)
    }

    fn tar_gz(entries: &[(&str, EntryType, &[u8])]) -> Vec<u8> {
        let mut tar = tar::Builder::new(GzEncoder::new(Vec::new(), Compression::fast()));
        for (path, kind, bytes) in entries {
            let mut header = Header::new_gnu();
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            tar.append(&header, *bytes).unwrap();
        }
        tar.into_inner().unwrap().finish().unwrap()
    }

    fn read(bytes: &[u8]) -> Result<BootstrapLayer, LayerError> {
        read_bootstrap_layer(bytes, &LayerLimits { bootstrap: 1 << 20, chunk_tables: 1 << 20 })
    }

    #[test]
    fn what_is_written_is_read_and_always_the_same() {
        let (first, layer) = written(b"bootstrap");
        assert_eq!((&first, layer), (&written(b"bootstrap").0, written(b"bootstrap").1));
        assert_eq!(layer.size, first.len() as u64);
        assert_eq!(layer.id, ObjectId::new(Sha256::digest(&first).into()));
        let mut tar = Vec::new();
        MultiGzDecoder::new(&first[..]).read_to_end(&mut tar).unwrap();
        assert_eq!(layer.diff_id, ObjectId::new(Sha256::digest(&tar).into()));
        let back = read(&first).unwrap();
        let (bootstrap, diff_id) = (Bytes::from("bootstrap"), layer.diff_id);
        assert_eq!(back, BootstrapLayer { bootstrap, chunk_tables: tables(b"table"), backend: None, diff_id });
        let mut archive = tar::Archive::new(&tar[..]);
        let modes: Vec<(String, u32)> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.path().unwrap().display().to_string(), entry.header().mode().unwrap()))
            .collect();
        assert_eq!(modes[0], ("image/".to_owned(), 0o755));
        assert_eq!(modes.last(), Some(&("image/image.boot".to_owned(), 0o444)));
    }

    #[test]
    fn layers_of_other_writers_are_read() {
        let table = format!("image/{}.blob.meta", BlobId::new([3; 32]));
        let layer = read(&tar_gz(&[
            ("./", EntryType::Directory, b""),
            ("./image/", EntryType::Directory, b""),
            ("PaxHeaders.0/image.boot", EntryType::XHeader, b"30 mtime=1700000000.123456789\n"),
            ("./image/image.boot", EntryType::Regular, b"boot"),
            (&table, EntryType::Regular, b"table"),
            ("image/backend.json", EntryType::Regular, b"{}"),
        ]));
        let layer = layer.unwrap();
        assert_eq!(layer.bootstrap, "boot");
        assert_eq!(layer.chunk_tables[&BlobId::new([3; 32])], "table");
    }

    #[test]
    fn a_table_of_which_the_header_alone_is_left_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let (source, boot, blobs) = (dir.path().join("source"), dir.path().join("boot"), dir.path().join("blobs"));
        std::fs::create_dir(&source).unwrap();
        std::fs::write(source.join("file"), b"content").unwrap();
        let report = Builder::new(BuildOptions::default()).build(&source, &boot, &blobs).unwrap();
        let table = chunk_table_file(&blobs.join(report.blob.unwrap().to_string())).unwrap();
        let header = &table[table.len() - 4096..];
        let [whole, alone, broken] = [1, 2, 3].map(|byte| BlobId::new([byte; 32]));
        let path = |blob: BlobId| format!("image/{blob}.blob.meta");
        // What is wrong in another way is for whoever reads it to find.
        let files = [(path(whole), &table[..]), (path(alone), header), (path(broken), &header[1..])];
        let files = files.each_ref().map(|(path, bytes)| (&path[..], EntryType::Regular, *bytes));
        let boot = [("image/image.boot", EntryType::Regular, &b"boot"[..])];
        let tables = read(&tar_gz(&[&boot[..], &files].concat())).unwrap().chunk_tables;
        assert_eq!(tables.keys().collect::<Vec<_>>(), [&whole, &broken]);
    }

    #[test]
    fn what_does_not_belong_there_is_refused() {
        for path in ["image/../image.boot", "/image/image.boot", "image/x", "image/00.blob.meta", "etc/passwd", ""] {
            let layer = tar_gz(&[(path, EntryType::Regular, b"x")]);
            assert!(matches!(read(&layer), Err(LayerError::Unexpected { what: "file", .. })), "{path}");
        }
        for kind in
            [EntryType::Symlink, EntryType::Link, EntryType::GNULongName, EntryType::GNUSparse, EntryType::Char]
        {
            let layer = tar_gz(&[("image/image.boot", kind, b"")]);
            assert!(matches!(read(&layer), Err(LayerError::Unexpected { what: "special file", .. })), "{kind:?}");
        }
        let twice = [("image/image.boot", EntryType::Regular, &b"x"[..]); 2];
        assert!(matches!(read(&tar_gz(&twice)), Err(LayerError::Twice { .. })));
        assert!(matches!(read(&tar_gz(&[])), Err(LayerError::Missing)));
        let many = [("image", EntryType::Directory, &b""[..]); MAX_ENTRIES + 1];
        assert!(matches!(read(&tar_gz(&many)), Err(LayerError::TooMany)));
    }

    #[test]
    fn bombs_stay_small() {
        let zeros = vec![0; (1 << 20) + 1];
        let bootstrap = tar_gz(&[("image/image.boot", EntryType::Regular, &zeros)]);
        assert!(bootstrap.len() < zeros.len() / 100, "it compresses well");
        assert!(matches!(read(&bootstrap), Err(LayerError::TooLarge { limit: 0x10_0000, .. })));
        let half = &zeros[..zeros.len() / 2 + 1];
        let names = [4, 5].map(|id| format!("image/{}.blob.meta", BlobId::new([id; 32])));
        let tables = tar_gz(&[(&names[0], EntryType::Regular, half), (&names[1], EntryType::Regular, half)]);
        assert!(matches!(read(&tables), Err(LayerError::TooLarge { .. })));
        let mut padded = tar_gz(&[("image/image.boot", EntryType::Regular, b"x")]);
        let mut more = GzEncoder::new(Vec::new(), Compression::fast());
        more.write_all(&zeros).unwrap();
        padded.extend(more.finish().unwrap());
        assert!(matches!(read(&padded), Err(LayerError::TooLarge { limit: MAX_PADDING, .. })));
        let pax = tar_gz(&[("pax", EntryType::XHeader, &zeros)]);
        assert!(matches!(read(&pax), Err(LayerError::TooLarge { limit: MAX_IGNORED, .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_damaged_layer_never_panics(at in 0usize..2000, flip in 1u8.., cut in 0usize..2000) {
            let (mut bytes, _) = written(&[7; 3000]);
            let length = bytes.len();
            bytes[at % length] ^= flip;
            let _ = read(&bytes);
            prop_assert!(read(&bytes[..cut % length]).is_err());
        }

        #[test]
        fn a_damaged_tar_never_panics(at in 0usize..4096, flip in 1u8..) {
            let mut tar = Vec::new();
            MultiGzDecoder::new(&written(&[7; 3000]).0[..]).read_to_end(&mut tar).unwrap();
            tar[at] ^= flip;
            let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
            gzip.write_all(&tar).unwrap();
            let _ = read(&gzip.finish().unwrap());
        }
    }
}
