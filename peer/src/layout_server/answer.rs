//! Answers to requests.

use std::sync::{Arc, atomic::Ordering};

use axum::{
    body::Body,
    extract::{Request, State},
    http::{
        HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
        header::{ACCEPT_RANGES, ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, RANGE},
    },
    response::Response,
};
use shoal_proto::ObjectId;
use shoal_rafs::oci::{Layout, RegistryError};

use super::{
    Shared,
    path::{ManifestName, PathError, Target, parse_range},
};

const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Largest manifest that is served as one.
const MAX_MANIFEST: u64 = 4 << 20;

/// An answer that is an error: status, code of the distribution specification, text.
struct Refusal(StatusCode, &'static str, String);

pub(super) async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let target = Target::parse(request.uri().path());
    if target != Ok(Target::Metrics) {
        shared.counters.requests.fetch_add(1, Ordering::Relaxed);
    }
    let answered = match (request.method(), target) {
        (&Method::GET | &Method::HEAD, Ok(target)) => serve(&shared, target, request.headers()).await,
        (_, Ok(_)) => {
            Err(Refusal(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry can only be read".to_owned()))
        }
        (_, Err(error)) => Err(error.into()),
    };
    let mut response = answered.unwrap_or_else(Refusal::response);
    response.headers_mut().insert(VERSION, HeaderValue::from_static("registry/2.0"));
    if request.method() == Method::HEAD {
        // The length stays as it would be.
        *response.body_mut() = Body::empty();
    }
    response
}

async fn serve(shared: &Shared, target: Target, headers: &HeaderMap) -> Result<Response, Refusal> {
    match target {
        Target::Base => Ok(text(StatusCode::OK, "application/json", "{}".to_owned())),
        Target::Metrics => Ok(text(StatusCode::OK, "text/plain; version=0.0.4", metrics(shared))),
        Target::Manifest { repository, name } => manifest(&shared.layout, &repository, name).await,
        Target::Blob(id) => blob(&shared.layout, id, headers).await,
    }
}

fn metrics(shared: &Shared) -> String {
    let stats = shared.counters.read();
    let counter = |name, help, value| format!("# HELP {name} {help}\n# TYPE {name} counter\n{name} {value}\n");
    counter("shoal_layout_requests_total", "Requests answered, /metrics left out.", stats.requests)
        + &counter("shoal_layout_sent_bytes_total", "Bytes written to sockets, headers included.", stats.sent_bytes)
}

async fn manifest(layout: &Layout, repository: &str, name: ManifestName) -> Result<Response, Refusal> {
    let unknown = || Refusal(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format!("no such manifest in {repository}"));
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

/// What a manifest says that it is, or what it looks like. `None` for what is no manifest: other blobs of the layout
/// are not served under that name.
fn media_type(bytes: &[u8]) -> Option<HeaderValue> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let list = value.get("manifests").is_some();
    if !list && value.get("layers").is_none() {
        return None;
    }
    let said = value.get("mediaType").and_then(|said| said.as_str());
    HeaderValue::from_str(said.unwrap_or(if list { OCI_INDEX } else { OCI_MANIFEST })).ok()
}

async fn blob(layout: &Layout, id: ObjectId, headers: &HeaderMap) -> Result<Response, Refusal> {
    let unknown = || Refusal(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("no such blob: sha256:{id}"));
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

fn named(response: axum::http::response::Builder, id: ObjectId) -> axum::http::response::Builder {
    response.header(DIGEST, format!("sha256:{id}")).header(ETAG, format!("\"sha256:{id}\""))
}

fn text(status: StatusCode, media_type: &'static str, text: String) -> Response {
    let response = Response::builder().status(status).header(CONTENT_TYPE, media_type);
    finish(response.header(CONTENT_LENGTH, text.len()), Body::from(text))
}

fn finish(response: axum::http::response::Builder, body: Body) -> Response {
    response.body(body).expect("all headers above are printable ASCII")
}

impl Refusal {
    fn response(self) -> Response {
        let Self(status, code, message) = self;
        let body = serde_json::json!({ "errors": [{ "code": code, "message": message }] });
        let mut response = text(status, "application/json", body.to_string());
        if status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        response
    }
}

impl From<PathError> for Refusal {
    fn from(error: PathError) -> Self {
        let (status, code, message) = match error {
            PathError::Unknown => (StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no such path"),
            PathError::Name => (StatusCode::BAD_REQUEST, "NAME_INVALID", "invalid repository name"),
            PathError::Digest => (StatusCode::BAD_REQUEST, "DIGEST_INVALID", "the digest must be sha256"),
            PathError::Tag => (StatusCode::BAD_REQUEST, "TAG_INVALID", "invalid tag"),
        };
        Self(status, code, message.to_owned())
    }
}

impl From<RegistryError> for Refusal {
    /// The cause goes to the log and not to the client: it names files.
    fn from(error: RegistryError) -> Self {
        tracing::error!(%error, "the layout cannot be read");
        Self(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "the layout cannot be read".to_owned())
    }
}
