//! One flight for each piece that somebody wants and that is not here: its waiters, what was tried, where it queues.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap},
};

use foldhash::fast::FixedState;
use shoal_proto::{PeerId, Priority};
use smallvec::SmallVec;

use crate::{
    Item, RequestId, Source, Time, WantId, Why,
    blobs::{BlobSlot, Piece},
    homes::mix,
};

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
    /// The class, and below its bits the turn.
    order: u64,
    shuffle: u32,
}

/// Where the class stands in [`Rank::order`].
const CLASS: u32 = 62;
const ON_DEMAND: u64 = 0;
const UNHELD: u64 = 1 << CLASS;
const HELD: u64 = 2 << CLASS;
const TURN: u64 = UNHELD - 1;

impl Rank {
    pub(crate) fn new(item: Item, priority: Priority, arrival: u64, salt: u64) -> Self {
        match priority {
            Priority::OnDemand => Self { order: ON_DEMAND | arrival & TURN, shuffle: 0 },
            Priority::Prefetch => {
                let blob = item.blob.id.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
                let group = blob ^ u64::from(item.piece / PREFETCH_GROUP);
                let shuffle = (mix(salt ^ mix(group)) >> 32) as u32;
                Self { order: UNHELD | (arrival / PREFETCH_WINDOW) & TURN, shuffle }
            }
        }
    }

    /// A prefetch, and nothing is known yet of a neighbour that has it.
    pub(crate) fn is_unheld(self) -> bool {
        self.order & !TURN == UNHELD
    }

    /// The same prefetch once a neighbour has it.
    pub(crate) fn held(self) -> Self {
        Self { order: HELD | self.order & TURN, ..self }
    }

    /// As it was before anything was known of neighbours.
    pub(crate) fn fresh(self) -> Self {
        if self.order & !TURN == HELD { Self { order: UNHELD | self.order & TURN, ..self } } else { self }
    }

    pub(crate) fn priority(self) -> Priority {
        if self.order & !TURN == ON_DEMAND { Priority::OnDemand } else { Priority::Prefetch }
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
    pub(crate) wants: SmallVec<[WantId; 2]>,
    /// When the last waiter gives up.
    pub(crate) deadline: Time,
    pub(crate) rank: Rank,
    /// Under way, at most [`MAX_REQUESTS`].
    pub(crate) requests: SmallVec<[RequestId; MAX_REQUESTS]>,
    /// Another node asked us as its home, so homes are not asked.
    pub(crate) for_peer: bool,
    /// Whether it looks for a (further) source.
    pub(crate) seeking: bool,
    pub(crate) gate: Option<Gate>,
    trouble: Option<Box<Trouble>>,
}

/// What went wrong with a flight, which is little or nothing for most of them.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
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
    /// Who was asked in vain, the last of them.
    tries: Vec<(Source, Why)>,
}

impl Flight {
    pub(crate) fn new(rank: Rank) -> Self {
        Self {
            wants: SmallVec::new(),
            deadline: Time::ZERO,
            rank,
            requests: SmallVec::new(),
            for_peer: false,
            seeking: false,
            gate: None,
            trouble: None,
        }
    }

    pub(crate) fn priority(&self) -> Priority {
        self.rank.priority()
    }

    pub(crate) fn trouble(&self) -> Option<&Trouble> {
        self.trouble.as_deref()
    }

    pub(crate) fn trouble_mut(&mut self) -> &mut Trouble {
        self.trouble.get_or_insert_default()
    }

    /// A source was asked in vain.
    pub(crate) fn tried(&mut self, source: Source, why: Why) {
        let tries = &mut self.trouble_mut().tries;
        if tries.len() >= MAX_TRIES {
            tries.remove(0);
        }
        tries.push((source, why));
    }

    pub(crate) fn tries(&self) -> &[(Source, Why)] {
        self.trouble().map_or(&[], |trouble| &trouble.tries)
    }

    /// Whether the registry refused the piece for good.
    pub(crate) fn is_refused_by_registry(&self) -> bool {
        self.trouble().is_some_and(|trouble| trouble.registry_refused)
    }
}

/// All flights, by blob and piece.
#[derive(Debug)]
pub(crate) struct Flights {
    flights: HashMap<Piece, Box<Flight>, FixedState>,
    /// How many somebody waits for.
    on_demand: usize,
}

impl Flights {
    /// None yet. The order in which a table is walked depends on the seed, so nothing here walks it.
    pub(crate) fn new(seed: u64) -> Self {
        Self { flights: HashMap::with_hasher(FixedState::with_seed(seed)), on_demand: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.flights.len()
    }

    /// How many somebody waits for.
    pub(crate) fn on_demand(&self) -> usize {
        self.on_demand
    }

    pub(crate) fn at(&self, piece: Piece) -> Option<&Flight> {
        self.flights.get(&piece).map(Box::as_ref)
    }

    pub(crate) fn at_mut(&mut self, piece: Piece) -> Option<&mut Flight> {
        self.flights.get_mut(&piece).map(Box::as_mut)
    }

    /// The flight of a piece, a new one if there is none; says whether it is new.
    pub(crate) fn open(&mut self, piece: Piece, rank: impl FnOnce() -> Rank) -> (&mut Flight, bool) {
        let mut new = false;
        let flight = self.flights.entry(piece).or_insert_with(|| {
            new = true;
            let flight = Flight::new(rank());
            self.on_demand += usize::from(flight.priority() == Priority::OnDemand);
            Box::new(flight)
        });
        (flight, new)
    }

    /// Gives a flight another rank; returns what it had.
    pub(crate) fn raise(&mut self, piece: Piece, rank: Rank) -> Option<Rank> {
        let flight = self.flights.get_mut(&piece)?;
        self.on_demand += usize::from(rank.priority() > flight.priority());
        Some(std::mem::replace(&mut flight.rank, rank))
    }

    pub(crate) fn remove(&mut self, piece: Piece) -> Option<Box<Flight>> {
        let flight = self.flights.remove(&piece)?;
        self.on_demand -= usize::from(flight.priority() == Priority::OnDemand);
        Some(flight)
    }

    /// The pieces of one blob that have a flight, in order.
    pub(crate) fn of_blob(&self, blob: BlobSlot) -> Vec<Piece> {
        let mut pieces: Vec<_> = self.flights.keys().filter(|piece| piece.blob == blob).copied().collect();
        pieces.sort_unstable();
        pieces
    }
}

/// Those that wait at one gate, in order.
type Queue = BTreeSet<(Rank, Piece)>;

/// The queues in front of the gates.
#[derive(Debug, Default)]
pub(crate) struct Queues {
    /// Emptied at every step, so what leaves it early is passed over when it comes up.
    fresh: BinaryHeap<Reverse<(Rank, Piece)>>,
    window: Queue,
    registry: Queue,
    homes: BTreeMap<PeerId, Queue>,
}

impl Queues {
    fn at(&self, gate: Gate) -> Option<&Queue> {
        match gate {
            Gate::Fresh => None,
            Gate::Window => Some(&self.window),
            Gate::Home(peer) => self.homes.get(&peer),
            Gate::Registry => Some(&self.registry),
        }
    }

    pub(crate) fn push(&mut self, gate: Gate, rank: Rank, piece: Piece) {
        let entry = (rank, piece);
        match gate {
            Gate::Fresh => self.fresh.push(Reverse(entry)),
            Gate::Window => _ = self.window.insert(entry),
            Gate::Home(peer) => _ = self.homes.entry(peer).or_default().insert(entry),
            Gate::Registry => _ = self.registry.insert(entry),
        }
    }

    pub(crate) fn remove(&mut self, gate: Gate, rank: Rank, piece: Piece) {
        let entry = (rank, piece);
        match gate {
            Gate::Fresh => {}
            Gate::Window => _ = self.window.remove(&entry),
            Gate::Registry => _ = self.registry.remove(&entry),
            Gate::Home(peer) => {
                if let Some(queue) = self.homes.get_mut(&peer)
                    && queue.remove(&entry)
                    && queue.is_empty()
                {
                    self.homes.remove(&peer);
                }
            }
        }
    }

    /// Takes the first of those to be looked at; it may have left since.
    pub(crate) fn pop_fresh(&mut self) -> Option<(Rank, Piece)> {
        self.fresh.pop().map(|Reverse(entry)| entry)
    }

    /// The first that waits at a gate other than [`Gate::Fresh`].
    pub(crate) fn first(&self, gate: Gate) -> Option<(Rank, Piece)> {
        self.at(gate)?.first().copied()
    }

    /// The homes that something waits for.
    pub(crate) fn homes(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.homes.keys().copied()
    }

    /// Everything that queues at a gate other than [`Gate::Fresh`].
    pub(crate) fn items(&self, gate: Gate) -> Vec<Piece> {
        self.at(gate).into_iter().flatten().map(|&(_, piece)| piece).collect()
    }

    /// Everything that queues at any gate but [`Gate::Fresh`].
    pub(crate) fn all(&self) -> Vec<Piece> {
        let placed = [&self.window].into_iter().chain(self.homes.values()).chain([&self.registry]);
        placed.flatten().map(|&(_, piece)| piece).collect()
    }

    pub(crate) fn len(&self, gate: Gate) -> usize {
        self.at(gate).map_or(0, BTreeSet::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlobKey;

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
        let prefetch = rank(7, Priority::Prefetch, 1);
        assert!(prefetch.is_unheld() && !prefetch.held().is_unheld() && prefetch < prefetch.held());
        assert_eq!((prefetch.held().fresh(), prefetch.held().priority()), (prefetch, Priority::Prefetch));
        let on_demand = rank(7, Priority::OnDemand, 1);
        assert_eq!((on_demand.fresh(), on_demand.priority()), (on_demand, Priority::OnDemand));
    }

    #[test]
    fn counts_those_that_somebody_waits_for() {
        let mut flights = Flights::new(1);
        let rank = |priority| Rank::new(item(0), priority, 0, 0);
        let piece = |piece| Piece { blob: 0, piece };
        flights.open(piece(0), || rank(Priority::Prefetch));
        flights.open(piece(1), || rank(Priority::OnDemand));
        flights.open(piece(1), || unreachable!("it is there"));
        assert_eq!(flights.on_demand(), 1);
        assert_eq!(flights.raise(piece(0), rank(Priority::OnDemand)), Some(rank(Priority::Prefetch)));
        assert_eq!(flights.on_demand(), 2);
        flights.raise(piece(0), rank(Priority::OnDemand));
        assert!(flights.raise(piece(7), rank(Priority::OnDemand)).is_none());
        assert!([0, 0, 1].map(|number| flights.remove(piece(number)).is_some()) == [true, false, true]);
        assert_eq!(flights.on_demand(), 0);
    }

    #[test]
    fn tries_are_bounded() {
        let mut flight = Flight::new(Rank::new(item(0), Priority::Prefetch, 0, 0));
        assert_eq!(flight.tries(), []);
        flight.tried(Source::Registry, Why::Registry);
        assert_eq!(flight.tries(), [(Source::Registry, Why::Registry)]);
        (0..40).for_each(|_| flight.tried(Source::Registry, Why::Stalled));
        assert_eq!(flight.tries().len(), MAX_TRIES);
    }
}
