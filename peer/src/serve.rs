//! What this node answers to others: pieces and objects that are here, and, as a home, those that it first has to get.
//!
//! A piece is named by its fingerprint, so what is sent is what the asker's image means by it, whichever image brought
//! it here. Only a seed peer reads the registry for others, only registries that its configuration lists, and only with
//! its own credentials; everybody else says that it cannot.

use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream::FuturesUnordered};
use shoal_proto::{Asked, BlobId, Fingerprint, ObjectId, ObjectKind, PeerId, Priority, Request};
use shoal_rafs::oci::Source;
use shoal_scheduler::{Item, Origin as WantOrigin};

use crate::{
    data::{AnswerSender, PeerContext, SendError, Service},
    driver::DriverHandle,
    fetch::MAX_OBJECT,
    images::{ImageBlob, Images},
};

/// What an asker is told to expect of a registry read; the next word comes with the data.
const REGISTRY_ETA: Duration = Duration::from_secs(5);

/// Whether, and for which registries, this node is a home.
#[derive(Debug, Clone)]
pub(crate) enum HomeDuty {
    /// Not a seed peer.
    None,
    /// A seed peer: registries it reads for others; `*` is any.
    Registries(Vec<String>),
}

impl HomeDuty {
    fn allows(&self, source: &Source) -> Result<(), &'static str> {
        match self {
            Self::None => Err("not a seed peer"),
            // A layout is a folder of this host: whoever names one would choose what this node reads.
            Self::Registries(_) if source.is_layout() => Err("a folder is not a registry"),
            Self::Registries(list) if list.iter().any(|one| one == "*" || one == source.registry()) => Ok(()),
            Self::Registries(_) => Err("this seed peer does not read that registry for others"),
        }
    }
}

/// The data plane's service.
#[derive(Debug, Clone)]
pub(crate) struct Server {
    pub me: PeerId,
    pub images: Images,
    pub driver: DriverHandle,
    pub duty: HomeDuty,
    pub runtime: tokio::runtime::Handle,
}

impl Service for Server {
    fn handle(&self, peer: PeerContext, request: Request, answers: AnswerSender) {
        let server = self.clone();
        self.runtime.spawn(async move {
            tracing::trace!(peer = %peer.peer, ?request, "asked");
            // An asker that has gone, or cancelled, ends the answer: there is nobody to tell.
            let _ = server.answer(request, answers).await;
        });
    }
}

/// The asker is gone.
struct Gone;

impl From<SendError> for Gone {
    fn from(_: SendError) -> Self {
        Self
    }
}

impl Server {
    async fn answer(&self, request: Request, mut answers: AnswerSender) -> Result<(), Gone> {
        let image = match Source::new(&request.image.registry, &request.image.repository) {
            Ok(image) => image,
            Err(error) => return Ok(answers.cannot_source(crate::chain(&error)).await?),
        };
        let wish = Wish { image, priority: request.priority, source: request.source, deadline: request.deadline };
        let answered = match request.what {
            Asked::Object { id, kind } => self.object(&wish, id, kind, &mut answers).await,
            Asked::Pieces { bootstrap, blob, first, fingerprints } => {
                self.pieces(&wish, bootstrap, blob, first, &fingerprints, &mut answers).await
            }
        };
        match answered {
            Ok(()) => Ok(answers.end().await?),
            Err(Stop::Gone) => Err(Gone),
            Err(Stop::NotMyHome(home)) => Ok(answers.not_my_home(vec![home]).await?),
            Err(Stop::CannotSource(reason)) => Ok(answers.cannot_source(reason).await?),
        }
    }

    async fn object(
        &self,
        wish: &Wish,
        id: ObjectId,
        kind: ObjectKind,
        answers: &mut AnswerSender,
    ) -> Result<(), Stop> {
        let bytes = match self.images.stored(id).await {
            Some(bytes) => bytes,
            None if !wish.source => return Ok(answers.not_have(0).await?),
            None => {
                self.may_source(wish, Item { blob: id.into(), piece: 0 }).await?;
                answers.pending(REGISTRY_ETA).await?;
                let fetched = self.images.fetch_object(&wish.image, id, kind, MAX_OBJECT, WantOrigin::ForPeer);
                let fetched = tokio::time::timeout(wish.deadline, fetched).await;
                fetched
                    .map_err(|_| Stop::CannotSource("the deadline passed".into()))?
                    .map_err(|error| Stop::CannotSource(error.to_string()))?
            }
        };
        send(answers, 0, bytes).await
    }

    async fn pieces(
        &self,
        wish: &Wish,
        layer: ObjectId,
        blob: BlobId,
        first: u32,
        fingerprints: &[Fingerprint],
        answers: &mut AnswerSender,
    ) -> Result<(), Stop> {
        let mut missing = Vec::new();
        for (piece, fingerprint) in (first..).zip(fingerprints) {
            match self.images.blob_agreeing(blob, piece, fingerprint) {
                Some(here) if here.handle.is_present(piece) => {
                    // Room first, then the bytes: what waits for a slow network waits on the disk.
                    answers.reserve(here.encoded_len(piece)).await?;
                    match read(here, piece).await {
                        Some(bytes) => send(answers, piece, bytes).await?,
                        None => missing.push((piece, *fingerprint)),
                    }
                }
                _ => missing.push((piece, *fingerprint)),
            }
        }
        if wish.source && !missing.is_empty() {
            return self.source(wish, layer, blob, missing, answers).await;
        }
        for (piece, _) in missing {
            answers.not_have(piece).await?;
        }
        Ok(())
    }

    /// As the home: gets what is missing, and passes each piece on as soon as it has verified.
    async fn source(
        &self,
        wish: &Wish,
        layer: ObjectId,
        blob: BlobId,
        missing: Vec<(u32, Fingerprint)>,
        answers: &mut AnswerSender,
    ) -> Result<(), Stop> {
        self.duty.allows(&wish.image).map_err(|why| Stop::CannotSource(why.into()))?;
        answers.pending(REGISTRY_ETA).await?;
        let image = self.images.by_layer(&wish.image, layer).await;
        let image = image.map_err(|error| Stop::CannotSource(crate::chain(&error)))?;
        let loaded = image.blobs.iter().find(|loaded| loaded.table.blob() == blob);
        let mut wanted = FuturesUnordered::new();
        for (piece, fingerprint) in missing {
            match loaded {
                Some(loaded) if loaded.agrees(piece, &fingerprint) => {
                    self.may_source(wish, Item { blob: loaded.key, piece }).await?;
                    wanted.push(self.get(wish, loaded.clone(), piece));
                }
                _ => answers.not_have(piece).await?,
            }
        }
        while let Some((piece, got)) = wanted.next().await {
            match got.map_err(Stop::CannotSource)? {
                Some(bytes) => send(answers, piece, bytes).await?,
                None => answers.not_have(piece).await?,
            }
        }
        Ok(())
    }

    async fn get(&self, wish: &Wish, blob: ImageBlob, piece: u32) -> (u32, Result<Option<Bytes>, String>) {
        let item = Item { blob: blob.key, piece };
        let got = self.driver.want(item, wish.priority, wish.deadline, WantOrigin::ForPeer).await;
        match got {
            Ok(_) => (piece, Ok(read(blob, piece).await)),
            Err(error) => (piece, Err(error.to_string())),
        }
    }

    /// Whether this node is to read the registry for the item.
    async fn may_source(&self, wish: &Wish, item: Item) -> Result<(), Stop> {
        self.duty.allows(&wish.image).map_err(|why| Stop::CannotSource(why.into()))?;
        match self.driver.home_of(item).await {
            Some(home) if home != self.me => Err(Stop::NotMyHome(home)),
            _ => Ok(()),
        }
    }
}

/// Why an answer ends before all that was asked for is answered.
enum Stop {
    /// The asker is gone.
    Gone,
    /// Somebody else is home.
    NotMyHome(PeerId),
    /// The registry cannot or may not be read.
    CannotSource(String),
}

impl From<SendError> for Stop {
    fn from(_: SendError) -> Self {
        Self::Gone
    }
}

async fn send(answers: &mut AnswerSender, piece: u32, bytes: Bytes) -> Result<(), Stop> {
    let length = bytes.len() as u64;
    answers.send_data(piece, bytes).await?;
    metrics::counter!("shoal_served_bytes_total").increment(length);
    Ok(())
}

/// What a request says beside what it asks for.
struct Wish {
    image: Source,
    priority: Priority,
    source: bool,
    deadline: Duration,
}

/// The encoded bytes of a piece that is here.
async fn read(blob: ImageBlob, piece: u32) -> Option<Bytes> {
    if !blob.handle.is_present(piece) {
        return None;
    }
    match tokio::task::spawn_blocking(move || blob.handle.read(piece)).await {
        Ok(Ok(bytes)) => bytes,
        Ok(Err(error)) => {
            tracing::warn!("cannot read piece {piece} from the store: {}", crate::chain(&error));
            None
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_home_reads_listed_registries_and_never_a_folder() {
        let source = |registry: &str| Source::new(registry, "app").unwrap();
        let listed = HomeDuty::Registries(vec!["r.example:5000".into()]);
        let any = HomeDuty::Registries(vec!["*".into()]);
        assert!(listed.allows(&source("r.example:5000")).is_ok());
        assert!(listed.allows(&source("r.example")).is_err());
        assert!(any.allows(&source("other")).is_ok());
        assert!(any.allows(&Source::layout(std::path::Path::new("/etc")).unwrap()).is_err());
        assert!(HomeDuty::None.allows(&source("r.example:5000")).is_err());
    }
}
