//! What the threads of the pipeline hand to each other: some chunks in one buffer.
//!
//! Handing over costs a system call or two and often a switch of threads, next to which compressing a small file is nothing;
//! so small chunks travel together. They are hashed, compressed and stored one by one all the same.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::BuildError;
use super::blob::ChunkKey;
use super::scan::Version;
use super::tree::InodeIndex;

/// Decoded bytes, and chunks, that a parcel has at most, unless it is one chunk alone: enough that handing it over costs
/// little, and so few that every thread has some.
const PARCEL_BYTES: usize = 256 << 10;
const PARCEL_CHUNKS: usize = 64;

/// Whether a chunk of `len` bytes may join others, so many with so many bytes.
pub(super) fn has_room(chunks: usize, filled: usize, len: usize) -> bool {
    chunks == 0 || (filled + len <= PARCEL_BYTES && chunks < PARCEL_CHUNKS)
}

/// How a chunk or a batch is stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Form {
    /// Whether it is compressed. Not so where that would be larger.
    pub(super) compressed: bool,
    /// Whether it is encrypted, compressed or not.
    pub(super) encrypted: bool,
}

impl Form {
    /// The bytes of this form, where there are others beside the plain ones.
    pub(super) fn pick<'a>(self, decoded: &'a [u8], encoded: &'a [u8]) -> &'a [u8] {
        if self.compressed || self.encrypted { encoded } else { decoded }
    }
}

/// One chunk in a parcel.
#[derive(Debug)]
pub(super) struct Chunk {
    pub(super) inode: InodeIndex,
    /// Whether the chunk is stored alone, rather than in a batch.
    pub(super) alone: bool,
    /// Where to read the chunk; absent if the parcel has it already.
    pub(super) source: Option<(Arc<SourceFile>, u64)>,
    /// Where it lies in the parcel.
    pub(super) decoded: Range<usize>,
    /// Where its other form lies, if it has one. It has none if the blob has the chunk already or it goes into a batch.
    pub(super) encoded: Range<usize>,
    pub(super) form: Form,
    pub(super) digest: [u8; 32],
    pub(super) crc32: u32,
}

impl Chunk {
    /// What the chunk is known by.
    pub(super) fn key(&self) -> ChunkKey {
        (self.digest, self.decoded.len() as u32)
    }
}

/// Chunks, with the buffers that hold them.
#[derive(Debug, Default)]
pub(super) struct Parcel {
    /// As long as it ever was, so that nothing is cleared twice.
    pub(super) decoded: Vec<u8>,
    pub(super) encoded: Vec<u8>,
    pub(super) chunks: Vec<Chunk>,
}

impl Parcel {
    /// Whether a chunk of `len` bytes may join the others.
    pub(super) fn has_room(&self, len: usize) -> bool {
        has_room(self.chunks.len(), self.filled(), len)
    }

    /// Adds a chunk of `len` bytes, and gives the place for them.
    pub(super) fn add(
        &mut self,
        inode: InodeIndex,
        alone: bool,
        source: Option<(Arc<SourceFile>, u64)>,
        len: usize,
    ) -> &mut [u8] {
        let decoded = self.filled()..self.filled() + len;
        if self.decoded.len() < decoded.end {
            self.decoded.resize(decoded.end, 0);
        }
        self.chunks.push(Chunk {
            inode,
            alone,
            source,
            decoded: decoded.clone(),
            encoded: 0..0,
            form: Form::default(),
            digest: [0; 32],
            crc32: 0,
        });
        &mut self.decoded[decoded]
    }

    fn filled(&self) -> usize {
        self.chunks.last().map_or(0, |chunk| chunk.decoded.end)
    }

    /// The bytes of a chunk of it.
    pub(super) fn decoded(&self, chunk: &Chunk) -> &[u8] {
        &self.decoded[chunk.decoded.clone()]
    }

    /// What is written to the blob for a chunk of it.
    pub(super) fn stored(&self, chunk: &Chunk) -> &[u8] {
        chunk.form.pick(self.decoded(chunk), &self.encoded[chunk.encoded.clone()])
    }
}

/// A file on disk, opened by the first worker that reads it.
#[derive(Debug)]
pub(super) struct SourceFile {
    path: PathBuf,
    version: Version,
    file: OnceLock<File>,
}

impl SourceFile {
    pub(super) fn new(path: PathBuf, version: Version) -> Self {
        Self { path, version, file: OnceLock::new() }
    }

    /// Reads part of the file. The version is compared after each read, so that all parts are of one version.
    pub(super) fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), BuildError> {
        let file = match self.file.get() {
            Some(file) => file,
            None => {
                let file = open(&self.path).map_err(BuildError::io("open", &self.path))?;
                self.file.get_or_init(|| file)
            }
        };
        let read = file.read_exact_at(bytes, offset);
        let now = file.metadata().map_err(BuildError::io("read", &self.path))?;
        self.version.check(&self.path, &now)?;
        read.map_err(BuildError::io("read", &self.path))
    }
}

/// Opens a file and nothing else: no link, and no waiting for the other end of a fifo.
fn open(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}
