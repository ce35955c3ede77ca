//! Writing to a registry: blobs by POST and one PUT, manifests by PUT.
//!
//! A broken upload starts again from the beginning, with a new session; chunked uploads are not used because
//! registries disagree about them.

use std::path::Path;

use bytes::Bytes;
use reqwest::{Method, Url, header};
use shoal_proto::ObjectId;

use super::{
    Descriptor, Reference, RegistryError, Source,
    http::{Body, Http, Request, describe},
};

impl Http {
    pub(super) async fn upload_file(
        &self,
        source: &Source,
        descriptor: &Descriptor,
        path: &Path,
    ) -> Result<(), RegistryError> {
        let size = descriptor.size;
        self.retrying(async || self.upload_once(source, descriptor.id, Body::File { path, size }).await).await
    }

    pub(super) async fn upload_bytes(
        &self,
        source: &Source,
        id: ObjectId,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        self.retrying(async || self.upload_once(source, id, Body::Bytes(bytes.clone())).await).await
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
        let id = super::registry::sha256(&bytes);
        let path = match reference.tag() {
            Some(tag) => format!("manifests/{tag}"),
            None => format!("manifests/sha256:{id}"),
        };
        self.retrying(async || {
            let put = self.request(Method::PUT, reference.source(), &path)?;
            let put = put.header(header::CONTENT_TYPE, media_type);
            let answer = self.send(&Request { push: true, body: Body::Bytes(bytes.clone()), ..put }).await?;
            let said = answer.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
            match said.and_then(|said| said.strip_prefix("sha256:")) {
                Some(said) if said != id.to_string() => Err(RegistryError::WrongDigest {
                    what: describe(answer.url()),
                    expected: id,
                    found: format!("sha256:{said}"),
                }),
                _ => Ok(id),
            }
        })
        .await
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
