//! Answers to requests that may be answered.

use std::{ops::Range, sync::Arc};

use axum::{
    body::Body,
    extract::Request,
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE},
    },
    response::Response,
};
use bytes::Bytes;
use shoal_proto::{BlobId, HashList, ObjectId, ObjectKind};
use shoal_rafs::oci::{Probe, Source};
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{Mirror, body::PieceBody, upstream::upstream};
use crate::{
    distribution::{ManifestName, Refusal, Target, finish, media_type, named, parse_range, text},
    images::{ImageError, MAX_MANIFEST},
    plain::{PlainBlob, Stage},
    serve::may_read,
};

/// A blob of this size and below is an object: one piece, which needs no list.
const OBJECT: u64 = HashList::PIECE;

/// What a request asks for beside its path.
struct Wish {
    head: bool,
    headers: HeaderMap,
}

impl Mirror {
    /// The head of an answer, which is here when its first byte could be. `place` is occupied until the last one has left.
    pub(super) async fn answer(
        self: Arc<Self>,
        request: Request,
        place: OwnedSemaphorePermit,
    ) -> Result<Response, Refusal> {
        let target = Target::parse(request.uri().path())?;
        let head = request.method() == Method::HEAD;
        if !head && request.method() != Method::GET {
            return Err(Refusal::read_only());
        }
        let registry =
            upstream(request.uri(), request.headers(), self.options.listen, &self.options.default_registry);
        let wish = Wish { head, headers: request.headers().clone() };
        match target {
            Target::Base => Ok(text(StatusCode::OK, "application/json", "{}".to_owned())),
            Target::Manifest { repository, name } => {
                self.manifest(&self.source(registry, &repository)?, name, &wish).await
            }
            Target::Blob { repository, id } => {
                let source = self.source(registry, &repository)?;
                self.blob(&source, id, &wish, place).await
            }
        }
    }

    /// The repository that is meant, if this mirror stands for its registry.
    fn source(&self, registry: Option<String>, repository: &str) -> Result<Source, Refusal> {
        let Some(registry) = registry else {
            let how = "the request names no registry: a query ns=HOST is missing";
            return Err(Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", how));
        };
        let source = Source::new(&registry, repository);
        let source = source.map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, "NAME_INVALID", e.to_string()))?;
        may_read(&self.options.registries, &source)
            .map_err(|_| Refusal::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no mirror of that registry"))?;
        Ok(source)
    }

    async fn manifest(&self, source: &Source, name: ManifestName, wish: &Wish) -> Result<Response, Refusal> {
        let probe = match name {
            ManifestName::Tag(tag) => Probe::Tag(tag),
            ManifestName::Digest(id) => Probe::Manifest(id),
        };
        let described = self.permissions.check(source, probe, &wish.headers).await?;
        let Some(id) = described.id else {
            return Err(unavailable("the registry does not say which manifest the tag means"));
        };
        let said = described.media_type.and_then(|said| HeaderValue::from_str(&said).ok());
        if wish.head
            && let (Some(size), Some(said)) = (described.size, &said)
        {
            let response = Response::builder().header(CONTENT_TYPE, said).header(CONTENT_LENGTH, size);
            return Ok(finish(named(response, id), Body::empty()));
        }
        let bytes = self.object(source, id, ObjectKind::Manifest, MAX_MANIFEST).await?;
        let Some(said) = said.or_else(|| media_type(&bytes)) else {
            return Err(unavailable("what the registry has under this name is no manifest"));
        };
        let response = Response::builder().header(CONTENT_TYPE, said).header(CONTENT_LENGTH, bytes.len());
        count_sent(bytes.len());
        Ok(finish(named(response, id), Body::from(bytes)))
    }

    async fn blob(
        self: &Arc<Self>,
        source: &Source,
        id: ObjectId,
        wish: &Wish,
        place: OwnedSemaphorePermit,
    ) -> Result<Response, Refusal> {
        let described = self.permissions.check(source, Probe::Blob(id), &wish.headers).await?;
        let size = described.size;
        if wish.head
            && let Some(size) = size
        {
            return Ok(ranged(id, None, size, Body::empty()));
        }
        if let Some(size) = size.filter(|&size| size <= OBJECT) {
            let bytes = self.object(source, id, ObjectKind::Blob, size).await?;
            let range = self.range(wish, bytes.len() as u64)?;
            let part =
                range.clone().map_or(bytes.clone(), |range| bytes.slice(range.start as usize..range.end as usize));
            count_sent(part.len());
            return Ok(ranged(id, range, bytes.len() as u64, Body::from(part)));
        }
        // A client can compare the whole with its digest, and a part with nothing.
        let asks_for_part = wish.headers.contains_key(RANGE);
        let mut stage = self.collector.bring(source, BlobId::new(*id.as_bytes()), size);
        let plain = begun(&mut stage, asks_for_part).await?;
        let range = self.range(wish, plain.size())?;
        if wish.head {
            return Ok(ranged(id, range, plain.size(), Body::empty()));
        }
        let sent = range.clone().unwrap_or(0..plain.size());
        let size = plain.size();
        let body = PieceBody::new(self.node.clone(), plain, stage, sent, self.options.patience, place);
        Ok(ranged(id, range, size, Body::from_stream(body.stream())))
    }

    fn range(&self, wish: &Wish, size: u64) -> Result<Option<Range<u64>>, Refusal> {
        let header = wish.headers.get(RANGE).and_then(|value| value.to_str().ok());
        parse_range(header, size).map_err(|()| {
            Refusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "RANGE_INVALID", "the range lies behind the end")
                .of_length(size)
        })
    }

    async fn object(&self, source: &Source, id: ObjectId, kind: ObjectKind, limit: u64) -> Result<Bytes, Refusal> {
        let object = self.node.images.object(source, id, kind, limit).await;
        object.map_err(|error: ImageError| {
            tracing::warn!("{source}: {}", crate::chain(&error));
            unavailable("neither the other nodes nor the registry give it")
        })
    }
}

/// Waits until there are bytes to send: of a part, until the whole is verified.
async fn begun(stage: &mut watch::Receiver<Stage>, asks_for_part: bool) -> Result<Arc<PlainBlob>, Refusal> {
    loop {
        let now = stage.borrow_and_update().clone();
        match now {
            Stage::Whole(plain) => return Ok(plain),
            Stage::Coming(plain) if !asks_for_part || plain.is_verified() => return Ok(plain),
            Stage::Failed(_) => return Err(unavailable("neither the other nodes nor the registry give it")),
            Stage::Coming(_) | Stage::Looking => {}
        }
        stage.changed().await.map_err(|_| unavailable("the node is stopping"))?;
    }
}

/// The head of a blob's answer: of a range of it, or of all.
fn ranged(id: ObjectId, range: Option<Range<u64>>, size: u64, body: Body) -> Response {
    let response = named(Response::builder(), id)
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(ACCEPT_RANGES, "bytes");
    let response = match range {
        None => response.header(CONTENT_LENGTH, size),
        Some(Range { start, end }) => response
            .status(StatusCode::PARTIAL_CONTENT)
            .header(CONTENT_RANGE, format!("bytes {start}-{}/{size}", end - 1))
            .header(CONTENT_LENGTH, end - start),
    };
    finish(response, body)
}

/// To a client that has the registry to turn to.
fn unavailable(why: &str) -> Refusal {
    Refusal::new(StatusCode::BAD_GATEWAY, "UNAVAILABLE", why)
}

fn count_sent(bytes: usize) {
    metrics::counter!("shoal_mirror_sent_bytes_total").increment(bytes as u64);
}
