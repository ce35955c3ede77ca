//! A bootstrap over a plain tar, which stays as it is ("tarfs mode").
//!
//! ```text
//! tar, untouched     the blob of the image, by its sha256
//! bootstrap          the tree, in blocks of 512 bytes as the tar's; files lead to where they are in the tar
//! ```
//!
//! The kernel's EROFS driver takes both as they are. Nothing is compressed or stored twice, and equal content is not found:
//! a chunk is wherever the tar has it. Upstream's builder states no digests of chunks; here the bootstrap's chunk table has
//! them, by sha256, so that every chunk can be verified alone. Upstream's reader does not look at that table in this mode.
//!
//! The tar is read once, from front to back, and written where it is wanted on the way. Memory depends on names and chunks
//! only. What has no place in the mode ends the build: sparse files, whose holes are nowhere in the tar, and compressed tars.

use std::cell::Cell;
use std::io::{self, Read};
use std::path::Path;
use std::rc::Rc;

use shoal_proto::{Algorithm, BlobId};
use zerocopy::FromZeros;

use super::bootstrap::{self, Contents};
use super::in_place;
use super::output::{BlobFile, Output};
use super::tree::{ChunkPlace, InodeIndex};
use super::{BuildError, BuildOptions, BuildReport, Builder, Notes, Progress, replace, tar};
use crate::archive::{Archive, ArchiveError, Member, plain};
use crate::codec::{self, Compressor};
use crate::layout::{self, BlobEntry, ChunkRecord, TAR_BLOCK, chunk_flags, features};

impl Builder {
    /// Builds a bootstrap over a plain tar, read from `stream`; `name` stands in errors. Writes the bootstrap to `bootstrap`,
    /// and the tar, named by its sha256, into `blob_dir`.
    ///
    /// Of the options, chunk size and limits count: nothing is compressed, digests are by sha256, and a tar has no place for a
    /// bootstrap or a table of contents. Nor are chunks of earlier images looked for; the prefetch list is taken. A tar without
    /// file content is no blob.
    pub fn build_tarfs(
        &self,
        stream: impl Read,
        name: &Path,
        bootstrap: &Path,
        blob_dir: &Path,
    ) -> Result<BuildReport, BuildError> {
        self.build_tarfs_to(stream, name, Output::files(bootstrap, blob_dir), None)
    }

    /// Like [`build_tarfs`](Self::build_tarfs), to wherever `output` says. With `id` the blob is called that, whatever its
    /// bytes are: a check will say so, but digests of chunks verify what is read all the same.
    pub fn build_tarfs_to(
        &self,
        stream: impl Read,
        name: &Path,
        output: Output<'_>,
        id: Option<BlobId>,
    ) -> Result<BuildReport, BuildError> {
        self.options.check()?;
        let mut file = BlobFile::new(output.blob)?;
        let (mut notes, mut index) = (Notes::default(), Index::new(self, name));
        let at_start = |source| BuildError::Archive {
            archive: name.to_owned(),
            source: ArchiveError::Read { place: "its start".into(), source },
        };
        let stream = plain(stream).map_err(at_start)?;
        let mut failed = None;
        let position = Rc::clone(&index.position);
        let copied = Copied { stream, file: &mut file, position, failed: &mut failed };
        let mut archive = Archive::new(copied, self.options.limits);
        let draft = tar::read(&mut archive, name, self.options.limits, &mut notes, None, |archive, member, inode| {
            index.file(archive, member, inode)
        });
        drop(archive);
        let mut draft = match failed {
            Some(error) => return Err(error),
            None => draft?,
        };
        for (inode, places) in draft.inodes.iter_mut().zip(std::mem::take(&mut index.places)) {
            inode.chunks = places;
        }
        let tree = draft.finish();
        let prefetch = self.find_prefetched(&tree, &mut notes).inodes(&tree);
        let (chunks, size, limit) = (index.records.len() as u64, file.len(), layout::MAX_ENCODED);
        if size > limit {
            return Err(BuildError::TooLarge { what: "bytes of a tar", found: size, limit });
        }
        let mut report = BuildReport {
            chunks,
            unique_chunks: chunks,
            prefetched: prefetch.len() as u64,
            notes: notes.lines,
            ..BuildReport::of(&tree)
        };
        let mut blobs = Vec::new();
        if chunks > 0 {
            report.encoded_bytes = size;
            let id = match id {
                Some(id) => file.finish_as(id)?,
                None => file.finish()?,
            };
            report.blob = Some(id);
            blobs.push(index.entry(id, size));
        }
        if let Some(path) = output.bootstrap {
            let Index { options: BuildOptions { chunk_size, compressor, algorithm, .. }, records, .. } = index;
            let contents = Contents { blobs, records, prefetch, chunk_size, compressor, algorithm, tarfs: true };
            let bytes = bootstrap::write(&tree, contents)?;
            replace(path, &bytes)?;
            report.bootstrap_bytes = bytes.len() as u64;
        }
        Ok(report)
    }
}

/// What is read through it is written to the blob, and counted; nothing is held back.
struct Copied<'a, R> {
    stream: R,
    file: &'a mut BlobFile,
    position: Rc<Cell<u64>>,
    /// Why the blob could not be written.
    failed: &'a mut Option<BuildError>,
}

impl<R: Read> Read for Copied<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.stream.read(buffer)?;
        if let Err(error) = self.file.write(&buffer[..len]) {
            *self.failed = Some(error);
            return Err(io::Error::other("the blob cannot be written"));
        }
        self.position.set(self.position.get() + len as u64);
        Ok(len)
    }
}

/// What is known of the chunks so far.
struct Index<'a> {
    builder: &'a Builder,
    /// Those of the builder, with what all tars have.
    options: BuildOptions,
    name: &'a Path,
    /// Bytes of the tar so far.
    position: Rc<Cell<u64>>,
    records: Vec<ChunkRecord>,
    /// Places of the chunks of each inode, by number.
    places: Vec<Vec<ChunkPlace>>,
    decoded_bytes: u64,
    chunk: Vec<u8>,
}

impl<'a> Index<'a> {
    fn new(builder: &'a Builder, name: &'a Path) -> Self {
        let (compressor, algorithm) = (Compressor::None, Algorithm::Sha256);
        Self {
            builder,
            options: BuildOptions { compressor, algorithm, ..builder.options },
            name,
            position: Rc::default(),
            records: Vec::new(),
            places: Vec::new(),
            decoded_bytes: 0,
            chunk: Vec::new(),
        }
    }

    fn file<R: Read>(
        &mut self,
        archive: &mut Archive<R>,
        member: &Member,
        inode: InodeIndex,
    ) -> Result<(), BuildError> {
        let place = archive.place().to_owned();
        let unsupported = |what: &str| {
            let what = format!("{place} {what}, which cannot be read from the tar as it is");
            Err(BuildError::Unsupported { path: self.name.to_owned(), what })
        };
        if member.has_holes() {
            return unsupported("is a sparse file");
        }
        if !self.position.get().is_multiple_of(TAR_BLOCK) {
            return unsupported("does not start at a block of the tar");
        }
        let (position, source) = (Rc::clone(&self.position), (self.name, self.options.chunk_size));
        let mut chunk = std::mem::take(&mut self.chunk);
        let add = |chunk: &mut Vec<u8>, before, offset| self.add(chunk, before, offset);
        let places = in_place::read_chunks(archive, member, source, &position, &mut chunk, add);
        self.chunk = chunk;
        in_place::note(&mut self.places, inode, places?);
        Ok(())
    }

    /// The place of the chunk that was just read, which starts at `start` of the tar.
    fn add(&mut self, chunk: &[u8], start: u64, file_offset: u64) -> Result<ChunkPlace, BuildError> {
        self.decoded_bytes += chunk.len() as u64;
        if let Some(progress) = &self.builder.progress {
            let (decoded_bytes, encoded_bytes) = (self.decoded_bytes, self.position.get());
            progress(Progress { decoded_bytes, total_bytes: None, encoded_bytes });
        }
        let index = self.next_index()?;
        let len = chunk.len() as u32;
        self.records.push(ChunkRecord {
            digest: codec::digest(self.options.algorithm, chunk).bytes,
            flags: chunk_flags::HAS_CRC.into(),
            encoded_size: len.into(),
            decoded_size: len.into(),
            encoded_offset: start.into(),
            decoded_offset: start.into(),
            file_offset: file_offset.into(),
            index: index.into(),
            crc32: crc32c::crc32c(chunk).into(),
            ..ChunkRecord::new_zeroed()
        });
        Ok(ChunkPlace { blob: 0, index, block: (start / TAR_BLOCK) as u32 })
    }

    /// The index of the next chunk.
    fn next_index(&self) -> Result<u32, BuildError> {
        let too_large = |what, found, limit| Err(BuildError::TooLarge { what, found, limit });
        // Here already, so that block addresses fit.
        if self.position.get() > layout::MAX_ENCODED {
            return too_large("bytes of a tar", self.position.get(), layout::MAX_ENCODED);
        }
        match u32::try_from(self.records.len()) {
            Ok(index) if index < layout::MAX_CHUNKS => Ok(index),
            _ => too_large("chunks", self.records.len() as u64 + 1, layout::MAX_CHUNKS.into()),
        }
    }

    /// How the bootstrap describes the tar.
    fn entry(&self, id: BlobId, size: u64) -> BlobEntry {
        BlobEntry {
            blob_id: layout::blob_id(id),
            chunk_size: self.options.chunk_size.into(),
            chunk_count: (self.records.len() as u32).into(),
            compressor: self.options.compressor.code().into(),
            digester: layout::digester(self.options.algorithm).into(),
            features: (features::TARFS | features::CAP_TAR_TOC).into(),
            encoded_size: size.into(),
            decoded_size: size.into(),
            ..BlobEntry::new_zeroed()
        }
    }
}
