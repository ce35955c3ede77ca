//! Who may read what: asked of the registry, as the client, and remembered for a short time.
//!
//! Only that something was granted is remembered, together with what the registry said of it. A refusal is asked for again each
//! time: what was refused a moment ago may be allowed now, and clients try with better credentials at once.

use std::{
    num::NonZeroUsize,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use lru::LruCache;
use sha2::{Digest, Sha256};
use shoal_rafs::oci::{Access, Described, Probe, Registry, Source};

use crate::distribution::Refusal;

/// Most permissions that are remembered.
const MAX_GRANTED: NonZeroUsize = NonZeroUsize::new(16 * 1024).expect("not 0");
/// Longest `Accept` that is passed on; a longer one is replaced by this program's own.
const MAX_ACCEPT: usize = 2048;

/// A client, as far as it can be told from others: what it shows and understands, hashed with a key of this process.
type Client = [u8; 32];

/// Who may have what, as the registry said, and when it did.
type Granted = LruCache<(Source, Probe, Client), (Instant, Described)>;

pub(super) struct Permissions {
    registry: Registry,
    lifetime: Duration,
    tag_lifetime: Duration,
    /// Makes hashes of credentials worth nothing elsewhere.
    key: [u8; 32],
    /// Held for a look or a change.
    granted: Mutex<Granted>,
}

impl Permissions {
    /// `registry` has no credentials of its own.
    pub(super) fn new(registry: Registry, lifetime: Duration, tag_lifetime: Duration) -> Self {
        // Grows as it is needed: most nodes read a few images.
        let granted = Mutex::new(LruCache::sparse(MAX_GRANTED));
        Self { registry, lifetime, tag_lifetime, key: rand::random(), granted }
    }

    /// What the registry says of something that it would give to this client.
    ///
    /// # Errors
    /// What the client is told instead.
    pub(super) async fn check(
        &self,
        source: &Source,
        probe: Probe,
        headers: &HeaderMap,
    ) -> Result<Described, Refusal> {
        let shown = match headers.get(header::AUTHORIZATION).map(HeaderValue::to_str) {
            Some(Err(_)) => return Err(refusal(&probe, Access::Refused { challenges: Vec::new() })),
            Some(Ok(shown)) => Some(shown),
            None => None,
        };
        let accept = accepted(headers);
        let key = (source.clone(), probe, self.client(shown, accept.as_deref()));
        if let Some(known) = self.known(&key) {
            return Ok(known);
        }
        metrics::counter!("shoal_mirror_access_checks_total").increment(1);
        match self.registry.probe(source, &key.1, shown, accept.as_deref()).await {
            Ok(Access::Granted(described)) => {
                self.granted().put(key, (Instant::now(), described.clone()));
                Ok(described)
            }
            Ok(access) => Err(refusal(&key.1, access)),
            Err(error) => {
                tracing::warn!("{source} cannot be asked who may read it: {}", crate::chain(&error));
                Err(Refusal::new(StatusCode::BAD_GATEWAY, "UNAVAILABLE", "the registry does not answer as it should"))
            }
        }
    }

    fn known(&self, key: &(Source, Probe, Client)) -> Option<Described> {
        let lifetime = if matches!(key.1, Probe::Tag(_)) { self.tag_lifetime } else { self.lifetime };
        let mut granted = self.granted();
        let (since, described) = granted.get(key)?;
        if since.elapsed() < lifetime {
            return Some(described.clone());
        }
        granted.pop(key);
        None
    }

    fn client(&self, shown: Option<&str>, accept: Option<&str>) -> Client {
        let mut hasher = Sha256::new();
        hasher.update(self.key);
        for part in [shown, accept] {
            // Lengths keep the parts apart, and nothing from an empty text.
            hasher.update(part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
            hasher.update(part.unwrap_or_default());
        }
        hasher.finalize().into()
    }

    fn granted(&self) -> MutexGuard<'_, Granted> {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that the client accepts, as one value.
fn accepted(headers: &HeaderMap) -> Option<String> {
    let values = headers.get_all(header::ACCEPT).iter().map(|value| value.to_str().ok());
    let joined = values.collect::<Option<Vec<_>>>()?.join(", ");
    Some(joined).filter(|joined| !joined.is_empty() && joined.len() <= MAX_ACCEPT)
}

fn refusal(probe: &Probe, access: Access) -> Refusal {
    match access {
        Access::Refused { challenges } if challenges.is_empty() => {
            Refusal::new(StatusCode::FORBIDDEN, "DENIED", "the registry refuses")
        }
        Access::Refused { challenges } => {
            let challenges = challenges.iter().filter_map(|text| HeaderValue::from_str(text).ok()).collect();
            let refusal = Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "the registry wants credentials");
            refusal.challenging(challenges)
        }
        Access::Absent | Access::Granted(_) => match probe {
            Probe::Blob(id) => {
                Refusal::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("no such blob: sha256:{id}"))
            }
            Probe::Tag(_) | Probe::Manifest(_) => {
                Refusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", "no such manifest")
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use shoal_rafs::oci::RegistryOptions;

    use super::*;

    #[test]
    fn clients_are_told_apart_by_what_they_show_and_accept() {
        let registry = Registry::new(RegistryOptions::default()).unwrap();
        let permissions = Permissions::new(registry, Duration::from_secs(60), Duration::from_secs(1));
        let shown = [None, Some(""), Some("Basic YQ=="), Some("Basic Yg==")];
        let clients = shown.iter().flat_map(|&one| shown.iter().map(move |&other| (one, other)));
        let hashes: std::collections::HashSet<_> = clients.map(|(a, b)| permissions.client(a, b)).collect();
        assert_eq!(hashes.len(), 16);
    }

    #[test]
    fn what_was_granted_is_good_for_its_lifetime_and_to_its_client() {
        let registry = Registry::new(RegistryOptions::default()).unwrap();
        let permissions = Permissions::new(registry, Duration::from_secs(3600), Duration::ZERO);
        let source = Source::new("r.example", "app").unwrap();
        let described = Described { id: None, size: Some(1), media_type: None };
        let blob = Probe::Blob(shoal_proto::ObjectId::new([1; 32]));
        let (one, other) = (permissions.client(Some("a"), None), permissions.client(None, None));
        for probe in [blob.clone(), Probe::Tag("1".into())] {
            permissions.granted().put((source.clone(), probe, one), (Instant::now(), described.clone()));
        }
        assert_eq!(permissions.known(&(source.clone(), blob.clone(), one)), Some(described));
        assert_eq!(permissions.known(&(source.clone(), blob, other)), None);
        assert_eq!(
            permissions.known(&(source, Probe::Tag("1".into()), one)),
            None,
            "tags have a lifetime of their own"
        );
    }

    #[test]
    fn all_lines_of_accept_count_and_a_flood_does_not() {
        let mut headers = HeaderMap::new();
        assert_eq!(accepted(&headers), None);
        headers.append(header::ACCEPT, "a/b".parse().unwrap());
        headers.append(header::ACCEPT, "*/*".parse().unwrap());
        assert_eq!(accepted(&headers).as_deref(), Some("a/b, */*"));
        headers.append(header::ACCEPT, "x".repeat(MAX_ACCEPT).parse().unwrap());
        assert_eq!(accepted(&headers), None);
    }
}
