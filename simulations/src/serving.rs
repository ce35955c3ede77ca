//! The serving half of a node: answers under way, and the room that they share. Twin of the daemon's `serve.rs` and of
//! the budgets below it.
//!
//! An answer sends one piece after the other. A piece is read once there is room for its bytes, of those for one peer and
//! of those for all; prefetch gets three quarters of either. Who waits, waits in the order of coming.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use shoal_proto::{PeerId, Priority};
use shoal_scheduler::{BlobKey, Item, RequestId, Time, Tracker};

use crate::{flows::FlowId, topology::Index};

/// Bytes between store and network for one peer, as in the daemon.
const PEER_ROOM: u64 = 4 << 20;
/// The same for all peers.
const ROOM: u64 = 64 << 20;

/// A request that this node serves: who asked, and its id there.
pub(crate) type Ticket = (Index, RequestId);

/// A piece that may go on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sending {
    pub(crate) ticket: Ticket,
    pub(crate) piece: u32,
    pub(crate) bytes: u64,
}

#[derive(Debug)]
struct Answer {
    asker: PeerId,
    pieces: Vec<u32>,
    priority: Priority,
    /// Pieces that are here and not sent.
    ready: VecDeque<u32>,
    /// Pieces that are being got.
    owed: usize,
    sending: Option<Outgoing>,
}

/// What is on the wire for an answer.
#[derive(Debug)]
struct Outgoing {
    room: u64,
    flow: Option<FlowId>,
}

/// Bytes in use: of prefetch, and of all.
#[derive(Debug, Default)]
struct Room {
    prefetch: u64,
    all: u64,
}

/// One peer that is served.
#[derive(Debug, Default)]
struct Served {
    room: Room,
    /// Answers that have a piece and no room for it, first come first; prefetch, on-demand.
    waiting: [VecDeque<Ticket>; 2],
}

impl Served {
    fn is_idle(&self) -> bool {
        self.room.all == 0 && self.waiting.iter().all(VecDeque::is_empty)
    }
}

impl Room {
    /// What a piece takes of a room of this size, if that is free.
    fn fits(&self, bytes: u64, priority: Priority, size: u64) -> Option<u64> {
        let most = match priority {
            Priority::OnDemand => size,
            Priority::Prefetch => size / 4 * 3,
        };
        let takes = bytes.min(most);
        let free = self.all + takes <= size && (priority == Priority::OnDemand || self.prefetch + takes <= most);
        free.then_some(takes)
    }

    fn add(&mut self, bytes: u64, priority: Priority) {
        self.all += bytes;
        self.prefetch += if priority == Priority::Prefetch { bytes } else { 0 };
    }

    fn sub(&mut self, bytes: u64, priority: Priority) {
        self.all -= bytes;
        self.prefetch -= if priority == Priority::Prefetch { bytes } else { 0 };
    }
}

/// All answers under way.
#[derive(Debug)]
pub(crate) struct Serving {
    piece_bytes: Arc<[u64]>,
    answers: BTreeMap<Ticket, Answer>,
    room: Room,
    peers: BTreeMap<Index, Served>,
    /// Peers to whom something may be sent now, and those that wait for room that others have.
    open: VecDeque<Index>,
    starved: VecDeque<Index>,
}

impl Serving {
    pub(crate) fn new(piece_bytes: Arc<[u64]>) -> Self {
        Self {
            piece_bytes,
            answers: BTreeMap::new(),
            room: Room::default(),
            peers: BTreeMap::new(),
            open: VecDeque::new(),
            starved: VecDeque::new(),
        }
    }

    /// Encoded bytes of a piece.
    pub(crate) fn bytes(&self, piece: u32) -> u64 {
        self.piece_bytes[piece as usize]
    }

    /// Begins an answer to a request that was admitted.
    pub(crate) fn begin(&mut self, ticket: Ticket, asker: PeerId, pieces: Vec<u32>, priority: Priority) {
        let (ready, sending) = (VecDeque::new(), None);
        self.answers.insert(ticket, Answer { asker, pieces, priority, ready, owed: 0, sending });
    }

    pub(crate) fn contains(&self, ticket: Ticket) -> bool {
        self.answers.contains_key(&ticket)
    }

    /// Whether the answer waits for pieces that this node is getting.
    pub(crate) fn is_owing(&self, ticket: Ticket) -> bool {
        self.answers.get(&ticket).is_some_and(|answer| answer.owed > 0)
    }

    /// A piece has to be got first.
    pub(crate) fn owe(&mut self, ticket: Ticket) {
        if let Some(answer) = self.answers.get_mut(&ticket) {
            answer.owed += 1;
        }
    }

    /// A piece that was owed is here.
    pub(crate) fn got(&mut self, ticket: Ticket, piece: u32) {
        if let Some(answer) = self.answers.get_mut(&ticket) {
            answer.owed -= 1;
            self.ready(ticket, piece);
        }
    }

    /// A piece that is here is to be sent.
    pub(crate) fn ready(&mut self, ticket: Ticket, piece: u32) {
        if let Some(answer) = self.answers.get_mut(&ticket) {
            let waits = answer.ready.is_empty() && answer.sending.is_none();
            answer.ready.push_back(piece);
            if waits {
                self.wait(ticket);
            }
        }
    }

    /// An answer has a piece to send.
    fn wait(&mut self, ticket: Ticket) {
        let Some(answer) = self.answers.get(&ticket) else { return };
        self.peers.entry(ticket.0).or_default().waiting[answer.priority as usize].push_back(ticket);
        self.open.push_back(ticket.0);
    }

    /// Takes the pieces that may go on the wire now.
    pub(crate) fn start(&mut self, started: &mut Vec<Sending>) {
        while let Some(peer) = self.open.pop_front() {
            for priority in [Priority::OnDemand, Priority::Prefetch] {
                while let Some(sending) = self.start_one(peer, priority) {
                    started.push(sending);
                }
            }
        }
    }

    fn start_one(&mut self, peer: Index, priority: Priority) -> Option<Sending> {
        let served = self.peers.get_mut(&peer)?;
        let waiting = &mut served.waiting[priority as usize];
        let ready = |ticket: &Ticket| Some(*self.answers.get(ticket)?.ready.front()?);
        let (ticket, piece) = loop {
            let ticket = *waiting.front()?;
            match ready(&ticket) {
                Some(piece) => break (ticket, piece),
                // It was broken off meanwhile.
                None => _ = waiting.pop_front(),
            }
        };
        let bytes = self.piece_bytes[piece as usize];
        let takes = served.room.fits(bytes, priority, PEER_ROOM)?;
        if self.room.fits(takes, priority, ROOM).is_none() {
            self.starved.push_back(peer);
            return None;
        }
        waiting.pop_front();
        served.room.add(takes, priority);
        self.room.add(takes, priority);
        let answer = self.answers.get_mut(&ticket)?;
        answer.ready.pop_front();
        answer.sending = Some(Outgoing { room: takes, flow: None });
        Some(Sending { ticket, piece, bytes })
    }

    /// Notes the transfer that carries what an answer is sending.
    pub(crate) fn carried_by(&mut self, ticket: Ticket, flow: FlowId) {
        if let Some(sending) = self.answers.get_mut(&ticket).and_then(|answer| answer.sending.as_mut()) {
            sending.flow = Some(flow);
        }
    }

    /// A piece has left.
    pub(crate) fn sent(&mut self, ticket: Ticket) {
        self.free(ticket);
        if self.answers.get(&ticket).is_some_and(|answer| !answer.ready.is_empty()) {
            self.wait(ticket);
        }
    }

    fn free(&mut self, ticket: Ticket) -> Option<FlowId> {
        let answer = self.answers.get_mut(&ticket)?;
        let Outgoing { room, flow } = answer.sending.take()?;
        self.room.sub(room, answer.priority);
        if let Some(served) = self.peers.get_mut(&ticket.0) {
            served.room.sub(room, answer.priority);
            if served.is_idle() {
                self.peers.remove(&ticket.0);
            }
        }
        self.open.push_back(ticket.0);
        self.open.append(&mut self.starved);
        flow
    }

    /// Ends an answer from which nothing is left; says whether it did.
    pub(crate) fn end_if_done(&mut self, now: Time, ticket: Ticket, blob: BlobKey, tracker: &mut Tracker) {
        let done = |answer: &Answer| answer.owed == 0 && answer.ready.is_empty() && answer.sending.is_none();
        if self.answers.get(&ticket).is_some_and(done)
            && let Some(answer) = self.answers.remove(&ticket)
        {
            tracker.ended(self.total(&answer));
            for piece in answer.pieces {
                tracker.sent(now, answer.asker, Item { blob, piece }, self.bytes(piece));
            }
        }
    }

    /// Encoded bytes of all that was asked for.
    fn total(&self, answer: &Answer) -> u64 {
        answer.pieces.iter().map(|&piece| self.bytes(piece)).sum()
    }

    /// Breaks an answer off; gives the transfer that is to be stopped.
    pub(crate) fn stop(&mut self, ticket: Ticket, tracker: &mut Tracker) -> Option<FlowId> {
        let flow = self.free(ticket);
        if let Some(answer) = self.answers.remove(&ticket) {
            tracker.ended(self.total(&answer));
        }
        flow
    }

    /// The answers to one node.
    pub(crate) fn to(&self, asker: Index) -> BTreeSet<Ticket> {
        let all = (asker, RequestId(0))..=(asker, RequestId(u64::MAX));
        self.answers.range(all).map(|(&ticket, _)| ticket).collect()
    }

    /// The transfers under way.
    pub(crate) fn flows(&self) -> impl Iterator<Item = FlowId> + '_ {
        let sending = |answer: &Answer| answer.sending.as_ref().and_then(|sending| sending.flow);
        self.answers.values().filter_map(sending)
    }

    /// Gives the transfer of an answer, which is to be stopped from outside; the answer itself goes nowhere until somebody
    /// notices.
    pub(crate) fn strand(&mut self, ticket: Ticket) -> Option<FlowId> {
        self.answers.get_mut(&ticket)?.sending.as_mut()?.flow.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOB: BlobKey = BlobKey { id: [0; 32], variant: 0 };

    #[test]
    fn one_piece_at_a_time_for_each_answer_and_three_quarters_of_the_room_for_prefetch() {
        let (mut serving, mut tracker) = (Serving::new([2 << 20; 4].into()), Tracker::new(Default::default()));
        let peer = PeerId::new([1; 32]);
        let ticket = |asker, n| (asker, RequestId(n));
        for (ticket, priority) in [
            (ticket(1, 0), Priority::Prefetch),
            (ticket(1, 1), Priority::Prefetch),
            (ticket(1, 2), Priority::OnDemand),
            (ticket(2, 0), Priority::Prefetch),
        ] {
            serving.begin(ticket, peer, vec![0, 1], priority);
            serving.ready(ticket, 0);
            serving.ready(ticket, 1);
        }
        let start = |serving: &mut Serving| {
            let mut started = Vec::new();
            serving.start(&mut started);
            started.into_iter().map(|sending| (sending.ticket, sending.piece)).collect::<Vec<_>>()
        };
        let first = [(ticket(1, 2), 0), (ticket(1, 0), 0), (ticket(2, 0), 0)];
        assert_eq!(start(&mut serving), first, "3 MiB are not room for two prefetches");
        assert_eq!(start(&mut serving), []);
        serving.sent(ticket(1, 0));
        assert_eq!(start(&mut serving), [(ticket(1, 1), 0)], "who waited longest");
        serving.sent(ticket(1, 2));
        assert_eq!(start(&mut serving), [(ticket(1, 2), 1)]);
        serving.sent(ticket(1, 2));
        serving.end_if_done(Time::ZERO, ticket(1, 2), BLOB, &mut tracker);
        assert!(!serving.contains(ticket(1, 2)) && serving.contains(ticket(1, 0)));
        assert_eq!(serving.to(1).len(), 2);
        serving.stop(ticket(1, 1), &mut tracker);
        assert_eq!(start(&mut serving), [(ticket(1, 0), 1)]);
    }
}
