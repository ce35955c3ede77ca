//! The distribution API from the server's side: what a request asks for, and what answers look like. For the registry over a
//! layout and for the mirror.

mod path;

use axum::{
    body::Body,
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{ALLOW, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, WWW_AUTHENTICATE},
        response::Builder,
    },
    response::Response,
};
use shoal_proto::ObjectId;

pub(crate) use self::path::{ManifestName, PathError, Target, parse_range};

/// Says that the server speaks this API.
pub(crate) const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// An answer that is an error.
#[derive(Debug)]
pub(crate) struct Refusal {
    status: StatusCode,
    /// Of the distribution specification.
    code: &'static str,
    message: String,
    /// What a client could show to be let in.
    challenges: Vec<HeaderValue>,
    /// How long what was asked for is, of which a part was asked for that is not there.
    length: Option<u64>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), challenges: Vec::new(), length: None }
    }

    /// To whoever wants to write.
    pub(crate) fn read_only() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this registry can only be read")
    }

    /// The same, with what a client could show to be let in.
    pub(crate) fn challenging(mut self, challenges: Vec<HeaderValue>) -> Self {
        self.challenges = challenges;
        self
    }

    /// The same, with how long what was asked for is: for those who asked for a part of it that is not there.
    pub(crate) fn of_length(mut self, length: u64) -> Self {
        self.length = Some(length);
        self
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    pub(crate) fn response(self) -> Response {
        let body = serde_json::json!({ "errors": [{ "code": self.code, "message": self.message }] });
        let mut response = text(self.status, "application/json", body.to_string());
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        if let Some(length) = self.length
            && let Ok(value) = HeaderValue::from_str(&format!("bytes */{length}"))
        {
            response.headers_mut().insert(CONTENT_RANGE, value);
        }
        for challenge in self.challenges {
            response.headers_mut().append(WWW_AUTHENTICATE, challenge);
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
        Self::new(status, code, message)
    }
}

/// What a manifest says that it is, or what it looks like. `None` for what is no manifest: other blobs of a layout
/// are not served under that name.
pub(crate) fn media_type(bytes: &[u8]) -> Option<HeaderValue> {
    let value: serde_json::Value = serde_json::from_slice(bytes).ok()?;
    let list = value.get("manifests").is_some();
    if !list && value.get("layers").is_none() {
        return None;
    }
    let said = value.get("mediaType").and_then(|said| said.as_str());
    HeaderValue::from_str(said.unwrap_or(if list { OCI_INDEX } else { OCI_MANIFEST })).ok()
}

/// Adds the headers that name what is sent.
pub(crate) fn named(response: Builder, id: ObjectId) -> Builder {
    response.header(DIGEST, format!("sha256:{id}")).header(ETAG, format!("\"sha256:{id}\""))
}

pub(crate) fn text(status: StatusCode, media_type: &'static str, text: String) -> Response {
    let response = Response::builder().status(status).header(CONTENT_TYPE, media_type);
    finish(response.header(CONTENT_LENGTH, text.len()), Body::from(text))
}

/// An answer whose headers are printable ASCII.
pub(crate) fn finish(response: Builder, body: Body) -> Response {
    response.body(body).expect("all headers are printable ASCII")
}
