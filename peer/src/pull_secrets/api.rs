//! The API server, as far as it is asked for secrets: lists, and watches.

use std::time::Duration;

use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, HeaderValue},
    redirect,
};
use tokio::time::timeout;

use super::{
    event::{self, Change, Page, Scope},
    kubeconfig::{KubeconfigError, Login},
};

/// Secrets in a part of a list. A secret has up to 1 MiB, and a third more in base64.
const PAGE: u32 = 16;
/// Most bytes of a part of a list.
const MAX_PAGE: usize = 32 << 20;
/// Most bytes of an event.
const MAX_EVENT: usize = 4 << 20;
/// Most bytes of an answer that is an error.
const MAX_ERROR: usize = 16 << 10;
/// Most letters of the server's own words that are logged.
const MAX_MESSAGE: usize = 256;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// Longest wait for the head of an answer, and for the next bytes of a list.
const ANSWER: Duration = Duration::from_secs(30);
/// After so long the server ends a watch. The next one reads tokens and certificates anew.
const WATCH_SECONDS: u64 = 240;
/// Longest wait for the next bytes of a watch: the server has ended it by then.
const SILENCE: Duration = Duration::from_secs(WATCH_SECONDS + 30);
/// How often the kernel asks whether the server is there, while nothing happens.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Why nothing was heard of secrets. Says nothing of what they hold.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error(transparent)]
    Kubeconfig(#[from] KubeconfigError),
    #[error("the API server cannot be spoken to")]
    Setup(#[source] reqwest::Error),
    #[error("the API server does not answer")]
    Transport(#[source] reqwest::Error),
    #[error("the API server has said nothing for {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the API server refuses with {status}: {message}")]
    Refused { status: u16, message: String },
    /// What is asked for is older than what the server remembers.
    #[error("what is known is too old")]
    Gone,
    #[error("the API server sends more than {0} bytes at once")]
    TooLarge(usize),
    #[error("there are more than {} of them", super::table::MAX_LISTED)]
    TooMany,
    #[error("the API server sends what is no {0}")]
    NotUnderstood(&'static str),
}

impl ApiError {
    /// What a status means.
    pub(super) fn status(status: u16, message: String) -> Self {
        if status == StatusCode::GONE {
            return Self::Gone;
        }
        let message = message.chars().filter(|letter| !letter.is_control()).take(MAX_MESSAGE).collect();
        Self::Refused { status, message }
    }
}

/// A server, and who to be there.
pub(super) struct Server {
    client: Client,
    base: Url,
    token: Option<HeaderValue>,
}

impl Server {
    /// Opens no connection yet.
    ///
    /// # Errors
    /// [`ApiError::Setup`].
    pub(super) fn new(login: Login) -> Result<Self, ApiError> {
        let Login { server: base, tls, token } = login;
        let client = Client::builder()
            .tls_backend_preconfigured(tls)
            .https_only(true)
            .http1_only()
            // Whatever is shown to this server is for no other.
            .redirect(redirect::Policy::none())
            .referer(false)
            .connect_timeout(CONNECT)
            .tcp_keepalive(KEEPALIVE)
            .user_agent(concat!("shoal/", env!("CARGO_PKG_VERSION")));
        Ok(Self { client: client.build().map_err(ApiError::Setup)?, base, token })
    }

    /// A part of the list: the first, or what `rest` of the one before stands for.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub(super) async fn list(&self, scope: &Scope, rest: Option<&str>) -> Result<Page, ApiError> {
        let limit = PAGE.to_string();
        let mut query = vec![("limit", limit.as_str())];
        query.extend(rest.map(|rest| ("continue", rest)));
        let mut response = self.get(scope, &query).await?;
        let mut bytes = Vec::new();
        while let Some(more) = next(&mut response, ANSWER).await? {
            if bytes.len() + more.len() > MAX_PAGE {
                return Err(ApiError::TooLarge(MAX_PAGE));
            }
            bytes.extend_from_slice(&more);
        }
        event::page(&bytes, scope.kind)
    }

    /// What happens after `version`.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub(super) async fn watch(&self, scope: &Scope, version: &str) -> Result<Events, ApiError> {
        let seconds = WATCH_SECONDS.to_string();
        let query = [
            ("watch", "true"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version),
            ("timeoutSeconds", &seconds),
        ];
        Ok(Events { response: self.get(scope, &query).await?, begun: Vec::new(), kind: scope.kind })
    }

    async fn get(&self, scope: &Scope, query: &[(&str, &str)]) -> Result<Response, ApiError> {
        let mut url = self.base.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(["api", "v1"]);
            if let Some(namespace) = &scope.namespace {
                path.extend(["namespaces", namespace]);
            }
            path.push("secrets");
        }
        let selector = format!("type={}", scope.kind.name());
        url.query_pairs_mut().append_pair("fieldSelector", &selector).extend_pairs(query);
        let mut request = self.client.get(url).header(ACCEPT, "application/json");
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token);
        }
        let sent = timeout(ANSWER, request.send()).await.map_err(|_| ApiError::Silent(ANSWER))?;
        let mut response = sent.map_err(transport)?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let mut said = Vec::new();
        while let Ok(Some(more)) = next(&mut response, ANSWER).await {
            said.extend_from_slice(&more);
            if said.len() > MAX_ERROR {
                break;
            }
        }
        Err(ApiError::status(status.as_u16(), event::message(&said)))
    }
}

/// The rest of a watch.
pub(super) struct Events {
    response: Response,
    /// A line of which the end has not come yet.
    begun: Vec<u8>,
    kind: event::Kind,
}

impl Events {
    /// What has happened, none when the watch has ended in good order. Not cancel safe.
    ///
    /// # Errors
    /// See [`ApiError`].
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Change>>, ApiError> {
        let Some(more) = next(&mut self.response, SILENCE).await? else { return Ok(None) };
        let mut changes = Vec::new();
        let mut lines = more.split(|byte| *byte == b'\n');
        // What is behind the last end of a line, or all of it.
        let last = lines.next_back().unwrap_or_default();
        for line in lines {
            self.begin(line)?;
            let line = std::mem::take(&mut self.begun);
            if !line.is_empty() {
                changes.push(event::change(&line, self.kind)?);
            }
        }
        self.begin(last)?;
        Ok(Some(changes))
    }

    fn begin(&mut self, part: &[u8]) -> Result<(), ApiError> {
        if self.begun.len() + part.len() > MAX_EVENT {
            return Err(ApiError::TooLarge(MAX_EVENT));
        }
        self.begun.extend_from_slice(part);
        Ok(())
    }
}

async fn next(response: &mut Response, patience: Duration) -> Result<Option<bytes::Bytes>, ApiError> {
    timeout(patience, response.chunk()).await.map_err(|_| ApiError::Silent(patience))?.map_err(transport)
}

/// Without the address: it names what is asked for, and adds nothing.
fn transport(error: reqwest::Error) -> ApiError {
    ApiError::Transport(error.without_url())
}
