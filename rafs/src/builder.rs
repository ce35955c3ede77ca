//! From a directory or an archive to an image: one bootstrap and one data blob.
//!
//! ```text
//! scan       walk a directory: names, owners, xattrs, hard links          \  a tree and chunks in their
//! tar        read a tar once, from front to back, into a tree and chunks  /  order: breadth first, or the tar's
//! pipeline   read, hash and compress chunks on worker threads
//! parcel     what they are handed over in: one chunk, or several small ones
//! collector  put chunks back in order, gather small ones in batches, store each that is not there yet
//! blob       append chunks and batches
//! output     where the files of an image go
//! parts      what follows them: table, digests, a copy of the bootstrap, contents; the file's sha256 is its name
//! bootstrap  place inodes, directories and indexes; write the tables
//! merge      the trees of several bootstraps, one over the other
//! optimize   the hot chunks of an image to a blob of their own
//! reference  an index over a gzip layer that stays as it is
//! tarfs      a bootstrap over a plain tar that stays as it is, which the kernel mounts
//! v5         bootstraps of RAFS v5, written anew for whoever reads them
//! ```
//!
//! The same source gives the same bytes, for any number of threads; not so when the blob is encrypted, as each has a key of its
//! own. Memory depends on the number of names and chunks (a few hundred bytes for each name, about 150 for each distinct chunk
//! and for each of a dictionary), and on `2 t + 2` parcels, each a chunk or 256 KiB if that is more, and `t + 2` batches, decoded
//! and encoded, for `t` threads; not on the size of files. Files and directories that change while they are read end the build:
//! half of one version and half of another is not an image of anything. Nothing appears under a final name before it is
//! complete; a blob that is written into a FIFO is complete when that ends and the build has succeeded.
//!
//! Not kept, because the format has no place for it: access and change times, sparseness, hard links between anything
//! but regular files (they become equal nodes of their own), xattrs outside `user.`, `trusted.`, `security.` and
//! `system.posix_acl_*` (skipped, each with a note in the report).

use std::io::Read;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use shoal_proto::{Algorithm, BlobId};

use crate::archive::{Archive, ArchiveError, decompress};
use crate::bootstrap::Bootstrap;
use crate::cipher::{Cipher, CipherKey, MAX_UNIT};
use crate::codec::{self, Compressor};
use crate::layout;
use crate::prefetch::PrefetchList;
use blob::{BlobWriter, Known};
use dictionary::Dictionary;
use image::Image;
use output::replace;
use prefetch::Prefetched;
use tree::{NodeIndex, Tree};

mod batches;
mod blob;
mod blobs;
mod bootstrap;
mod collector;
mod dictionary;
mod directory;
mod error;
mod image;
mod in_place;
mod layer_notes;
mod lending;
mod merge;
mod optimize;
mod output;
pub(crate) mod overlay;
mod parcel;
mod parts;
mod pipeline;
mod place;
mod prefetch;
mod reference;
mod scan;
mod tar;
mod tarfs;
mod tree;
pub(crate) mod v5;

pub use error::BuildError;
pub use layer_notes::{ForeignLink, LayerNotes};
pub use merge::{LayerBlob, MergeError, MergeOptions, MergeReport, merge, merge_with};
pub use optimize::OptimizeReport;
pub use output::{BlobTarget, Output};

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
    /// Compress small files together: those of one chunk below half of this many bytes, in batches that stay below it. A power
    /// of two from 0x1000 to the chunk size. Default: none; each chunk is compressed, and can be fetched, alone.
    pub batch_size: Option<u32>,
    /// Put the bootstrap into the blob too, as layers of registries have it, with tar headers behind each part. Default: no.
    pub inline_meta: bool,
    /// End the blob with the digests of its chunks and a table of contents, with tar headers. Default: no.
    pub toc: bool,
    /// Whether the blob is encrypted. Default: no.
    pub encryption: Encryption,
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
            batch_size: None,
            inline_meta: false,
            toc: false,
            encryption: Encryption::None,
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
        let batches = 0x1000..=self.chunk_size;
        if let Some(found) = self.batch_size.filter(|size| !size.is_power_of_two() || !batches.contains(size)) {
            return Err(BuildError::BatchSize { found, chunk_size: self.chunk_size });
        }
        if self.compressor == Compressor::Gzip {
            return Err(BuildError::Compressor { found: self.compressor });
        }
        if self.encryption != Encryption::None {
            if self.inline_meta {
                return Err(BuildError::KeyInBlob);
            }
            // The length of a chunk that does not shrink has to fit the second form of the chunk table.
            if self.chunk_size as usize >= MAX_UNIT {
                return Err(BuildError::EncryptedChunkSize { found: self.chunk_size });
            }
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

/// Whether and with what key a blob is encrypted. The key is written into the bootstrap, so what is encrypted is safe from
/// those who do not have that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Encryption {
    /// It is not.
    #[default]
    None,
    /// With a key of its own from the system's random numbers: the same source gives another blob every time.
    FreshKey,
    /// With this key, so that tests can compare bytes. A key must never be used for two blobs.
    #[doc(hidden)]
    Key(CipherKey),
}

impl Encryption {
    fn cipher(self) -> Result<Option<Cipher>, BuildError> {
        let key = match self {
            Self::None => return Ok(None),
            Self::FreshKey => CipherKey::fresh().map_err(|source| BuildError::RandomKey { source })?,
            Self::Key(key) => key,
        };
        Ok(Some(Cipher::new(key)))
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
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct BuildReport {
    /// Names in the image, the root included.
    pub names: u64,
    /// Regular files, hard links counted once.
    pub files: u64,
    /// Their content in bytes.
    pub decoded_bytes: u64,
    /// Size of the blob file; 0 without a blob.
    pub encoded_bytes: u64,
    /// Size of the bootstrap.
    pub bootstrap_bytes: u64,
    /// Chunks that files consist of.
    pub chunks: u64,
    /// Distinct chunks, those in the blob.
    pub unique_chunks: u64,
    /// Distinct chunks that are read from blobs of earlier images.
    pub shared_chunks: u64,
    /// Their bytes, decoded: what was not stored again.
    pub shared_bytes: u64,
    /// Files and directories that the prefetch table lists.
    pub prefetched: u64,
    /// The blob; none for an image without file content, unless the bootstrap goes into it.
    #[serde(serialize_with = "display")]
    pub blob: Option<BlobId>,
    /// The meta blob of an index over a gzip layer.
    #[serde(serialize_with = "display", skip_serializing_if = "Option::is_none")]
    pub meta: Option<BlobId>,
    /// Blobs of earlier images that are read, in the order of the blob table.
    #[serde(serialize_with = "display_all")]
    pub shared_blobs: Vec<BlobId>,
    /// What was left out, with its path. At most [`MAX_NOTES`].
    pub notes: Vec<String>,
}

impl BuildReport {
    /// What the tree of an image tells.
    fn of(tree: &Tree) -> Self {
        Self {
            names: tree.nodes.len() as u64,
            files: tree.files().count() as u64,
            decoded_bytes: tree.files().map(|inode| inode.size).sum(),
            ..Self::default()
        }
    }
}

/// Most notes in a report.
pub const MAX_NOTES: usize = 1000;

fn display<S: serde::Serializer>(id: &Option<BlobId>, serializer: S) -> Result<S::Ok, S::Error> {
    id.map(|id| id.to_string()).serialize(serializer)
}

fn display_all<S: serde::Serializer>(ids: &[BlobId], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(ids.iter().map(ToString::to_string))
}

/// Builds images.
#[derive(Clone)]
pub struct Builder {
    options: BuildOptions,
    dictionary: Vec<Bootstrap>,
    prefetch: PrefetchList,
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
        Self { options, dictionary: Vec::new(), prefetch: PrefetchList::default(), progress: None }
    }

    /// Lets images use what earlier ones have: a chunk that one of these names is read from the blob that has it, and not
    /// stored again. They must have the chunk size of the image; chunks of blobs with another digest algorithm are of no use.
    pub fn chunk_dictionary(mut self, images: Vec<Bootstrap>) -> Self {
        self.dictionary = images;
        self
    }

    /// Lets images say what to read early. A directory is stored in that order, too; an archive is stored in its own. What
    /// the list names and the source has not is noted in the report.
    pub fn prefetch(mut self, list: PrefetchList) -> Self {
        self.prefetch = list;
        self
    }

    /// Tells `progress` after every chunk. It is called from a thread of the builder, which waits meanwhile.
    pub fn on_progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.progress = Some(Arc::new(progress));
        self
    }

    /// Builds an image of the directory `source`: writes the bootstrap to `bootstrap` and the blob, named by its id,
    /// into `blob_dir` (made if missing). Both files appear under their names only when they are complete. The bootstrap
    /// names the blob by its id, also where the options put another one, which does not, into the blob.
    pub fn build(&self, source: &Path, bootstrap: &Path, blob_dir: &Path) -> Result<BuildReport, BuildError> {
        self.build_to(source, Output::files(bootstrap, blob_dir))
    }

    /// Like [`build`](Self::build), to wherever `output` says.
    pub fn build_to(&self, source: &Path, output: Output<'_>) -> Result<BuildReport, BuildError> {
        self.options.check()?;
        let mut notes = Notes::default();
        let mut scanned = scan::scan(source, &mut notes)?;
        let prefetched = self.find_prefetched(&scanned.tree, &mut notes);
        let (writer, dictionary) = self.writer(output.blob)?;
        let total = scanned.tree.files().map(|inode| inode.size).sum();
        let order = prefetched.files_first(&scanned.tree);
        let (_, stored) = pipeline::run(self.options, writer, self.watch(Some(total)), |feed| {
            order.iter().try_for_each(|node| feed_file(feed, &scanned, *node))
        })?;
        for (inode, places) in scanned.tree.inodes.iter_mut().zip(stored.places) {
            inode.chunks = places;
        }
        let prefetch = prefetched.inodes(&scanned.tree);
        let image = Image { options: self.options, tree: scanned.tree, writer: stored.writer, dictionary, prefetch };
        Ok(BuildReport { notes: notes.lines, ..image.write(stored.chunks, output.bootstrap)? })
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
        self.build_tar_to(stream, name, Output::files(bootstrap, blob_dir))
    }

    /// Like [`build_tar`](Self::build_tar), to wherever `output` says. The stream is read to its end, also behind the end of
    /// the tar.
    pub fn build_tar_to(
        &self,
        stream: impl Read,
        name: &Path,
        output: Output<'_>,
    ) -> Result<BuildReport, BuildError> {
        self.archive(stream, name, output, None)
    }

    /// Like [`build_tar`](Self::build_tar), from the archive of a layer, which may say things of lower layers: they are
    /// for [`merge_with`].
    pub fn build_layer(
        &self,
        stream: impl Read,
        name: &Path,
        bootstrap: &Path,
        blob_dir: &Path,
    ) -> Result<(BuildReport, LayerNotes), BuildError> {
        let mut layer = LayerNotes::default();
        let report = self.archive(stream, name, Output::files(bootstrap, blob_dir), Some(&mut layer))?;
        Ok((report, layer))
    }

    fn archive(
        &self,
        stream: impl Read,
        name: &Path,
        output: Output<'_>,
        layer: Option<&mut LayerNotes>,
    ) -> Result<BuildReport, BuildError> {
        self.options.check()?;
        let mut notes = Notes::default();
        let (writer, dictionary) = self.writer(output.blob)?;
        let failed = |source| BuildError::Archive { archive: name.to_owned(), source };
        let at_start = |source| failed(ArchiveError::Read { place: "its start".into(), source });
        let mut archive = Archive::new(decompress(stream).map_err(at_start)?, self.options.limits);
        let (mut draft, stored) = pipeline::run(self.options, writer, self.watch(None), |feed| {
            tar::read(&mut archive, name, self.options.limits, &mut notes, layer, |archive, member, inode| {
                let place = archive.place().to_owned();
                feed.stream(inode, &mut archive.content(member), member.size, |error| {
                    failed(Archive::<&[u8]>::read_error(&place, error))
                })
            })
        })?;
        for (inode, places) in draft.inodes.iter_mut().zip(stored.places) {
            inode.chunks = places;
        }
        let tree = draft.finish();
        let prefetch = self.find_prefetched(&tree, &mut notes).inodes(&tree);
        let image = Image { options: self.options, tree, writer: stored.writer, dictionary, prefetch };
        Ok(BuildReport { notes: notes.lines, ..image.write(stored.chunks, output.bootstrap)? })
    }

    fn watch(&self, total_bytes: Option<u64>) -> impl Fn(u64, u64) + Send + '_ {
        move |decoded_bytes, encoded_bytes| {
            if let Some(progress) = &self.progress {
                progress(Progress { decoded_bytes, total_bytes, encoded_bytes });
            }
        }
    }

    fn find_prefetched(&self, tree: &Tree, notes: &mut Notes) -> Prefetched {
        let prefetched = Prefetched::find(tree, &self.prefetch);
        prefetched.unmatched.iter().for_each(|path| notes.add(|| format!("{path}: no file to prefetch")));
        prefetched
    }

    fn writer(&self, target: BlobTarget<'_>) -> Result<(BlobWriter, Dictionary), BuildError> {
        let (dictionary, known) = Dictionary::new(&self.dictionary, &self.options)?;
        Ok((BlobWriter::new(target, self.options, Known::new(known))?, dictionary))
    }
}

/// Feeds a file of a scanned directory.
fn feed_file(feed: &mut pipeline::Feed, scanned: &scan::Scanned, node: NodeIndex) -> Result<(), BuildError> {
    let inode = scanned.tree.nodes[node].inode;
    let file = &scanned.tree.inodes[inode];
    match file.version {
        Some(version) => feed.file(inode, parcel::SourceFile::new(scanned.path(node), version), file.size),
        None => Ok(()),
    }
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

#[cfg(test)]
mod tests;
