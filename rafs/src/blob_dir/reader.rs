//! Reading and verifying pieces of blob files in the caller's thread.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::io::{pread, retry_on_intr};
use shoal_proto::BlobId;

use super::{BlobDirError, BlobPaths, DECODED_CACHE_BYTES, tar};
use crate::blob::ChunkTable;
use crate::bootstrap::{Blob, Bootstrap, Metadata};
use crate::chunk_cache::Lru;
use crate::error_chain::chain;
use crate::piece::{DecodedPiece, PieceTable};
use crate::source::{ChunkError, ChunkId};

/// A piece of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PieceId {
    /// Position of the blob in the bootstrap's blob table.
    pub(crate) blob: u32,
    /// Number of the piece in the blob.
    pub(crate) piece: u32,
}

#[derive(Debug)]
enum Blobs {
    Ready(Vec<BlobFile>),
    Later(Box<Later>),
}

/// Blob files whose pieces are not known before somebody reads one.
#[derive(Debug)]
struct Later {
    metadata: Metadata,
    paths: BlobPaths,
    files: Vec<File>,
    ready: OnceLock<Result<Vec<BlobFile>, Box<str>>>,
}

/// The blob files of one image, in a folder, named by blob id.
#[derive(Debug)]
pub struct BlobDirReader {
    blobs: Blobs,
    /// For readers that go from chunk to chunk of a batch.
    recent: Mutex<Lru<PieceId, Arc<DecodedPiece>>>,
}

impl BlobDirReader {
    /// Opens every blob of an image. Says nothing yet about the bytes of chunks, but for tars whose chunks have no digests: these
    /// are read in full, and refused unless they have the sha256 that they are named by.
    pub fn open(bootstrap: &Bootstrap, dir: &Path) -> Result<Self, BlobDirError> {
        Self::at(bootstrap, &BlobPaths::new(Some(dir), None))
    }

    /// Opens every blob of an image where `paths` says.
    pub fn at(bootstrap: &Bootstrap, paths: &BlobPaths) -> Result<Self, BlobDirError> {
        let blobs = bootstrap.blobs().iter().zip(0..).map(|(described, blob)| {
            let places = paths.path(described.id).zip(paths.chunk_table(described));
            let (path, table) = places.ok_or(BlobDirError::NoFolder { blob: described.id })?;
            BlobFile::open(bootstrap, blob, &path, &table)
        });
        Ok(Self::over(Blobs::Ready(blobs.collect::<Result<_, _>>()?)))
    }

    /// Opens every blob of an image that may be read in place. Then chunk tables are read when the first chunk is, as that takes
    /// time, and memory, for each chunk; if it fails, every read does.
    pub fn lazily(metadata: &Metadata, paths: &BlobPaths) -> Result<Self, BlobDirError> {
        if let Metadata::Whole(bootstrap) = metadata {
            return Self::at(bootstrap, paths);
        }
        let files = metadata.blobs().iter().map(|described| {
            let path = paths.path(described.id).ok_or(BlobDirError::NoFolder { blob: described.id })?;
            File::open(&path).map_err(|source| BlobDirError::Open { path, source })
        });
        let (files, metadata, paths) = (files.collect::<Result<_, _>>()?, metadata.clone(), paths.clone());
        Ok(Self::over(Blobs::Later(Box::new(Later { metadata, paths, files, ready: OnceLock::new() }))))
    }

    fn over(blobs: Blobs) -> Self {
        Self { blobs, recent: Mutex::new(Lru::new(DECODED_CACHE_BYTES as usize)) }
    }

    /// The blobs with their pieces, or why there are none.
    fn blobs(&self) -> Result<&[BlobFile], &str> {
        match &self.blobs {
            Blobs::Ready(blobs) => Ok(blobs),
            Blobs::Later(later) => {
                let ready = later.ready.get_or_init(|| later.make().map_err(|error| chain(&*error).into()));
                ready.as_deref().map_err(|reason| &**reason)
            }
        }
    }

    fn blob(&self, blob: u32) -> Option<&BlobFile> {
        self.blobs().ok()?.get(blob as usize)
    }

    /// One chunk, read, decoded and verified, or from a piece that was read a moment ago.
    pub fn read(&self, chunk: ChunkId) -> Result<Bytes, ChunkError> {
        let id = self.piece_of(chunk).ok_or_else(|| self.error(chunk, "the image does not name it"))?;
        let recent = || self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let known = recent().get(&id);
        let piece = match known {
            Some(piece) => piece,
            None => {
                let piece = self.piece(id).map(Arc::new);
                let piece = piece.map_err(|error| ChunkError { index: chunk.index, ..error })?;
                recent().insert(id, Arc::clone(&piece), piece.decoded_len());
                piece
            }
        };
        piece.chunk(chunk.index).ok_or_else(|| self.error(chunk, "its piece decodes without it"))
    }

    /// Reads, decodes and verifies a piece. The error names its first chunk.
    pub(crate) fn piece(&self, id: PieceId) -> Result<DecodedPiece, ChunkError> {
        match self.blob(id.blob) {
            Some(blob) => blob.read(id.piece),
            None => Err(self.error(ChunkId { blob: id.blob, index: 0 }, "the image has no such blob")),
        }
    }

    /// The piece that holds a chunk, if the image names it.
    pub(crate) fn piece_of(&self, chunk: ChunkId) -> Option<PieceId> {
        let piece = self.blob(chunk.blob)?.table.piece_of_chunk(chunk.index)?;
        Some(PieceId { blob: chunk.blob, piece })
    }

    /// The pieces of a blob, by its position in the blob table.
    pub(crate) fn table(&self, blob: u32) -> Option<&PieceTable> {
        self.blob(blob).map(|blob| &blob.table)
    }

    pub(crate) fn error(&self, chunk: ChunkId, reason: &str) -> ChunkError {
        // A blob that the image does not have has no id.
        let blob = self.blob(chunk.blob).map_or(BlobId::new([0; 32]), |blob| blob.table.blob());
        let reason = self.blobs().err().unwrap_or(reason);
        ChunkError { blob, index: chunk.index, reason: reason.into() }
    }
}

impl Later {
    fn make(&self) -> Result<Vec<BlobFile>, Box<dyn std::error::Error + Send + Sync>> {
        let named = self.metadata.named_chunks()?;
        let blobs = self.metadata.blobs().iter().zip(&self.files).zip(0..).map(|((described, file), blob)| {
            let path = self.paths.chunk_table(described).ok_or(BlobDirError::NoFolder { blob: described.id })?;
            let table = named.piece_table(blob, chunk_table(described, &path)?.as_ref());
            Ok(BlobFile {
                table: table.map_err(|source| BlobDirError::Pieces { path, source })?,
                file: file.try_clone()?,
            })
        });
        blobs.collect()
    }
}

/// The chunk table of a blob in the file `path`, where the bootstrap does not say all.
fn chunk_table(described: &Blob, path: &Path) -> Result<Option<ChunkTable>, BlobDirError> {
    let table = described.needs_chunk_table().then(|| ChunkTable::read_with(path, described.cipher.as_ref()));
    table.transpose().map_err(|source| BlobDirError::ChunkTable { path: path.to_owned(), source })
}

/// One stored blob.
#[derive(Debug)]
pub(crate) struct BlobFile {
    file: File,
    pub(crate) table: PieceTable,
}

impl BlobFile {
    /// Opens the file of a blob and, where the bootstrap does not say all, reads the chunk table in the file `table`; of a tar
    /// without digests of chunks, everything.
    pub(crate) fn open(bootstrap: &Bootstrap, blob: u32, path: &Path, table: &Path) -> Result<Self, BlobDirError> {
        let described = &bootstrap.blobs()[blob as usize];
        let path = path.to_owned();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(source) => return Err(BlobDirError::Open { path, source }),
        };
        if described.is_tar() && !bootstrap.has_digests() {
            let table = tar::pieces(bootstrap, blob, &file, &path)?;
            return Ok(Self { file, table });
        }
        let table = bootstrap.piece_table(blob, chunk_table(described, table)?.as_ref());
        let table = table.map_err(|source| BlobDirError::Pieces { path, source })?;
        Ok(Self { file, table })
    }

    /// Reads, decodes and verifies a piece.
    pub(crate) fn read(&self, number: u32) -> Result<DecodedPiece, ChunkError> {
        let failed = |reason| self.error(number, reason);
        let range = self.table.piece(number).ok_or_else(|| failed("the image does not name it".into()))?.encoded();
        let encoded = read_range(&self.file, range).map_err(|error| failed(format!("blob file: {error}")))?;
        self.decode(number, &encoded)
    }

    /// Decodes and verifies a piece that somebody has read.
    pub(crate) fn decode(&self, number: u32, encoded: &[u8]) -> Result<DecodedPiece, ChunkError> {
        self.table.decode(number, encoded).map_err(|error| self.error(number, chain(&error)))
    }

    fn error(&self, number: u32, reason: String) -> ChunkError {
        let first = self.table.piece(number).and_then(|piece| piece.chunks().first());
        let index = first.map_or(number, |chunk| chunk.index);
        ChunkError { blob: self.table.blob(), index, reason: reason.into() }
    }
}

/// A range of a file, read into memory that is not cleared first.
fn read_range(file: &File, range: Range<u64>) -> io::Result<Vec<u8>> {
    let len = (range.end - range.start) as usize;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let at = range.start + bytes.len() as u64;
        if retry_on_intr(|| pread(file, spare_capacity(&mut bytes), at))? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    // There may have been room for more.
    bytes.truncate(len);
    Ok(bytes)
}
