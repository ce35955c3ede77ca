//! Writing to a registry: blobs by POST and one PUT, manifests by PUT.
//!
//! A broken upload starts again from the beginning, with a new session; chunked uploads are not used because
//! registries disagree about them.

use bytes::Bytes;
use reqwest::{Method, Url, header};
use shoal_proto::ObjectId;

use super::{
    Reference, RegistryError, Source,
    http::{Body, Http, Request, describe},
};

impl Http {
    /// Uploads a blob; `body` must have this digest.
    pub(super) async fn upload(&self, source: &Source, id: ObjectId, body: Body<'_>) -> Result<(), RegistryError> {
        let mut tries = self.tries();
        loop {
            match self.upload_once(source, id, body.clone()).await {
                Ok(()) => return Ok(()),
                Err(error) => tries.wait(error).await?,
            }
        }
    }

    async fn upload_once(&self, source: &Source, id: ObjectId, body: Body<'_>) -> Result<(), RegistryError> {
        let begin = Request { push: true, ..self.request(Method::POST, source, "blobs/uploads/")? };
        let answer = self.send(&Request { body: Body::Bytes(Bytes::new()), ..begin }).await?;
        let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        let mut url = upload_url(answer.url(), location.unwrap_or_default())?;
        url.query_pairs_mut().append_pair("digest", &format!("sha256:{id}"));
        let put = self.request(Method::PUT, source, "")?.header(header::CONTENT_TYPE, "application/octet-stream");
        self.send(&Request { url, push: true, body, ..put }).await.map(drop)
    }

    pub(super) async fn put_manifest(
        &self,
        reference: &Reference,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<ObjectId, RegistryError> {
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
            _ => Ok(expected),
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
