//! Reading a whole blob at the registry, to make its hash list.
//!
//! ```text
//! registry --1 MiB--> sha256 of all, BLAKE3 of each --> spool --sha256 is right--> store, present --> list beside it
//! ```
//!
//! Until the last byte has come nobody can tell what the first ones are, so all wait in a file without a name: nothing of a
//! blob that turns out wrong is ever in the store. Memory: one piece. Nothing is kept of a read that breaks off.

use std::{ops::Range, os::unix::fs::FileExt, sync::Arc};

use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use sha2::{Digest, Sha256};
use shoal_proto::{BlobId, HashList, HashListError, ObjectId, Priority};
use shoal_rafs::oci::{RegistryError, Source};

use super::{hash, table};
use crate::{
    data::Throttle,
    fetch::Fetcher,
    mounts::blocking,
    origin::OriginError,
    store::{BlobHandle, Spool, Store, StoreError},
    traffic::{Provenance, Traffic},
};

/// Why there is no list.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WholeError {
    /// The registry did not give the blob, or gave something else.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// There is no room for it, or the disk fails.
    #[error("blob {blob} cannot be kept")]
    Store {
        /// The blob.
        blob: BlobId,
        /// Why not.
        #[source]
        source: StoreError,
    },
    /// It is larger than such blobs may be, or empty.
    #[error("blob {blob}")]
    Size {
        /// The blob.
        blob: BlobId,
        /// Which.
        #[source]
        source: HashListError,
    },
}

impl From<RegistryError> for WholeError {
    fn from(error: RegistryError) -> Self {
        Self::Origin(error.into())
    }
}

/// A blob that is being read.
pub(crate) struct Whole {
    blob: BlobId,
    source: Source,
    size: u64,
    parts: BoxStream<'static, Result<(u32, Bytes), OriginError>>,
    /// Gone while a thread works with it.
    state: Option<State>,
    store: Store,
    pace: Arc<Throttle>,
    traffic: Arc<Traffic>,
}

struct State {
    spool: Spool,
    hasher: Sha256,
    digests: Vec<[u8; 32]>,
    /// What is to become of it, once all of it has come and is right.
    right: Option<Right>,
}

struct Right {
    list: Bytes,
    handle: BlobHandle,
    /// Pieces that are in the store.
    kept: u32,
}

impl Whole {
    pub(crate) async fn begin(
        fetcher: &Fetcher,
        source: &Source,
        blob: BlobId,
        priority: Priority,
    ) -> Result<Self, WholeError> {
        let id = ObjectId::new(*blob.as_bytes());
        let size = fetcher.origin.registry().blob_size(source, id).await?;
        let size = size.ok_or_else(|| RegistryError::NotFound { what: format!("{source}@sha256:{blob}") })?;
        if size == 0 || size > HashList::MAX_BLOB {
            return Err(WholeError::Size { blob, source: HashListError::Size(size) });
        }
        let store = fetcher.store.clone();
        let spool = blocking(move || store.spool(size)).await.map_err(|source| WholeError::Store { blob, source })?;
        let parts = fetcher.origin.at(priority).whole(source, blob, size, HashList::PIECE).boxed();
        Ok(Self {
            blob,
            source: source.clone(),
            size,
            parts,
            state: Some(State { spool, hasher: Sha256::new(), digests: Vec::new(), right: None }),
            store: fetcher.store.clone(),
            pace: fetcher.whole_reads.clone(),
            traffic: fetcher.traffic.clone(),
        })
    }

    /// Goes one piece further; false when all of it is in the store.
    ///
    /// # Errors
    /// [`WholeError`]; nothing of it is kept then that was not verified.
    pub(crate) async fn step(&mut self, priority: Priority) -> Result<bool, WholeError> {
        let blob = self.blob;
        let broken = move |source| WholeError::Store { blob, source };
        // Whoever is asked for a next step after an error has none.
        let Some(mut state) = self.state.take() else { return Ok(false) };
        if state.right.is_some() {
            let size = self.size;
            let (state, more) = blocking(move || state.keep_next(size)).await.map_err(broken)?;
            self.state = Some(state);
            return Ok(more);
        }
        match self.parts.next().await {
            Some(part) => {
                let (number, bytes) = part?;
                self.pace.pass(bytes.len() as u64, priority).await;
                let length = bytes.len() as u64;
                self.state = Some(blocking(move || state.take_in(number, &bytes)).await.map_err(broken)?);
                self.traffic.piece(Provenance::Registry, length, 1);
            }
            None => {
                let found = ObjectId::new(std::mem::take(&mut state.hasher).finalize().into());
                let expected = ObjectId::new(*blob.as_bytes());
                if found != expected {
                    let what = format!("{}@sha256:{blob}", self.source);
                    return Err(
                        RegistryError::WrongDigest { what, expected, found: format!("sha256:{found}") }.into()
                    );
                }
                let list = HashList::new(self.size, std::mem::take(&mut state.digests));
                let list = list.map_err(|source| WholeError::Size { blob, source })?;
                let (store, table) = (self.store.clone(), table(blob, &list));
                let handle = blocking(move || store.open_blob(&table)).await.map_err(broken)?;
                state.right = Some(Right { list: list.encode().into(), handle, kept: 0 });
                self.state = Some(state);
            }
        }
        Ok(true)
    }

    /// The list of what the steps have brought.
    ///
    /// # Errors
    /// [`WholeError::Store`] when the list cannot be kept.
    pub(crate) async fn keep(self) -> Result<Bytes, WholeError> {
        let blob = self.blob;
        let failed = move |source| WholeError::Store { blob, source };
        let right = self.state.and_then(|state| state.right).ok_or(StoreError::Closed).map_err(failed)?;
        blocking(move || right.handle.put_list(&right.list).map(|()| right.list)).await.map_err(failed)
    }
}

impl State {
    fn take_in(mut self, number: u32, bytes: &[u8]) -> Result<Self, StoreError> {
        let writing = |source| StoreError::io("writing what is on its way", source);
        self.spool.file().write_all_at(bytes, range(number, u64::MAX).start).map_err(writing)?;
        self.hasher.update(bytes);
        self.digests.push(hash(bytes));
        Ok(self)
    }

    /// Moves one piece into the store; false when there is none left.
    fn keep_next(mut self, size: u64) -> Result<(Self, bool), StoreError> {
        let Some(right) = &mut self.right else { return Ok((self, false)) };
        let piece = right.kept;
        let range = range(piece, size);
        if range.is_empty() {
            return Ok((self, false));
        }
        let bytes = self.spool.read(range.clone()).map_err(|e| StoreError::io("reading what is on its way", e))?;
        right.handle.write(piece, &bytes)?;
        right.kept += 1;
        self.spool.release(range);
        Ok((self, true))
    }
}

/// Where a piece lies in a blob of `size` bytes; empty behind its end.
fn range(piece: u32, size: u64) -> Range<u64> {
    let start = u64::from(piece) * HashList::PIECE;
    start..(start + HashList::PIECE).min(size).max(start)
}
