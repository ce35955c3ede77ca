//! The files of an image that the kernel mounts without this daemon: its bootstrap, and the decoded form of each blob. They
//! are made of what is in the store, once that is all of the image.

use std::{io, path::PathBuf};

use shoal_proto::{BlobId, DecodedId, ObjectId};
use shoal_rafs::{DecodedPiece, expand_pieces};
use shoal_scheduler::{Event, Item};

use crate::{
    images::{Image, ImageBlob, NamedImage},
    mounts::blocking,
    node::Node,
    store::{Footprint, Store, StoreError},
};

/// Why the files were not made.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// Not all of the image is in the store.
    #[error("piece {piece} of blob {blob} is not here")]
    Incomplete {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
    },
    /// A piece does not verify any more. It counts as missing from now on.
    #[error("piece {piece} of blob {blob} is damaged in the store: {reason}")]
    Damaged {
        /// The blob.
        blob: BlobId,
        /// Number of the piece.
        piece: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk refused.
    #[error("cannot write a decoded form")]
    Write(#[from] io::Error),
}

/// What the files of an image are called.
#[derive(Debug)]
pub(crate) struct NativeNames {
    bootstrap: ObjectId,
    blobs: Vec<DecodedId>,
}

/// The files of an image.
#[derive(Debug)]
pub(crate) struct NativeFiles {
    /// Its bootstrap.
    pub(crate) bootstrap: PathBuf,
    /// The decoded forms of its blobs, in the order of its blob table.
    pub(crate) blobs: Vec<PathBuf>,
}

impl NativeNames {
    /// Hashes all that the image says of pieces.
    pub(crate) fn of(image: &Image) -> Self {
        Self { bootstrap: image.bootstrap, blobs: image.blobs.iter().map(|blob| blob.table.decoded_id()).collect() }
    }

    /// What the store must keep for the image to be mounted natively, and read by peers.
    pub(crate) fn needs(&self, NamedImage { needs, .. }: &NamedImage) -> Footprint {
        let mut needs = needs.clone();
        if !needs.objects.contains(&self.bootstrap) {
            needs.objects.push(self.bootstrap);
        }
        needs.decoded.clone_from(&self.blobs);
        needs
    }

    /// What the decoded forms of its blobs are called, in the order of its blob table.
    pub(crate) fn decoded(&self) -> &[DecodedId] {
        &self.blobs
    }

    /// Where the bootstrap is, or would be.
    pub(crate) fn bootstrap_path(&self, store: &Store) -> PathBuf {
        store.object_path(self.bootstrap)
    }

    /// The files, if all of them are there. Blocks.
    pub(crate) fn find(&self, store: &Store) -> Option<NativeFiles> {
        let blobs = self.blobs.iter().map(|id| store.decoded(*id)).collect::<Option<_>>()?;
        store.has_object(self.bootstrap).then(|| NativeFiles { bootstrap: self.bootstrap_path(store), blobs })
    }
}

/// Makes those files of an image that are not there. They are to be held meanwhile; see [`NativeNames::needs`].
///
/// # Errors
/// See [`NativeError`]. What was made until then stays.
pub(crate) async fn make(node: &Node, image: &std::sync::Arc<Image>) -> Result<NativeFiles, NativeError> {
    let (store, making) = (node.store.clone(), image.clone());
    let made = blocking(move || make_files(&store, &making)).await;
    if let Err(NativeError::Damaged { blob, piece, .. }) = &made
        && let Some(blob) = image.blob(*blob)
    {
        node.driver.event(Event::Lost { item: Item { blob: blob.key, piece: *piece } }).await;
    }
    made
}

/// Bytes on disk that decoding an image would add to the store.
pub(crate) fn missing_bytes(store: &Store, image: &Image) -> u64 {
    let missing = image.blobs.iter().zip(&image.native_names().blobs);
    let missing = missing.filter(|(_, id)| store.decoded(**id).is_none());
    missing.map(|(blob, _)| blob.table.decoded_form_bytes()).sum()
}

fn make_files(store: &Store, image: &Image) -> Result<NativeFiles, NativeError> {
    let names = image.native_names();
    for (blob, &id) in image.blobs.iter().zip(&names.blobs) {
        if store.decoded(id).is_none() {
            let len = blob.table.decoded_form_bytes();
            store.put_decoded(id, len, |file| expand_pieces(&blob.table, |piece| decoded(blob, piece), file))?;
        }
    }
    put_bootstrap(store, image)?;
    names.find(store).ok_or_else(|| StoreError::Full { what: "a decoded form".into() }.into())
}

/// Sees to it that the bootstrap of an image is a file.
pub(crate) fn put_bootstrap(store: &Store, image: &Image) -> Result<(), StoreError> {
    if store.has_object(image.bootstrap) {
        return Ok(());
    }
    let bytes = image.metadata.read().map_err(|source| StoreError::io("reading a bootstrap", source))?;
    store.put_object(image.bootstrap, &bytes)
}

/// A piece from the store, verified.
fn decoded(blob: &ImageBlob, piece: u32) -> Result<DecodedPiece, NativeError> {
    let id = blob.table.blob();
    let encoded = blob.handle.inspect(piece)?.ok_or(NativeError::Incomplete { blob: id, piece })?;
    blob.table.decode(piece, &encoded).or_else(|error| {
        blob.handle.forget(piece)?;
        Err(NativeError::Damaged { blob: id, piece, reason: crate::chain(&error) })
    })
}
