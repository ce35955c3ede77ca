//! A proxy that keeps what registries have, such as dfdaemon of Dragonfly: asked before the registry, never trusted.
//!
//! ```text
//! a read of what a digest names ──> mirrors ──> proxy, if it may see it and works ──> the registry itself
//! tags, what may be pushed, tokens, pushes ─────────────────────────────────────────> the registry itself
//! ```
//!
//! - **Nothing is believed.** Its bytes are verified like the registry's; where they are wrong, it is passed over for a while.
//!   What a tag means it is not asked. A challenge of it is not answered: the registry itself is asked what it wants to see.
//! - **Nothing fails because of it,** unless the options say that there is no other way: one try with a time-out of its own,
//!   then the registry. What it does wrong is no error of the registry. After a failure it is passed over until it answers a
//!   ping, or for a while.
//! - **Credentials** go through it only where it cannot see them, or where the options say so. An image for which this client
//!   has some is otherwise read past it.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use reqwest::{
    Client, Url,
    header::{self, HeaderMap, HeaderName, HeaderValue},
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use self::health::Health;
use super::{
    RegistryError, RegistryOptions, Source,
    http::{Http, Route},
};

mod health;

/// How urgent what somebody waits for is to Dragonfly, and what nobody waits for: of 0 to 6, as nydusd says it.
const PRIORITIES: [&str; 2] = ["6", "3"];
/// Most that is accepted as further headers.
const MAX_HEADERS: usize = 32;
/// Headers that a request has for itself.
const OWN_HEADERS: [HeaderName; 7] = [
    header::HOST,
    header::AUTHORIZATION,
    header::RANGE,
    header::ACCEPT,
    header::ACCEPT_ENCODING,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
];

/// In which form requests are sent to a proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProxyForm {
    /// As to a mirror, with the registry's URL in the header `X-Dragonfly-Registry`. The proxy speaks to the registry as
    /// that URL says.
    Mirror,
    /// As to a proxy, in the clear (`GET http://registry/..`), also where the registry is spoken to over TLS: that is left to
    /// the proxy.
    Forward,
    /// As to a proxy, through a tunnel (`CONNECT`) where the registry is spoken to over TLS, and in the clear elsewhere.
    Tunnel,
}

/// A proxy that keeps what registries have.
#[derive(Clone)]
pub struct ProxyOptions {
    /// Where it listens, http or https.
    pub url: Url,
    /// How it is spoken to.
    pub form: ProxyForm,
    /// Registries that are read through it; `*` is any.
    pub registries: Vec<String>,
    /// Whether it may see credentials.
    pub credentials: bool,
    /// Further headers for it. `Proxy-*` are told to it alone.
    pub headers: BTreeMap<String, String>,
    /// What is asked (with GET) whether it works. Without it, a read that fails says that it does not.
    pub ping_url: Option<Url>,
    /// How often it is asked while it is used, and the shortest time for which it is passed over after a failure.
    pub check_interval: Duration,
    /// Whether the registry itself is read when the proxy gives nothing.
    pub fallback: bool,
    /// For a connection, and for the next byte.
    pub timeout: Duration,
}

/// Values of headers may be secrets.
impl fmt::Debug for ProxyOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let headers: Vec<_> = self.headers.keys().collect();
        let mut all = f.debug_struct("ProxyOptions");
        all.field("url", &self.url.as_str()).field("form", &self.form).field("registries", &self.registries);
        all.field("credentials", &self.credentials).field("headers", &headers).finish_non_exhaustive()
    }
}

impl ProxyOptions {
    /// What cannot be meant, in words.
    ///
    /// # Errors
    /// The first such thing.
    pub fn check(&self) -> Result<(), String> {
        for url in [Some(&self.url), self.ping_url.as_ref()].into_iter().flatten() {
            if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
                return Err("an http or https URL with a host is needed".to_owned());
            }
            if !url.username().is_empty() || url.password().is_some() {
                return Err("a user does not belong into the URL, but into headers (Proxy-Authorization)".to_owned());
            }
        }
        if !matches!(self.url.path(), "" | "/") || self.url.query().is_some() {
            return Err("the URL of a proxy has no path".to_owned());
        }
        if self.check_interval.is_zero() || self.timeout.is_zero() {
            return Err("times must be longer than nothing".to_owned());
        }
        self.parsed_headers().map(drop)
    }

    /// The further headers.
    fn parsed_headers(&self) -> Result<HeaderMap, String> {
        if self.headers.len() > MAX_HEADERS {
            return Err(format!("at most {MAX_HEADERS} headers"));
        }
        let mut parsed = HeaderMap::new();
        for (name, value) in &self.headers {
            let refused = |why| format!("the header {name:?} {why}");
            let key = HeaderName::from_bytes(name.as_bytes()).map_err(|_| refused("has no valid name"))?;
            if OWN_HEADERS.contains(&key) {
                return Err(refused("is set by each request for itself"));
            }
            let mut value = HeaderValue::from_str(value).map_err(|_| refused("has no valid value"))?;
            value.set_sensitive(true);
            parsed.insert(key, value);
        }
        Ok(parsed)
    }

    fn lists(&self, source: &Source) -> bool {
        self.registries.iter().any(|one| one == "*" || one.eq_ignore_ascii_case(source.registry()))
    }

    /// Host and port, for errors and logs.
    fn name(&self) -> String {
        super::http::describe(&self.url).trim_end_matches('/').to_owned()
    }
}

/// What became of reads through the proxy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProxyStats {
    /// Whether the next read is tried through it.
    pub used: bool,
    /// Reads that were tried through it.
    pub reads: u64,
    /// Those of them that it did not answer, or broke off.
    pub failed: u64,
}

/// The proxy, and how it does.
#[derive(Debug)]
pub(super) struct Proxy {
    options: ProxyOptions,
    /// For reads that somebody waits for, and for others.
    ways: [Http; 2],
    state: Arc<State>,
}

/// What is known of the proxy; streams that come from it tell here how they end.
pub(super) struct State {
    name: String,
    /// Asks whether it works.
    pings: Option<(Client, Url)>,
    timeout: Duration,
    health: Health,
    reads: AtomicU64,
    failed: AtomicU64,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("name", &self.name).field("health", &self.health).finish_non_exhaustive()
    }
}

impl Proxy {
    /// `None` where none is configured. It shares the tokens of `direct`.
    pub(super) fn new(options: &RegistryOptions, direct: &Http) -> Result<Option<Self>, RegistryError> {
        let Some(proxy) = options.proxy.clone() else { return Ok(None) };
        let name = proxy.name();
        let broken = |reason: String| RegistryError::Protocol { what: format!("proxy {name}"), reason };
        proxy.check().map_err(broken)?;
        let headers = proxy.parsed_headers().map_err(broken)?;
        let once = RegistryOptions {
            retries: 0,
            connect_timeout: proxy.timeout,
            read_timeout: proxy.timeout,
            proxy: None,
            mirrors: BTreeMap::new(),
            backends: Vec::new(),
            ..options.clone()
        };
        let client = super::http::plain_client(&once)?;
        let state = Arc::new(State {
            name,
            pings: proxy.ping_url.clone().map(|url| (client, url)),
            timeout: proxy.timeout,
            health: Health::new(proxy.check_interval, proxy.ping_url.is_some().then_some(proxy.timeout)),
            reads: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        });
        let way = |priority: &'static str| {
            let mut all = HeaderMap::new();
            all.insert("x-dragonfly-use-p2p", HeaderValue::from_static("true"));
            all.insert("x-dragonfly-priority", HeaderValue::from_static(priority));
            all.extend(headers.clone());
            let route = Route::new(&once, &proxy.url, proxy.form, all, proxy.credentials, state.clone())?;
            direct.through(once.clone(), route)
        };
        let ways = [way(PRIORITIES[0])?, way(PRIORITIES[1])?];
        Ok(Some(Self { options: proxy, ways, state }))
    }

    /// The way to read `source` by now; none where the registry itself is to be read.
    pub(super) async fn way(&self, source: &Source, in_background: bool) -> Option<&Http> {
        let http = &self.ways[usize::from(in_background)];
        let seen = self.options.form != ProxyForm::Tunnel || http.is_plain(source.registry());
        if !self.options.lists(source) {
            return None;
        }
        let auth = &http.options.auth;
        // One that does not say whether it has any may have some.
        if seen && !self.options.credentials && (auth.ask_helper(source).await.is_err() || auth.knows(source)) {
            return None;
        }
        let look = self.state.health.look(Instant::now());
        if look.ping {
            tokio::spawn(self.state.clone().ping());
        }
        if !look.use_it && self.options.fallback {
            return None;
        }
        self.state.reads.fetch_add(1, Ordering::Relaxed);
        Some(http)
    }

    /// Whether the registry itself is read when the proxy gives nothing.
    pub(super) fn falls_back(&self) -> bool {
        self.options.fallback
    }

    /// Notes that a read gave nothing.
    ///
    /// # Errors
    /// That it failed, where there is no other way.
    pub(super) fn failed(&self, error: RegistryError) -> Result<(), RegistryError> {
        self.state.failed(&error);
        if self.options.fallback {
            return Ok(());
        }
        Err(RegistryError::Proxy { proxy: self.state.name.clone(), source: Box::new(error) })
    }

    /// Passes over it for a while: bytes that came from somewhere were wrong. Whether the next ones of `source` come from
    /// elsewhere because of that.
    pub(super) fn distrust(&self, source: &Source) -> bool {
        self.options.lists(source) && self.state.health.distrust(Instant::now()) && self.options.fallback
    }

    pub(super) fn stats(&self) -> ProxyStats {
        ProxyStats {
            used: self.state.health.is_used(Instant::now()),
            reads: self.state.reads.load(Ordering::Relaxed),
            failed: self.state.failed.load(Ordering::Relaxed),
        }
    }
}

impl State {
    /// Notes that a read gave nothing, or broke.
    pub(super) fn failed(&self, error: &RegistryError) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let proxy = &self.name;
        let now = Instant::now();
        let was_used = match error {
            // It works, and has not what was asked for or may not give it; the registry may.
            RegistryError::NotFound { .. } | RegistryError::Unauthorized { .. } => false,
            RegistryError::WrongDigest { .. } => self.health.distrust(now),
            error => self.health.failed(now, error.retry_after()),
        };
        if was_used {
            tracing::warn!(proxy, %error, "the proxy of registries fails and is passed over for a while");
        } else {
            tracing::debug!(proxy, %error, "the proxy of registries gave nothing");
        }
    }

    async fn ping(self: Arc<Self>) {
        let Some((client, url)) = &self.pings else { return };
        let sent = tokio::time::timeout(self.timeout, client.get(url.clone()).send()).await;
        // As nydusd counts: a redirect is an answer.
        let answers = matches!(&sent, Ok(Ok(answer)) if answer.status().as_u16() < 400);
        if self.health.pinged(answers) {
            match answers {
                true => tracing::info!(proxy = self.name, "the proxy of registries answers again"),
                false => tracing::warn!(proxy = self.name, "the proxy of registries does not answer its ping"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(url: &str) -> ProxyOptions {
        ProxyOptions {
            url: url.parse().unwrap(),
            form: ProxyForm::Mirror,
            registries: vec!["*".to_owned()],
            credentials: false,
            headers: BTreeMap::new(),
            ping_url: None,
            check_interval: Duration::from_secs(5),
            fallback: true,
            timeout: Duration::from_secs(5),
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let with = |name: &str, value: &str| ProxyOptions {
            headers: [(name.to_owned(), value.to_owned())].into(),
            ..options("http://127.0.0.1:4001")
        };
        options("http://127.0.0.1:4001/").check().unwrap();
        with("X-Dragonfly-Tag", "a").check().unwrap();
        with("Proxy-Authorization", "Basic eDp5").check().unwrap();
        for (broken, part) in [
            (options("ftp://127.0.0.1"), "http"),
            (options("http://user:secret@127.0.0.1"), "Proxy-Authorization"),
            (options("http://127.0.0.1/path"), "path"),
            (with("Authorization", "Basic eDp5"), "Authorization"),
            (with("range", "bytes=0-1"), "range"),
            (with("a b", "x"), "valid name"),
            (with("a", "x\ny"), "valid value"),
            (ProxyOptions { timeout: Duration::ZERO, ..options("http://127.0.0.1") }, "longer"),
            (ProxyOptions { ping_url: Some("file:///x".parse().unwrap()), ..options("http://127.0.0.1") }, "http"),
        ] {
            let error = broken.check().unwrap_err();
            assert!(error.contains(part) && !error.contains("secret") && !error.contains("eDp5"), "{error}");
        }
        let shown = format!("{:?}", with("Proxy-Authorization", "Basic eDp5"));
        assert!(shown.contains("Proxy-Authorization") && !shown.contains("eDp5"), "{shown}");
    }
}
