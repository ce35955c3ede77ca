//! One node: the shell around a scheduler, twin of the daemon's driver. It reads like the daemon would if sending
//! were a function call: what it wants to tell others it leaves in `outbox` for the world to deliver.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use shoal_proto::{Bitfield, PeerId, Priority};
use shoal_scheduler::{
    Action, Admission, BlobKey, Event, Item, Origin, RequestId, Scheduler, Source, Time, Tracker, WantId,
};

use crate::{link::Link, scenario::Role};

/// Prefetch wants open at a time.
const PREFETCH_OPEN: usize = 512;
/// A reader gives up after this, as the daemon's default is.
const READ_DEADLINE: Duration = Duration::from_secs(60);
/// A prefetch has all day.
const PREFETCH_DEADLINE: Duration = Duration::from_secs(86_400);
/// Who owes something says so this often; it has to be less than the scheduler's `progress`.
pub(crate) const REMIND: Duration = Duration::from_millis(400);
/// Backlog of an uplink from which an asker is told to be patient.
const LONG_BACKLOG: Duration = Duration::from_millis(100);

/// Position of a node in the world.
pub(crate) type Index = usize;

/// A request that this node serves: who asked, and its id there.
pub(crate) type Ticket = (Index, RequestId);

/// A piece on an uplink.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parcel {
    pub(crate) ticket: Ticket,
    pub(crate) item: Item,
    pub(crate) bytes: u64,
}

/// What one node tells another.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Request {
        request: RequestId,
        pieces: Vec<u32>,
        priority: Priority,
        source: bool,
        deadline: Time,
    },
    Cancel {
        request: RequestId,
    },
    /// An answer, as the asker's scheduler hears it.
    Answer(Event),
    /// New pieces.
    Have(Bitfield),
}

/// What the world is to do for a node.
#[derive(Debug)]
pub(crate) enum Errand {
    Send(Index, Message),
    Connect(PeerId),
    Registry {
        request: RequestId,
        pieces: Vec<u32>,
        bytes: u64,
        priority: Priority,
    },
    CancelRegistry {
        request: RequestId,
    },
    /// Something is on the uplink.
    Uplink,
    Remind(Ticket),
    Disconnect(PeerId),
}

#[derive(Debug)]
struct Service {
    /// Pieces not sent yet.
    owed: BTreeSet<u32>,
    admitted: usize,
}

/// A node.
pub(crate) struct Node {
    pub(crate) id: PeerId,
    pub(crate) zone: String,
    pub(crate) role: Role,
    pub(crate) alive: bool,
    pub(crate) scheduler: Scheduler,
    pub(crate) uplink: Link<Parcel>,
    /// When the downlink has taken in all that is on its way.
    pub(crate) down_free: Time,
    pub(crate) down_bytes_per_s: f64,
    pub(crate) neighbours: BTreeMap<PeerId, Index>,
    pub(crate) outbox: Vec<Errand>,
    /// Pieces that neighbours have not heard of.
    pub(crate) news: Bitfield,
    pub(crate) wake: Option<Time>,
    pub(crate) started: Option<Time>,
    pub(crate) first: Option<Time>,
    pub(crate) last: Option<Time>,
    pub(crate) failed_reads: u64,
    pub(crate) received: BTreeMap<&'static str, u64>,
    blob: BlobKey,
    tracker: Tracker,
    piece_bytes: Vec<u64>,
    requests: BTreeMap<RequestId, Source>,
    seeds: BTreeSet<PeerId>,
    services: BTreeMap<Ticket, Service>,
    duties: BTreeMap<WantId, (Ticket, u32, Priority)>,
    reads: BTreeMap<WantId, Priority>,
    next_want: u64,
    next_prefetch: u32,
    next_read: u32,
    read_window: usize,
}

impl Node {
    #[expect(clippy::too_many_arguments, reason = "one caller, and each is a different thing")]
    pub(crate) fn new(
        id: PeerId,
        zone: String,
        role: Role,
        scheduler: Scheduler,
        (up_mbit, down_mbit): (f64, f64),
        blob: BlobKey,
        piece_bytes: Vec<u64>,
        seeds: BTreeSet<PeerId>,
    ) -> Self {
        let pieces = piece_bytes.len() as u32;
        Self {
            id,
            zone,
            role,
            alive: true,
            scheduler,
            uplink: Link::new(up_mbit),
            down_free: Time::ZERO,
            down_bytes_per_s: down_mbit * 125_000.0,
            neighbours: BTreeMap::new(),
            outbox: Vec::new(),
            news: Bitfield::new(pieces),
            wake: None,
            started: None,
            first: None,
            last: None,
            failed_reads: 0,
            received: BTreeMap::new(),
            blob,
            tracker: Tracker::new(Default::default()),
            piece_bytes,
            requests: BTreeMap::new(),
            seeds,
            services: BTreeMap::new(),
            duties: BTreeMap::new(),
            reads: BTreeMap::new(),
            next_want: 0,
            next_prefetch: 0,
            next_read: 0,
            read_window: 0,
        }
    }

    pub(crate) fn have(&self) -> Bitfield {
        self.scheduler.present(self.blob).cloned().unwrap_or_default()
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.scheduler.present(self.blob).is_some_and(Bitfield::is_full)
    }

    fn has(&self, piece: u32) -> bool {
        self.scheduler.present(self.blob).is_some_and(|present| present.contains(piece))
    }

    /// Starts to read the image: prefetch of everything, and a reader that waits for `window` pieces at a time.
    pub(crate) fn start(&mut self, now: Time, window: usize) {
        self.started = Some(now);
        self.read_window = window;
        self.read_on(now);
        self.drain(now);
    }

    fn read_on(&mut self, now: Time) {
        if self.started.is_none() {
            return;
        }
        let pieces = self.piece_bytes.len() as u32;
        let open = |priority| self.reads.values().filter(|&&read| read == priority).count();
        let (reads, prefetches) = (open(Priority::OnDemand), open(Priority::Prefetch));
        for _ in reads..self.read_window.min(reads + (pieces - self.next_read) as usize) {
            self.want(now, self.next_read, Priority::OnDemand, now + READ_DEADLINE);
            self.next_read += 1;
        }
        for _ in prefetches..PREFETCH_OPEN.min(prefetches + (pieces - self.next_prefetch) as usize) {
            self.want(now, self.next_prefetch, Priority::Prefetch, now + PREFETCH_DEADLINE);
            self.next_prefetch += 1;
        }
    }

    fn want(&mut self, now: Time, piece: u32, priority: Priority, deadline: Time) {
        let want = self.name_want();
        self.reads.insert(want, priority);
        let item = Item { blob: self.blob, piece };
        self.scheduler.handle_event(now, Event::Want { want, item, priority, deadline, origin: Origin::Local });
    }

    fn name_want(&mut self) -> WantId {
        self.next_want += 1;
        WantId(self.next_want)
    }

    pub(crate) fn handle(&mut self, now: Time, event: Event) {
        if let Event::PeerDown { peer } = &event {
            self.tracker.forget(*peer);
            if let Some(index) = self.neighbours.remove(peer) {
                let gone: Vec<_> = self.services.keys().filter(|ticket| ticket.0 == index).copied().collect();
                gone.into_iter().for_each(|ticket| self.stop_serving(ticket));
            }
        }
        self.scheduler.handle_event(now, event);
        self.drain(now);
    }

    pub(crate) fn timeout(&mut self, now: Time) {
        self.scheduler.handle_timeout(now);
        self.drain(now);
    }

    /// A piece came in whole.
    pub(crate) fn receive(&mut self, now: Time, request: RequestId, item: Item, bytes: u64) {
        let source = match self.requests.get(&request) {
            Some(Source::Registry) => "registry",
            Some(Source::Peer(peer) | Source::Home(peer)) if self.seeds.contains(peer) => "seed",
            Some(_) => "peer",
            None => "cancelled",
        };
        *self.received.entry(source).or_default() += bytes;
        if !self.has(item.piece) {
            self.news.insert(item.piece);
            self.first.get_or_insert(now);
        }
        self.scheduler.handle_event(now, Event::Delivered { request, item, bytes });
        if self.is_complete() {
            self.last.get_or_insert(now);
        }
        self.drain(now);
    }

    /// Carries out what the scheduler wants done.
    pub(crate) fn drain(&mut self, now: Time) {
        loop {
            while let Some(action) = self.scheduler.poll_action(now) {
                self.carry_out(now, action);
            }
            let open = self.reads.len();
            self.read_on(now);
            if self.reads.len() == open {
                return;
            }
        }
    }

    fn carry_out(&mut self, now: Time, action: Action) {
        match action {
            Action::Request { request, peer, pieces, priority, source, deadline, .. } => {
                self.requests.insert(request, if source { Source::Home(peer) } else { Source::Peer(peer) });
                if let Some(&index) = self.neighbours.get(&peer) {
                    let message = Message::Request { request, pieces, priority, source, deadline };
                    self.outbox.push(Errand::Send(index, message));
                }
            }
            Action::Cancel { request } => match self.requests.remove(&request) {
                Some(Source::Peer(peer) | Source::Home(peer)) => {
                    if let Some(&index) = self.neighbours.get(&peer) {
                        self.outbox.push(Errand::Send(index, Message::Cancel { request }));
                    }
                }
                Some(Source::Registry) => self.outbox.push(Errand::CancelRegistry { request }),
                None => {}
            },
            Action::BackToSource { request, pieces, range, priority, .. } => {
                self.requests.insert(request, Source::Registry);
                self.outbox.push(Errand::Registry { request, pieces, bytes: range.end - range.start, priority });
            }
            Action::Complete { want, item, outcome } => self.completed(now, want, item, outcome.is_ok()),
            Action::Ban { peer, .. } => self.outbox.push(Errand::Disconnect(peer)),
            Action::Connect { peer } => self.outbox.push(Errand::Connect(peer)),
        }
    }

    fn completed(&mut self, now: Time, want: WantId, item: Item, ok: bool) {
        if self.reads.remove(&want).is_some() {
            self.failed_reads += u64::from(!ok);
        } else if let Some((ticket, piece, priority)) = self.duties.remove(&want) {
            if ok {
                self.queue(ticket, piece, priority);
            } else if self.services.contains_key(&ticket) {
                self.stop_serving(ticket);
                self.answer(ticket, Event::CannotSource { request: ticket.1 });
            }
        }
        debug_assert!(now >= Time::ZERO && item.blob == self.blob);
    }

    fn answer(&mut self, ticket: Ticket, event: Event) {
        self.outbox.push(Errand::Send(ticket.0, Message::Answer(event)));
    }

    /// Puts a piece that is here on the uplink.
    fn queue(&mut self, ticket: Ticket, piece: u32, priority: Priority) {
        if self.services.contains_key(&ticket) {
            let bytes = self.piece_bytes[piece as usize];
            let item = Item { blob: self.blob, piece };
            self.uplink.push(priority, ticket, bytes, Parcel { ticket, item, bytes });
            self.outbox.push(Errand::Uplink);
        }
    }

    pub(crate) fn hear(&mut self, now: Time, from: Index, peer: PeerId, message: Message) {
        match message {
            Message::Request { request, pieces, priority, source, deadline } => {
                self.serve(now, (from, request), peer, pieces, priority, source, deadline);
                self.drain(now);
            }
            Message::Cancel { request } => self.stop_serving((from, request)),
            Message::Answer(event) => self.handle(now, event),
            Message::Have(have) => {
                self.handle(now, Event::PeerHave { peer, blob: self.blob, first: 0, have, full: false });
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of a request")]
    fn serve(
        &mut self,
        now: Time,
        ticket: Ticket,
        peer: PeerId,
        pieces: Vec<u32>,
        priority: Priority,
        source: bool,
        deadline: Time,
    ) {
        let request = ticket.1;
        if source
            && pieces.iter().any(|&piece| !self.has(piece) && self.scheduler.home_rank(self.blob, piece).is_none())
        {
            let members = self.scheduler.zone_members();
            return self.answer(ticket, Event::NotMyHome { request, members });
        }
        if let Admission::Busy { retry_after, alternates } =
            self.tracker.admit(now, peer, self.blob, &pieces, priority)
        {
            return self.answer(ticket, Event::Busy { request, retry_after, alternates });
        }
        let service = Service { owed: pieces.iter().copied().collect(), admitted: pieces.len() };
        self.services.insert(ticket, service);
        let backlog = self.uplink.backlog();
        let mut pending = (backlog > LONG_BACKLOG).then_some(backlog);
        for piece in pieces {
            let item = Item { blob: self.blob, piece };
            if self.has(piece) {
                self.queue(ticket, piece, priority);
            } else if source {
                let want = self.name_want();
                self.duties.insert(want, (ticket, piece, priority));
                self.scheduler
                    .handle_event(now, Event::Want { want, item, priority, deadline, origin: Origin::ForPeer });
                pending = Some(pending.unwrap_or_default().max(REMIND));
            } else {
                self.owes_no_more(ticket, piece);
                self.answer(ticket, Event::NotHave { request, item });
            }
        }
        if let Some(eta) = pending {
            self.answer(ticket, Event::Pending { request, eta });
        }
        self.outbox.push(Errand::Remind(ticket));
    }

    /// Whether the asker is to be told once more that this node is at it.
    pub(crate) fn remind(&mut self, ticket: Ticket) {
        if self.services.contains_key(&ticket) {
            let eta = self.uplink.backlog().max(REMIND);
            self.answer(ticket, Event::Pending { request: ticket.1, eta });
            self.outbox.push(Errand::Remind(ticket));
        }
    }

    /// A piece left the uplink.
    pub(crate) fn sent(&mut self, now: Time, parcel: &Parcel, to: PeerId) {
        self.tracker.sent(now, to, parcel.item);
        self.owes_no_more(parcel.ticket, parcel.item.piece);
    }

    fn owes_no_more(&mut self, ticket: Ticket, piece: u32) {
        let Some(service) = self.services.get_mut(&ticket) else { return };
        service.owed.remove(&piece);
        if service.owed.is_empty() {
            self.stop_serving(ticket);
        }
    }

    fn stop_serving(&mut self, ticket: Ticket) {
        if let Some(service) = self.services.remove(&ticket) {
            self.tracker.ended(service.admitted);
            self.uplink.cancel(ticket);
        }
    }
}
