//! Whether somebody may read something, asked of the registry itself: for those who have the bytes already and must not give
//! them to whom the registry would not.
//!
//! The registry is asked with what the client showed, as it came, and nothing of this program's own; it goes nowhere else, not
//! along a redirect to another host, and is not kept. Who showed nothing is nobody: then a token for nobody is fetched where the
//! registry wants one, as every client does for public images.

use reqwest::{
    Method, Response, StatusCode,
    header::{self, HeaderValue},
};
use shoal_proto::ObjectId;

use super::{ACCEPT, Http, Request, header_number};
use crate::oci::{RegistryError, Source};

/// Most challenges of one answer that are passed on.
const MAX_CHALLENGES: usize = 4;

/// What is asked about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Probe {
    /// The manifest that has this tag.
    Tag(String),
    /// A manifest.
    Manifest(ObjectId),
    /// A blob.
    Blob(ObjectId),
}

/// What a registry says to a [`Probe`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Access {
    /// It would give it.
    Granted(Described),
    /// It would not. With challenges it says what it wants to see (401), without it says no (403).
    Refused {
        /// Values of `WWW-Authenticate`.
        challenges: Vec<String>,
    },
    /// There is no such thing, or so it says to this client.
    Absent,
}

/// What a registry said of a thing without giving it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Described {
    /// Its digest, where the registry told.
    pub id: Option<ObjectId>,
    /// Its bytes, where the registry told.
    pub size: Option<u64>,
    /// Its media type, where the registry told.
    pub media_type: Option<String>,
}

impl Http {
    pub(in crate::oci) async fn probe(
        &self,
        source: &Source,
        probe: &Probe,
        shown: Option<&str>,
        accept: Option<&str>,
    ) -> Result<Access, RegistryError> {
        let path = match probe {
            Probe::Tag(tag) => format!("manifests/{tag}"),
            Probe::Manifest(id) => format!("manifests/sha256:{id}"),
            Probe::Blob(id) => format!("blobs/sha256:{id}"),
        };
        let mut request = self.request(Method::HEAD, source, &path)?;
        if !matches!(probe, Probe::Blob(_)) {
            request = request.header(header::ACCEPT, accept.unwrap_or(ACCEPT));
        }
        let (mut response, grant) = match self.ask(&request, shown).await? {
            Ok(answered) => answered,
            Err(challenges) => return Ok(Access::Refused { challenges }),
        };
        if !response.status().is_success() && response.url() != &request.url {
            // What signs a link for GET only does not let a HEAD in.
            let one = self.request(Method::GET, source, &path)?.header(header::RANGE, "bytes=0-0");
            response = self.follow(&one, grant.as_ref()).await?;
        }
        match response.status() {
            status if status.is_success() => Ok(Access::Granted(described(probe, &response))),
            StatusCode::NOT_FOUND => Ok(Access::Absent),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Ok(Access::Refused { challenges: challenges(&response) })
            }
            _ => Err(self.success(&request, response).await.err().unwrap_or(RegistryError::NotFound { what: path })),
        }
    }

    /// Makes the request as whoever showed `shown`, or as nobody; gives the answer and what was sent along, or the challenges.
    async fn ask(
        &self,
        request: &Request<'_>,
        shown: Option<&str>,
    ) -> Result<Result<(Response, Option<HeaderValue>), Vec<String>>, RegistryError> {
        let grant = match shown {
            Some(shown) => {
                let Ok(mut value) = HeaderValue::from_str(shown) else { return Ok(Err(Vec::new())) };
                value.set_sensitive(true);
                Some(value)
            }
            None => self.grants.cached(self, request).await,
        };
        let response = self.follow(request, grant.as_ref()).await?;
        let own = response.url().origin() == request.url.origin();
        if response.status() != StatusCode::UNAUTHORIZED || !own || shown.is_some() {
            return Ok(Ok((response, grant)));
        }
        let challenges = challenges(&response);
        match self.grants.renew(self, request, response.headers(), grant, &mut 0).await {
            Ok(Some(grant)) => {
                let response = self.follow(request, Some(&grant)).await?;
                let refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
                Ok(if refused { Err(challenges) } else { Ok((response, Some(grant))) })
            }
            // It has no token for nobody.
            Ok(None) | Err(RegistryError::Unauthorized { .. } | RegistryError::BadRealm { .. }) => {
                Ok(Err(challenges))
            }
            Err(error) => Err(error),
        }
    }
}

fn described(probe: &Probe, response: &Response) -> Described {
    let text = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    let announced = text("docker-content-digest").and_then(|digest| digest.strip_prefix("sha256:")?.parse().ok());
    let (id, media_type) = match probe {
        Probe::Tag(_) => (announced, text("content-type")),
        Probe::Manifest(id) => (Some(*id), text("content-type")),
        Probe::Blob(id) => (Some(*id), None),
    };
    let size = match response.status() {
        StatusCode::PARTIAL_CONTENT => text("content-range").and_then(|range| range.rsplit_once('/')?.1.parse().ok()),
        _ => header_number(response, &header::CONTENT_LENGTH),
    };
    Described { id, size, media_type: media_type.map(str::to_owned) }
}

fn challenges(response: &Response) -> Vec<String> {
    let values = response.headers().get_all(header::WWW_AUTHENTICATE).iter();
    values.filter_map(|value| value.to_str().ok()).take(MAX_CHALLENGES).map(str::to_owned).collect()
}
