//! Writing to a registry: blobs by POST and one PUT, manifests by PUT.
//!
//! What another repository of the registry has is mounted from there where the registry allows it. A broken upload starts
//! again from the beginning, with a new session; chunked uploads are not used because registries disagree about them.

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
        let mut tries = self.tries();
        loop {
            match self.upload_once(source, id, body.clone(), from).await {
                Ok(placed) => return Ok(placed),
                Err(error) => tries.wait(error).await?,
            }
        }
    }

    async fn upload_once<'a>(
        &self,
        source: &'a Source,
        id: ObjectId,
        body: Body<'a>,
        from: Option<&'a Source>,
    ) -> Result<Placed, RegistryError> {
        let answer = self.begin(source, id, from).await?;
        if from.is_some() && answer.status() == StatusCode::CREATED {
            return Ok(Placed::Mounted);
        }
        let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let mut url = upload_url(answer.url(), location.unwrap_or_default())?;
        url.query_pairs_mut().append_pair("digest", &format!("sha256:{id}"));
        let put = self.request(Method::PUT, source, "")?.header(header::CONTENT_TYPE, "application/octet-stream");
        self.send(&Request { url, push: true, body, ..put }).await.map(|_| Placed::Sent)
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
        let said = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        match said.filter(|said| *said != format!("sha256:{expected}")) {
            Some(found) if found.starts_with("sha256:") => {
                let found = found.chars().take(80).collect();
                Err(RegistryError::WrongDigest { what: describe(answer.url()), expected, found })
            }
            _ => Ok(PutManifest { id: expected, knows_referrers: answer.headers().contains_key("oci-subject") }),
        }
    }
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
