//! The ledger of what is in flight: which request owes which pieces, and whether another may start.

use shoal_proto::Priority;
use smallvec::SmallVec;

use crate::{
    Limits, RequestId, Time,
    blobs::{BlobSlot, Piece},
    inflow::Lane,
    peers::Slot,
};

/// Whom a request went to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A neighbour that announced the pieces.
    Peer(Slot),
    /// A home, which gets them.
    Home(Slot),
    /// The registry.
    Registry,
}

impl Asked {
    /// The peer, if it is one.
    pub(crate) fn peer(self) -> Option<Slot> {
        match self {
            Self::Peer(peer) | Self::Home(peer) => Some(peer),
            Self::Registry => None,
        }
    }
}

/// The pieces of a request: one where they are large.
pub(crate) type Pieces = SmallVec<[u32; 4]>;

/// A request under way.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) asked: Asked,
    pub(crate) blob: BlobSlot,
    /// The pieces that it still owes.
    pub(crate) pieces: Pieces,
    pub(crate) priority: Priority,
    /// A home said it is getting the pieces, and was given until then.
    pub(crate) pending_until: Time,
    /// When it owes a sign of life.
    pub(crate) due: Time,
    /// Times in a row that it was silent for too long.
    pub(crate) stalls: u32,
}

impl Request {
    /// The peer asked. It is connected: when it goes, its requests are given up first.
    pub(crate) fn peer(&self) -> Option<Slot> {
        self.asked.peer()
    }

    /// The pieces that it still owes.
    pub(crate) fn owed(&self) -> impl Iterator<Item = Piece> {
        self.pieces.iter().map(|&piece| Piece { blob: self.blob, piece })
    }

    pub(crate) fn owes(&self, piece: Piece) -> bool {
        self.blob == piece.blob && self.pieces.contains(&piece.piece)
    }

    /// Whether a home was asked.
    pub(crate) fn is_at_home(&self) -> bool {
        matches!(self.asked, Asked::Home(_))
    }

    /// What its bytes count as.
    pub(crate) fn lane(&self) -> Lane {
        match self.asked {
            Asked::Registry => Lane::Registry(self.priority),
            _ => Lane::Peers(self.priority),
        }
    }

    /// Whether a home has said that it is at it and may still be believed.
    pub(crate) fn is_pending(&self, now: Time) -> bool {
        self.is_at_home() && self.pending_until > now
    }
}

/// Bits of a [`RequestId`] that say where the request stands in the table; the others are a turn that comes once.
const PLACE_BITS: u32 = 24;

/// All requests under way.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    turn: u64,
    table: Vec<Option<(RequestId, Request)>>,
    free: Vec<u32>,
    open: u32,
    registry: u32,
}

fn place(id: RequestId) -> usize {
    (id.0 & ((1 << PLACE_BITS) - 1)) as usize
}

impl Requests {
    pub(crate) fn open(&mut self, request: Request) -> RequestId {
        let place = self.free.pop().unwrap_or_else(|| {
            self.table.push(None);
            self.table.len() as u32 - 1
        });
        let id = RequestId(self.turn << PLACE_BITS | u64::from(place));
        self.turn += 1;
        self.open += 1;
        self.registry += u32::from(request.asked == Asked::Registry);
        self.table[place as usize] = Some((id, request));
        id
    }

    pub(crate) fn close(&mut self, id: RequestId) -> Option<Request> {
        let (_, request) = self.table.get_mut(place(id))?.take_if(|(open, _)| *open == id)?;
        self.free.push(place(id) as u32);
        self.open -= 1;
        self.registry -= u32::from(request.asked == Asked::Registry);
        Some(request)
    }

    pub(crate) fn at(&self, id: RequestId) -> Option<&Request> {
        let (open, request) = self.table.get(place(id))?.as_ref()?;
        (*open == id).then_some(request)
    }

    pub(crate) fn at_mut(&mut self, id: RequestId) -> Option<&mut Request> {
        let (open, request) = self.table.get_mut(place(id))?.as_mut()?;
        (*open == id).then_some(request)
    }

    /// The piece is no longer owed; says whether it was.
    pub(crate) fn take(&mut self, id: RequestId, piece: u32) -> bool {
        let Some(request) = self.at_mut(id) else { return false };
        let before = request.pieces.len();
        request.pieces.retain(|owed| *owed != piece);
        request.pieces.len() < before
    }

    pub(crate) fn of_peer(&self, peer: Slot) -> Vec<RequestId> {
        self.those(|request| request.peer() == Some(peer))
    }

    pub(crate) fn of_blob(&self, blob: BlobSlot) -> Vec<RequestId> {
        self.those(|request| request.blob == blob)
    }

    /// In the order in which they were opened.
    fn those(&self, fits: impl Fn(&Request) -> bool) -> Vec<RequestId> {
        let mut found: Vec<_> =
            self.table.iter().flatten().filter(|(_, request)| fits(request)).map(|&(id, _)| id).collect();
        found.sort_unstable();
        found
    }

    /// Requests under way.
    pub(crate) fn len(&self) -> usize {
        self.open as usize
    }

    /// Requests under way at the registry.
    pub(crate) fn at_registry(&self) -> u32 {
        self.registry
    }

    /// Requests under way at peers.
    pub(crate) fn at_peers(&self) -> u32 {
        self.open - self.registry
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
        let request = |asked| Request {
            asked,
            blob: 0,
            pieces: [3, 4].into_iter().collect(),
            priority: Priority::Prefetch,
            pending_until: Time::ZERO,
            due: Time::ZERO,
            stalls: 0,
        };
        let mut requests = Requests::default();
        let first = requests.open(request(Asked::Registry));
        let second = requests.open(request(Asked::Home(7)));
        assert_eq!((requests.at_registry(), requests.at_peers()), (1, 1));
        assert!(!requests.registry_room(Priority::Prefetch, &limits));
        assert!(requests.registry_room(Priority::OnDemand, &limits));
        assert_eq!(requests.of_peer(7), [second]);
        assert!(requests.take(first, 4) && !requests.take(first, 4));
        assert_eq!(requests.close(first).map(|request| request.pieces.into_vec()), Some(vec![3]));
        assert!(requests.close(first).is_none());
        assert_eq!((requests.at_registry(), requests.at_peers()), (0, 1));
        let third = requests.open(request(Asked::Registry));
        assert!(
            third != first && requests.at(first).is_none() && requests.at(third).is_some(),
            "its place is used again"
        );
    }
}
