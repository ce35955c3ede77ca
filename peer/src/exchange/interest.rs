//! Who wants to hear of which blob.
//!
//! Bounded in all and for each peer, so that nobody's interest can keep out that of another. Nobody takes interest back, so the oldest
//! of whoever has shown too much gives way: a node that has run for long is told of what it read last.
//!
//! Memory: about 200 bytes for each interest, 50 MiB when there is no room for more. How many peers hear of one blob is not limited: they
//! are connected, and the more they are the less often they are told.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ops::Bound,
};

use shoal_proto::PeerId;

use super::Topic;

/// Most interests of one peer: those of a node that runs hundreds of images.
const MAX_OF_PEER: usize = 1024;
/// Most interests of all: 2,500 nodes that share a hundred blobs.
const MAX_IN_ALL: usize = 1 << 18;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Interests {
    topics: BTreeMap<Topic, BTreeSet<PeerId>>,
    /// Of each peer, the oldest first.
    peers: BTreeMap<PeerId, VecDeque<Topic>>,
    count: usize,
}

impl Interests {
    /// Notes an interest; what gives way for it is its peer's, or that of whoever has most.
    pub(super) fn insert(&mut self, peer: PeerId, topic: Topic) {
        if self.topics.get(&topic).is_some_and(|peers| peers.contains(&peer)) {
            return;
        }
        if self.peers.get(&peer).is_some_and(|topics| topics.len() >= MAX_OF_PEER) {
            self.drop_oldest(peer);
        } else if self.count >= MAX_IN_ALL {
            let greediest = self.peers.iter().max_by_key(|(_, topics)| topics.len()).map(|(peer, _)| *peer);
            greediest.into_iter().for_each(|peer| self.drop_oldest(peer));
        }
        self.topics.entry(topic).or_default().insert(peer);
        self.peers.entry(peer).or_default().push_back(topic);
        self.count += 1;
    }

    /// The peer has gone.
    pub(super) fn forget(&mut self, peer: PeerId) {
        for topic in self.peers.remove(&peer).unwrap_or_default() {
            self.take_out(peer, topic);
        }
    }

    /// Who is interested in a topic; nobody if none.
    pub(super) fn of(&self, topic: &Topic) -> Option<&BTreeSet<PeerId>> {
        self.topics.get(topic)
    }

    /// At most so many others that share a topic with `peer`, those that are `near` first. Their ids are random, so the order in
    /// which they come behind that of the peer is as good as a draw.
    pub(super) fn others(
        &self,
        peer: PeerId,
        topic: &Topic,
        most: usize,
        near: impl Fn(PeerId) -> bool,
    ) -> Vec<PeerId> {
        let Some(peers) = self.topics.get(topic) else { return Vec::new() };
        let (mut chosen, mut far) = (Vec::new(), Vec::new());
        for &other in peers.range((Bound::Excluded(peer), Bound::Unbounded)).chain(peers.range(..peer)) {
            if chosen.len() == most {
                break;
            }
            let list = if near(other) { &mut chosen } else { &mut far };
            list.push(other);
        }
        chosen.extend(far);
        chosen.truncate(most);
        chosen
    }

    fn drop_oldest(&mut self, peer: PeerId) {
        let Some(topics) = self.peers.get_mut(&peer) else { return };
        if let Some(oldest) = topics.pop_front() {
            self.take_out(peer, oldest);
        }
    }

    fn take_out(&mut self, peer: PeerId, topic: Topic) {
        self.count -= 1;
        if let Some(peers) = self.topics.get_mut(&topic) {
            peers.remove(&peer);
            if peers.is_empty() {
                self.topics.remove(&topic);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use shoal_proto::{BlobId, ObjectId};

    use super::*;

    fn id(n: usize) -> [u8; 32] {
        let mut id = [0; 32];
        id[..8].copy_from_slice(&(n as u64).to_be_bytes());
        id
    }

    fn peer(n: usize) -> PeerId {
        PeerId::new(id(n))
    }

    fn topic(n: usize) -> Topic {
        (ObjectId::new(id(n)), BlobId::new(id(n)))
    }

    fn hears(interests: &Interests, n: usize, of: usize) -> bool {
        interests.of(&topic(of)).is_some_and(|peers| peers.contains(&peer(n)))
    }

    #[test]
    fn who_shows_too_much_interest_keeps_out_nobody() {
        let mut interests = Interests::default();
        interests.insert(peer(1), topic(7));
        (0..10 * MAX_OF_PEER).for_each(|n| interests.insert(peer(2), topic(100 + n)));
        assert_eq!(interests.count, MAX_OF_PEER + 1);
        assert!(hears(&interests, 1, 7) && !hears(&interests, 2, 100));
        assert!(hears(&interests, 2, 100 + 10 * MAX_OF_PEER - 1), "the latest");
        interests.forget(peer(2));
        assert_eq!((interests.count, interests.topics.len(), interests.peers.len()), (1, 1, 1));
    }

    #[test]
    fn many_that_show_too_much_give_way_to_one_that_does_not() {
        let mut interests = Interests::default();
        for n in 0..MAX_IN_ALL {
            interests.insert(peer(n / MAX_OF_PEER), topic(n));
        }
        assert_eq!(interests.count, MAX_IN_ALL);
        (0..8).for_each(|n| interests.insert(peer(1_000_000), topic(n)));
        assert_eq!(interests.count, MAX_IN_ALL);
        assert!((0..8).all(|n| hears(&interests, 1_000_000, n)));
        let topics = interests.peers.values().map(VecDeque::len).sum::<usize>();
        assert_eq!(topics, interests.topics.values().map(BTreeSet::len).sum::<usize>());
    }

    #[test]
    fn a_thousand_hear_of_one_blob_and_the_near_ones_are_named() {
        let mut interests = Interests::default();
        (0..1000).for_each(|n| interests.insert(peer(n), topic(1)));
        interests.insert(peer(3), topic(1));
        assert_eq!((interests.of(&topic(1)).unwrap().len(), interests.count), (1000, 1000));
        let named = interests.others(peer(990), &topic(1), 8, |other| other.as_bytes()[7].is_multiple_of(2));
        assert_eq!(named, [992, 994, 996, 998, 0, 2, 4, 6].map(peer));
        assert_eq!(interests.others(peer(990), &topic(1), 3, |other| other == peer(5)), [5, 991, 992].map(peer));
        assert!(interests.others(peer(1), &topic(2), 8, |_| true).is_empty());
    }
}
