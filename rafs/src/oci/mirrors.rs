//! Mirrors: other hosts that have what a registry has, asked before it.
//!
//! What they give is verified like the registry's own, except what a tag means, which is theirs to say as it is the
//! registry's. A mirror is tried once; who has failed to answer is passed over for a while, so that a dead one costs one
//! connection time-out and not one for every read. Each is shown its own credentials. Nothing is ever written to a mirror, nor
//! asked whether something has to be.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{RegistryError, RegistryOptions, Source, http::Http};

/// How long a mirror that did not answer is passed over.
pub(super) const PAUSE: Duration = Duration::from_secs(30);

/// The mirrors of all registries.
#[derive(Debug)]
pub(super) struct Mirrors {
    pub(super) http: Http,
    of: BTreeMap<String, Vec<String>>,
    /// Until when. At most one entry for each mirror. Held for a look-up only.
    paused: Mutex<HashMap<String, Instant>>,
}

impl Mirrors {
    /// `None` when there are none.
    pub(super) fn new(options: &RegistryOptions) -> Result<Option<Self>, RegistryError> {
        if options.mirrors.is_empty() {
            return Ok(None);
        }
        for host in options.mirrors.values().flatten().chain(options.mirrors.keys()) {
            Source::new(host, "any").map_err(RegistryError::from)?;
        }
        let lower = |host: &String| host.to_ascii_lowercase();
        let of = options.mirrors.iter().map(|(host, mirrors)| (lower(host), mirrors.iter().map(lower).collect()));
        let once = RegistryOptions { retries: 0, mirrors: BTreeMap::new(), proxy: None, ..options.clone() };
        Ok(Some(Self { http: Http::new(once)?, of: of.collect(), paused: Mutex::default() }))
    }

    /// Where else to look for what this source has, in order.
    pub(super) fn of(&self, source: &Source) -> Vec<Source> {
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        paused.retain(|_, until| *until > now);
        let mirrors = self.of.get(source.registry()).into_iter().flatten();
        let ready = mirrors.filter(|mirror| !paused.contains_key(*mirror));
        ready.filter_map(|mirror| Source::new(mirror, source.repository()).ok()).collect()
    }

    /// Passes over all mirrors of a registry for a while: nobody knows which of them gave bytes that turned out to be wrong.
    /// Whether one was asked until now.
    pub(super) fn distrust(&self, registry: &str) -> bool {
        let mirrors: Vec<_> = self.of.get(registry).into_iter().flatten().collect();
        let now = Instant::now();
        let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
        let asked = mirrors.iter().any(|mirror| paused.get(*mirror).is_none_or(|until| *until <= now));
        paused.extend(mirrors.into_iter().map(|mirror| (mirror.clone(), now + PAUSE)));
        asked
    }

    /// Notes that a mirror gave nothing.
    pub(super) fn failed(&self, mirror: &Source, error: &RegistryError) {
        tracing::debug!(%mirror, %error, "a mirror gave nothing");
        if error.is_transient() {
            let mut paused = self.paused.lock().unwrap_or_else(PoisonError::into_inner);
            paused.insert(mirror.registry().to_owned(), Instant::now() + PAUSE);
        }
    }
}
