//! One node: the shell around a scheduler, twin of the daemon's driver and of its `serve.rs`. It reads like the daemon
//! would if sending were a function call: what it wants of others it leaves in `outbox` for the swarm to carry out.

use std::{collections::HashMap, sync::Arc, time::Duration};

use foldhash::fast::FixedState;
use shoal_proto::{Bitfield, PeerId, Priority};
use shoal_scheduler::{
    Action, Admission, Ask, BlobKey, Event, Failure, Item, Origin, RequestId, Scheduler, Time, Tracker, WantId,
};

use crate::{
    flows::FlowId,
    requests::Requests,
    serving::{Sending, Serving, Ticket},
    topology::Index,
};

/// Prefetch wants open at a time, as in the daemon.
const PREFETCH_OPEN: usize = 256;
/// A reader gives up after this, as the daemon's default is.
const READ_DEADLINE: Duration = Duration::from_secs(60);
/// A prefetch gives up after this, as in the daemon.
const PREFETCH_DEADLINE: Duration = Duration::from_secs(600);
/// What a home tells an asker to expect while it gets a piece, and how often, as in the daemon.
const SOURCE_ETA: Duration = Duration::from_secs(1);
pub(crate) const REMIND: Duration = Duration::from_millis(400);
/// The one blob of a swarm.
pub(crate) const BLOB: BlobKey = BlobKey { id: [0x5a; 32], variant: 0 };

/// What one node tells another.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Request {
        request: RequestId,
        pieces: Vec<u32>,
        priority: Priority,
        source: bool,
        deadline: Time,
        lacks: u16,
    },
    Cancel {
        request: RequestId,
    },
    /// An answer without bytes, as the asker's scheduler hears it.
    Answer(Event),
}

/// What the swarm is to do for a node.
#[derive(Debug)]
pub(crate) enum Errand {
    Send(PeerId, Message),
    Reply(Index, Message),
    Connect(PeerId),
    Registry { request: RequestId, pieces: Vec<u32> },
    CancelRegistry { request: RequestId },
    Transfer(Sending),
    Stop(FlowId),
    Remind(Ticket),
    Disconnect(PeerId),
}

/// What kind of want a [`WantId`] names; its lowest bits.
const PREFETCH: u64 = 0;
const ON_DEMAND: u64 = 1;
const DUTY: u64 = 2;

/// A node.
pub(crate) struct Node {
    pub(crate) alive: bool,
    /// Serves wrong bytes.
    pub(crate) poisonous: bool,
    pub(crate) scheduler: Scheduler,
    pub(crate) serving: Serving,
    pub(crate) outbox: Vec<Errand>,
    /// Pieces that neighbours have not heard of.
    pub(crate) news: Bitfield,
    /// Whether some of them were at none of the neighbours when they came.
    pub(crate) has_rare_news: bool,
    pub(crate) wake: Option<Time>,
    /// Whether its scheduler did something since the swarm asked last.
    pub(crate) stirred: bool,
    /// What neighbours told it that its scheduler has not heard: it will with whatever happens next.
    heard: Vec<(PeerId, Arc<Bitfield>)>,
    /// Whether [`take_in`](Self::take_in) is about to be called.
    listening: bool,
    /// When it will start.
    pub(crate) starts: Time,
    pub(crate) started: Option<Time>,
    pub(crate) first: Option<Time>,
    pub(crate) last: Option<Time>,
    pub(crate) failed_reads: u64,
    /// When all that has arrived will be decoded.
    pub(crate) decoded: Time,
    tracker: Tracker,
    pub(crate) requests: Requests,
    duties: HashMap<WantId, (Ticket, u32), FixedState>,
    next_want: u64,
    /// Wants open: prefetch, on-demand.
    open: [usize; 2],
    /// The next piece that each wants.
    next: [u32; 2],
    reading: bool,
    /// Pieces that a reader waits for at a time.
    window: usize,
    starting: Vec<Sending>,
}

impl Node {
    pub(crate) fn new(scheduler: Scheduler, tracker: Tracker, piece_bytes: Arc<[u64]>) -> Self {
        Self {
            alive: true,
            poisonous: false,
            scheduler,
            outbox: Vec::new(),
            news: Bitfield::new(piece_bytes.len() as u32),
            has_rare_news: false,
            requests: Requests::new(piece_bytes.len()),
            serving: Serving::new(piece_bytes),
            wake: None,
            stirred: false,
            heard: Vec::new(),
            listening: false,
            starts: Time::ZERO,
            started: None,
            first: None,
            last: None,
            failed_reads: 0,
            decoded: Time::ZERO,
            tracker,
            duties: HashMap::default(),
            next_want: 0,
            open: [0; 2],
            next: [0; 2],
            reading: false,
            window: 0,
            starting: Vec::new(),
        }
    }

    pub(crate) fn have(&self) -> &Bitfield {
        self.scheduler.present(BLOB).expect("every node is given the blob when it is made")
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.have().is_full()
    }

    fn has(&self, piece: u32) -> bool {
        self.have().contains(piece)
    }

    /// Mounts the image.
    pub(crate) fn start(&mut self, now: Time) {
        self.started = Some(now);
        self.finish_if_complete(now);
    }

    /// Starts to read the mounted image: prefetch of everything, and a reader that waits for `window` pieces at a time.
    pub(crate) fn read(&mut self, now: Time, window: usize) {
        self.reading = true;
        self.window = window;
        self.drain(now);
    }

    fn read_on(&mut self, now: Time) {
        if !self.reading {
            return;
        }
        self.read_class(now, ON_DEMAND, self.window, READ_DEADLINE);
        self.read_class(now, PREFETCH, PREFETCH_OPEN, PREFETCH_DEADLINE);
    }

    fn read_class(&mut self, now: Time, kind: u64, most: usize, patience: Duration) {
        let class = kind as usize;
        let priority = if kind == ON_DEMAND { Priority::OnDemand } else { Priority::Prefetch };
        while self.open[class] < most && self.next[class] < self.news.len() {
            let piece = self.next[class];
            self.next[class] += 1;
            if self.has(piece) {
                continue;
            }
            self.open[class] += 1;
            let want = self.name_want(kind);
            let (item, deadline) = (Item { blob: BLOB, piece }, now + patience);
            let origin = Origin::Local;
            self.scheduler.handle_event(now, Event::Want { want, item, priority, deadline, origin });
        }
    }

    fn name_want(&mut self, kind: u64) -> WantId {
        self.next_want += 4;
        WantId(self.next_want | kind)
    }

    pub(crate) fn handle(&mut self, now: Time, event: Event) {
        self.scheduler.handle_event(now, event);
        self.drain(now);
    }

    /// The connection to a node is gone.
    pub(crate) fn lost(&mut self, now: Time, peer: PeerId, index: Index) {
        self.tracker.forget(peer);
        self.serving.to(index).into_iter().for_each(|ticket| self.stop_serving(ticket));
        self.requests.end_all(peer);
        self.handle(now, Event::PeerDown { peer });
    }

    /// Pieces that it wants for itself and that are not here yet.
    pub(crate) fn wants(&self) -> usize {
        self.open.iter().sum()
    }

    /// Something is due. The daemon would have told its scheduler every now and then of what is `arriving`; that matters no
    /// sooner than now.
    pub(crate) fn timeout(&mut self, now: Time, arriving: &[RequestId]) {
        for &request in arriving {
            self.scheduler.handle_event(now, Event::Progress { request });
        }
        self.scheduler.handle_timeout(now);
        self.drain(now);
    }

    /// A piece came in whole and was decoded.
    pub(crate) fn receive(&mut self, now: Time, request: RequestId, piece: u32) {
        self.requests.answered(request, piece);
        if !self.has(piece) {
            self.news.insert(piece);
            self.has_rare_news |= self.scheduler.holders(Item { blob: BLOB, piece }) == 0;
            self.first.get_or_insert(now);
        }
        let (item, bytes) = (Item { blob: BLOB, piece }, self.serving.bytes(piece));
        self.scheduler.handle_event(now, Event::Delivered { request, item, bytes });
        self.finish_if_complete(now);
        self.drain(now);
    }

    /// A piece came in and was wrong.
    pub(crate) fn reject(&mut self, now: Time, request: RequestId, piece: u32) {
        self.requests.answered(request, piece);
        self.handle(now, Event::Failed { request, reason: Failure::WrongBytes });
    }

    fn finish_if_complete(&mut self, now: Time) {
        if self.is_complete() {
            self.first.get_or_insert(now);
            self.last.get_or_insert(now);
        }
    }

    /// A neighbour told what is new there. Says whether [`take_in`](Self::take_in) has to be called for it later.
    pub(crate) fn overhear(&mut self, peer: PeerId, news: Arc<Bitfield>) -> bool {
        self.heard.push((peer, news));
        !std::mem::replace(&mut self.listening, true)
    }

    /// Tells the scheduler what neighbours told, if it has not heard it by now.
    pub(crate) fn take_in(&mut self, now: Time) {
        self.listening = false;
        if !self.heard.is_empty() {
            self.drain(now);
        }
    }

    /// Carries out what the scheduler wants done.
    fn drain(&mut self, now: Time) {
        self.stirred = true;
        for (peer, news) in self.heard.drain(..) {
            let have = Bitfield::clone(&news);
            self.scheduler.handle_event(now, Event::PeerHave { peer, blob: BLOB, first: 0, have, full: false });
        }
        loop {
            while let Some(action) = self.scheduler.poll_action(now) {
                self.carry_out(now, action);
            }
            let open = self.open;
            self.read_on(now);
            if self.open == open {
                break;
            }
        }
        self.start_sending();
    }

    /// Puts on the wire what may go there.
    fn start_sending(&mut self) {
        self.serving.start(&mut self.starting);
        self.outbox.extend(self.starting.drain(..).map(Errand::Transfer));
    }

    fn carry_out(&mut self, now: Time, action: Action) {
        match action {
            Action::Request { request, peer, pieces, priority, source, deadline, lacks, .. } => {
                self.requests.begin(now, request, Some(peer), &pieces);
                let message = Message::Request { request, pieces, priority, source, deadline, lacks };
                self.outbox.push(Errand::Send(peer, message));
            }
            Action::Cancel { request } => match self.requests.end(request) {
                Some(Some(peer)) => self.outbox.push(Errand::Send(peer, Message::Cancel { request })),
                Some(None) => self.outbox.push(Errand::CancelRegistry { request }),
                None => {}
            },
            Action::BackToSource { request, pieces, .. } => {
                self.requests.begin(now, request, None, &pieces);
                self.outbox.push(Errand::Registry { request, pieces });
            }
            Action::Complete { want, outcome, .. } => self.completed(want, outcome.is_ok()),
            Action::Ban { peer, .. } => self.outbox.push(Errand::Disconnect(peer)),
            Action::Connect { peer } => self.outbox.push(Errand::Connect(peer)),
        }
    }

    fn completed(&mut self, want: WantId, ok: bool) {
        match want.0 & 3 {
            DUTY => {
                let Some((ticket, piece)) = self.duties.remove(&want) else { return };
                if ok {
                    self.serving.got(ticket, piece);
                } else if self.serving.contains(ticket) {
                    self.stop_serving(ticket);
                    self.answer(ticket, Event::CannotSource { request: ticket.1 });
                }
            }
            kind => {
                self.open[kind as usize] -= 1;
                self.failed_reads += u64::from(!ok);
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, event: Event) {
        self.outbox.push(Errand::Reply(ticket.0, Message::Answer(event)));
    }

    pub(crate) fn hear(&mut self, now: Time, from: Index, peer: PeerId, message: Message) {
        match message {
            Message::Request { request, pieces, priority, source, deadline, lacks } => {
                let first = Item { blob: BLOB, piece: pieces.first().copied().unwrap_or_default() };
                let bytes = pieces.iter().map(|&piece| self.serving.bytes(piece)).sum();
                let ask = Ask { peer, first, bytes, priority, lacks };
                self.admit(now, (from, request), ask, pieces, source.then_some(deadline));
            }
            Message::Cancel { request } => {
                self.stop_serving((from, request));
                self.start_sending();
            }
            Message::Answer(event) => {
                match event {
                    Event::NotHave { request, item } => self.requests.answered(request, item.piece),
                    Event::Busy { request, .. }
                    | Event::NotMyHome { request, .. }
                    | Event::CannotSource { request } => {
                        self.requests.end(request);
                    }
                    _ => {}
                }
                self.handle(now, event);
            }
        }
    }

    /// Answers a request; with a deadline, as the home, which gets what is not here.
    fn admit(&mut self, now: Time, ticket: Ticket, ask: Ask, pieces: Vec<u32>, source: Option<Time>) {
        let (request, Ask { peer, priority, .. }) = (ticket.1, ask);
        if let Admission::Busy { retry_after, alternates } = self.tracker.admit(now, ask) {
            return self.answer(ticket, Event::Busy { request, retry_after, alternates });
        }
        let (here, missing): (Vec<u32>, Vec<u32>) = pieces.iter().partition(|&&piece| self.has(piece));
        self.serving.begin(ticket, peer, pieces, priority);
        here.into_iter().for_each(|piece| self.serving.ready(ticket, piece));
        match source {
            Some(deadline) if !missing.is_empty() => {
                self.source(now, ticket, &missing, priority, deadline);
                self.drain(now);
            }
            _ => {
                for piece in missing {
                    self.answer(ticket, Event::NotHave { request, item: Item { blob: BLOB, piece } });
                }
                self.serving.end_if_done(now, ticket, BLOB, &mut self.tracker);
                self.start_sending();
            }
        }
    }

    /// As the home: gets what is missing.
    fn source(&mut self, now: Time, ticket: Ticket, missing: &[u32], priority: Priority, deadline: Time) {
        let request = ticket.1;
        if missing.iter().any(|&piece| self.scheduler.home_rank(BLOB, piece).is_none()) {
            let members = self.scheduler.zone_members();
            self.stop_serving(ticket);
            return self.answer(ticket, Event::NotMyHome { request, members });
        }
        for &piece in missing {
            let want = self.name_want(DUTY);
            self.duties.insert(want, (ticket, piece));
            self.serving.owe(ticket);
            let item = Item { blob: BLOB, piece };
            let origin = Origin::ForPeer;
            self.scheduler.handle_event(now, Event::Want { want, item, priority, deadline, origin });
        }
        self.answer(ticket, Event::Pending { request, eta: SOURCE_ETA });
        self.outbox.push(Errand::Remind(ticket));
    }

    /// Whether the asker is to be told once more that this node is at it.
    pub(crate) fn remind(&mut self, ticket: Ticket) {
        if self.serving.is_owing(ticket) {
            self.answer(ticket, Event::Pending { request: ticket.1, eta: SOURCE_ETA });
            self.outbox.push(Errand::Remind(ticket));
        }
    }

    /// A piece left the uplink.
    pub(crate) fn sent(&mut self, now: Time, ticket: Ticket) {
        self.serving.sent(ticket);
        self.serving.end_if_done(now, ticket, BLOB, &mut self.tracker);
        self.start_sending();
    }

    fn stop_serving(&mut self, ticket: Ticket) {
        let flow = self.serving.stop(ticket, &mut self.tracker);
        self.outbox.extend(flow.map(Errand::Stop));
    }
}
