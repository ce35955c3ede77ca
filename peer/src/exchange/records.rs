//! Provider records: of which blobs this node says in the DHT that it has them.
//!
//! All providers of a blob land on the same twenty nodes of the DHT, and nobody waits for it: whoever looks there only has to find a few,
//! who name others. So seed peers announce what they have, and of the nodes of a zone a sample that stays about as large as it is,
//! whatever the zone has.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};
use shoal_proto::{BlobId, PeerId, Role};

use super::Exchange;
use crate::images::ImageBlob;

/// How many nodes of a zone announce a blob, about, if all of them have it. With as many seed peers as there may be in a zone they are
/// fewer than a key is remembered with.
const SAMPLE: u64 = 24;

/// Blobs that this node could announce, and whether it does.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeMap<BlobId, bool>);

impl Records {
    /// Forgets the blobs that are not here any more; gives those with a record.
    pub(super) fn take_back(&mut self, is_here: impl Fn(&BlobId) -> bool) -> Vec<BlobId> {
        let gone = self.0.extract_if(.., |blob, _| !is_here(blob));
        gone.filter_map(|(blob, announced)| announced.then_some(blob)).collect()
    }
}

/// Whether a node is in the sample of `nodes` nodes that announce a blob.
fn is_sampled(me: PeerId, blob: BlobId, nodes: usize) -> bool {
    let hash = Sha256::new().chain_update(me.as_bytes()).chain_update(blob.as_bytes()).finalize();
    let place = hash.iter().take(8).fold(0, |place: u64, byte| place << 8 | u64::from(*byte));
    (u128::from(place) * nodes as u128) >> 64 < u128::from(SAMPLE)
}

impl Exchange {
    /// Seed peers, and a few of the nodes that hold half of a blob, are worth a provider record.
    pub(super) async fn announce(&self, blob: &ImageBlob) {
        let (id, parts) = (blob.table.blob(), &self.parts);
        let present = blob.handle.present().count();
        let half = present * 2 >= blob.table.len();
        let is_seed = parts.role == Role::Seed;
        if present == 0 || !(is_seed || half) || self.lock().records.0.contains_key(&id) {
            return;
        }
        let chosen = is_seed || is_sampled(parts.me, id, parts.contacts.len_of_zone(&parts.zone));
        let new = self.lock().records.0.insert(id, chosen).is_none();
        if new
            && chosen
            && let Err(error) = parts.control.announce(id).await
        {
            tracing::debug!("not announced: {error}");
        }
    }

    /// The store has let go of a blob. Neighbours are told with the next news.
    pub(crate) async fn evicted(&self, blob: BlobId) {
        let announced = self.lock().records.0.remove(&blob);
        if announced == Some(true) {
            self.withdraw(blob).await;
        }
    }

    pub(super) async fn withdraw(&self, blob: BlobId) {
        if let Err(error) = self.parts.control.withdraw(blob).await {
            tracing::debug!("not withdrawn: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_few_announce_and_of_many_a_few() {
        let peer = |n: usize| PeerId::new(Sha256::digest(n.to_le_bytes()).into());
        for n in 0..4 {
            let blob = BlobId::new([n; 32]);
            let sampled = |nodes: usize| (0..nodes).filter(|n| is_sampled(peer(*n), blob, nodes)).count();
            assert_eq!([1, 8, 24].map(sampled), [1, 8, 24]);
            // Four standard deviations.
            assert!([200, 2500, 10_000].map(sampled).iter().all(|few| (4..=44).contains(few)));
        }
        let first = |blob| (0..1000).find(|n| is_sampled(peer(*n), BlobId::new([blob; 32]), 1000));
        assert!((1..9).any(|blob| first(blob) != first(0)), "others for others");
    }
}
