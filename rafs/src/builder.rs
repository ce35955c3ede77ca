//! From a directory or an archive to an image: one bootstrap and one data blob.
//!
//! ```text
//! scan       walk a directory: names, owners, xattrs, hard links          \  a tree and chunks in their
//! tar        read a tar once, from front to back, into a tree and chunks  /  order: breadth first, or the tar's
//! pipeline   read, hash and compress chunks on worker threads
//! blob       append each chunk that is not there yet; table and header; the file's sha256 is its name
//! bootstrap  place inodes, directories and indexes; write the tables
//! merge      the trees of several bootstraps, one over the other
//! reference  an index over a gzip layer that stays as it is
//! ```
//!
//! The same source gives the same bytes, for any number of threads. Memory depends on the number of names and chunks (a
//! few hundred bytes for each name, about 150 for each distinct chunk), and on `2 t + 2` chunks, decoded and encoded,
//! for `t` threads; not on the size of files. Files and directories that change while they are read end the build: half
//! of one version and half of another is not an image of anything. Nothing appears under a final name before it is
//! complete.
//!
//! Not kept, because the format has no place for it: access and change times, sparseness, hard links between anything
//! but regular files (they become equal nodes of their own), xattrs outside `user.`, `trusted.`, `security.` and
//! `system.posix_acl_*` (skipped, each with a note in the report).

use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use shoal_proto::{Algorithm, BlobId};

use crate::archive::{Archive, ArchiveError, decompress};
use crate::bootstrap::Kind;
use crate::codec::{self, Compressor};
use crate::layout;

mod blob;
mod bootstrap;
mod directory;
mod merge;
mod pipeline;
mod place;
mod reference;
mod scan;
mod tar;
mod tree;
pub(crate) mod v5;

pub use merge::{MergeError, MergeReport, merge};

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
    /// Level of the compressor, for zstd only: -7 (fast) to 22 (small). Default: 3.
    pub level: Option<i32>,
    /// Threads that hash and compress, at most 256. Default: one for each core. The image does not depend on it.
    pub threads: Option<NonZeroUsize>,
    /// What an archive may hold.
    pub limits: ArchiveLimits,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            compressor: Compressor::Zstd,
            algorithm: Algorithm::Blake3,
            chunk_size: 0x10_0000,
            level: None,
            threads: None,
            limits: ArchiveLimits::default(),
        }
    }
}

impl BuildOptions {
    fn check(&self) -> Result<(), BuildError> {
        if !self.chunk_size.is_power_of_two() || !layout::CHUNK_SIZES.contains(&self.chunk_size) {
            return Err(BuildError::ChunkSize { found: self.chunk_size });
        }
        if self.compressor == Compressor::Gzip {
            return Err(BuildError::Compressor { found: self.compressor });
        }
        match self.level {
            Some(level) if self.compressor != Compressor::Zstd || !codec::ZSTD_LEVELS.contains(&level) => {
                Err(BuildError::Level { compressor: self.compressor, found: level })
            }
            _ => Ok(()),
        }
    }

    fn workers(&self) -> usize {
        let threads = self.threads.or_else(|| std::thread::available_parallelism().ok());
        threads.map_or(1, usize::from).min(pipeline::MAX_WORKERS)
    }
}

/// What an archive may hold. A small compressed file can stand for any amount; whoever made it need not be a friend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArchiveLimits {
    /// Names, parents that no entry describes included. Default: 4 Mi, about 2 GiB of memory.
    pub names: u64,
    /// Bytes of the archive once decompressed, and bytes of all files with the holes of sparse ones. Default: 1 TiB.
    pub bytes: u64,
}

impl Default for ArchiveLimits {
    fn default() -> Self {
        Self { names: 1 << 22, bytes: 1 << 40 }
    }
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of file content that were read, hashed and stored, or found to be there already.
    pub decoded_bytes: u64,
    /// Bytes of file content in all; unknown for an archive.
    pub total_bytes: Option<u64>,
    /// Bytes of the blob so far.
    pub encoded_bytes: u64,
}

type OnProgress = dyn Fn(Progress) + Send + Sync;

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
    /// The meta blob of an index over a gzip layer.
    #[serde(serialize_with = "display", skip_serializing_if = "Option::is_none")]
    pub meta: Option<BlobId>,
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
    /// The compressor has no such level.
    #[error("{compressor} has no compression level {found}: zstd has -7 to 22, the others none")]
    Level {
        /// The compressor.
        compressor: Compressor,
        /// What was asked for.
        found: i32,
    },
    /// A compressor failed.
    #[error("cannot compress a chunk: {message}")]
    Encode {
        /// What it said.
        message: String,
    },
    /// An archive cannot become an image.
    #[error("{}", archive.display())]
    Archive {
        /// The archive.
        archive: PathBuf,
        /// Which entry, and why.
        #[source]
        source: ArchiveError,
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
    /// A bootstrap names a chunk that it does not describe.
    #[error("chunk {index} of blob {blob} is in no chunk table")]
    UnknownChunk {
        /// The blob.
        blob: BlobId,
        /// Index of the chunk.
        index: u32,
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

/// Builds images.
#[derive(Clone)]
pub struct Builder {
    options: BuildOptions,
    progress: Option<Arc<OnProgress>>,
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Builder").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Builder {
    /// A builder with these options; they are checked when it builds.
    pub fn new(options: BuildOptions) -> Self {
        Self { options, progress: None }
    }

    /// Tells `progress` after every chunk. It is called from a thread of the builder, which waits meanwhile.
    pub fn on_progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Builds an image of the directory `source`: writes the bootstrap to `bootstrap` and the blob, named by its id,
    /// into `blob_dir` (made if missing). Both files appear under their names only when they are complete.
    pub fn build(&self, source: &Path, bootstrap: &Path, blob_dir: &Path) -> Result<BuildReport, BuildError> {
        self.options.check()?;
        let mut notes = Notes::default();
        let mut scanned = scan::scan(source, &mut notes)?;
        let writer = self.writer(blob_dir)?;
        let total = scanned.tree.files().map(|inode| inode.size).sum();
        let (_, stored) =
            pipeline::run(self.options, writer, self.watch(Some(total)), |feed| feed_files(feed, &scanned))?;
        for (inode, places) in scanned.tree.inodes.iter_mut().zip(stored.places) {
            inode.chunks = places;
        }
        self.finish(&scanned.tree, stored.writer, stored.chunks, notes, bootstrap)
    }

    /// Like [`build`](Self::build), from a tar, gzip or zstd stream of one; `name` stands in errors. See
    /// [`ArchiveLimits`] for what it may hold.
    ///
    /// Whiteouts of layers stay ordinary files: they mean something to [`merge`](crate::merge) only.
    pub fn build_tar(
        &self,
        stream: impl Read,
        name: &Path,
        bootstrap: &Path,
        blob_dir: &Path,
    ) -> Result<BuildReport, BuildError> {
        self.options.check()?;
        let mut notes = Notes::default();
        let writer = self.writer(blob_dir)?;
        let failed = |source| BuildError::Archive { archive: name.to_owned(), source };
        let at_start = |source| failed(ArchiveError::Read { place: "its start".into(), source });
        let mut archive = Archive::new(decompress(stream).map_err(at_start)?, self.options.limits);
        let (mut draft, stored) = pipeline::run(self.options, writer, self.watch(None), |feed| {
            tar::read(&mut archive, name, self.options.limits, &mut notes, |archive, member, inode| {
                let place = archive.place().to_owned();
                feed.stream(inode, &mut archive.content(member), member.size, |error| {
                    failed(Archive::<&[u8]>::read_error(&place, error))
                })
            })
        })?;
        for (inode, places) in draft.inodes.iter_mut().zip(stored.places) {
            inode.chunks = places;
        }
        self.finish(&draft.finish(), stored.writer, stored.chunks, notes, bootstrap)
    }

    fn watch(&self, total_bytes: Option<u64>) -> impl Fn(u64, u64) + Send + '_ {
        move |decoded_bytes, encoded_bytes| {
            if let Some(progress) = &self.progress {
                progress(Progress { decoded_bytes, total_bytes, encoded_bytes });
            }
        }
    }

    fn writer(&self, blob_dir: &Path) -> Result<blob::BlobWriter, BuildError> {
        std::fs::create_dir_all(blob_dir).map_err(BuildError::io("make", blob_dir))?;
        blob::BlobWriter::new(blob_dir, self.options)
    }

    fn finish(
        &self,
        tree: &tree::Tree,
        writer: blob::BlobWriter,
        chunks: u64,
        notes: Notes,
        bootstrap: &Path,
    ) -> Result<BuildReport, BuildError> {
        let BuildOptions { compressor, algorithm, chunk_size, .. } = self.options;
        let blob = writer.finish()?;
        let records = blob.as_ref().map(|blob| blob.records.clone()).unwrap_or_default();
        let unique_chunks = records.len() as u64;
        let blobs = blob.iter().map(|blob| blob.entry(self.options)).collect();
        let contents = bootstrap::Contents { blobs, records, chunk_size, compressor, algorithm };
        let bytes = bootstrap::write(tree, contents)?;
        replace(bootstrap, &bytes)?;
        Ok(BuildReport {
            names: tree.nodes.len() as u64,
            files: tree.files().count() as u64,
            decoded_bytes: tree.files().map(|inode| inode.size).sum(),
            encoded_bytes: blob.as_ref().map_or(0, |blob| blob.encoded_size),
            bootstrap_bytes: bytes.len() as u64,
            chunks,
            unique_chunks,
            blob: blob.map(|blob| blob.id),
            meta: None,
            notes: notes.lines,
        })
    }
}

/// Feeds the files of a scanned directory, each once, breadth first.
fn feed_files(feed: &mut pipeline::Feed, scanned: &scan::Scanned) -> Result<(), BuildError> {
    for (index, node, inode) in scanned.tree.first_names() {
        if let (Kind::File, Some(version)) = (inode.kind, inode.version) {
            feed.file(node.inode, pipeline::SourceFile::new(scanned.path(index), version), inode.size)?;
        }
    }
    Ok(())
}

/// What was left out, for the report.
#[derive(Debug, Default)]
struct Notes {
    lines: Vec<String>,
}

impl Notes {
    fn add(&mut self, line: impl FnOnce() -> String) {
        if self.lines.len() < MAX_NOTES {
            self.lines.push(line());
        }
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
