//! The OCI distribution protocol over HTTP: one request with its redirects, challenges, time-outs and tries.
//!
//! Redirects are followed here and not by the HTTP library, because what goes along is a matter of trust: credentials
//! are sent only to scheme, host and port of the registry itself, and nothing that began on https continues on http.
//! HTTP/1.1 only: many short ranged reads over several connections do not then share one flow-control window.

mod hosts;
mod probe;
mod progress;
mod realm;
mod request;
mod route;
mod token;
mod transport;

use std::{
    hash::{BuildHasher, RandomState},
    ops::Range,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use reqwest::{
    Method, Response, StatusCode, Url,
    header::{self, HeaderMap, HeaderValue},
};
use shoal_proto::{BlobId, ObjectId};

pub use self::{
    probe::{Access, Described, Probe},
    transport::{is_loopback_registry, is_public_registry},
};
pub(super) use self::{
    progress::Progress,
    request::{Body, Request},
    route::Route,
    transport::plain_client,
};
use self::{token::Grants, transport::Transport};
use super::{BlobStream, Reference, RegistryError, RegistryOptions, Source, error::excerpt, registry::MAX_MANIFEST};

/// Manifest kinds that this client understands, OCI and Docker, single and lists.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
/// First wait before a try; it doubles.
const BACKOFF: Duration = Duration::from_millis(200);
/// Most redirects that are followed for one request.
const MAX_REDIRECTS: usize = 5;
/// Most times that one request is made again with something else to show.
const MAX_RENEWALS: usize = 8;
/// When a registry ignores `Range`, up to this many bytes before the range are read and thrown away.
const MAX_SKIP: u64 = 1 << 20;
/// Most bytes of an error body that are read.
const MAX_ERROR_BODY: usize = 8 * 1024;

/// What a registry offers of a repository.
#[derive(Debug)]
pub(super) struct Http {
    pub(super) options: RegistryOptions,
    transport: Transport,
    grants: Arc<Grants>,
    /// Where it leads through a proxy.
    route: Option<Route>,
}

impl Http {
    pub(super) fn new(options: RegistryOptions) -> Result<Self, RegistryError> {
        let transport = Transport::new(&options)?;
        Ok(Self { options, transport, grants: Arc::default(), route: None })
    }

    /// Whether a registry is spoken to without TLS.
    pub(super) fn is_plain(&self, registry: &str) -> bool {
        self.transport.is_plain(registry)
    }

    pub(super) async fn resolve(&self, reference: &Reference) -> Result<(ObjectId, u64), RegistryError> {
        let path = format!("manifests/{}", reference.object());
        let head = self.request(Method::HEAD, reference.source(), &path)?.header(header::ACCEPT, ACCEPT);
        match self.send_retrying(&head).await {
            Ok(response) => {
                if let Some((id, size)) = announced(&response) {
                    return pinned(reference, id, size);
                }
            }
            // Some proxies know no HEAD.
            Err(RegistryError::Registry { status: 400 | 405 | 501, .. }) => {}
            Err(error) => return Err(error),
        }
        let bytes = self.document(reference.source(), &path).await?;
        pinned(reference, super::registry::sha256(&bytes), bytes.len() as u64)
    }

    pub(super) async fn manifest(&self, source: &Source, id: ObjectId) -> Result<Bytes, RegistryError> {
        let bytes = self.document(source, &format!("manifests/sha256:{id}")).await?;
        verified(source, id, bytes)
    }

    /// A manifest or index, unverified.
    async fn document(&self, source: &Source, path: &str) -> Result<Bytes, RegistryError> {
        let request = self.request(Method::GET, source, path)?.header(header::ACCEPT, ACCEPT);
        self.whole(&request, MAX_MANIFEST).await
    }

    pub(super) async fn blob(&self, source: &Source, id: ObjectId, limit: u64) -> Result<Bytes, RegistryError> {
        let request = self.request(Method::GET, source, &format!("blobs/sha256:{id}"))?;
        let bytes = self.whole(&request, limit).await?;
        verified(source, id, bytes)
    }

    /// A whole body in memory, tried again also when it breaks on the way.
    pub(super) async fn whole(&self, request: &Request<'_>, limit: u64) -> Result<Bytes, RegistryError> {
        let mut tries = self.tries();
        loop {
            let collected = match self.send(request).await {
                Ok(response) => self.collect(response, limit).await,
                Err(error) => Err(error),
            };
            match collected {
                Ok(bytes) => return Ok(bytes),
                Err(error) => tries.wait(error).await?,
            }
        }
    }

    pub(super) async fn blob_size(&self, source: &Source, id: ObjectId) -> Result<Option<u64>, RegistryError> {
        self.size_of(&self.request(Method::HEAD, source, &format!("blobs/sha256:{id}"))?).await
    }

    /// The size of what a HEAD asks about, or `None` when it is not there.
    pub(super) async fn size_of(&self, head: &Request<'_>) -> Result<Option<u64>, RegistryError> {
        match self.send_retrying(head).await {
            Ok(response) => Ok(Some(header_number(&response, &header::CONTENT_LENGTH).unwrap_or(0))),
            Err(RegistryError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn blob_range(
        &self,
        source: &Source,
        id: BlobId,
        range: Range<u64>,
    ) -> Result<BlobStream, RegistryError> {
        let path = format!("blobs/sha256:{id}");
        if range.is_empty() {
            return Ok(BlobStream::empty(path));
        }
        self.range_of(self.request(Method::GET, source, &path)?, range).await
    }

    /// A range, which is not empty, of what a request would get as a whole.
    pub(super) async fn range_of(
        &self,
        request: Request<'_>,
        range: Range<u64>,
    ) -> Result<BlobStream, RegistryError> {
        let asked = format!("bytes={}-{}", range.start, range.end - 1);
        let request = request.header(header::RANGE, &asked);
        match self.send_retrying(&request).await {
            Ok(response) => self.ranged(response, range),
            Err(RegistryError::Registry { what, status: 416, .. }) => {
                Err(RegistryError::WrongRange { what, asked: range, found: "status 416".to_owned() })
            }
            Err(error) => Err(error),
        }
    }

    /// The stream behind an answer to a ranged read, when it is the range that was asked for.
    fn ranged(&self, response: Response, range: Range<u64>) -> Result<BlobStream, RegistryError> {
        let what = describe(response.url());
        let status = response.status();
        let length = header_number(&response, &header::CONTENT_LENGTH);
        let content_range = response.headers().get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
        let wanted = range.end - range.start;
        let (skip, fits) = match status {
            StatusCode::PARTIAL_CONTENT => {
                let exact = content_range.and_then(parse_content_range) == Some(range.clone());
                (0, exact && length.is_none_or(|length| length == wanted))
            }
            StatusCode::OK => {
                (range.start, range.start <= MAX_SKIP && length.is_none_or(|length| length >= range.end))
            }
            _ => (0, false),
        };
        if !fits {
            let found = format!("status {}, content-range {content_range:?}, length {length:?}", status.as_u16());
            return Err(RegistryError::WrongRange { what, asked: range, found });
        }
        let cut = status == StatusCode::OK;
        let stream = BlobStream::from_response(response, what, (skip, wanted, cut), self.options.read_timeout);
        let Some(state) = self.route.as_ref().map(|route| route.state().clone()) else { return Ok(stream) };
        Ok(stream.reporting(move |error| state.failed(error)))
    }

    /// `https://host/v2/<repository>/<path>`, http where that is asked for.
    pub(super) fn request<'a>(
        &self,
        method: Method,
        source: &'a Source,
        path: &str,
    ) -> Result<Request<'a>, RegistryError> {
        let (registry, repository) = (source.registry(), source.repository());
        let scheme = if self.transport.is_plain(registry) { "http" } else { "https" };
        // Docker Hub is called by a name under which it does not serve.
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        let text = format!("{scheme}://{host}/v2/{repository}/{path}");
        let url = Url::parse(&text).map_err(|error| RegistryError::Protocol {
            what: source.to_string(),
            reason: format!("this makes no URL: {error}"),
        })?;
        Ok(Request { method, url, source, push: false, also: None, headers: HeaderMap::new(), body: Body::None })
    }

    /// The HTTP library's client for a place.
    pub(super) fn client(&self, url: &Url) -> reqwest::Client {
        self.transport.client(url).clone()
    }

    /// Makes a request as often as it takes to get the head of a successful answer.
    pub(super) async fn send_retrying(&self, request: &Request<'_>) -> Result<Response, RegistryError> {
        let mut tries = self.tries();
        loop {
            match self.send(request).await {
                Ok(response) => return Ok(response),
                Err(error) => tries.wait(error).await?,
            }
        }
    }

    /// Makes a request once, with the token it takes, and gives the answer if it is a success.
    pub(super) async fn send(&self, request: &Request<'_>) -> Result<Response, RegistryError> {
        let mut grant = self.grants.cached(self, request).await;
        let mut response = self.follow(request, grant.as_ref()).await?;
        let mut tried = 0;
        // A fresh one of somebody else, and then one for each of the credentials.
        for _ in 0..MAX_RENEWALS {
            if response.status() != StatusCode::UNAUTHORIZED {
                break;
            }
            let Some(challenge) = self.challenge(request, &response, grant.as_ref()).await? else { break };
            let Some(next) = self.grants.renew(self, request, &challenge, grant, &mut tried).await? else { break };
            response = self.follow(request, Some(&next)).await?;
            grant = Some(next);
        }
        self.success(request, response).await
    }

    /// Follows redirects. Credentials go no further than the registry itself.
    async fn follow(&self, request: &Request<'_>, grant: Option<&HeaderValue>) -> Result<Response, RegistryError> {
        let mut url = request.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let own = url.origin() == self.request(Method::GET, request.source, "")?.url.origin();
            let route = self.route.as_ref().filter(|route| own || route.takes_redirect(&url));
            let response = self.transport.execute(request, &url, grant.filter(|_| own), route).await?;
            // 307 and 308 say that the same is to be asked there, with the same body. What else may follow a PUT is a GET.
            let follow = match response.status() {
                StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => true,
                StatusCode::NOT_MODIFIED => false,
                status => status.is_redirection() && matches!(request.method, Method::GET | Method::HEAD),
            };
            if !follow {
                return Ok(response);
            }
            url = redirect_target(&url, &response)?;
        }
        Err(RegistryError::Redirect {
            what: describe(&request.url),
            location: describe(&url),
            reason: "too many redirects",
        })
    }

    async fn success(&self, request: &Request<'_>, response: Response) -> Result<Response, RegistryError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let what = describe(response.url());
        let registry = request.source.registry().to_owned();
        let retry_after = retry_after(response.headers(), SystemTime::now());
        Err(match status {
            StatusCode::NOT_FOUND => RegistryError::NotFound { what },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => RegistryError::Unauthorized {
                registry,
                repository: request.source.repository().to_owned(),
                given: self.options.auth.knows(request.source),
            },
            StatusCode::TOO_MANY_REQUESTS => RegistryError::RateLimited { registry, retry_after },
            status => {
                let body = excerpt(&self.error_body(response).await);
                RegistryError::Registry { what, status: status.as_u16(), body, retry_after }
            }
        })
    }

    /// The beginning of a body, as far as it comes.
    async fn error_body(&self, mut response: Response) -> Vec<u8> {
        let mut body = Vec::new();
        while body.len() < MAX_ERROR_BODY {
            match tokio::time::timeout(self.options.read_timeout, response.chunk()).await {
                Ok(Ok(Some(chunk))) => body.extend_from_slice(&chunk[..chunk.len().min(MAX_ERROR_BODY)]),
                _ => break,
            }
        }
        body
    }

    /// A whole body of at most `limit` bytes.
    async fn collect(&self, mut response: Response, limit: u64) -> Result<Bytes, RegistryError> {
        let what = describe(response.url());
        let announced = header_number(&response, &header::CONTENT_LENGTH);
        if let Some(length) = announced {
            return BlobStream::from_response(response, what, (0, length, false), self.options.read_timeout)
                .collect(limit)
                .await;
        }
        let after = self.options.read_timeout;
        let mut bytes = Vec::new();
        loop {
            let read = tokio::time::timeout(after, response.chunk()).await;
            let chunk = read.map_err(|_| RegistryError::Timeout { what: what.clone(), after })?;
            let Some(chunk) = chunk.map_err(|error| RegistryError::transport(&what, error))? else { break };
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(RegistryError::TooLarge { what, limit });
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes.into())
    }

    /// For one operation that may be tried several times.
    pub(super) fn tries(&self) -> Tries {
        Tries { made: 0, most: self.options.retries, max_wait: self.options.max_wait }
    }
}

/// Counts the tries of one operation and waits between them.
pub(super) struct Tries {
    made: u32,
    most: u32,
    max_wait: Duration,
}

impl Tries {
    /// Waits before the next try, longer each time and as long as the registry asked for. Gives the error back when it
    /// will not pass, when the tries are used up, or when the registry asks for more than the longest wait.
    pub(super) async fn wait(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        let wait = match error.retry_after() {
            Some(asked) if asked > self.max_wait => return Err(error),
            Some(asked) => above(asked),
            None => jittered(BACKOFF * 2u32.saturating_pow(self.made.min(8))).min(self.max_wait),
        };
        if self.made >= self.most || !error.is_transient() {
            return Err(error);
        }
        self.made += 1;
        tracing::debug!(%error, ?wait, tries = self.made, "will ask the registry again");
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

fn verified(source: &Source, id: ObjectId, bytes: Bytes) -> Result<Bytes, RegistryError> {
    match super::registry::sha256(&bytes) {
        found if found == id => Ok(bytes),
        found => Err(wrong_digest(format!("{source}@sha256:{id}"), id, found)),
    }
}

/// What a reference was resolved to must be the digest that it has, if it has one.
fn pinned(reference: &Reference, id: ObjectId, size: u64) -> Result<(ObjectId, u64), RegistryError> {
    match reference.digest().filter(|expected| *expected != id) {
        None => Ok((id, size)),
        Some(expected) => Err(wrong_digest(reference.to_string(), expected, id)),
    }
}

fn wrong_digest(what: String, expected: ObjectId, found: ObjectId) -> RegistryError {
    RegistryError::WrongDigest { what, expected, found: format!("sha256:{found}") }
}

/// Half to all of it, so that many nodes that failed together do not come back together.
fn jittered(wait: Duration) -> Duration {
    let random = RandomState::new().hash_one(0u8) % 512;
    wait / 2 + wait.mul_f64(random as f64 / 1024.0)
}

/// As long as was asked for, and up to a quarter more, at least up to half a second: all were told the same.
fn above(asked: Duration) -> Duration {
    asked + jittered((asked / 4).max(BACKOFF * 5 / 2))
}

/// Host and path: what may be told of a URL. Queries of signed URLs are secrets.
pub(super) fn describe(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}{port}{}", url.host_str().unwrap_or_default(), url.path())
}

fn redirect_target(from: &Url, response: &Response) -> Result<Url, RegistryError> {
    let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let broken = |location: String, reason| RegistryError::Redirect { what: describe(from), location, reason };
    let target = from.join(location).map_err(|_| broken(String::new(), "not a URL"))?;
    match (from.scheme(), target.scheme()) {
        _ if location.is_empty() => Err(broken(String::new(), "no location")),
        (_, "https") | ("http", "http") => Ok(target),
        _ => Err(broken(describe(&target), "only https may follow https")),
    }
}

/// Digest and size of a manifest as a HEAD announces them.
fn announced(response: &Response) -> Option<(ObjectId, u64)> {
    let digest = response.headers().get("docker-content-digest")?.to_str().ok()?;
    let id = digest.strip_prefix("sha256:")?.parse().ok()?;
    Some((id, header_number(response, &header::CONTENT_LENGTH)?))
}

pub(super) fn header_number(response: &Response, name: &header::HeaderName) -> Option<u64> {
    response.headers().get(name)?.to_str().ok()?.trim().parse().ok()
}

/// Seconds or a date (RFC 9110, section 10.2.3); a date that has passed asks for no wait.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    match text.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(httpdate::parse_http_date(text).ok()?.duration_since(now).unwrap_or_default()),
    }
}

/// `bytes 0-99/1000` or `bytes 0-99/*`.
fn parse_content_range(text: &str) -> Option<Range<u64>> {
    let (range, total) = text.strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, end): (u64, u64) = (first.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?);
    let fits = total == "*" || total.parse::<u64>().ok()? >= end;
    (fits && first < end).then_some(first..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(parse_content_range("bytes 0-99/1000"), Some(0..100));
        assert_eq!(parse_content_range("bytes 5-5/*"), Some(5..6));
        for text in ["bytes */1000", "bytes 0-99/50", "bytes 9-0/10", "0-99/100", "bytes 0-18446744073709551615/*"] {
            assert_eq!(parse_content_range(text), None, "{text}");
        }
    }

    #[test]
    fn what_a_registry_asks_to_wait_is_read_in_both_forms() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        for (text, wait) in [
            ("120", Some(120)),
            ("0", Some(0)),
            // The three forms of RFC 9110, section 5.6.7.
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:49:38 GMT", Some(1)),
            ("Sun Nov  6 08:49:37 1994", Some(0)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
            ("Sun, 99 Nov 1994 08:50:37 GMT", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            assert_eq!(retry_after(&headers, now), wait.map(Duration::from_secs), "{text}");
        }
    }

    #[test]
    fn waits_are_spread_within_their_bounds() {
        for _ in 0..100 {
            let wait = jittered(Duration::from_secs(1));
            assert!((Duration::from_millis(500)..=Duration::from_secs(1)).contains(&wait), "{wait:?}");
        }
        for (asked, most) in [(0, 500), (1000, 1500), (8000, 10_000)].map(|(a, m)| (a, Duration::from_millis(m))) {
            let asked = Duration::from_millis(asked);
            let waits: std::collections::BTreeSet<_> = (0..100).map(|_| above(asked)).collect();
            assert!(waits.len() > 1 && waits.iter().all(|wait| (asked..=most).contains(wait)), "{waits:?}");
        }
    }

    #[test]
    fn urls_are_told_without_their_secrets() {
        let url = Url::parse("https://user:pass@host:81/path?signature=secret#x").unwrap();
        assert_eq!(describe(&url), "host:81/path");
    }
}
