//! What can go wrong between this program and a registry.
//!
//! No value here ever holds a credential: URLs are reduced to host and path, and bodies are shown as a short excerpt.

use std::{io, ops::Range, time::Duration};

use shoal_proto::ObjectId;

use super::{AuthfileError, ManifestError, ReferenceError};

/// Longest excerpt of an error body that is kept, in bytes.
pub(super) const EXCERPT_BYTES: usize = 256;

/// Why an operation on a registry or a layout folder failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// There is no such manifest, blob, tag or repository.
    #[error("{what} not found")]
    NotFound {
        /// Host and path, or the name in a layout folder.
        what: String,
    },
    /// The registry wants other credentials than it was given, or any at all.
    #[error("{registry} refused the credentials for {repository} ({})", if *.given { "some were given" } else { "none were given" })]
    Unauthorized {
        /// The registry.
        registry: String,
        /// The repository.
        repository: String,
        /// Whether this program had credentials for it.
        given: bool,
    },
    /// What knows the credentials for the registry did not tell them.
    #[error(transparent)]
    Authfile(#[from] AuthfileError),
    /// The registry names a place to get tokens from that must not see the credentials.
    #[error("{registry} asks for tokens from {realm:?}, which is neither https nor on the same host")]
    BadRealm {
        /// The registry.
        registry: String,
        /// What it named, without query and user.
        realm: String,
    },
    /// The registry names a token server that is not known to be its own, so that it was not shown the credentials.
    #[error(
        "{registry} asks for tokens from {realm:?}, which is under another domain and was not shown the credentials; if it is \
         the right one, name {server} as a token server (--token-server, or registry.token_servers in the configuration)"
    )]
    UntrustedRealm {
        /// The registry.
        registry: String,
        /// What it named, without query and user.
        realm: String,
        /// Its host.
        server: String,
    },
    /// The registry has had enough of us (429).
    #[error("{registry} limits the rate of requests{}", .retry_after.map(|d| format!(", retry after {d:?}")).unwrap_or_default())]
    RateLimited {
        /// The registry.
        registry: String,
        /// What it asked to wait, if it said so.
        retry_after: Option<Duration>,
    },
    /// Any other answer that is not a success.
    #[error("{what}: status {status}: {body}")]
    Registry {
        /// Host and path.
        what: String,
        /// The HTTP status.
        status: u16,
        /// The beginning of the body, printable characters only.
        body: String,
        /// What a 503 asked to wait.
        retry_after: Option<Duration>,
    },
    /// The bytes are not those that the digest names.
    #[error("{what}: expected sha256:{expected}, got {found}")]
    WrongDigest {
        /// Host and path, or the file.
        what: String,
        /// The digest asked for.
        expected: ObjectId,
        /// The digest found, or said by the registry.
        found: String,
    },
    /// The registry answered a ranged read with something else.
    #[error("{what}: asked for bytes {}..{}, got {found}", .asked.start, .asked.end)]
    WrongRange {
        /// Host and path, or the file.
        what: String,
        /// The range asked for.
        asked: Range<u64>,
        /// The status and `Content-Range` that came.
        found: String,
    },
    /// The body ended early, or went on beyond its end.
    #[error("{what}: expected {expected} bytes, got {found}")]
    WrongLength {
        /// Host and path, or the file.
        what: String,
        /// Number of bytes expected.
        expected: u64,
        /// Number of bytes that came; one more than expected stands for any number more.
        found: u64,
    },
    /// The object is larger than the caller wants to hold.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// Host and path, or the file.
        what: String,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A redirect that must not or cannot be followed.
    #[error("{what}: redirected to {location:?}: {reason}")]
    Redirect {
        /// Host and path.
        what: String,
        /// Where to, without query and user.
        location: String,
        /// Why not.
        reason: &'static str,
    },
    /// An answer that breaks the distribution protocol.
    #[error("{what}: {reason}")]
    Protocol {
        /// Host and path.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// The connection could not be made, or broke.
    #[error("{what}: {}", transport_text(&**.source))]
    Transport {
        /// Host and path.
        what: String,
        /// The cause; its URL has been taken out.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Nothing came for the length of the time-out.
    #[error("{what}: no progress for {after:?}")]
    Timeout {
        /// Host and path.
        what: String,
        /// The time-out.
        after: Duration,
    },
    /// The proxy gave nothing, and there is no other way.
    #[error("through the proxy {proxy}")]
    Proxy {
        /// Its host and port.
        proxy: String,
        /// What went wrong there.
        source: Box<RegistryError>,
    },
    /// A file could not be read or written.
    #[error("{what}")]
    Io {
        /// What was done to which file.
        what: String,
        /// The cause.
        source: io::Error,
    },
    /// The layout folder is not one, or its index is broken.
    #[error("{dir}: {reason}")]
    Layout {
        /// The folder.
        dir: String,
        /// What is wrong.
        reason: String,
    },
    /// The operation does not fit this kind of place.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The manifest cannot be used.
    #[error("manifest sha256:{id}")]
    Manifest {
        /// Which manifest.
        id: ObjectId,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// The client could not be set up: certificates.
    #[error("cannot set up TLS: {reason}")]
    Tls {
        /// What is wrong, and in which file.
        reason: String,
    },
}

impl RegistryError {
    /// Whether the same request may succeed a little later. Wrong bytes count as permanent: the same registry gave them.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::RateLimited { .. } | Self::Transport { .. } | Self::Timeout { .. } | Self::WrongLength { .. } => {
                true
            }
            Self::Registry { status, .. } => *status >= 500 || *status == 408,
            // Bytes of a proxy may be others the next time.
            Self::Proxy { source, .. } => !matches!(**source, Self::NotFound { .. } | Self::Unauthorized { .. }),
            _ => false,
        }
    }

    /// How long the registry asked to wait, if it did.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Registry { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    pub(super) fn transport(what: &str, error: reqwest::Error) -> Self {
        Self::Transport { what: what.to_owned(), source: Box::new(error.without_url()) }
    }

    pub(super) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }
}

/// The whole chain in one line: the outer text of an HTTP error alone ("error sending request") says nothing.
fn transport_text(error: &(dyn std::error::Error + Send + Sync + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

/// The first printable characters of an error body, for a log line.
pub(super) fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(EXCERPT_BYTES)]);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}
