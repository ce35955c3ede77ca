//! What is fetched: a blob, an object, a hash list; and all that is needed to verify and keep it.

use std::{ops::Range, sync::Arc};

use shoal_proto::{BlobId, ObjectId, ObjectKind};
use shoal_rafs::{Piece, PieceTable, oci::Source};
use shoal_scheduler::{BlobKey, Event};

use crate::{
    plain,
    store::{BlobHandle, ChunkPlace, Store},
    traffic::PieceOrigins,
};

/// What a key of the scheduler stands for.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    /// A data blob as one image, or several that agree, name its pieces.
    Blob(Arc<BlobTarget>),
    /// A manifest, a bootstrap layer: anything named by the hash of all its bytes.
    Object(Arc<ObjectTarget>),
    /// The hash list of a blob that no image describes.
    List(Arc<ListTarget>),
}

/// All that is needed to fetch, verify and keep a blob's pieces.
#[derive(Debug)]
pub(crate) struct BlobTarget {
    /// Where a registry has it.
    pub source: Source,
    /// The bootstrap layer that names the pieces.
    pub bootstrap: ObjectId,
    /// The manifest, where that layer is encrypted.
    pub manifest: Option<ObjectId>,
    /// The pieces.
    pub table: Arc<PieceTable>,
    /// Where they are kept.
    pub handle: BlobHandle,
    /// Where they came from.
    pub origins: Arc<PieceOrigins>,
    /// The same blob in other images that agree about the pieces that they share; they may name pieces that this one
    /// does not.
    pub others: Vec<Arc<BlobTarget>>,
}

/// All that is needed to fetch, verify and keep an object.
#[derive(Debug)]
pub(crate) struct ObjectTarget {
    /// Where a registry has it.
    pub source: Source,
    /// Its digest.
    pub id: ObjectId,
    /// Which of the registry's two stores holds it.
    pub kind: ObjectKind,
    /// Its size where a descriptor tells it, otherwise the most that is accepted.
    pub limit: u64,
}

/// All that is needed to get the hash list of a blob; at the registry, that is the blob itself.
#[derive(Debug)]
pub(crate) struct ListTarget {
    /// Where a registry has the blob.
    pub source: Source,
    /// The blob.
    pub blob: BlobId,
}

impl Target {
    /// The event that makes the target known to the scheduler.
    pub(crate) fn event(&self, blob: BlobKey) -> Event {
        match self {
            Self::Blob(target) => {
                let extents: Arc<[Range<u64>]> = (0..target.table.len())
                    .map(|n| target.table.piece(n).map(|piece| piece.encoded()).unwrap_or_default())
                    .collect();
                Event::BlobAdded { blob, extents, present: target.handle.present() }
            }
            Self::Object(_) | Self::List(_) => {
                // Its size may be unknown, and the scheduler only cares that there is something.
                let whole: Arc<[Range<u64>]> = Arc::new([Range { start: 0, end: 1 }]);
                Event::BlobAdded { blob, extents: whole, present: shoal_proto::Bitfield::new(1) }
            }
        }
    }

    /// Whether it is about a blob that no image describes.
    pub(super) fn is_plain(&self) -> bool {
        match self {
            Self::Blob(target) => plain::is_plain(target.bootstrap, target.table.blob()),
            Self::List(_) => true,
            Self::Object(_) => false,
        }
    }

    /// Adds what another image knows of the same blob.
    pub(crate) fn merge(&mut self, other: &Self) {
        if let (Self::Blob(mine), Self::Blob(theirs)) = (self, other)
            && mine.bootstrap != theirs.bootstrap
            && !mine.others.iter().any(|known| known.bootstrap == theirs.bootstrap)
        {
            let others = mine.others.iter().chain([theirs]).cloned().collect();
            *mine = Arc::new(BlobTarget {
                source: mine.source.clone(),
                bootstrap: mine.bootstrap,
                manifest: mine.manifest,
                table: mine.table.clone(),
                handle: mine.handle.clone(),
                origins: mine.origins.clone(),
                others,
            });
        }
    }
}

impl BlobTarget {
    /// The piece, and the blob as an image sees it that names this piece.
    pub(super) fn naming(&self, piece: u32) -> Option<(&Self, &Piece)> {
        let named = |blob: &'_ Self| blob.table.piece(piece).is_some();
        let blob = if named(self) { self } else { self.others.iter().find(|other| named(other))? };
        Some((blob, blob.table.piece(piece)?))
    }

    /// Where the store has the same content, probably encoded the same way, as part of another blob.
    pub(super) fn elsewhere(&self, store: &Store, piece: u32) -> Option<(ChunkPlace, Range<u64>)> {
        let (named, layout) = self.naming(piece)?;
        let found = store.find_digest(&layout.chunks().first()?.digest).unwrap_or_else(|error| {
            tracing::warn!("cannot look for a chunk: {}", crate::chain(&error));
            None
        });
        let length = |range: &Range<u64>| range.end - range.start;
        let same_length = |found: &Range<u64>| length(found) == length(&layout.encoded());
        found.filter(|(place, encoded)| place.key != named.handle.key() && same_length(encoded))
    }
}
