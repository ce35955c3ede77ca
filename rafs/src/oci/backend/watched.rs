//! The HTTP client of registries, as the S3 library wants it: what is written may take as long as it moves.

use std::pin::Pin;

use object_store::{
    ClientOptions,
    client::{
        HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    },
};
use reqwest::{Client, Request, Response, Url};

use crate::oci::http::Progress;

/// Bodies up to this size are sent without a watch: the library's own time-outs are enough for them.
const SMALL: usize = 256 * 1024;
/// Most bytes of an answer to a write.
const MAX_ANSWER: usize = 1 << 20;

/// An HTTP client that gives up a write when nothing of it has moved for `patience`.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    pub(super) client: Client,
    pub(super) patience: std::time::Duration,
}

impl HttpConnector for Watched {
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

impl HttpService for Watched {
    fn call<'a, 'b>(
        &'a self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'b>>
    where
        'a: 'b,
        Self: 'b,
    {
        match request.body().as_bytes().filter(|bytes| bytes.len() > SMALL).cloned() {
            Some(bytes) => Box::pin(self.write(request, bytes)),
            None => HttpService::call(&self.client, request),
        }
    }
}

impl Watched {
    async fn write(&self, request: HttpRequest, bytes: bytes::Bytes) -> Result<HttpResponse, HttpError> {
        let url: Url = request.uri().to_string().parse().map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
        let mut sent = Request::new(request.method().clone(), url);
        *sent.headers_mut() = request.headers().clone();
        sent.headers_mut().insert(reqwest::header::CONTENT_LENGTH, bytes.len().into());
        let progress = Progress::of(bytes.len() as u64);
        *sent.body_mut() = Some(progress.watch_bytes(bytes));
        let answer = progress.answer(self.client.execute(sent), self.patience).await;
        let timeout = |after| HttpError::new(HttpErrorKind::Timeout, Silence(after));
        let answer = answer.map_err(timeout)?.map_err(broken)?;
        let collected = tokio::time::timeout(self.patience, collect(answer)).await;
        collected.map_err(|_| timeout(self.patience))?
    }
}

/// What a server says to a write, which is little.
async fn collect(mut answer: Response) -> Result<HttpResponse, HttpError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(broken)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_ANSWER {
            return Err(HttpError::new(HttpErrorKind::Decode, std::io::Error::other("an answer of more than 1 MiB")));
        }
    }
    let mut response = HttpResponse::new(HttpResponseBody::from(bytes));
    *response.status_mut() = answer.status();
    *response.headers_mut() = answer.headers().clone();
    Ok(response)
}

/// A part can be sent again, whatever became of it.
fn broken(error: reqwest::Error) -> HttpError {
    let kind = if error.is_connect() { HttpErrorKind::Connect } else { HttpErrorKind::Interrupted };
    HttpError::new(kind, error.without_url())
}

#[derive(Debug, thiserror::Error)]
#[error("no progress for {0:?}")]
struct Silence(std::time::Duration);
