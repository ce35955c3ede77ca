//! The part of a fetch that reads the registry: runs of pieces, objects, whole blobs.

use std::time::Instant;

use bytes::Bytes;
use futures::StreamExt;
use shoal_rafs::oci::{RegistryError, Source};
use shoal_scheduler::{Event, Failure};

use super::{BlobTarget, ListTarget, PROGRESS_INTERVAL, Running, Target, Wrong, accept::accept_piece};
use crate::{
    driver::Command,
    origin::OriginError,
    plain::{Whole, WholeError},
    traffic::Provenance,
};

/// Pieces that came together and are verified in one go, at most: handing each to another thread costs as much as a small one
/// takes. The first of them waits for the last.
const TOGETHER: usize = 16;

impl Running {
    pub(super) async fn read_registry(&self, pieces: &[u32]) {
        match &self.target {
            Target::Object(object) => {
                let (id, kind, limit) = (object.id, object.kind, object.limit);
                let origin = self.fetcher.origin.at(self.priority);
                match origin.object(&object.source, id, kind, limit).await {
                    Ok(bytes) => drop(self.take(0, bytes, Provenance::Registry, None).await),
                    Err(error) => self.registry_failed(&object.source, &error).await,
                }
            }
            Target::List(list) => match self.read_whole(list).await {
                Ok(bytes) => drop(self.take(0, bytes, Provenance::Registry, None).await),
                Err(WholeError::Origin(error)) => self.registry_failed(&list.source, &error).await,
                Err(error) => {
                    tracing::warn!(blob = %list.blob, "{}: {}", list.source, crate::chain(&error));
                    self.failed(Failure::Registry { retry_after: None, permanent: true }).await;
                }
            },
            Target::Blob(blob) => {
                let mut rest = pieces;
                while let Some((named, _)) = rest.first().and_then(|&piece| blob.naming(piece)) {
                    let run = rest.iter().take_while(|&&piece| named.table.piece(piece).is_some()).count();
                    self.read_run(named, &rest[..run]).await;
                    rest = &rest[run..];
                }
            }
        }
    }

    async fn read_run(&self, blob: &BlobTarget, pieces: &[u32]) {
        let read = self.fetcher.origin.at(self.priority).pieces(&blob.source, &blob.table, pieces);
        let mut read = std::pin::pin!(read.ready_chunks(TOGETHER));
        while let Some(ready) = read.next().await {
            let (mut came, mut broken) = (Vec::with_capacity(ready.len()), None);
            for next in ready {
                match next {
                    Ok(piece) => came.push(piece),
                    Err(error) => broken = Some(error),
                }
            }
            for _ in 0..self.take_all(came).await {
                self.fetcher.origin.registry().distrust(&blob.source);
                self.failed(Failure::WrongBytes).await;
            }
            if let Some(error) = broken {
                return self.registry_failed(&blob.source, &error).await;
            }
        }
    }

    /// As [`take`](Self::take) for pieces that the registry gave: in one go, of which the scheduler hears at once, or else it, and
    /// whoever waits, would be woken for each. Gives how many were wrong.
    async fn take_all(&self, came: Vec<(u32, Bytes)>) -> usize {
        let this = self.clone();
        let take = move || {
            let Target::Blob(blob) = &this.target else { return 0 };
            let (mut delivered, mut wrong) = (Vec::with_capacity(came.len()), 0);
            for (piece, bytes) in came {
                let length = bytes.len() as u64;
                let accepted = accept_piece(blob, piece, bytes, Provenance::Registry);
                match this.noted(piece, length, Provenance::Registry, accepted) {
                    Ok(command) => delivered.push(command),
                    Err(Wrong) => wrong += 1,
                }
            }
            // Here, so that what was kept is also told of when the fetch has been given up meanwhile.
            if let Some(commands) = this.fetcher.commands.upgrade() {
                // As for `send`.
                let _ = commands.blocking_send(Command::Together(delivered));
            }
            wrong
        };
        tokio::task::spawn_blocking(take).await.unwrap_or_else(|error| {
            // What did not come the scheduler has asked for elsewhere once this has ended.
            tracing::error!("pieces were not verified: {error}");
            0
        })
    }

    /// Reads a blob to make its hash list; once more where it was wrong and may have come from elsewhere than the registry.
    async fn read_whole(&self, list: &ListTarget) -> Result<Bytes, WholeError> {
        match self.read_whole_once(list).await {
            Err(WholeError::Origin(OriginError::Registry(error @ RegistryError::WrongDigest { .. })))
                if self.fetcher.origin.registry().distrust(&list.source) =>
            {
                tracing::warn!(blob = %list.blob, "{}: {error}: it is read again", list.source);
                self.read_whole_once(list).await
            }
            read => read,
        }
    }

    async fn read_whole_once(&self, list: &ListTarget) -> Result<Bytes, WholeError> {
        let mut told = Instant::now();
        let mut reading = Whole::begin(&self.fetcher, &list.source, list.blob, self.priority).await?;
        while reading.step(self.priority).await? {
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                self.report(Event::Progress { request: self.request }).await;
            }
        }
        reading.keep().await
    }

    async fn registry_failed(&self, source: &Source, error: &OriginError) {
        tracing::warn!("{source}: {}", crate::chain(error));
        let (retry_after, permanent) = match error {
            OriginError::Registry(error) => (error.retry_after(), !error.is_transient()),
            OriginError::Unnamed { .. } => (None, true),
        };
        self.failed(Failure::Registry { retry_after, permanent }).await;
    }
}
