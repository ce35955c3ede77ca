//! From a directory to an image: one bootstrap and one data blob.
//!
//! ```text
//! tree       walk the directory breadth first, names in byte order: nodes, owners, xattrs, hard links
//! chunker    read each file once, in that order; hash and compress chunks on worker threads
//! blob       append each chunk that is not there yet; table and header; the file's sha256 is its name
//! bootstrap  place inodes, directories and indexes; write the tables
//! ```
//!
//! The same tree gives the same bytes. Memory depends on the number of nodes and chunks and on the chunk size, not on the
//! size of files. Files that change while they are read end the build: half of one version and half of another is not an
//! image of anything.
//!
//! Not kept, because the format has no place for it: access and change times, sparseness, hard links between anything
//! but regular files (they become equal nodes of their own), xattrs outside `user.`, `trusted.`, `security.` and
//! `system.posix_acl_*` (skipped, each with a note in the report).

use std::collections::HashMap;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use shoal_proto::{Algorithm, BlobId};

use crate::codec::Compressor;
use crate::layout;

mod blob;
mod bootstrap;
mod chunker;
mod directory;
mod place;
mod tree;

/// How to build an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildOptions {
    /// How chunks are compressed; those that do not shrink are stored raw. Default: zstd.
    pub compressor: Compressor,
    /// How chunks are named. Default: BLAKE3.
    pub algorithm: Algorithm,
    /// Bytes of every chunk but the last of a file, a power of two from 0x1000 to 0x1000000. Default: 1 MiB, which costs
    /// little metadata and keeps a read from the network short.
    pub chunk_size: u32,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self { compressor: Compressor::Zstd, algorithm: Algorithm::Blake3, chunk_size: 0x10_0000 }
    }
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BuildReport {
    /// Names in the image, the root included.
    pub names: u64,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Their content in bytes.
    pub decoded_bytes: u64,
    /// Size of the blob file; 0 without a blob.
    pub encoded_bytes: u64,
    /// Size of the bootstrap file.
    pub bootstrap_bytes: u64,
    /// Chunks that files consist of.
    pub chunks: u64,
    /// Distinct chunks, those in the blob.
    pub unique_chunks: u64,
    /// The blob; none for an image without file content.
    #[serde(serialize_with = "display")]
    pub blob: Option<BlobId>,
    /// What was left out, with its path. At most [`MAX_NOTES`].
    pub notes: Vec<String>,
}

/// Most notes in a report.
pub const MAX_NOTES: usize = 1000;

fn display<S: serde::Serializer>(id: &Option<BlobId>, serializer: S) -> Result<S::Ok, S::Error> {
    id.map(|id| id.to_string()).serialize(serializer)
}

/// Why a build ended.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The chunk size is none of the format.
    #[error("chunk size {found:#x} must be a power of two from 0x1000 to 0x1000000")]
    ChunkSize {
        /// What was asked for.
        found: u32,
    },
    /// The compressor can only be read.
    #[error("blobs cannot be written with compressor {found}")]
    Compressor {
        /// What was asked for.
        found: Compressor,
    },
    /// A file or directory could not be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file is not what it was when its directory was read.
    #[error("{} changed while the image was built: {what}", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
        /// How it differs.
        what: String,
    },
    /// The source has something that the format cannot hold.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The limit.
        what: String,
    },
    /// The image is larger than the format allows.
    #[error("the image has {found} {what}, at most {limit} fit")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// A worker thread ended early.
    #[error("a worker thread ended before its work was done")]
    Worker,
}

impl BuildError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// Builds images from directories.
#[derive(Debug, Clone)]
pub struct Builder {
    options: BuildOptions,
}

impl Builder {
    /// A builder with these options; they are checked when it builds.
    pub fn new(options: BuildOptions) -> Self {
        Self { options }
    }

    /// Builds an image of `source`: writes the bootstrap to `bootstrap` and the blob, named by its id, into `blob_dir`
    /// (made if missing). Both files appear under their names only when they are complete.
    pub fn build(&self, source: &Path, bootstrap: &Path, blob_dir: &Path) -> Result<BuildReport, BuildError> {
        let options = self.options;
        if !options.chunk_size.is_power_of_two() || !layout::CHUNK_SIZES.contains(&options.chunk_size) {
            return Err(BuildError::ChunkSize { found: options.chunk_size });
        }
        if options.compressor == Compressor::Gzip {
            return Err(BuildError::Compressor { found: options.compressor });
        }
        let mut tree = tree::Tree::scan(source)?;
        std::fs::create_dir_all(blob_dir).map_err(BuildError::io("make", blob_dir))?;
        let mut writer = blob::BlobWriter::new(blob_dir, options)?;
        let mut chunks = HashMap::new();
        let count = chunker::run(&tree, options, &mut writer, &mut chunks)?;
        tree.chunks = chunks;
        let blob = writer.finish()?;
        let bytes = bootstrap::write(&tree, blob.as_ref(), options)?;
        replace(bootstrap, &bytes)?;
        Ok(BuildReport {
            names: tree.nodes.len() as u64,
            files: tree.files().count() as u64,
            decoded_bytes: tree.files().map(|(_, node)| node.size).sum(),
            encoded_bytes: blob.as_ref().map_or(0, |blob| blob.encoded_size),
            bootstrap_bytes: bytes.len() as u64,
            chunks: count,
            unique_chunks: blob.as_ref().map_or(0, |blob| blob.records.len() as u64),
            blob: blob.map(|blob| blob.id),
            notes: tree.notes,
        })
    }
}

/// A new file in `dir` that is deleted unless it is given its name.
fn temporary(dir: &Path) -> Result<tempfile::NamedTempFile, BuildError> {
    let file = tempfile::Builder::new()
        .prefix(".shoal-")
        .permissions(std::fs::Permissions::from_mode(0o644))
        .tempfile_in(dir);
    file.map_err(BuildError::io("make a file in", dir))
}

/// Syncs a file and gives it its name.
fn persist(file: tempfile::NamedTempFile, path: &Path) -> Result<(), BuildError> {
    file.as_file().sync_all().map_err(BuildError::io("sync", path))?;
    file.persist(path).map_err(|error| BuildError::io("write", path)(error.error))?;
    Ok(())
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = temporary(dir)?;
    file.write_all(bytes).map_err(BuildError::io("write", path))?;
    persist(file, path)
}

#[cfg(test)]
mod tests;
