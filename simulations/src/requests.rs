//! The requests of a node that are under way, and how many of them are hedges: requests for a piece that somebody else was
//! asked for already and still owes.

use std::{
    collections::{HashMap, hash_map::Entry},
    time::Duration,
};

use foldhash::fast::FixedState;
use shoal_proto::PeerId;
use shoal_scheduler::{RequestId, Time};
use smallvec::SmallVec;

use crate::images::Image;

/// Nobody looks silent to the scheduler before that, by its configuration.
const LEAST_PATIENCE: Duration = Duration::from_millis(500);

/// A request under way.
#[derive(Debug, Clone)]
struct Asked {
    /// Nobody is the registry.
    peer: Option<PeerId>,
    image: Image,
    /// Pieces of it not answered yet.
    pieces: SmallVec<[u32; 4]>,
    at: Time,
}

/// All requests of a node under way.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    open: HashMap<RequestId, Asked, FixedState>,
    naming: Naming,
    hedges: u64,
}

/// How many requests name a piece of an image, of those that are named. The scheduler makes two at most, and a third comes rarely
/// beside one that it has given up.
#[derive(Debug, Default)]
struct Naming(HashMap<(Image, u32), u8, FixedState>);

impl Naming {
    fn add(&mut self, image: Image, piece: u32) {
        *self.0.entry((image, piece)).or_default() += 1;
    }

    fn remove(&mut self, image: Image, piece: u32) {
        if let Entry::Occupied(mut naming) = self.0.entry((image, piece)) {
            *naming.get_mut() -= 1;
            if *naming.get() == 0 {
                naming.remove();
            }
        }
    }
}

impl Requests {
    /// A request is made for pieces of an image; to nobody, of the registry.
    pub(crate) fn begin(
        &mut self,
        now: Time,
        request: RequestId,
        peer: Option<PeerId>,
        image: Image,
        pieces: &[u32],
    ) {
        self.hedges += u64::from(pieces.iter().any(|&piece| self.naming.0.contains_key(&(image, piece))));
        pieces.iter().for_each(|&piece| self.naming.add(image, piece));
        self.open.insert(request, Asked { peer, image, pieces: pieces.into(), at: now });
    }

    /// A piece of a request is answered, one way or another.
    pub(crate) fn answered(&mut self, request: RequestId, piece: u32) {
        let Some(asked) = self.open.get_mut(&request) else { return };
        let Some(at) = asked.pieces.iter().position(|&owed| owed == piece) else { return };
        asked.pieces.swap_remove(at);
        self.naming.remove(asked.image, piece);
        if asked.pieces.is_empty() {
            self.open.remove(&request);
        }
    }

    /// A request is over. Gives whom it went to, if it was under way; nobody is the registry.
    pub(crate) fn end(&mut self, request: RequestId) -> Option<Option<PeerId>> {
        let asked = self.open.remove(&request)?;
        asked.pieces.iter().for_each(|&piece| self.naming.remove(asked.image, piece));
        Some(asked.peer)
    }

    /// What went to this peer is over.
    pub(crate) fn end_all(&mut self, peer: PeerId) {
        let naming = &mut self.naming;
        self.open.retain(|_, asked| {
            let stays = asked.peer != Some(peer);
            let over = asked.pieces.iter().filter(|_| !stays);
            over.for_each(|&piece| naming.remove(asked.image, piece));
            stays
        });
    }

    /// Those that may look silent by now, and whom they went to; nobody is the registry.
    pub(crate) fn waiting(&self, now: Time) -> impl Iterator<Item = (RequestId, Option<PeerId>)> {
        let long = move |asked: &Asked| now.since(asked.at) >= LEAST_PATIENCE;
        self.open.iter().filter(move |(_, asked)| long(asked)).map(|(&request, asked)| (request, asked.peer))
    }

    /// Requests so far, of nodes or of the registry, that named a piece which another one was about to bring.
    pub(crate) fn hedges(&self) -> u64 {
        self.hedges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hedge_is_a_second_request_for_what_is_under_way() {
        let (a, b) = (PeerId::new([1; 32]), PeerId::new([2; 32]));
        let mut requests = Requests::default();
        let begin = |requests: &mut Requests, id, peer, pieces: &[u32]| {
            requests.begin(Time::ZERO, RequestId(id), peer, 7, pieces);
            requests.hedges()
        };
        assert_eq!(begin(&mut requests, 1, Some(a), &[0, 1]), 0);
        assert_eq!(begin(&mut requests, 2, Some(b), &[2]), 0);
        assert_eq!(begin(&mut requests, 3, None, &[1, 2, 3]), 1, "one, however many pieces it hedges");
        requests.answered(RequestId(1), 0);
        requests.answered(RequestId(1), 0);
        assert_eq!(begin(&mut requests, 4, Some(b), &[0]), 1, "answered");
        assert_eq!(requests.end(RequestId(3)), Some(None));
        assert_eq!(requests.end(RequestId(3)), None);
        assert_eq!(begin(&mut requests, 5, Some(a), &[3]), 1, "cancelled");
        requests.end_all(b);
        assert_eq!(begin(&mut requests, 6, Some(a), &[0, 2]), 1, "the peer is gone");
        requests.answered(RequestId(1), 1);
        assert_eq!(requests.end(RequestId(1)), None, "it has no piece left");
        let waiting: Vec<_> = requests.waiting(Time::ZERO + LEAST_PATIENCE).collect();
        assert_eq!(waiting.len(), 2);
        assert!(waiting.iter().all(|&(_, peer)| peer == Some(a)));
    }

    #[test]
    fn the_same_piece_of_another_image_is_another_piece() {
        let peer = Some(PeerId::new([1; 32]));
        let mut requests = Requests::default();
        for (id, image) in [(1, 0), (2, 1)] {
            requests.begin(Time::ZERO, RequestId(id), peer, image, &[3]);
        }
        assert_eq!(requests.hedges(), 0);
        requests.answered(RequestId(1), 3);
        requests.begin(Time::ZERO, RequestId(3), None, 1, &[3]);
        assert_eq!(requests.hedges(), 1, "the answer was for the other image");
        requests.end_all(PeerId::new([1; 32]));
        requests.end(RequestId(3));
        assert!(requests.naming.0.is_empty() && requests.open.is_empty(), "{requests:?}");
    }
}
