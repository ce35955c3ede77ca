//! Bearer tokens and passwords: what a registry wants to see before it answers, kept until it expires.
//!
//! The scope asked for is always made here, from the repository and the need to write; the one in the challenge is not
//! used, so that a registry cannot make this program fetch a token for something else.
//!
//! Which token servers see credentials, `realm.rs` says. A password goes there as the distribution's token specification says, an
//! identity token as its OAuth 2 variant does: by POST, so that it is in no log of addresses.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use reqwest::{
    StatusCode,
    header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;
use url::form_urlencoded;

use super::{Http, Request, describe, realm, transport::Shown};
use crate::oci::{Credentials, RegistryError, Source, auth::Challenge};

/// Lifetime of a token that does not say (distribution token specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Longest lifetime that is believed.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// A token is not used in its last seconds.
const MARGIN: Duration = Duration::from_secs(5);
/// Most bytes of a token answer.
const MAX_ANSWER: u64 = 64 * 1024;
/// What this program calls itself where an identity token is exchanged.
const CLIENT: &str = "shoal";
/// Most repositories that are remembered; beyond, all are forgotten.
const MAX_GRANTS: usize = 4096;

/// Registry, repository, whether it may write, another repository that it may read.
type Scope = (String, String, bool, Option<String>);

/// The `Authorization` values that worked last.
#[derive(Default)]
pub(super) struct Grants {
    /// The inner lock is held while a token is fetched, so that a hundred reads that start together fetch one.
    by_scope: Mutex<HashMap<Scope, Arc<tokio::sync::Mutex<Option<Grant>>>>>,
}

struct Grant {
    value: HeaderValue,
    expires: Option<Instant>,
    /// What it was got with; none if anybody would have got it.
    by: Option<Credentials>,
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Grants {
    /// What to send along, if it is known already.
    pub(super) async fn cached(&self, http: &Http, request: &Request<'_>) -> Option<HeaderValue> {
        let slot = self.slot(request);
        let grant = slot.lock().await;
        grant.as_ref().filter(|grant| grant.is_current(http, request.source)).map(|grant| grant.value.clone())
    }

    /// Answers the challenge of a 401 that `refused` got, with the next of the credentials; `tried` counts those that were
    /// tried for this request. `None` when there is nothing better to offer.
    pub(super) async fn renew(
        &self,
        http: &Http,
        request: &Request<'_>,
        headers: &HeaderMap,
        refused: Option<HeaderValue>,
        tried: &mut usize,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let slot = self.slot(request);
        let mut grant = slot.lock().await;
        if let Some(newer) = grant
            .as_ref()
            .filter(|grant| grant.is_current(http, request.source) && Some(&grant.value) != refused.as_ref())
        {
            return Ok(Some(newer.value.clone()));
        }
        if let Some(by) =
            grant.take().filter(|grant| Some(&grant.value) == refused.as_ref()).and_then(|grant| grant.by)
        {
            http.options.auth.refused(request.source, &by);
        }
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let Some(challenge) = Challenge::parse(values) else { return Ok(None) };
        // Others may still open it.
        let mut refusal = http.options.auth.ask_helper(request.source).await.err().map(RegistryError::from);
        let candidates = http.options.auth.candidates(request.source);
        while let Some(next) = candidates.get(*tried) {
            *tried += 1;
            let fresh = match &challenge {
                Challenge::Basic => {
                    next.as_ref().and_then(|next| Grant::new(&next.basic()?, None, Some(next.clone())))
                }
                Challenge::Bearer { realm, service } => {
                    match fetch(http, request, realm, service.clone(), next).await {
                        Ok(fresh) => Some(fresh),
                        Err(error @ RegistryError::Unauthorized { .. }) => {
                            if let Some(next) = next {
                                http.options.auth.refused(request.source, next);
                            }
                            refusal.get_or_insert(error);
                            continue;
                        }
                        Err(error) => return Err(error),
                    }
                }
            };
            // The same password again would be refused again.
            if let Some(fresh) = fresh.filter(|fresh| Some(&fresh.value) != refused.as_ref()) {
                let value = fresh.value.clone();
                *grant = Some(fresh);
                return Ok(Some(value));
            }
        }
        refusal.map_or(Ok(None), Err)
    }

    fn slot(&self, request: &Request<'_>) -> Arc<tokio::sync::Mutex<Option<Grant>>> {
        let source = request.source;
        let scope = (
            source.registry().to_owned(),
            source.repository().to_owned(),
            request.push,
            request.also.map(str::to_owned),
        );
        let mut grants = self.by_scope.lock().unwrap_or_else(PoisonError::into_inner);
        if grants.len() >= MAX_GRANTS && !grants.contains_key(&scope) {
            grants.clear();
        }
        grants.entry(scope).or_default().clone()
    }
}

impl fmt::Debug for Grants {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grants").finish_non_exhaustive()
    }
}

impl Grant {
    fn new(value: &str, lifetime: Option<Duration>, by: Option<Credentials>) -> Option<Self> {
        let mut value = HeaderValue::from_str(value).ok()?;
        value.set_sensitive(true);
        Some(Self { value, expires: lifetime.map(|lifetime| Instant::now() + lifetime), by })
    }

    /// Whether it has not expired, and what it was got with may still be used.
    fn is_current(&self, http: &Http, source: &Source) -> bool {
        let held = self.by.as_ref().is_none_or(|by| http.options.auth.holds(source, by));
        held && self.expires.is_none_or(|expires| Instant::now() < expires)
    }
}

async fn fetch(
    http: &Http,
    request: &Request<'_>,
    realm: &str,
    service: Option<String>,
    credentials: &Option<Credentials>,
) -> Result<Grant, RegistryError> {
    let source = request.source;
    let (registry, shown) = (source.registry(), credentials.is_some());
    let plain = http.transport.is_plain(registry);
    let mut url = realm::checked(realm, registry, plain, shown, &http.options.token_servers)?;
    let actions = if request.push { "pull,push" } else { "pull" };
    let also = request.also.map(|also| format!("repository:{also}:pull"));
    let scopes = [Some(format!("repository:{}:{actions}", source.repository())), also];
    let scopes: Vec<String> = scopes.into_iter().flatten().collect();
    let shown = match credentials.as_ref().and_then(Credentials::as_identity_token) {
        Some(token) => {
            let mut form = form_urlencoded::Serializer::new(String::new());
            form.append_pair("grant_type", "refresh_token").append_pair("client_id", CLIENT);
            form.append_pair("refresh_token", token).append_pair("scope", &scopes.join(" "));
            form.extend_pairs(service.map(|service| ("service", service)));
            Shown::Form(form.finish())
        }
        None => {
            url.query_pairs_mut().extend_pairs(scopes.iter().map(|scope| ("scope", scope)));
            url.query_pairs_mut().extend_pairs(service.map(|service| ("service", service)));
            credentials.as_ref().and_then(Credentials::basic).map_or(Shown::Nothing, Shown::Basic)
        }
    };
    let response = http.transport.token(&url, shown).await?;
    let what = describe(&url);
    if response.status().is_redirection() {
        let reason = "token servers are not followed".to_owned();
        return Err(RegistryError::Protocol { what, reason });
    }
    // Docker's token server says 400 or 403 to users that it does not know.
    if matches!(response.status(), StatusCode::BAD_REQUEST) && credentials.is_some() {
        let (registry, repository) = (source.registry().to_owned(), source.repository().to_owned());
        return Err(RegistryError::Unauthorized { registry, repository, given: true });
    }
    let response = http.success(request, response).await?;
    let body = http.collect(response, MAX_ANSWER).await?;
    let broken = |reason: &str| RegistryError::Protocol { what: what.clone(), reason: reason.to_owned() };
    let answer: Answer = serde_json::from_slice(&body).map_err(|_| broken("the token answer is not JSON"))?;
    let token = answer.token.or(answer.access_token).filter(|token| !token.is_empty());
    let token = token.ok_or_else(|| broken("the token answer has no token"))?;
    let lifetime = answer.expires_in.map_or(DEFAULT_LIFETIME, Duration::from_secs).min(MAX_LIFETIME);
    Grant::new(&format!("Bearer {token}"), Some(lifetime.saturating_sub(MARGIN)), credentials.clone())
        .ok_or_else(|| broken("the token cannot be sent in a header"))
}
