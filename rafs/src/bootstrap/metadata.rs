//! What a mount asks of an image: its tree, its blobs, its chunks.
//!
//! A [`Bootstrap`] is verified in full, and in memory in full. To mount an image neither is needed. [`Metadata`] is a bootstrap
//! or a file that is read *in place*: opening it reads super blocks and the tables of devices and blobs, and what is asked for
//! later is read then, see [`windows`](super::windows). So neither the time that it takes nor the memory depends on the number of files.
//!
//! Whatever a file holds, each structure is checked when it is looked at, as far as whoever looks relies on it: it lies in the
//! file, names are names, values are in range. What only a walk can tell is not known: that a directory has one parent, that
//! `..` leads to it, that files lead to chunks that there are. A directory that contains itself is for the kernel to refuse; a chunk
//! that there is not is an error of the read. So a bootstrap from a stranger may be opened in place, and whoever hands it on
//! verifies it in full, once, as [`Bootstrap`].
//!
//! The file must not change. If it does, readers of the mount see what it became, or errors, and nothing worse happens.
//!
//! Read in full after all are RAFS v5, which is translated, and tars, which may have no chunk table.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;

use super::chunks::Chunks;
use super::error::At;
use super::image::{Content, Image, Source};
use super::superblock::{self, Header};
use super::windows::Windows;
use super::{Blob, Bootstrap, BootstrapError, Inode, Kind, Nid, Origin, tables};
use crate::blob::ChunkTable;
use crate::builder::v5;
use crate::piece::{PieceTable, PieceTableError};

/// The metadata of an image, for whoever mounts it. Immutable, cheap to clone.
#[derive(Debug, Clone)]
pub enum Metadata {
    /// Verified in full, in memory.
    Whole(Bootstrap),
    /// In a file.
    InPlace(Arc<InPlace>),
}

/// A bootstrap that stays in its file. `Debug` shows none of its bytes.
pub struct InPlace {
    file: Arc<File>,
    /// With nothing read; each look has its own.
    image: Image,
    header: Header,
    blobs: Vec<Blob>,
    /// BLAKE3 of the file, where somebody has told.
    hash: Option<[u8; 32]>,
}

/// One look at the metadata, for as long as a question takes: it keeps all that was read for it.
#[derive(Debug)]
pub enum Look<'a> {
    /// Of what is in memory.
    Whole(&'a Bootstrap),
    /// Of a file.
    InPlace(Fresh),
}

/// What a look has read. Opaque.
#[derive(Debug)]
pub struct Fresh(Image);

/// Which chunks an image names, verified. Memory is proportional to their number.
#[derive(Debug)]
pub enum NamedChunks {
    /// Those of a bootstrap.
    Whole(Bootstrap),
    /// Those of a file.
    InPlace(Box<FreshChunks>),
}

/// The chunk table of a file. Opaque.
#[derive(Debug)]
pub struct FreshChunks(Content);

impl From<Bootstrap> for Metadata {
    fn from(bootstrap: Bootstrap) -> Self {
        Self::Whole(bootstrap)
    }
}

impl Metadata {
    /// Opens a bootstrap in place, or reads and verifies it where that is not possible.
    ///
    /// # Errors
    /// It is none, or what is read of it now is wrong.
    pub fn open(file: File) -> Result<Self, BootstrapError> {
        Self::open_as(file, Origin::File, None)
    }

    /// The same for a file whose BLAKE3 is known, so that it need not be read for its [`hash`](Self::hash).
    pub fn open_known(file: File, hash: [u8; 32]) -> Result<Self, BootstrapError> {
        Self::open_as(file, Origin::File, Some(hash))
    }

    pub(crate) fn open_extracted(file: File, own: shoal_proto::BlobId) -> Result<Self, BootstrapError> {
        Self::open_as(file, Origin::Extracted(own), None)
    }

    fn open_as(file: File, origin: Origin, hash: Option<[u8; 32]>) -> Result<Self, BootstrapError> {
        let failed = |source| BootstrapError::Read { structure: "bootstrap", offset: 0, source };
        let size = file.metadata().map_err(failed)?.len();
        let file = Arc::new(file);
        let mut magic = [0; 4];
        if size >= 4 {
            file.read_exact_at(&mut magic, 0).map_err(failed)?;
        }
        let whole = || {
            let bytes = read(&file, 0, size).map_err(failed)?;
            Bootstrap::parse_as(bytes, origin).map(Self::Whole)
        };
        if v5::is_v5(&magic) {
            return whole();
        }
        let source = Source::File(Box::new(Windows::new(Arc::clone(&file), size)));
        let header = superblock::read(&source)?;
        if header.is_tarfs() {
            return whole();
        }
        let blobs = tables::blobs(&source, &header, origin)?;
        let image = Image::new(source.again(), &header);
        let metadata = Self::InPlace(Arc::new(InPlace { file, image, header, blobs, hash }));
        let root = metadata.look().inode(metadata.root())?.kind();
        At::new("super block", crate::layout::SUPER_OFFSET)
            .require(root == Kind::Directory, || format!("the root is a {root:?}"))?;
        Ok(metadata)
    }

    /// Begins to look. Costs nothing; one look is for one question, and not for a walk through everything.
    pub fn look(&self) -> Look<'_> {
        match self {
            Self::Whole(bootstrap) => Look::Whole(bootstrap),
            Self::InPlace(place) => Look::InPlace(Fresh(place.image.again())),
        }
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        match self {
            Self::Whole(bootstrap) => bootstrap.root(),
            Self::InPlace(place) => place.header.root,
        }
    }

    /// The data blobs, in the order of the device table.
    pub fn blobs(&self) -> &[Blob] {
        match self {
            Self::Whole(bootstrap) => bootstrap.blobs(),
            Self::InPlace(place) => &place.blobs,
        }
    }

    /// Size of every chunk but the last of a file.
    pub fn chunk_size(&self) -> u32 {
        match self {
            Self::Whole(bootstrap) => bootstrap.chunk_size(),
            Self::InPlace(place) => place.header.chunk_size,
        }
    }

    /// Distinct inodes in the tree; names by the super block where nobody has counted.
    pub fn inode_count(&self) -> u64 {
        match self {
            Self::Whole(bootstrap) => bootstrap.inode_count(),
            Self::InPlace(place) => place.header.declared.names,
        }
    }

    /// Whether any of its blobs is encrypted, so that its bytes hold keys.
    pub fn is_encrypted(&self) -> bool {
        self.blobs().iter().any(|blob| blob.cipher.is_some())
    }

    /// BLAKE3 of the bootstrap. Reads all of it unless it is known.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn hash(&self) -> io::Result<[u8; 32]> {
        let known = match self {
            Self::Whole(_) => None,
            Self::InPlace(place) => place.hash,
        };
        known.map_or_else(|| Ok(*blake3::hash(&self.read()?).as_bytes()), Ok)
    }

    /// All bytes of the bootstrap, read where they are not in memory.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn read(&self) -> io::Result<Bytes> {
        match self {
            Self::Whole(bootstrap) => Ok(bootstrap.as_bytes().clone()),
            Self::InPlace(place) => read(&place.file, 0, place.image.source.size()),
        }
    }

    /// Which chunks the image names. Reads the chunk table where it is not in memory, and verifies that.
    ///
    /// # Errors
    /// It cannot be read, or is wrong.
    pub fn named_chunks(&self) -> Result<NamedChunks, BootstrapError> {
        let place = match self {
            Self::Whole(bootstrap) => return Ok(NamedChunks::Whole(bootstrap.clone())),
            Self::InPlace(place) => place,
        };
        let range = &place.header.chunk_table;
        let failed = |source| BootstrapError::Read { structure: "chunk table", offset: range.start, source };
        let table = read(&place.file, range.start, range.end - range.start).map_err(failed)?;
        let chunks = Chunks::read(table, &place.header, &place.blobs)?;
        Ok(NamedChunks::InPlace(Box::new(FreshChunks(Content { blobs: place.blobs.clone(), chunks }))))
    }

    /// Files and directories that the builder wants read early, in order.
    ///
    /// # Errors
    /// They cannot be read. Of what is read in place only whoever looks for one learns whether it is there.
    pub fn prefetch(&self) -> Result<Vec<Nid>, BootstrapError> {
        match self {
            Self::Whole(bootstrap) => Ok(bootstrap.prefetch().to_vec()),
            Self::InPlace(place) => tables::prefetch(&place.image.source.again(), &place.header, |_| true),
        }
    }

    /// Every directory below one, itself first, level by level, each once. `visit` is given each of its entries but `.` and `..`,
    /// with what it gave for the directory.
    pub(crate) fn walk<T: Clone>(
        &self,
        directory: Nid,
        root: T,
        mut visit: impl FnMut(&T, &super::Entry<'_>) -> T,
    ) -> Result<(), BootstrapError> {
        let mut seen = HashSet::from([directory]);
        let mut level = vec![(root, directory)];
        while !level.is_empty() {
            let mut below = Vec::new();
            for (known, directory) in level {
                for entry in self.look().inode(directory)?.entries() {
                    let entry = entry?;
                    if entry.name == b"." || entry.name == b".." {
                        continue;
                    }
                    let of_entry = visit(&known, &entry);
                    if entry.kind == Kind::Directory && seen.insert(entry.nid) {
                        below.push((of_entry, entry.nid));
                    }
                }
            }
            level = below;
        }
        Ok(())
    }
}

impl Look<'_> {
    /// Decodes an inode. Of what is read in place it is one if there could be one; a bootstrap knows which there are.
    ///
    /// # Errors
    /// There is none, or it is broken.
    pub fn inode(&self, nid: Nid) -> Result<Inode<'_>, BootstrapError> {
        match self {
            Self::Whole(bootstrap) => bootstrap.inode(nid),
            Self::InPlace(fresh) => Inode::decode(&fresh.0, nid),
        }
    }
}

impl NamedChunks {
    /// The pieces of a blob; see [`Bootstrap::piece_table`].
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// Panics if there is no such blob.
    pub fn piece_table(&self, blob: u32, table: Option<&ChunkTable>) -> Result<PieceTable, PieceTableError> {
        match self {
            Self::Whole(bootstrap) => bootstrap.piece_table(blob, table),
            Self::InPlace(chunks) => chunks.0.piece_table(blob, table),
        }
    }
}

impl Image {
    /// For another look.
    fn again(&self) -> Self {
        Self { source: self.source.again(), ..*self }
    }
}

impl std::fmt::Debug for InPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InPlace").field("super_blocks", &self.header.super_blocks()).finish_non_exhaustive()
    }
}

fn read(file: &File, start: u64, len: u64) -> io::Result<Bytes> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, start)?;
    Ok(bytes.into())
}
