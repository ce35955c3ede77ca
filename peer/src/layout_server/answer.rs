//! Answers to requests.

use std::sync::{Arc, atomic::Ordering};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue, Method, StatusCode,
        header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, RANGE},
    },
    response::Response,
};
use shoal_proto::ObjectId;
use shoal_rafs::oci::{Layout, RegistryError};

use super::Shared;
use crate::distribution::{API_VERSION, ManifestName, Refusal, Target, finish, media_type, named, parse_range, text};

/// Largest manifest that is served as one.
const MAX_MANIFEST: u64 = 4 << 20;

pub(super) async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let answered = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => {
            Ok(text(StatusCode::OK, "text/plain; version=0.0.4", metrics(&shared)))
        }
        (method, path) => {
            shared.counters.requests.fetch_add(1, Ordering::Relaxed);
            match (method, Target::parse(path)) {
                (&Method::GET | &Method::HEAD, Ok(target)) => serve(&shared, target, request.headers()).await,
                (_, Ok(_)) => Err(Refusal::read_only()),
                (_, Err(error)) => Err(error.into()),
            }
        }
    };
    let mut response = answered.unwrap_or_else(Refusal::response);
    response.headers_mut().insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    if request.method() == Method::HEAD {
        // The length stays as it would be.
        *response.body_mut() = Body::empty();
    }
    response
}

async fn serve(shared: &Shared, target: Target, headers: &HeaderMap) -> Result<Response, Refusal> {
    match target {
        Target::Base => Ok(text(StatusCode::OK, "application/json", "{}".to_owned())),
        Target::Manifest { repository, name } => manifest(&shared.layout, &repository, name).await,
        Target::Blob { id, .. } => blob(&shared.layout, id, headers).await,
    }
}

fn metrics(shared: &Shared) -> String {
    let stats = shared.counters.read();
    let counter = |name, help, value| format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n");
    counter("shoal_layout_requests_total", "Requests answered, /metrics left out.", stats.requests)
        + &counter("shoal_layout_sent_bytes_total", "Bytes written to sockets, headers included.", stats.sent_bytes)
}

async fn manifest(layout: &Layout, repository: &str, name: ManifestName) -> Result<Response, Refusal> {
    let unknown =
        || Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format!("no such manifest in {repository}"));
    let id = match name {
        ManifestName::Digest(id) => id,
        ManifestName::Tag(tag) => tagged(layout, repository, &tag)?.ok_or_else(unknown)?,
    };
    let bytes = match layout.blob(id, None).await {
        Ok(stream) => stream.collect(MAX_MANIFEST).await?,
        Err(RegistryError::NotFound { .. }) => return Err(unknown()),
        Err(error) => return Err(error.into()),
    };
    let response = Response::builder()
        .header(CONTENT_TYPE, media_type(&bytes).ok_or_else(unknown)?)
        .header(CONTENT_LENGTH, bytes.len());
    Ok(finish(named(response, id), Body::from(bytes)))
}

/// The manifest that a tag means: `repository:tag` before the plain tag.
fn tagged(layout: &Layout, repository: &str, tag: &str) -> Result<Option<ObjectId>, Refusal> {
    let entries = match layout.entries() {
        Ok(entries) => entries,
        // Nothing has been pushed yet.
        Err(RegistryError::Layout { .. }) if !layout.dir().join("index.json").exists() => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let find = |name: &str| entries.iter().find(|entry| entry.tag.as_deref() == Some(name));
    Ok(find(&format!("{repository}:{tag}")).or_else(|| find(tag)).map(|entry| entry.manifest.id))
}

async fn blob(layout: &Layout, id: ObjectId, headers: &HeaderMap) -> Result<Response, Refusal> {
    let unknown = || Refusal::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("no such blob: sha256:{id}"));
    let size = layout.blob_size(id)?.ok_or_else(unknown)?;
    let header = headers.get(RANGE).and_then(|value| value.to_str().ok());
    let response = named(Response::builder(), id)
        .header(CONTENT_TYPE, "application/octet-stream")
        .header(ACCEPT_RANGES, "bytes");
    let (response, range) = match parse_range(header, size) {
        Ok(None) => (response, 0..size),
        Ok(Some(range)) => {
            let content_range = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            (response.status(StatusCode::PARTIAL_CONTENT).header(CONTENT_RANGE, content_range), range)
        }
        Err(()) => {
            let response = response.status(StatusCode::RANGE_NOT_SATISFIABLE);
            return Ok(finish(response.header(CONTENT_RANGE, format!("bytes */{size}")), Body::empty()));
        }
    };
    let length = range.end - range.start;
    // A range even for the whole: registries serve what they have, the reader verifies.
    let stream = layout.blob(id, Some(range)).await?;
    Ok(finish(response.header(CONTENT_LENGTH, length), Body::from_stream(stream)))
}

impl From<RegistryError> for Refusal {
    /// The cause goes to the log and not to the client: it names files.
    fn from(error: RegistryError) -> Self {
        tracing::error!(%error, "the layout cannot be read");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "the layout cannot be read")
    }
}
