//! The gate into the store: what comes, from whomever, is verified here or goes no further.

use std::sync::Arc;

use bytes::Bytes;

use super::{BlobTarget, ObjectTarget, Target};
use crate::{
    driver::Fetched,
    store::{Store, StoreError},
    traffic::Provenance,
};

/// Why a piece or an object was not accepted, and how many chunks were in it.
#[derive(Debug, thiserror::Error)]
#[error("{why}")]
pub(super) struct Rejected {
    pub(super) chunks: u64,
    why: String,
}

impl Target {
    /// The one gate into the store: verifies `bytes`, keeps them, and gives the decoded piece (or the object) with the
    /// number of chunks in it. A full disk does not fail it: what is verified is handed on without being kept.
    pub(super) async fn accept(
        self,
        store: Store,
        piece: u32,
        bytes: Bytes,
        from: Provenance,
    ) -> Result<(Fetched, u64), Rejected> {
        let checked = tokio::task::spawn_blocking(move || match self {
            Self::Blob(blob) => accept_piece(&blob, piece, bytes, from),
            Self::Object(object) => accept_object(&object, &store, bytes, from),
            Self::List(_) => {
                Err(Rejected { chunks: 0, why: "a list is not kept before its blob is verified".into() })
            }
        });
        checked.await.unwrap_or_else(|panic| Err(Rejected { chunks: 0, why: panic.to_string() }))
    }
}

pub(super) fn accept_piece(
    blob: &BlobTarget,
    piece: u32,
    bytes: Bytes,
    from: Provenance,
) -> Result<(Fetched, u64), Rejected> {
    let Some((named, layout)) = blob.naming(piece) else {
        return Err(Rejected { chunks: 0, why: "no image names this piece".into() });
    };
    let chunks = layout.chunks().len() as u64;
    let decoded = named.table.decode(piece, &bytes).map_err(|e| Rejected { chunks, why: crate::chain(&e) })?;
    for image in blob.others.iter().map(AsRef::as_ref).chain([blob]) {
        image.origins.note(piece, from);
    }
    let kept = named.handle.write(piece, &bytes);
    let unkept = kept.inspect_err(|error| not_kept(&format!("piece {piece} of blob {}", named.table.blob()), error));
    let unkept = unkept.is_err().then_some(bytes);
    Ok((Fetched::Piece { piece: Arc::new(decoded), from, unkept }, chunks))
}

fn accept_object(
    object: &ObjectTarget,
    store: &Store,
    bytes: Bytes,
    from: Provenance,
) -> Result<(Fetched, u64), Rejected> {
    use sha2::Digest;
    if sha2::Sha256::digest(&bytes)[..] != object.id.as_bytes()[..] {
        return Err(Rejected { chunks: 0, why: format!("not the object {}", object.id) });
    }
    if let Err(error) = store.put_object(object.id, &bytes) {
        not_kept(&format!("object {}", object.id), &error);
    }
    Ok((Fetched::Object { bytes, from }, 0))
}

/// Counts what is used but not kept. That there is no room is the usual reason, of which the store itself speaks.
fn not_kept(what: &str, error: &StoreError) {
    metrics::counter!("shoal_not_kept_total").increment(1);
    match error {
        StoreError::Full { .. } => tracing::debug!("{what} is used but not kept: {error}"),
        _ => tracing::warn!("{what} is used but not kept: {}", crate::chain(error)),
    }
}
