//! The serving half of a node: answers under way, and the room that they share. Twin of the daemon's `serve.rs` and of
//! the budgets below it.
//!
//! All that goes to one peer shares one connection, so it goes one piece after the other, on-demand beside prefetch. A piece
//! is read once there is room for its bytes, of which prefetch gets three quarters. Who waits, waits in the order of coming:
//! the answers to a peer, and the peers.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use foldhash::fast::FixedState;
use shoal_proto::{PeerId, Priority};
use shoal_scheduler::{Item, RequestId, Time, Tracker};
use smallvec::SmallVec;

use crate::{
    flows::FlowId,
    images::{Image, key},
    topology::Index,
};

/// Bytes between store and network, as in the daemon.
const ROOM: u64 = 64 << 20;

/// A request that this node serves: who asked, and its id there.
pub(crate) type Ticket = (Index, RequestId);

/// A piece that may go on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sending {
    pub(crate) ticket: Ticket,
    pub(crate) image: Image,
    pub(crate) piece: u32,
    pub(crate) bytes: u64,
}

#[derive(Debug)]
struct Answer {
    asker: PeerId,
    image: Image,
    pieces: Vec<u32>,
    priority: Priority,
    /// Pieces that are here and not sent.
    ready: SmallVec<[u32; 4]>,
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

/// What goes to one peer with one priority.
#[derive(Debug, Default)]
struct Lane {
    /// Answers that have a piece to send, first come first.
    waiting: VecDeque<Ticket>,
    /// Whether a piece is on the wire, or the peer is in line for its next.
    busy: bool,
}

impl Room {
    /// What a piece takes, if that is free.
    fn fits(&self, bytes: u64, priority: Priority) -> Option<u64> {
        let most = match priority {
            Priority::OnDemand => ROOM,
            Priority::Prefetch => ROOM / 4 * 3,
        };
        let takes = bytes.min(most);
        let free = self.all + takes <= ROOM && (priority == Priority::OnDemand || self.prefetch + takes <= most);
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
    answers: HashMap<Ticket, Answer, FixedState>,
    room: Room,
    /// By priority, and by peer for those that ever asked.
    lanes: [HashMap<Index, Lane, FixedState>; 2],
    /// Peers in line for their next piece, by priority.
    line: [VecDeque<Index>; 2],
}

impl Serving {
    pub(crate) fn new(piece_bytes: Arc<[u64]>) -> Self {
        Self {
            piece_bytes,
            answers: HashMap::default(),
            room: Room::default(),
            lanes: Default::default(),
            line: Default::default(),
        }
    }

    /// Encoded bytes of a piece.
    pub(crate) fn bytes(&self, piece: u32) -> u64 {
        self.piece_bytes[piece as usize]
    }

    /// Begins an answer to a request that was admitted.
    pub(crate) fn begin(
        &mut self,
        ticket: Ticket,
        asker: PeerId,
        image: Image,
        pieces: Vec<u32>,
        priority: Priority,
    ) {
        let (ready, sending) = (SmallVec::new(), None);
        self.answers.insert(ticket, Answer { asker, image, pieces, priority, ready, owed: 0, sending });
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
            answer.ready.push(piece);
            if waits {
                self.wait(ticket);
            }
        }
    }

    /// An answer has a piece to send.
    fn wait(&mut self, ticket: Ticket) {
        let Some(answer) = self.answers.get(&ticket) else { return };
        let class = answer.priority as usize;
        let lane = self.lanes[class].entry(ticket.0).or_default();
        lane.waiting.push_back(ticket);
        if !std::mem::replace(&mut lane.busy, true) {
            self.line[class].push_back(ticket.0);
        }
    }

    /// Takes the pieces that may go on the wire now.
    pub(crate) fn start(&mut self, started: &mut Vec<Sending>) {
        for priority in [Priority::OnDemand, Priority::Prefetch] {
            while let Some(&peer) = self.line[priority as usize].front() {
                let Some((ticket, piece)) = self.next_of(peer, priority) else {
                    self.line[priority as usize].pop_front();
                    self.lanes[priority as usize].get_mut(&peer).into_iter().for_each(|lane| lane.busy = false);
                    continue;
                };
                let bytes = self.piece_bytes[piece as usize];
                let Some(takes) = self.room.fits(bytes, priority) else { break };
                self.line[priority as usize].pop_front();
                self.lanes[priority as usize].get_mut(&peer).map(|lane| lane.waiting.pop_front());
                self.room.add(takes, priority);
                if let Some(answer) = self.answers.get_mut(&ticket) {
                    answer.ready.remove(0);
                    answer.sending = Some(Outgoing { room: takes, flow: None });
                    started.push(Sending { ticket, image: answer.image, piece, bytes });
                }
            }
        }
    }

    /// The first answer to a peer that has a piece to send, and that piece.
    fn next_of(&mut self, peer: Index, priority: Priority) -> Option<(Ticket, u32)> {
        let lane = self.lanes[priority as usize].get_mut(&peer)?;
        // Some were broken off meanwhile.
        let ready = |ticket: &Ticket| self.answers.get(ticket).and_then(|answer| answer.ready.first());
        while lane.waiting.front().is_some_and(|ticket| ready(ticket).is_none()) {
            lane.waiting.pop_front();
        }
        let ticket = *lane.waiting.front()?;
        Some((ticket, *ready(&ticket)?))
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
        // Whether there is more for the peer shows when its turn comes.
        self.line[answer.priority as usize].push_back(ticket.0);
        flow
    }

    /// Ends an answer from which nothing is left; says whether it did.
    pub(crate) fn end_if_done(&mut self, now: Time, ticket: Ticket, tracker: &mut Tracker) {
        let done = |answer: &Answer| answer.owed == 0 && answer.ready.is_empty() && answer.sending.is_none();
        if self.answers.get(&ticket).is_some_and(done)
            && let Some(answer) = self.answers.remove(&ticket)
        {
            tracker.ended(answer.asker, self.total(&answer));
            let blob = key(answer.image);
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
            tracker.ended(answer.asker, self.total(&answer));
        }
        flow
    }

    /// The answers to one node.
    pub(crate) fn to(&self, asker: Index) -> Vec<Ticket> {
        let mut tickets: Vec<_> = self.answers.keys().filter(|ticket| ticket.0 == asker).copied().collect();
        tickets.sort_unstable();
        tickets
    }

    /// The transfer that an answer is sending.
    pub(crate) fn flow(&self, ticket: Ticket) -> Option<FlowId> {
        self.answers.get(&ticket)?.sending.as_ref()?.flow
    }

    /// The transfers under way.
    pub(crate) fn flows(&self) -> Vec<FlowId> {
        let sending = |answer: &Answer| answer.sending.as_ref().and_then(|sending| sending.flow);
        let mut flows: Vec<_> = self.answers.values().filter_map(sending).collect();
        flows.sort_unstable();
        flows
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

    fn ticket(asker: Index, request: u64) -> Ticket {
        (asker, RequestId(request))
    }

    fn start(serving: &mut Serving) -> Vec<(Ticket, u32)> {
        let mut started = Vec::new();
        serving.start(&mut started);
        started.into_iter().map(|sending| (sending.ticket, sending.piece)).collect()
    }

    #[test]
    fn one_piece_at_a_time_for_each_peer_and_priority() {
        let (mut serving, mut tracker) = (Serving::new([2 << 20; 4].into()), Tracker::new(Default::default()));
        let peer = PeerId::new([1; 32]);
        for (ticket, priority) in [
            (ticket(1, 0), Priority::Prefetch),
            (ticket(1, 1), Priority::Prefetch),
            (ticket(1, 2), Priority::OnDemand),
            (ticket(2, 0), Priority::Prefetch),
        ] {
            serving.begin(ticket, peer, 0, vec![0, 1], priority);
            serving.ready(ticket, 0);
            serving.ready(ticket, 1);
        }
        assert_eq!(start(&mut serving), [(ticket(1, 2), 0), (ticket(1, 0), 0), (ticket(2, 0), 0)]);
        assert_eq!(start(&mut serving), []);
        serving.sent(ticket(1, 0));
        assert_eq!(start(&mut serving), [(ticket(1, 1), 0)], "who waited longest");
        serving.sent(ticket(1, 2));
        assert_eq!(start(&mut serving), [(ticket(1, 2), 1)]);
        serving.sent(ticket(1, 2));
        serving.end_if_done(Time::ZERO, ticket(1, 2), &mut tracker);
        assert!(!serving.contains(ticket(1, 2)) && serving.contains(ticket(1, 0)));
        assert_eq!(serving.to(1).len(), 2);
        serving.stop(ticket(1, 1), &mut tracker);
        assert_eq!(start(&mut serving), [(ticket(1, 0), 1)]);
    }

    #[test]
    fn three_quarters_of_the_room_are_for_prefetch() {
        let mut serving = Serving::new([20 << 20].into());
        for asker in 1..=3 {
            serving.begin(ticket(asker, 0), PeerId::new([1; 32]), 0, vec![0], Priority::Prefetch);
            serving.ready(ticket(asker, 0), 0);
        }
        assert_eq!(start(&mut serving), [(ticket(1, 0), 0), (ticket(2, 0), 0)]);
        serving.begin(ticket(3, 1), PeerId::new([1; 32]), 0, vec![0], Priority::OnDemand);
        serving.ready(ticket(3, 1), 0);
        assert_eq!(start(&mut serving), [(ticket(3, 1), 0)]);
        serving.sent(ticket(2, 0));
        assert_eq!(start(&mut serving), [(ticket(3, 0), 0)]);
    }
}
