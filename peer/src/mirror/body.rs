//! The bytes of a plain blob on their way to a client, piece by piece, as they come.
//!
//! A client that is sent all of it may be sent pieces before the whole is verified, because it can compare the whole with its
//! digest itself. But never all of them: the last piece waits until this node has done so. What turns out wrong, or does not come,
//! is cut.

use std::{io, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, stream};
use shoal_proto::HashList;
use tokio::{
    sync::{OwnedSemaphorePermit, watch},
    time::timeout,
};

use crate::{
    driver::Fetched,
    mounts::blocking,
    node::Node,
    plain::{PlainBlob, Stage, want_piece},
};

/// How often a piece is looked for that keeps being evicted, or damaged, before it is read.
const LOOKS: usize = 3;

pub(super) struct PieceBody {
    node: Arc<Node>,
    plain: Arc<PlainBlob>,
    stage: watch::Receiver<Stage>,
    /// What is still to be sent.
    left: Range<u64>,
    patience: Duration,
    /// One answer at a time, until its last byte.
    _place: OwnedSemaphorePermit,
}

impl PieceBody {
    pub(super) fn new(
        node: Arc<Node>,
        plain: Arc<PlainBlob>,
        stage: watch::Receiver<Stage>,
        left: Range<u64>,
        patience: Duration,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self { node, plain, stage, left, patience, _place: place }
    }

    /// The bytes; after an error nothing follows.
    pub(super) fn stream(self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        stream::try_unfold(self, |mut body| async move {
            if body.left.is_empty() {
                return Ok(None);
            }
            let next = timeout(body.patience, body.next()).await;
            let next = next.unwrap_or_else(|_| Err("it does not come".into()));
            match next {
                Ok(bytes) => {
                    metrics::counter!("shoal_mirror_sent_bytes_total").increment(bytes.len() as u64);
                    Ok(Some((bytes, body)))
                }
                Err(why) => {
                    tracing::warn!(blob = %body.plain.id(), "an answer is cut: {why}");
                    metrics::counter!("shoal_mirror_cut_answers_total").increment(1);
                    Err(io::Error::other(why))
                }
            }
        })
    }

    async fn next(&mut self) -> Result<Bytes, String> {
        let piece = (self.left.start / HashList::PIECE) as u32;
        if piece + 1 == self.plain.blob.table.len() {
            self.verified().await?;
        }
        let bytes = self.piece(piece).await?;
        let start = u64::from(piece) * HashList::PIECE;
        let (from, to) = (self.left.start - start, (self.left.end - start).min(bytes.len() as u64));
        self.left.start = start + to;
        Ok(bytes.slice(from as usize..to as usize))
    }

    /// Waits until all of the blob was compared with its digest, and was right.
    async fn verified(&mut self) -> Result<(), String> {
        while !self.plain.is_verified() {
            let stage = self.stage.borrow_and_update().clone();
            match stage {
                Stage::Coming(coming) if Arc::ptr_eq(&coming, &self.plain) => {}
                Stage::Failed(why) => return Err(why.to_string()),
                _ => return Err("it is not what its digest says".into()),
            }
            self.stage.changed().await.map_err(|_| "the node is stopping")?;
        }
        Ok(())
    }

    async fn piece(&self, piece: u32) -> Result<Bytes, String> {
        for _ in 0..LOOKS {
            let plain = self.plain.clone();
            if let Some(bytes) = blocking(move || plain.read(piece)).await.map_err(|e| crate::chain(&e))? {
                return Ok(bytes);
            }
            let fetched = want_piece(&self.node.driver, &self.plain, piece, self.patience).await;
            if let Fetched::Piece { unkept: Some(bytes), .. } = fetched.map_err(|e| e.to_string())? {
                return Ok(bytes);
            }
        }
        Err(format!("piece {piece} is evicted before it is read"))
    }
}
