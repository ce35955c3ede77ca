//! What starts of images touch first, between nodes and the seed peers that keep it; see [`crate::starts`].
//!
//! Asking and telling are for nobody who waits: what fails is left at that. A seed peer takes in what is told of images that it
//! has itself passed on, and, where the image is loaded, only if the image has all those pieces. So a node that makes a trace up can
//! have others fetch pieces of an image that they have mounted anyway, and no more.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use shoal_proto::{
    Asked, FEATURE_START_TRACES, Message, ObjectId, ObjectKind, PeerId, Priority, Request, Role, StartTrace,
};

use super::Exchange;
use crate::{data::Answer, fetch::on_the_wire, images::Image, mounts::blocking};

/// Seed peers that are asked, in the order in which they would keep an image's traces: the second is for when the first has
/// just come or gone.
const KEEPERS: usize = 2;
/// How many nodes tell of their starts of an image, about, when all that are known start it: enough for the few starts that are
/// kept, and few enough for the one seed peer that keeps them.
const TELLERS: u64 = 32;
/// How long a connection to a keeper is waited for, and how often it is looked for one.
const CONNECTING: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(50);
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a keeper that is busy is asked again, and after how long at most.
const AGAIN: usize = 5;
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Exchange {
    /// What other starts of this image touched first, if anybody knows.
    pub(crate) async fn start_of(&self, image: &Image) -> Option<StartTrace> {
        for peer in self.keepers(image.layer).await {
            let bytes = if peer == self.parts.me {
                let (starts, layer) = (self.parts.starts.clone(), image.layer);
                blocking(move || starts.of(layer)).await
            } else {
                tokio::time::timeout(CONNECTING + PATIENCE, self.ask_for_start(peer, image)).await.ok().flatten()
            };
            let Some(bytes) = bytes else { continue };
            match StartTrace::parse(&bytes) {
                Ok(trace) => return Some(trace),
                Err(error) => tracing::debug!(%peer, "no trace of a start: {error}"),
            }
        }
        None
    }

    /// Tells the seed peer that keeps such things what this node's start of an image touched first. Of many nodes a few do.
    pub(crate) async fn tell_start(&self, image: &Image, trace: StartTrace) {
        if rand::random::<u64>() % self.parts.contacts.len().max(1) as u64 >= TELLERS {
            return;
        }
        for peer in self.keepers(image.layer).await {
            if peer == self.parts.me {
                return self.parts.starts.take_in(peer, image.layer, trace);
            }
            if self.parts.data.has_feature(peer, FEATURE_START_TRACES) {
                // Of many starts a few are told: where there is no room, the next one is.
                let _ = self.notify(peer, Message::Trace { bootstrap: image.layer, trace });
                return;
            }
        }
    }

    /// As a seed peer: takes in what another node tells.
    pub(super) fn heard_start(&self, peer: PeerId, layer: ObjectId, trace: StartTrace) {
        let parts = &self.parts;
        let fits = match parts.images.loaded(layer) {
            Some(image) => trace.pieces().all(|(blob, piece)| image.piece(blob, piece).is_some()),
            None => parts.images.has_layer(layer),
        };
        let taken = parts.role == Role::Seed && fits;
        metrics::counter!("shoal_start_traces_heard_total", "taken" => if taken { "yes" } else { "no" }).increment(1);
        if taken {
            parts.starts.take_in(peer, layer, trace);
        } else {
            tracing::debug!(%peer, %layer, "a trace of a start is not taken in");
        }
    }

    async fn keepers(&self, layer: ObjectId) -> Vec<PeerId> {
        let mut keepers = self.parts.driver.keepers(*layer.as_bytes()).await;
        keepers.truncate(KEEPERS);
        keepers
    }

    async fn ask_for_start(&self, peer: PeerId, image: &Image) -> Option<Bytes> {
        let data = &self.parts.data;
        data.connect(peer, &self.parts.contacts.addresses(peer));
        let looks = CONNECTING.as_millis() / LOOK.as_millis();
        for _ in 0..looks {
            if data.is_connected(peer) {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        if !data.has_feature(peer, FEATURE_START_TRACES) {
            return None;
        }
        for _ in 0..AGAIN {
            let request = Request {
                // The data plane numbers the requests of a connection.
                id: 0,
                image: on_the_wire(&image.source),
                what: Asked::Object { id: image.layer, kind: ObjectKind::StartTrace },
                priority: Priority::Prefetch,
                source: false,
                deadline: PATIENCE,
                lacks: 0,
            };
            let mut answers = data.request(peer, request, vec![StartTrace::MAX_ENCODED as u64]).await.ok()?;
            loop {
                match answers.next().await?.ok()? {
                    Answer::Data { bytes, .. } => return Some(bytes),
                    Answer::Busy { retry_after, .. } => {
                        tokio::time::sleep(retry_after.min(LONGEST_PAUSE)).await;
                        break;
                    }
                    Answer::Progress | Answer::Pending { .. } => {}
                    Answer::NotHave { .. } | Answer::NotMyHome { .. } | Answer::CannotSource { .. } => return None,
                }
            }
        }
        None
    }
}
