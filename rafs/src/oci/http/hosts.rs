//! How much is asked of one host at the same time.
//!
//! Reads and writes are counted apart: a copy reads while it writes, maybe from the same host, and who holds a read while it
//! waits for a write must not be waited for by the writes.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use reqwest::Url;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most hosts that are remembered. Beyond, those that nothing is asked of are forgotten.
const MAX_HOSTS: usize = 1024;

/// Scheme, host and port; whether it is for writes.
type Key = (String, bool);

/// The hosts that are being asked.
#[derive(Debug)]
pub(super) struct Hosts {
    most: usize,
    /// Held for a look-up only.
    by_host: Mutex<HashMap<Key, Arc<Semaphore>>>,
}

/// One request under way.
#[derive(Debug, Clone)]
pub(super) struct Permit {
    _held: Option<Arc<OwnedSemaphorePermit>>,
}

impl Hosts {
    /// At most so many reads of one host at a time, and as many writes; at least one.
    pub(super) fn new(most: usize) -> Self {
        Self { most: most.clamp(1, Semaphore::MAX_PERMITS), by_host: Mutex::default() }
    }

    /// Waits for a place among the requests of a URL's host.
    pub(super) async fn enter(&self, url: &Url, writes: bool) -> Permit {
        let semaphore = self.of((url.origin().ascii_serialization(), writes));
        // It is never closed.
        Permit { _held: semaphore.acquire_owned().await.ok().map(Arc::new) }
    }

    fn of(&self, key: Key) -> Arc<Semaphore> {
        let mut hosts = self.by_host.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_HOSTS && !hosts.contains_key(&key) {
            // Who holds or awaits a place holds its semaphore as well.
            hosts.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
        }
        hosts.entry(key).or_insert_with(|| Arc::new(Semaphore::new(self.most))).clone()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn so_many_at_a_time_and_writes_apart() {
        let hosts = Hosts::new(2);
        let url = |text: &str| Url::parse(text).unwrap();
        let (one, other) = (url("https://h.io/a"), url("https://h.io:8443/a"));
        let first = hosts.enter(&one, false).await;
        let _second = hosts.enter(&url("https://h.io:443/b"), false).await;
        assert!(hosts.enter(&one, false).now_or_never().is_none());
        assert!(hosts.enter(&one, true).now_or_never().is_some());
        assert!(hosts.enter(&other, false).now_or_never().is_some());
        let copied = first.clone();
        drop(first);
        assert!(hosts.enter(&one, false).now_or_never().is_none());
        drop(copied);
        assert!(hosts.enter(&one, false).now_or_never().is_some());
    }

    #[tokio::test]
    async fn hosts_that_are_not_asked_are_forgotten() {
        let hosts = Hosts::new(1);
        let url = |n: usize| Url::parse(&format!("https://h{n}.io/")).unwrap();
        let _held = hosts.enter(&url(0), false).await;
        for n in 1..2 * MAX_HOSTS {
            hosts.enter(&url(n), false).await;
        }
        assert!(hosts.by_host.lock().unwrap().len() <= MAX_HOSTS);
        assert!(hosts.enter(&url(0), false).now_or_never().is_none());
    }
}
