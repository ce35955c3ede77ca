//! The ledger of what is in flight: which request owes which pieces, and whether another may start.

use std::collections::BTreeMap;

use shoal_proto::{PeerId, Priority};

use crate::{BlobKey, Limits, RequestId, Source, Time, inflow::Lane};

/// A request under way.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) source: Source,
    pub(crate) blob: BlobKey,
    /// The pieces that it still owes.
    pub(crate) pieces: Vec<u32>,
    pub(crate) priority: Priority,
    /// A home said it is getting the pieces, and was given until then.
    pub(crate) pending_until: Time,
    /// Times in a row that it was silent for too long.
    pub(crate) stalls: u32,
}

impl Request {
    /// The peer asked.
    pub(crate) fn peer(&self) -> Option<PeerId> {
        match self.source {
            Source::Peer(peer) | Source::Home(peer) => Some(peer),
            Source::Registry => None,
        }
    }

    /// What its bytes count as.
    pub(crate) fn lane(&self) -> Lane {
        Lane::new(self.source, self.priority)
    }

    /// Whether a home has said that it is at it and may still be believed.
    pub(crate) fn is_pending(&self, now: Time) -> bool {
        matches!(self.source, Source::Home(_)) && self.pending_until > now
    }
}

/// All requests under way.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    next: u64,
    open: BTreeMap<RequestId, Request>,
    registry: u32,
}

impl Requests {
    pub(crate) fn open(&mut self, request: Request) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        self.registry += u32::from(request.source == Source::Registry);
        self.open.insert(id, request);
        id
    }

    pub(crate) fn close(&mut self, id: RequestId) -> Option<Request> {
        let request = self.open.remove(&id)?;
        self.registry -= u32::from(request.source == Source::Registry);
        Some(request)
    }

    pub(crate) fn at(&self, id: RequestId) -> Option<&Request> {
        self.open.get(&id)
    }

    pub(crate) fn at_mut(&mut self, id: RequestId) -> Option<&mut Request> {
        self.open.get_mut(&id)
    }

    /// The piece is no longer owed; says whether it was.
    pub(crate) fn take(&mut self, id: RequestId, piece: u32) -> bool {
        let Some(request) = self.open.get_mut(&id) else { return false };
        let before = request.pieces.len();
        request.pieces.retain(|&owed| owed != piece);
        request.pieces.len() < before
    }

    pub(crate) fn of_peer(&self, peer: PeerId) -> Vec<RequestId> {
        self.open.iter().filter(|(_, request)| request.peer() == Some(peer)).map(|(&id, _)| id).collect()
    }

    pub(crate) fn of_blob(&self, blob: BlobKey) -> Vec<RequestId> {
        self.open.iter().filter(|(_, request)| request.blob == blob).map(|(&id, _)| id).collect()
    }

    /// Requests under way at the registry.
    pub(crate) fn at_registry(&self) -> u32 {
        self.registry
    }

    /// Requests under way at peers.
    pub(crate) fn at_peers(&self) -> u32 {
        self.open.len() as u32 - self.registry
    }

    /// Whether the registry may be asked once more.
    pub(crate) fn registry_room(&self, priority: Priority, limits: &Limits) -> bool {
        let limit = match priority {
            Priority::OnDemand => limits.registry_slots,
            Priority::Prefetch => limits.registry_slots.saturating_sub(limits.registry_reserve),
        };
        self.registry < limit.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_what_is_open_and_keeps_slots_for_on_demand() {
        let limits = Limits { registry_slots: 2, registry_reserve: 1, ..Limits::default() };
        let request = |source| Request {
            source,
            blob: BlobKey { id: [0; 32], variant: 0 },
            pieces: vec![3, 4],
            priority: Priority::Prefetch,
            pending_until: Time::ZERO,
            stalls: 0,
        };
        let mut requests = Requests::default();
        let first = requests.open(request(Source::Registry));
        let peer = PeerId::new([1; 32]);
        let second = requests.open(request(Source::Home(peer)));
        assert_eq!((requests.at_registry(), requests.at_peers()), (1, 1));
        assert!(!requests.registry_room(Priority::Prefetch, &limits));
        assert!(requests.registry_room(Priority::OnDemand, &limits));
        assert_eq!(requests.of_peer(peer), [second]);
        assert!(requests.take(first, 4) && !requests.take(first, 4));
        assert_eq!(requests.close(first).map(|request| request.pieces), Some(vec![3]));
        assert!(requests.close(first).is_none());
        assert_eq!((requests.at_registry(), requests.at_peers()), (0, 1));
    }
}
