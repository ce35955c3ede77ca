//! Back-to-source: pieces and objects read from the registry, as few requests as bytes allow.
//!
//! A run of pieces is read with one ranged request, gaps included, and handed on one by one as they complete; which pieces
//! make a run, the scheduler has decided. Pieces of a gzip layer may overlap: what two share comes once. What is handed on is *encoded and unverified*: whoever asked decodes it with the
//! piece table, which is the one place where bytes become trusted. Objects are verified here, whole.
//!
//! Memory: at most one piece, what it shares with others, and one network buffer per stream. How many requests there are at a time, and how many bytes
//! they may bring, the scheduler has decided before it asks, so nothing waits here. No retries of whole requests beyond
//! those of the client, except that a transfer that breaks half-way goes on where it broke.

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use shoal_proto::{BlobId, ObjectId, ObjectKind, Priority};
use shoal_rafs::{
    PieceTable,
    oci::{BlobStream, Registry, RegistryError, Source},
};

/// How often in a row a transfer may break without a single new byte before it is given up.
const FRUITLESS: u32 = 2;

/// What was asked of registries so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OriginStats {
    /// Requests for bytes; look-ups and retries inside the client are not counted.
    pub requests: u64,
    /// Bytes of bodies received: pieces, gaps between them, objects.
    pub received_bytes: u64,
}

/// Why the registry gave no piece.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The image does not name this piece.
    #[error("blob {blob} has no piece {piece} in this image")]
    Unnamed {
        /// The blob.
        blob: BlobId,
        /// The piece.
        piece: u32,
    },
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Reads registries. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Origin {
    registry: Registry,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    requests: AtomicU64,
    received_bytes: AtomicU64,
}

impl Origin {
    /// Reads through this client.
    pub fn new(registry: Registry) -> Self {
        Self { registry, shared: Arc::default() }
    }

    /// The same for reads of this priority, which whatever lies before the registry is told.
    pub fn at(&self, priority: Priority) -> Self {
        match priority {
            Priority::OnDemand => self.clone(),
            Priority::Prefetch => Self { registry: self.registry.in_background(), shared: self.shared.clone() },
        }
    }

    /// The client.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Counters so far.
    pub fn stats(&self) -> OriginStats {
        OriginStats {
            requests: self.shared.requests.load(Ordering::Relaxed),
            received_bytes: self.shared.received_bytes.load(Ordering::Relaxed),
        }
    }

    /// Reads pieces of a blob, in ascending order, with one request from the first byte of the first to the last of the
    /// last: each with its encoded bytes. After an error nothing follows; what came before is good. Dropping the stream
    /// ends the transfer.
    pub fn pieces(
        &self,
        source: &Source,
        table: &PieceTable,
        pieces: &[u32],
    ) -> impl Stream<Item = Result<(u32, Bytes), OriginError>> + Send + use<> {
        let blob = table.blob();
        let pieces = pieces.iter().map(|&piece| match table.piece(piece) {
            Some(found) => Ok((piece, found.encoded())),
            None => Err(OriginError::Unnamed { blob, piece }),
        });
        self.read(source, blob, pieces.collect())
    }

    /// Reads a whole blob of `size` bytes with one request, cut into parts of `part` bytes and a shorter last one.
    pub fn whole(
        &self,
        source: &Source,
        blob: BlobId,
        size: u64,
        part: u64,
    ) -> impl Stream<Item = Result<(u32, Bytes), OriginError>> + Send + use<> {
        let parts = (0..).zip((0..size).step_by(part as usize));
        self.read(source, blob, Ok(parts.map(|(number, at)| (number, at..size.min(at + part))).collect()))
    }

    fn read(
        &self,
        source: &Source,
        blob: BlobId,
        pieces: Result<VecDeque<(u32, Range<u64>)>, OriginError>,
    ) -> impl Stream<Item = Result<(u32, Bytes), OriginError>> + Send + use<> {
        let (registry, shared, source) = (self.registry.clone(), self.shared.clone(), source.clone());
        let run = pieces.map(|pieces| Run { registry, shared, source, blob, pieces, transfer: None });
        futures::stream::once(async { run }).flat_map(|run| match run {
            Err(error) => futures::stream::once(async { Err(error) }).left_stream(),
            Ok(run) => futures::stream::try_unfold(run, |mut run| async move {
                let piece = run.next().await?;
                Ok(piece.map(|piece| (piece, run)))
            })
            .right_stream(),
        })
    }

    /// Reads an object of at most `limit` bytes and verifies it.
    pub async fn object(
        &self,
        source: &Source,
        id: ObjectId,
        kind: ObjectKind,
        limit: u64,
    ) -> Result<Bytes, OriginError> {
        let shared = &self.shared;
        shared.requests.fetch_add(1, Ordering::Relaxed);
        let bytes = match kind {
            ObjectKind::Manifest => self.registry.manifest(source, id).await?,
            ObjectKind::Blob => self.registry.blob(source, id, limit).await?,
            ObjectKind::HashList | ObjectKind::StartTrace => {
                return Err(RegistryError::NotFound { what: format!("{kind:?} of {id} in {source}") }.into());
            }
        };
        if bytes.len() as u64 > limit {
            return Err(RegistryError::TooLarge { what: format!("{source}@sha256:{id}"), limit }.into());
        }
        shared.received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// The pieces of one call that are still to come.
struct Run {
    registry: Registry,
    shared: Arc<Shared>,
    source: Source,
    blob: BlobId,
    pieces: VecDeque<(u32, Range<u64>)>,
    transfer: Option<Transfer>,
}

/// The request under way.
struct Transfer {
    stream: BlobStream,
    /// Bytes of the blob from `at` to `end` are to come; those in the buffer have, and are not handed on.
    at: u64,
    end: u64,
    buffer: BytesMut,
    fruitless: u32,
}

impl Run {
    async fn next(&mut self) -> Result<Option<(u32, Bytes)>, OriginError> {
        while let Some((piece, range)) = self.pieces.front().cloned() {
            match &mut self.transfer {
                None => self.transfer = Some(self.begin(range.start).await?),
                Some(transfer) => match transfer.complete(&range, self.pieces.get(1).map(|(_, next)| next.start)) {
                    Some(bytes) => {
                        self.pieces.pop_front();
                        return Ok(Some((piece, bytes)));
                    }
                    None => self.receive().await?,
                },
            }
        }
        Ok(None)
    }

    /// Takes `&mut self`, as everything here, because a stream cannot be looked at from two threads.
    async fn begin(&mut self, at: u64) -> Result<Transfer, OriginError> {
        let end = self.pieces.iter().map(|(_, range)| range.end).max().unwrap_or(at);
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        let stream = self.registry.blob_range(&self.source, self.blob, at..end).await?;
        Ok(Transfer { stream, at, end, buffer: BytesMut::new(), fruitless: 0 })
    }

    /// Takes one more chunk from the network, going on with a new request where the old one broke.
    async fn receive(&mut self) -> Result<(), OriginError> {
        let Some(transfer) = &mut self.transfer else { return Ok(()) };
        let error = match transfer.stream.next().await {
            Some(Ok(chunk)) => {
                self.shared.received_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                transfer.fruitless = 0;
                transfer.buffer.extend_from_slice(&chunk);
                return Ok(());
            }
            Some(Err(error)) => error,
            // The stream checks its length, so this is a range that ended before its last piece: never.
            None => RegistryError::WrongLength {
                what: format!("blob {}", self.blob),
                expected: transfer.end,
                found: transfer.at + transfer.buffer.len() as u64,
            },
        };
        if !error.is_transient() || transfer.fruitless >= FRUITLESS {
            return Err(error.into());
        }
        transfer.fruitless += 1;
        let rest = transfer.at + transfer.buffer.len() as u64..transfer.end;
        tracing::debug!(%error, blob = %self.blob, ?rest, "a transfer broke and goes on");
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        let stream = self.registry.rest_of_range(&self.source, self.blob, rest).await?;
        if let Some(transfer) = &mut self.transfer {
            transfer.stream = stream;
        }
        Ok(())
    }
}

impl Transfer {
    /// The bytes of `range`, if all of them have come. What lies before it is dropped as it comes, and what lies before `next`,
    /// where the next piece starts, once it is handed on.
    fn complete(&mut self, range: &Range<u64>, next: Option<u64>) -> Option<Bytes> {
        let skip = range.start.saturating_sub(self.at).min(self.buffer.len() as u64);
        self.buffer.advance(skip as usize);
        self.at += skip;
        let length = range.end - range.start;
        if self.at < range.start || (self.buffer.len() as u64) < length {
            return None;
        }
        let done = next.map_or(length, |next| next.saturating_sub(self.at).min(length));
        self.at += done;
        if done == length {
            return Some(self.buffer.split_to(length as usize).freeze());
        }
        let bytes = Bytes::copy_from_slice(&self.buffer[..length as usize]);
        self.buffer.advance(done as usize);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests;
