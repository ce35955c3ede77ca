//! The file that an image is opened by: a bootstrap, or a blob as registries have it with the bootstrap inside.
//!
//! A bootstrap inside a blob cannot know the sha256 of that blob. It names it `xxxx...`, and means the file that it was
//! found in: the file's name, if that begins with a digest, otherwise the sha256 of its bytes. Converters take bootstraps out
//! of their blobs, and give the file the name of the blob.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use shoal_proto::BlobId;

use crate::blob::{self, ChunkTableError, Toc};
use crate::blob_dir::BlobPaths;
use crate::bootstrap::{Bootstrap, BootstrapError, Metadata, OwnBlob, TocRange};
use crate::codec::{self, Compressor};

/// Most bytes of a bootstrap inside a blob.
const MAX_BOOTSTRAP: u64 = 1 << 30;
/// Most bytes of a table of contents with its header: what readers look at of the end of a blob.
const MAX_TOC: u64 = 4096;

/// Why a file holds no bootstrap.
#[derive(Debug, thiserror::Error)]
pub enum ImageFileError {
    /// It could not be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// It is a blob, and what lies behind its chunks is damaged.
    #[error("blob {}", path.display())]
    Contents {
        /// The file.
        path: PathBuf,
        /// What is wrong there.
        #[source]
        source: ChunkTableError,
    },
    /// Its bootstrap is broken.
    #[error("{}: {source}", path.display())]
    Bootstrap {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: BootstrapError,
    },
    /// It is a blob without a bootstrap inside.
    #[error("{} is a blob, and has no bootstrap inside", path.display())]
    NoBootstrap {
        /// The file.
        path: PathBuf,
    },
}

/// A bootstrap that has not been looked at, and the blob that it was found in.
#[derive(Debug, Clone)]
pub struct ImageFile {
    bootstrap: Bytes,
    own: Option<Own>,
}

/// The blob that a bootstrap belongs to.
#[derive(Debug, Clone)]
enum Own {
    /// This file has both.
    Inside(OwnBlob, PathBuf),
    /// The bootstrap was taken out of a blob of this name, which may lie in a file.
    Apart(BlobId, Option<PathBuf>),
}

impl From<Bytes> for ImageFile {
    fn from(bootstrap: Bytes) -> Self {
        Self { bootstrap, own: None }
    }
}

impl ImageFile {
    /// Reads the bootstrap of a file of either kind. What ends with a tar header is a blob.
    pub fn open(path: &Path) -> Result<Self, ImageFileError> {
        let failed = |source| ImageFileError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        let members = blob::members(&file, size).map_err(failed)?;
        if members.is_empty() {
            let bootstrap = Bytes::from(std::fs::read(path).map_err(failed)?);
            return Ok(Self { bootstrap, own: id_in_name(path).map(|id| Own::Apart(id, None)) });
        }
        let damaged = |source| ImageFileError::Contents { path: path.to_owned(), source };
        let bootstrap = inlined(&file, &members).map_err(damaged)?;
        let bootstrap = bootstrap.ok_or_else(|| ImageFileError::NoBootstrap { path: path.to_owned() })?;
        let toc = toc(&file, &members).map_err(damaged)?;
        let id = match id_in_name(path) {
            Some(id) => id,
            None => sha256(file).map_err(failed)?.0,
        };
        let own = OwnBlob { id, encoded_size: size, toc };
        Ok(Self { bootstrap, own: Some(Own::Inside(own, path.to_owned())) })
    }

    /// The metadata of the image in a file of either kind, and where its blobs are if the others lie in `dir`. A bootstrap is
    /// read in place; what lies in a blob is read and verified in full.
    ///
    /// # Errors
    /// As for [`open`](Self::open), and those of [`Metadata::open`].
    pub fn open_in_place(path: &Path, dir: Option<&Path>) -> Result<(Metadata, BlobPaths), ImageFileError> {
        let failed = |source| ImageFileError::Io { path: path.to_owned(), source };
        let broken = |source| ImageFileError::Bootstrap { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        if !blob::members(&file, size).map_err(failed)?.is_empty() {
            let file = Self::open(path)?;
            return Ok((file.parse().map_err(broken)?.into(), file.blob_paths(dir)));
        }
        let metadata = match id_in_name(path) {
            Some(id) => Metadata::open_extracted(file, id),
            None => Metadata::open(file),
        };
        Ok((metadata.map_err(broken)?, BlobPaths::new(dir, None)))
    }

    /// Like [`open`](Self::open), for an image whose own blob, or its only one, is the file `blob`, whatever that is called. Of
    /// a blob that was taken apart the chunks are enough.
    pub fn open_with_blob(path: &Path, blob: &Path) -> Result<Self, ImageFileError> {
        let Self { bootstrap, own } = Self::open(path)?;
        let named = match own {
            Some(Own::Inside(own, _)) => Some(own.id),
            Some(Own::Apart(id, _)) => Some(id),
            None => None,
        };
        // Any name does for a blob that nobody has named.
        let id = id_in_name(blob).or(named).unwrap_or_else(|| BlobId::new(Sha256::digest(&bootstrap).into()));
        let id = match Bootstrap::parse_extracted(bootstrap.clone(), id) {
            Ok(image) => match image.blobs() {
                [only] => only.id,
                _ => id,
            },
            // Whoever parses it next says so.
            Err(_) => id,
        };
        Ok(Self { bootstrap, own: Some(Own::Apart(id, Some(blob.to_owned()))) })
    }

    /// The bootstrap's bytes.
    pub fn bootstrap(&self) -> &Bytes {
        &self.bootstrap
    }

    /// The blob that holds the bootstrap, or was given with it.
    pub fn own_blob(&self) -> Option<BlobId> {
        match self.own {
            Some(Own::Inside(OwnBlob { id, .. }, _) | Own::Apart(id, Some(_))) => Some(id),
            Some(Own::Apart(_, None)) | None => None,
        }
    }

    /// The digest that a bootstrap's file is named by, where that is what converters call its blob.
    pub fn id_in_name(&self) -> Option<BlobId> {
        match self.own {
            Some(Own::Apart(id, None)) => Some(id),
            Some(Own::Inside(..) | Own::Apart(_, Some(_))) | None => None,
        }
    }

    /// Verifies the bootstrap in full.
    pub fn parse(&self) -> Result<Bootstrap, BootstrapError> {
        let bytes = self.bootstrap.clone();
        match &self.own {
            Some(Own::Inside(own, _)) => Bootstrap::parse_inlined(bytes, *own),
            Some(Own::Apart(id, _)) => Bootstrap::parse_extracted(bytes, *id),
            None => Bootstrap::parse(bytes),
        }
    }

    /// Where the blobs of the image are: those that are not this file, nor given with it, lie in `dir`.
    pub fn blob_paths(&self, dir: Option<&Path>) -> BlobPaths {
        let own = match &self.own {
            Some(Own::Inside(OwnBlob { id, .. }, path) | Own::Apart(id, Some(path))) => Some((*id, path.clone())),
            Some(Own::Apart(_, None)) | None => None,
        };
        BlobPaths::new(dir, own)
    }
}

/// The bootstrap in a blob. The table of contents says where it lies and how it is stored; without one it is stored as it
/// is, in front of the last tar header.
fn inlined(file: &File, members: &[blob::Member]) -> Result<Option<Bytes>, ChunkTableError> {
    let Some(last) = members.first() else { return Ok(None) };
    if last.name == blob::BOOTSTRAP_NAME {
        return bootstrap(file, &last.range, Compressor::None, None).map(Some);
    }
    let Some(toc) = Toc::find(file, members)? else { return Ok(None) };
    let Some(entry) = toc.entry(blob::BOOTSTRAP_NAME) else { return Ok(None) };
    if entry.range.end > last.range.start {
        let problem = format!("{} ends behind the table of contents", entry.name);
        return Err(blob::invalid("table of contents", problem));
    }
    let bytes = bootstrap(file, &entry.range, entry.compressor, Some(entry.decoded_size))?;
    if Sha256::digest(&bytes)[..] != entry.sha256[..] {
        return Err(blob::invalid("image.boot", "its sha256 is not the one in the table of contents"));
    }
    Ok(Some(bytes))
}

/// The table of contents at the end of a blob, with its header.
fn toc(file: &File, members: &[blob::Member]) -> Result<Option<TocRange>, ChunkTableError> {
    let Some(last) = members.first().filter(|last| last.name == blob::TOC_NAME) else { return Ok(None) };
    let range = last.range.start..last.range.end + blob::TAR_HEADER;
    let bytes = blob::content(file, &range, blob::TOC_NAME, MAX_TOC)?;
    Ok(Some(TocRange { size: bytes.len() as u32, sha256: Sha256::digest(&bytes).into() }))
}

fn bootstrap(
    file: &File,
    range: &Range<u64>,
    compressor: Compressor,
    decoded_size: Option<u64>,
) -> Result<Bytes, ChunkTableError> {
    let what = blob::BOOTSTRAP_NAME;
    let stored = blob::content(file, range, what, MAX_BOOTSTRAP)?;
    let decoded_size = decoded_size.unwrap_or(stored.len() as u64);
    if decoded_size > MAX_BOOTSTRAP {
        return Err(blob::invalid(what, format!("{decoded_size} bytes, at most {MAX_BOOTSTRAP} are read")));
    }
    let decoded = codec::decode(compressor, &stored, decoded_size as usize);
    Ok(decoded.map_err(|error| blob::invalid(what, error.to_string()))?.into())
}

/// The digest that a file is named by: everything before the first dot.
fn id_in_name(path: &Path) -> Option<BlobId> {
    path.file_name()?.to_str()?.split('.').next()?.parse().ok()
}

/// The sha256 of all bytes, and their number.
pub(crate) fn sha256(mut input: impl io::Read) -> io::Result<(BlobId, u64)> {
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut size = 0;
    loop {
        let len = input.read(&mut buffer)?;
        if len == 0 {
            return Ok((BlobId::new(hasher.finalize().into()), size));
        }
        hasher.update(&buffer[..len]);
        size += len as u64;
    }
}
