//! Provider records: under which key the DHT keeps who has a blob, and the look-ups under way.
//!
//! The key holds the zone as well, since a provider far away is no help, and every blob has as many places in the
//! DHT as it has zones. A record lives for [`RECORD_TTL`] unless it is announced again, which Kademlia does on its
//! own; it knows no way to take one back, so who withdraws is found for that long still and has to say `not_have`.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use libp2p::kad::{self, QueryId, store::MemoryStoreConfig};
use sha2::{Digest, Sha256};
use shoal_proto::{BlobId, PeerId};

/// How long a record is kept without being announced again.
pub(super) const RECORD_TTL: Duration = Duration::from_secs(30 * 60);

/// Pause between two announcements of the same blob.
pub(super) const ANNOUNCE_EVERY: Duration = Duration::from_secs(10 * 60);

/// Providers that a key is remembered with.
pub(super) const MAX_PROVIDERS: usize = 32;

/// Keys that a node keeps records for, its own included: tens of thousands of blobs with all their zones would be a
/// large registry, and each node keeps but its share.
const MAX_KEYS: usize = 8192;

/// Look-ups at a time.
const MAX_LOOKUPS: usize = 256;

/// How much the DHT may keep in memory. Values are not used at all, only providers.
pub(super) fn store_limits() -> MemoryStoreConfig {
    MemoryStoreConfig {
        max_records: 0,
        max_value_bytes: 0,
        max_providers_per_key: MAX_PROVIDERS,
        max_provided_keys: MAX_KEYS,
    }
}

/// Where the DHT keeps who in `zone` has `blob`.
pub(super) fn key(blob: &BlobId, zone: &str) -> kad::RecordKey {
    let hash = Sha256::new()
        .chain_update(b"shoal provider 1\0")
        .chain_update(blob.as_bytes())
        .chain_update(zone.as_bytes())
        .finalize();
    kad::RecordKey::new(&hash)
}

/// Look-ups whose answers are still coming in.
#[derive(Debug, Default)]
pub(super) struct Lookups {
    running: HashMap<QueryId, Lookup>,
}

#[derive(Debug)]
struct Lookup {
    blob: BlobId,
    found: BTreeSet<PeerId>,
}

impl Lookups {
    /// Whether a look-up for `blob` is under way.
    pub(super) fn runs(&self, blob: &BlobId) -> bool {
        self.running.values().any(|lookup| lookup.blob == *blob)
    }

    /// Whether no other look-up may start.
    pub(super) fn is_full(&self) -> bool {
        self.running.len() >= MAX_LOOKUPS
    }

    pub(super) fn start(&mut self, query: QueryId, blob: BlobId) {
        self.running.insert(query, Lookup { blob, found: BTreeSet::new() });
    }

    /// More providers were found.
    pub(super) fn found(&mut self, query: &QueryId, providers: impl IntoIterator<Item = PeerId>) {
        if let Some(lookup) = self.running.get_mut(query) {
            let room = MAX_PROVIDERS.saturating_sub(lookup.found.len());
            lookup.found.extend(providers.into_iter().take(room));
        }
    }

    /// The look-up is over: what for, and who was found, in order.
    pub(super) fn finish(&mut self, query: &QueryId) -> Option<(BlobId, Vec<PeerId>)> {
        let lookup = self.running.remove(query)?;
        Some((lookup.blob, lookup.found.into_iter().collect()))
    }
}

#[cfg(test)]
mod tests {
    use libp2p::kad::store::{MemoryStore, RecordStore};

    use super::*;

    #[test]
    fn a_million_records_are_not_kept() {
        let me = libp2p::PeerId::random();
        let mut store = MemoryStore::with_config(me, store_limits());
        let key = |n: u32| kad::RecordKey::new(&n.to_le_bytes());
        let provider = libp2p::PeerId::random();
        for n in 0..1_000_000 {
            let kept = store.add_provider(kad::ProviderRecord::new(key(n), provider, Vec::new()));
            assert_eq!(kept.is_ok(), (n as usize) < MAX_KEYS, "{n}");
        }
        for _ in 0..1000 {
            let record = kad::ProviderRecord::new(key(0), libp2p::PeerId::random(), Vec::new());
            // Those that came first are kept.
            let _ = store.add_provider(record);
        }
        assert_eq!(store.providers(&key(0)).len(), MAX_PROVIDERS);
    }

    #[test]
    fn keys_differ_by_blob_and_zone() {
        let (a, b) = (BlobId::new([1; 32]), BlobId::new([2; 32]));
        let keys: BTreeSet<_> =
            [key(&a, "x"), key(&a, "y"), key(&b, "x"), key(&a, "")].iter().map(|key| key.to_vec()).collect();
        assert_eq!(keys.len(), 4);
        assert_eq!(key(&a, "x"), key(&a, "x"));
    }
}
