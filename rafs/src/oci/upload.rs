//! Writing to a registry: blobs by POST and one PUT, manifests by PUT.
//!
//! What another repository of the registry has is mounted from there where the registry allows it. A blob is sent with one PUT,
//! because registries disagree about chunks. When that is cut, the registry is asked how much it has: the rest goes to the
//! same session as one chunk, also of what comes from another registry. One that does not say, or has lost count, gets all of it
//! again in a new session. As long as each try brings a session further, there is another one.

use bytes::Bytes;
use reqwest::{Method, Response, StatusCode, Url, header};
use shoal_proto::ObjectId;

use super::{
    Reference, RegistryError, Source,
    http::{Body, Http, Request, describe},
};

/// How a blob came to be where it was to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placed {
    /// It was there.
    Existed,
    /// The registry took it from another of its repositories.
    Mounted,
    /// Its bytes were sent.
    Sent,
}

/// What a registry said to a manifest.
pub(super) struct PutManifest {
    pub(super) id: ObjectId,
    /// Whether it lists the manifest among the referrers of its subject by itself.
    pub(super) knows_referrers: bool,
}

impl Http {
    /// Uploads a blob; `body` must have this digest. With `from`, another repository of the registry, it is mounted from
    /// there if it can be.
    pub(super) async fn upload<'a>(
        &self,
        source: &'a Source,
        id: ObjectId,
        body: Body<'a>,
        from: Option<&'a Source>,
    ) -> Result<Placed, RegistryError> {
        let (mut tries, mut session, mut most) = (self.tries(), None, 0);
        loop {
            let mut has = 0;
            let resumed = match &session {
                Some(session) => self.resume(source, id, session, &body, &mut has).await,
                None => Ok(false),
            };
            if has > most + ADVANCE {
                (tries, most) = (self.tries(), has);
            }
            let sent = match resumed {
                Ok(true) => Ok(Placed::Sent),
                Ok(false) => self.upload_once((source, id), body.clone(), from, &mut session).await,
                Err(error) => Err(error),
            };
            match sent {
                Ok(placed) => return Ok(placed),
                Err(error) => tries.wait(error).await?,
            }
        }
    }

    /// Leaves in `session` where the upload can go on if it breaks.
    async fn upload_once<'a>(
        &self,
        (source, id): (&'a Source, ObjectId),
        body: Body<'a>,
        from: Option<&'a Source>,
        session: &mut Option<Url>,
    ) -> Result<Placed, RegistryError> {
        *session = None;
        let answer = self.begin(source, id, from).await?;
        if from.is_some() && answer.status() == StatusCode::CREATED {
            return Ok(Placed::Mounted);
        }
        let url = session_of(&answer)?;
        *session = Some(url.clone());
        self.finish(source, id, url, body).await.map(|()| Placed::Sent)
    }

    /// Ends an upload with these bytes.
    async fn finish<'a>(
        &self,
        source: &'a Source,
        id: ObjectId,
        mut url: Url,
        body: Body<'a>,
    ) -> Result<(), RegistryError> {
        url.query_pairs_mut().append_pair("digest", &format!("sha256:{id}"));
        let put = self.request(Method::PUT, source, "")?.header(header::CONTENT_TYPE, OCTETS);
        let answer = self.send(&Request { url, push: true, body, ..put }).await?;
        stored_as(&answer, id)
    }

    /// Sends what is missing of an upload that broke, and notes how much the session has. `false` when it has to begin again: the
    /// registry does not know the session any more, has nothing of it, or will not say.
    async fn resume<'a>(
        &self,
        source: &'a Source,
        id: ObjectId,
        session: &Url,
        body: &Body<'a>,
        has: &mut u64,
    ) -> Result<bool, RegistryError> {
        let status = Request { url: session.clone(), push: true, ..self.request(Method::GET, source, "")? };
        let answer = match self.send(&status).await {
            Ok(answer) => answer,
            Err(error) if may_pass(&error) => return Err(error),
            Err(_) => return Ok(false),
        };
        let Some(stored) = stored(&answer).filter(|stored| *stored > 0) else { return Ok(false) };
        let Some(rest) = body.rest(stored) else { return Ok(false) };
        *has = stored;
        let mut url = session_of(&answer).unwrap_or_else(|_| session.clone());
        if rest.len() > 0 {
            let range = format!("{stored}-{}", stored + rest.len() - 1);
            let patch = self.request(Method::PATCH, source, "")?;
            let patch = patch.header(header::CONTENT_TYPE, OCTETS).header(header::CONTENT_RANGE, &range);
            tracing::debug!(blob = %id, %range, "an upload broke and goes on");
            match self.send(&Request { url: url.clone(), push: true, body: rest, ..patch }).await {
                Ok(answer) => url = session_of(&answer)?,
                Err(error) if may_pass(&error) => return Err(error),
                Err(_) => return Ok(false),
            }
        }
        match self.finish(source, id, url, Body::Bytes(Bytes::new())).await {
            Ok(()) => Ok(true),
            Err(error) if may_pass(&error) => Err(error),
            // It may have put together something else; the whole decides.
            Err(_) => Ok(false),
        }
    }

    /// Opens an upload session, or has the blob mounted.
    async fn begin(&self, source: &Source, id: ObjectId, from: Option<&Source>) -> Result<Response, RegistryError> {
        let begin = || {
            let request = self.request(Method::POST, source, "blobs/uploads/")?;
            Ok::<_, RegistryError>(Request { push: true, body: Body::Bytes(Bytes::new()), ..request })
        };
        if let Some(from) = from.map(Source::repository) {
            let mut mount = Request { also: Some(from), ..begin()? };
            mount.url.query_pairs_mut().append_pair("mount", &format!("sha256:{id}")).append_pair("from", from);
            match self.send(&mount).await {
                // Who may not read the other repository, or whose registry mounts nothing, sends the bytes.
                Err(error) if !error.is_transient() => {}
                answer => return answer,
            }
        }
        self.send(&begin()?).await
    }

    pub(super) async fn put_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<PutManifest, RegistryError> {
        let expected = super::registry::sha256(&bytes);
        let path = match reference.tag() {
            Some(tag) => format!("manifests/{tag}"),
            None => format!("manifests/sha256:{expected}"),
        };
        let put = self.request(Method::PUT, reference.source(), &path)?.header(header::CONTENT_TYPE, media_type);
        let answer = self.send_retrying(&Request { push: true, body: Body::Bytes(bytes), ..put }).await?;
        stored_as(&answer, expected)?;
        Ok(PutManifest { id: expected, knows_referrers: answer.headers().contains_key("oci-subject") })
    }
}

/// What the registry says that it has stored must be what it was sent, where it says so.
fn stored_as(answer: &Response, expected: ObjectId) -> Result<(), RegistryError> {
    let said = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
    match said.filter(|said| *said != format!("sha256:{expected}")) {
        Some(found) if found.starts_with("sha256:") => {
            let found = found.chars().take(80).collect();
            Err(RegistryError::WrongDigest { what: describe(answer.url()), expected, found })
        }
        _ => Ok(()),
    }
}

/// So many more bytes in a session than the last time are worth as many tries as before.
const ADVANCE: u64 = 1 << 20;

const OCTETS: &str = "application/octet-stream";

/// Whether a session may go on a little later. One that the registry itself is in trouble about is better left.
fn may_pass(error: &RegistryError) -> bool {
    error.is_transient() && !matches!(error, RegistryError::Registry { .. })
}

/// How many bytes a session has, from the answer to a GET: `Range: 0-<last>`.
fn stored(answer: &Response) -> Option<u64> {
    let range = answer.headers().get(header::RANGE)?.to_str().ok()?.trim();
    let range = range.strip_prefix("bytes=").unwrap_or(range);
    range.strip_prefix("0-")?.parse::<u64>().ok()?.checked_add(1)
}

/// Where the session of an answer continues.
fn session_of(answer: &Response) -> Result<Url, RegistryError> {
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    upload_url(answer.url(), location.unwrap_or_default())
}

/// Where an upload session continues; relative locations are allowed, and so are other hosts, without credentials.
fn upload_url(from: &Url, location: &str) -> Result<Url, RegistryError> {
    let broken = |location, reason| RegistryError::Redirect { what: describe(from), location, reason };
    if location.is_empty() {
        return Err(broken(String::new(), "no location"));
    }
    let url = from.join(location).map_err(|_| broken(String::new(), "not a URL"))?;
    match (from.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => Ok(url),
        _ => Err(broken(describe(&url), "only https may follow https")),
    }
}
