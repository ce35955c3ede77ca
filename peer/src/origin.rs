//! Back-to-source: pieces and objects read from the registry, as few requests as bytes allow.
//!
//! Pieces that lie next to each other, or nearly so, are read with one ranged request and handed on one by one as they
//! complete. What is handed on is *encoded and unverified*: whoever asked decodes it with the piece table, which is the
//! one place where bytes become trusted. Objects are verified here, whole.
//!
//! Memory: at most one piece and one network buffer per stream. Everything queues for a slot, on-demand first, and, if
//! there is a byte budget, for that. No retries of whole requests beyond those of the client, except that a transfer
//! that breaks half-way goes on where it broke.

mod budget;
mod join;
mod slots;

use std::{
    collections::VecDeque,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use shoal_proto::{BlobId, ObjectId, Priority};
use shoal_rafs::{
    PieceTable,
    oci::{BlobStream, Registry, RegistryError, Source},
};

use self::{
    budget::Budget,
    join::Read,
    slots::{Slot, Slots},
};

/// How often in a row a transfer may break without a single new byte before it is given up.
const FRUITLESS: u32 = 2;

/// How the registry is read.
#[derive(Debug, Clone)]
pub struct OriginOptions {
    /// Pieces with at most this many bytes between them share a request. Default 64 KiB: less than what a request costs
    /// in time on a long path.
    pub gap: u64,
    /// Most bytes of one request, unless a single piece is larger. Default 16 MiB, a stripe.
    pub max_request: u64,
    /// Requests at a time. Default 16.
    pub concurrency: usize,
    /// Of these, kept free for on-demand reads. Default 4.
    pub reserved_on_demand: usize,
    /// Bytes per second, over all requests. Default none. On-demand reads may run one second ahead of it.
    pub rate_bytes_per_s: Option<u64>,
}

impl Default for OriginOptions {
    fn default() -> Self {
        Self { gap: 64 << 10, max_request: 16 << 20, concurrency: 16, reserved_on_demand: 4, rate_bytes_per_s: None }
    }
}

/// What was asked of registries so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OriginStats {
    /// Requests for bytes; look-ups and retries inside the client are not counted.
    pub requests: u64,
    /// Bytes of bodies received: pieces, gaps between them, objects.
    pub received_bytes: u64,
}

/// Which path of the registry has an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ObjectKind {
    /// A manifest or an index.
    Manifest,
    /// Anything else: configs, bootstrap layers.
    Blob,
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

/// Reads registries within limits that all reads of this node share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Origin {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    registry: Registry,
    options: OriginOptions,
    slots: Slots,
    budget: Option<Mutex<Budget>>,
    started: Instant,
    requests: AtomicU64,
    received_bytes: AtomicU64,
}

impl Origin {
    /// Reads through this client.
    pub fn new(registry: Registry, options: OriginOptions) -> Self {
        let slots = Slots::new(options.concurrency, options.reserved_on_demand);
        let budget = options.rate_bytes_per_s.map(|rate| Mutex::new(Budget::new(rate)));
        Self {
            shared: Arc::new(Shared {
                registry,
                options,
                slots,
                budget,
                started: Instant::now(),
                requests: AtomicU64::new(0),
                received_bytes: AtomicU64::new(0),
            }),
        }
    }

    /// The client.
    pub fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    /// Counters so far.
    pub fn stats(&self) -> OriginStats {
        OriginStats {
            requests: self.shared.requests.load(Ordering::Relaxed),
            received_bytes: self.shared.received_bytes.load(Ordering::Relaxed),
        }
    }

    /// Reads pieces of a blob: each of `pieces` once with its encoded bytes, in the order of the blob. After an error
    /// nothing follows; what came before is good. Dropping the stream ends the transfer and frees its slot.
    pub fn pieces(
        &self,
        source: &Source,
        table: &PieceTable,
        pieces: &[u32],
        priority: Priority,
    ) -> impl Stream<Item = Result<(u32, Bytes), OriginError>> + Send + use<> {
        let blob = table.blob();
        let ranges: Result<Vec<_>, _> = pieces
            .iter()
            .map(|&piece| match table.piece(piece) {
                Some(found) => Ok((piece, found.encoded())),
                None => Err(OriginError::Unnamed { blob, piece }),
            })
            .collect();
        let (shared, source) = (self.shared.clone(), source.clone());
        let run = ranges.map(|ranges| {
            let reads = join::join(ranges, shared.options.gap, shared.options.max_request).into();
            Run { shared, source, blob, priority, reads, current: None }
        });
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
        priority: Priority,
    ) -> Result<Bytes, OriginError> {
        let shared = &self.shared;
        // How much there is to pay for is known afterwards only.
        shared.pay(0, priority).await;
        let _slot = shared.slots.acquire(priority).await;
        shared.requests.fetch_add(1, Ordering::Relaxed);
        let bytes = match kind {
            ObjectKind::Manifest => shared.registry.manifest(source, id).await?,
            ObjectKind::Blob => shared.registry.blob(source, id, limit).await?,
        };
        if bytes.len() as u64 > limit {
            return Err(RegistryError::TooLarge { what: format!("{source}@sha256:{id}"), limit }.into());
        }
        shared.received_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        shared.debit(bytes.len() as u64);
        Ok(bytes)
    }
}

impl Shared {
    /// Waits until the budget allows `bytes` more, and takes them.
    async fn pay(&self, bytes: u64, priority: Priority) {
        let Some(budget) = &self.budget else { return };
        loop {
            let taken =
                budget.lock().unwrap_or_else(PoisonError::into_inner).take(self.started.elapsed(), bytes, priority);
            match taken {
                Ok(()) => return,
                Err(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    fn debit(&self, bytes: u64) {
        if let Some(budget) = &self.budget {
            budget.lock().unwrap_or_else(PoisonError::into_inner).debit(bytes);
        }
    }
}

/// The reads of one call, one after the other.
struct Run {
    shared: Arc<Shared>,
    source: Source,
    blob: BlobId,
    priority: Priority,
    reads: VecDeque<Read>,
    current: Option<Transfer>,
}

/// A request under way.
struct Transfer {
    stream: BlobStream,
    pieces: VecDeque<(u32, Range<u64>)>,
    end: u64,
    /// Bytes of the blob from `at` on that have come and are not handed on.
    buffer: BytesMut,
    at: u64,
    fruitless: u32,
    _slot: Slot,
}

impl Run {
    async fn next(&mut self) -> Result<Option<(u32, Bytes)>, OriginError> {
        loop {
            if let Some(transfer) = &mut self.current {
                if let Some(piece) = transfer.complete() {
                    return Ok(Some(piece));
                }
                if !transfer.pieces.is_empty() {
                    self.receive().await?;
                    continue;
                }
            }
            self.current = None;
            let Some(read) = self.reads.pop_front() else { return Ok(None) };
            self.current = Some(self.begin(read).await?);
        }
    }

    /// Takes `&mut self`, as everything here, because a stream cannot be looked at from two threads.
    async fn begin(&mut self, read: Read) -> Result<Transfer, OriginError> {
        let (at, end) = (read.range.start, read.range.end);
        self.shared.pay(end - at, self.priority).await;
        let slot = self.shared.slots.acquire(self.priority).await;
        let stream = self.open(read.range).await?;
        let pieces = read.pieces.into();
        Ok(Transfer { stream, pieces, end, buffer: BytesMut::new(), at, fruitless: 0, _slot: slot })
    }

    async fn open(&mut self, range: Range<u64>) -> Result<BlobStream, RegistryError> {
        self.shared.requests.fetch_add(1, Ordering::Relaxed);
        self.shared.registry.blob_range(&self.source, self.blob, range).await
    }

    /// Takes one more chunk from the network, going on with a new request where the old one broke.
    async fn receive(&mut self) -> Result<(), OriginError> {
        let Some(transfer) = &mut self.current else { return Ok(()) };
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
        let stream = self.open(rest).await?;
        if let Some(transfer) = &mut self.current {
            transfer.stream = stream;
        }
        Ok(())
    }
}

impl Transfer {
    /// The next piece, if all its bytes have come. Gaps are dropped as they come.
    fn complete(&mut self) -> Option<(u32, Bytes)> {
        let (piece, range) = self.pieces.front()?.clone();
        let skip = (range.start - self.at).min(self.buffer.len() as u64);
        self.buffer.advance(skip as usize);
        self.at += skip;
        let length = range.end - range.start;
        if self.at < range.start || (self.buffer.len() as u64) < length {
            return None;
        }
        self.pieces.pop_front();
        self.at += length;
        Some((piece, self.buffer.split_to(length as usize).freeze()))
    }
}

#[cfg(test)]
mod tests;
