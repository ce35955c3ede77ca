//! One flight for each piece that somebody wants and that is not here: its waiters, what was tried, where it queues.

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};

use shoal_proto::{PeerId, Priority};

use crate::{BlobKey, Item, RequestId, Source, Time, WantId, Why, homes::mix};

/// Tries remembered for the log.
const MAX_TRIES: usize = 16;
/// Requests for one piece at a time: the first, and a hedge.
pub(crate) const MAX_REQUESTS: usize = 2;
/// Prefetches that are mixed with each other; who came a window later goes later.
const PREFETCH_WINDOW: u64 = 256;
/// Consecutive pieces that stay together when prefetches are mixed.
const PREFETCH_GROUP: u32 = 16;

/// Where a flight stands in every queue: on-demand before prefetch, and behind that what was found to be held by a neighbour
/// while it waited for its home. On-demand is first come, first served. Prefetch
/// is mixed differently on every node, so that nodes which start together fetch different pieces and then have
/// something to give each other; groups of consecutive pieces stay together, for the sake of joined reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    class: u8,
    turn: u64,
    shuffle: u64,
}

impl Rank {
    pub(crate) fn new(item: Item, priority: Priority, arrival: u64, salt: u64) -> Self {
        match priority {
            Priority::OnDemand => Self { class: 0, turn: arrival, shuffle: 0 },
            Priority::Prefetch => {
                let blob = item.blob.id.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
                let group = blob ^ u64::from(item.piece / PREFETCH_GROUP);
                let shuffle = mix(salt ^ mix(group));
                Self { class: 1, turn: arrival / PREFETCH_WINDOW, shuffle }
            }
        }
    }

    /// A prefetch, and nothing is known yet of a neighbour that has it.
    pub(crate) fn is_unheld(self) -> bool {
        self.class == 1
    }

    /// The same prefetch once a neighbour has it.
    pub(crate) fn held(self) -> Self {
        Self { class: 2, ..self }
    }

    /// As it was before anything was known of neighbours.
    pub(crate) fn fresh(self) -> Self {
        Self { class: self.class.min(1), ..self }
    }

    pub(crate) fn priority(self) -> Priority {
        if self.class == 0 { Priority::OnDemand } else { Priority::Prefetch }
    }
}

/// What a flight queues for, apart from any neighbour that has the piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Gate {
    /// To be looked at.
    Fresh,
    /// Room in this node's own window, to ask a neighbour.
    Window,
    /// Room or a connection at its home.
    Home(PeerId),
    /// A slot at the registry.
    Registry,
}

/// A piece on its way.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) wants: BTreeSet<WantId>,
    /// When the last waiter gives up.
    pub(crate) deadline: Time,
    /// Another node asked us as its home, so homes are not asked.
    pub(crate) for_peer: bool,
    pub(crate) rank: Rank,
    /// Under way, at most [`MAX_REQUESTS`].
    pub(crate) requests: Vec<RequestId>,
    /// Whether it looks for a (further) source.
    pub(crate) seeking: bool,
    pub(crate) gate: Option<Gate>,
    /// Homes that are of no use to it.
    pub(crate) refused: BTreeSet<PeerId>,
    /// Homes that others believe in.
    pub(crate) suggested: BTreeSet<PeerId>,
    /// Since when a home says that it is busy.
    pub(crate) busy_since: Option<Time>,
    /// Registry reads that failed.
    pub(crate) registry_failures: u32,
    /// Back-off after those.
    pub(crate) not_before: Time,
    /// The registry refused for good.
    pub(crate) registry_refused: bool,
    tries: Vec<(Source, Why)>,
}

impl Flight {
    pub(crate) fn new(rank: Rank) -> Self {
        Self {
            wants: BTreeSet::new(),
            deadline: Time::ZERO,
            for_peer: false,
            rank,
            requests: Vec::new(),
            seeking: false,
            gate: None,
            refused: BTreeSet::new(),
            suggested: BTreeSet::new(),
            busy_since: None,
            registry_failures: 0,
            not_before: Time::ZERO,
            registry_refused: false,
            tries: Vec::new(),
        }
    }

    pub(crate) fn priority(&self) -> Priority {
        self.rank.priority()
    }

    pub(crate) fn tried(&mut self, source: Source, why: Why) {
        match self.tries.iter_mut().rev().find(|(tried, was)| *tried == source && *was == Why::Open) {
            Some(last) => last.1 = why,
            None => {
                if self.tries.len() >= MAX_TRIES {
                    self.tries.remove(0);
                }
                self.tries.push((source, why));
            }
        }
    }

    pub(crate) fn tries(&self) -> &[(Source, Why)] {
        &self.tries
    }
}

/// All flights, by blob and piece.
#[derive(Debug, Default)]
pub(crate) struct Flights {
    /// Boxed, since the nodes of a map of large values are mostly empty space. No blob without a flight.
    blobs: BTreeMap<BlobKey, BTreeMap<u32, Box<Flight>>>,
    len: usize,
}

impl Flights {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn at(&self, item: Item) -> Option<&Flight> {
        self.blobs.get(&item.blob)?.get(&item.piece).map(Box::as_ref)
    }

    pub(crate) fn at_mut(&mut self, item: Item) -> Option<&mut Flight> {
        self.blobs.get_mut(&item.blob)?.get_mut(&item.piece).map(Box::as_mut)
    }

    /// The flight of an item, a new one of this rank if there is none; says whether it is new.
    pub(crate) fn open(&mut self, item: Item, rank: Rank) -> (&mut Flight, bool) {
        match self.blobs.entry(item.blob).or_default().entry(item.piece) {
            Entry::Occupied(known) => (known.into_mut(), false),
            Entry::Vacant(vacant) => {
                self.len += 1;
                (vacant.insert(Box::new(Flight::new(rank))), true)
            }
        }
    }

    pub(crate) fn remove(&mut self, item: Item) -> Option<Box<Flight>> {
        let pieces = self.blobs.get_mut(&item.blob)?;
        let flight = pieces.remove(&item.piece)?;
        self.len -= 1;
        if pieces.is_empty() {
            self.blobs.remove(&item.blob);
        }
        Some(flight)
    }

    /// The items of one blob that have a flight.
    pub(crate) fn of_blob(&self, blob: BlobKey) -> impl Iterator<Item = Item> {
        let pieces = self.blobs.get(&blob).into_iter().flat_map(BTreeMap::keys);
        pieces.map(move |&piece| Item { piece, blob })
    }
}

/// Those that wait at one gate, in order.
type Queue = BTreeSet<(Rank, Item)>;

/// The queues in front of the gates.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    fresh: Queue,
    window: Queue,
    registry: Queue,
    homes: BTreeMap<PeerId, Queue>,
}

impl Queues {
    fn at(&self, gate: Gate) -> Option<&Queue> {
        match gate {
            Gate::Fresh => Some(&self.fresh),
            Gate::Window => Some(&self.window),
            Gate::Home(peer) => self.homes.get(&peer),
            Gate::Registry => Some(&self.registry),
        }
    }

    fn at_mut(&mut self, gate: Gate) -> &mut Queue {
        match gate {
            Gate::Fresh => &mut self.fresh,
            Gate::Window => &mut self.window,
            Gate::Home(peer) => self.homes.entry(peer).or_default(),
            Gate::Registry => &mut self.registry,
        }
    }

    pub(crate) fn push(&mut self, gate: Gate, rank: Rank, item: Item) {
        self.at_mut(gate).insert((rank, item));
    }

    pub(crate) fn remove(&mut self, gate: Gate, rank: Rank, item: Item) {
        let queue = self.at_mut(gate);
        queue.remove(&(rank, item));
        if let Gate::Home(peer) = gate
            && queue.is_empty()
        {
            self.homes.remove(&peer);
        }
    }

    pub(crate) fn first(&self, gate: Gate) -> Option<(Rank, Item)> {
        self.at(gate)?.first().copied()
    }

    /// The homes that something waits for.
    pub(crate) fn homes(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.homes.keys().copied()
    }

    /// Everything that queues at one gate.
    pub(crate) fn items(&self, gate: Gate) -> Vec<Item> {
        self.at(gate).into_iter().flatten().map(|&(_, item)| item).collect()
    }

    /// Everything that queues at any gate but [`Gate::Fresh`].
    pub(crate) fn all(&self) -> Vec<Item> {
        let placed = [&self.window].into_iter().chain(self.homes.values()).chain([&self.registry]);
        placed.flatten().map(|&(_, item)| item).collect()
    }

    pub(crate) fn len(&self, gate: Gate) -> usize {
        self.at(gate).map_or(0, BTreeSet::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(piece: u32) -> Item {
        Item { blob: BlobKey { id: [0; 32], variant: 0 }, piece }
    }

    #[test]
    fn on_demand_goes_first_and_prefetch_is_mixed_in_groups() {
        let rank = |piece, priority, salt| Rank::new(item(piece), priority, u64::from(piece), salt);
        assert!(rank(200, Priority::OnDemand, 1) < rank(0, Priority::Prefetch, 1));
        assert!(rank(3, Priority::OnDemand, 1) < rank(4, Priority::OnDemand, 1));
        let order = |salt| {
            let mut order: Vec<u32> = (0..256).collect();
            order.sort_by_key(|&piece| (rank(piece, Priority::Prefetch, salt), piece));
            order
        };
        assert_ne!(order(1), order(2));
        for group in order(1).chunks(16) {
            assert!(group.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{group:?}");
        }
        assert!(rank(0, Priority::Prefetch, 1) < rank(256, Priority::Prefetch, 1), "but not for ever");
    }

    #[test]
    fn tries_are_updated_and_bounded() {
        let mut flight = Flight::new(Rank::new(item(0), Priority::Prefetch, 0, 0));
        flight.tried(Source::Registry, Why::Open);
        flight.tried(Source::Registry, Why::Registry);
        assert_eq!(flight.tries(), [(Source::Registry, Why::Registry)]);
        (0..40).for_each(|_| flight.tried(Source::Registry, Why::Stalled));
        assert_eq!(flight.tries().len(), MAX_TRIES);
    }
}
