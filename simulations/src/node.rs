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
    images::{Image, key, of_key},
    mount::Mount,
    requests::Requests,
    serving::{Sending, Serving, Ticket},
    topology::Index,
};

/// A reader gives up after this, as the daemon's default is.
const READ_DEADLINE: Duration = Duration::from_secs(60);
/// A prefetch gives up after this, as in the daemon.
const PREFETCH_DEADLINE: Duration = Duration::from_secs(600);
/// What a home tells an asker to expect while it gets a piece, and how often, as in the daemon.
const SOURCE_ETA: Duration = Duration::from_secs(1);
pub(crate) const REMIND: Duration = Duration::from_millis(400);

/// What one node tells another.
#[derive(Debug, Clone)]
pub(crate) enum Message {
    Request {
        request: RequestId,
        image: Image,
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
    Registry { request: RequestId, image: Image, pieces: Vec<u32> },
    CancelRegistry { request: RequestId },
    Transfer(Sending),
    Stop(FlowId),
    Remind(Ticket),
    Disconnect(PeerId),
}

/// What kind of want a [`WantId`] names, its lowest bits: that of a reader, or a duty, or else a prefetch. The highest say of which
/// image.
const ON_DEMAND: u64 = Priority::OnDemand as u64;
const DUTY: u64 = 2;
const IMAGE_SHIFT: u32 = 48;

/// A node.
pub(crate) struct Node {
    pub(crate) alive: bool,
    /// Serves wrong bytes.
    pub(crate) poisonous: bool,
    pub(crate) scheduler: Scheduler,
    pub(crate) serving: Serving,
    pub(crate) outbox: Vec<Errand>,
    /// Its images, in order.
    pub(crate) mounts: Vec<Mount>,
    /// Positions of those that are read: a seed peer has very many, and reads none.
    reads: Vec<usize>,
    /// Images of which something is new since the swarm asked last.
    pub(crate) fresh: Vec<Image>,
    pub(crate) wake: Option<Time>,
    /// Whether its scheduler did something since the swarm asked last.
    pub(crate) stirred: bool,
    /// What neighbours told it that its scheduler has not heard: it will with whatever happens next.
    heard: Vec<(PeerId, Image, Arc<Bitfield>)>,
    /// Whether [`take_in`](Self::take_in) is about to be called.
    listening: bool,
    /// When all that has arrived will be decoded.
    pub(crate) decoded: Time,
    tracker: Tracker,
    pub(crate) requests: Requests,
    duties: HashMap<WantId, (Ticket, u32), FixedState>,
    next_want: u64,
    starting: Vec<Sending>,
}

impl Node {
    /// A node that the scheduler was told the images of.
    pub(crate) fn new(scheduler: Scheduler, tracker: Tracker, piece_bytes: Arc<[u64]>, mounts: Vec<Mount>) -> Self {
        Self {
            alive: true,
            poisonous: false,
            scheduler,
            requests: Requests::default(),
            serving: Serving::new(piece_bytes),
            outbox: Vec::new(),
            mounts,
            reads: Vec::new(),
            fresh: Vec::new(),
            wake: None,
            stirred: false,
            heard: Vec::new(),
            listening: false,
            decoded: Time::ZERO,
            tracker,
            duties: HashMap::default(),
            next_want: 0,
            starting: Vec::new(),
        }
    }

    fn find(&self, image: Image) -> Option<usize> {
        self.mounts.binary_search_by_key(&image, |mount| mount.image).ok()
    }

    /// An image, if it is one that this node has to do with.
    pub(crate) fn mount(&self, image: Image) -> Option<&Mount> {
        self.mounts.get(self.find(image)?)
    }

    pub(crate) fn mount_mut(&mut self, image: Image) -> Option<&mut Mount> {
        let at = self.find(image)?;
        self.mounts.get_mut(at)
    }

    /// The pieces of an image that are here.
    pub(crate) fn have(&self, image: Image) -> Option<&Bitfield> {
        self.scheduler.present(key(image))
    }

    pub(crate) fn has(&self, image: Image, piece: u32) -> bool {
        self.have(image).is_some_and(|have| have.contains(piece))
    }

    /// Mounts an image.
    pub(crate) fn start(&mut self, now: Time, image: Image) {
        self.mount_mut(image).into_iter().for_each(|mount| mount.start(now));
    }

    /// Starts to read a mounted image: prefetch, and a reader that waits.
    pub(crate) fn read(&mut self, now: Time, image: Image) {
        self.reads.extend(self.find(image));
        self.drain(now);
    }

    /// Wants what may be wanted more; says whether there was something.
    fn read_on(&mut self, now: Time) -> bool {
        let before = self.next_want;
        for turn in 0..self.reads.len() {
            let at = self.reads[turn];
            self.want_next(now, at, Priority::OnDemand, READ_DEADLINE);
            self.want_next(now, at, Priority::Prefetch, PREFETCH_DEADLINE);
        }
        self.next_want != before
    }

    fn want_next(&mut self, now: Time, at: usize, priority: Priority, patience: Duration) {
        let image = self.mounts[at].image;
        let blob = key(image);
        while let Some(piece) = self.scheduler.present(blob).and_then(|have| self.mounts[at].next(priority, have)) {
            let want = self.name_want(image, priority as u64);
            let (item, deadline) = (Item { blob, piece }, now + patience);
            let origin = Origin::Local;
            self.scheduler.handle_event(now, Event::Want { want, item, priority, deadline, origin });
        }
    }

    fn name_want(&mut self, image: Image, kind: u64) -> WantId {
        self.next_want += 4;
        WantId(u64::from(image) << IMAGE_SHIFT | self.next_want | kind)
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
        self.mounts.iter().map(Mount::wants).sum()
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
    pub(crate) fn receive(&mut self, now: Time, request: RequestId, image: Image, piece: u32) {
        self.requests.answered(request, piece);
        let is_new = !self.has(image, piece);
        let (item, bytes) = (Item { blob: key(image), piece }, self.serving.bytes(piece));
        let unheld = self.scheduler.holders(item) == 0;
        self.scheduler.handle_event(now, Event::Delivered { request, item, bytes });
        let here = self.have(image).map_or(0, Bitfield::count);
        if is_new && let Some(mount) = self.mount_mut(image) {
            mount.got(now, piece, unheld, here);
            self.fresh.push(image);
        }
        self.drain(now);
    }

    /// A piece came in and was wrong.
    pub(crate) fn reject(&mut self, now: Time, request: RequestId, piece: u32) {
        self.requests.answered(request, piece);
        self.handle(now, Event::Failed { request, reason: Failure::WrongBytes });
    }

    /// A neighbour told what is new there. Says whether [`take_in`](Self::take_in) has to be called for it later.
    pub(crate) fn overhear(&mut self, peer: PeerId, image: Image, news: Arc<Bitfield>) -> bool {
        self.heard.push((peer, image, news));
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
        for (peer, image, news) in self.heard.drain(..) {
            let (blob, have) = (key(image), Bitfield::clone(&news));
            self.scheduler.handle_event(now, Event::PeerHave { peer, blob, first: 0, have, full: false });
        }
        loop {
            while let Some(action) = self.scheduler.poll_action(now) {
                self.carry_out(now, action);
            }
            if !self.read_on(now) {
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
            Action::Request { request, peer, blob, pieces, priority, source, deadline, lacks } => {
                let image = of_key(blob);
                self.requests.begin(now, request, Some(peer), image, &pieces);
                let message = Message::Request { request, image, pieces, priority, source, deadline, lacks };
                self.outbox.push(Errand::Send(peer, message));
            }
            Action::Cancel { request } => match self.requests.end(request) {
                Some(Some(peer)) => self.outbox.push(Errand::Send(peer, Message::Cancel { request })),
                Some(None) => self.outbox.push(Errand::CancelRegistry { request }),
                None => {}
            },
            Action::BackToSource { request, blob, pieces, .. } => {
                let image = of_key(blob);
                self.requests.begin(now, request, None, image, &pieces);
                self.outbox.push(Errand::Registry { request, image, pieces });
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
                let priority = if kind == ON_DEMAND { Priority::OnDemand } else { Priority::Prefetch };
                let image = (want.0 >> IMAGE_SHIFT) as Image;
                self.mount_mut(image).into_iter().for_each(|mount| mount.ended(priority, ok));
            }
        }
    }

    fn answer(&mut self, ticket: Ticket, event: Event) {
        self.outbox.push(Errand::Reply(ticket.0, Message::Answer(event)));
    }

    pub(crate) fn hear(&mut self, now: Time, from: Index, peer: PeerId, message: Message) {
        match message {
            Message::Request { request, image, pieces, priority, source, deadline, lacks } => {
                let first = Item { blob: key(image), piece: pieces.first().copied().unwrap_or_default() };
                let bytes = pieces.iter().map(|&piece| self.serving.bytes(piece)).sum();
                let ask = Ask { peer, first, bytes, priority, lacks, home: source };
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
        let (request, Ask { peer, priority, first, .. }) = (ticket.1, ask);
        let (blob, image) = (first.blob, of_key(first.blob));
        if let Admission::Busy { retry_after, alternates } = self.tracker.admit(now, ask) {
            return self.answer(ticket, Event::Busy { request, retry_after, alternates });
        }
        let (here, missing): (Vec<u32>, Vec<u32>) = pieces.iter().partition(|&&piece| self.has(image, piece));
        self.serving.begin(ticket, peer, image, pieces, priority);
        here.into_iter().for_each(|piece| self.serving.ready(ticket, piece));
        match source {
            Some(deadline) if !missing.is_empty() => {
                self.source(now, ticket, blob, &missing, priority, deadline);
                self.drain(now);
            }
            _ => {
                for piece in missing {
                    self.answer(ticket, Event::NotHave { request, item: Item { blob, piece } });
                }
                self.serving.end_if_done(now, ticket, &mut self.tracker);
                self.start_sending();
            }
        }
    }

    /// As the home: gets what is missing.
    fn source(
        &mut self,
        now: Time,
        ticket: Ticket,
        blob: BlobKey,
        missing: &[u32],
        priority: Priority,
        deadline: Time,
    ) {
        let request = ticket.1;
        if missing.iter().any(|&piece| self.scheduler.home_rank(blob, piece).is_none()) {
            let members = self.scheduler.zone_members();
            self.stop_serving(ticket);
            return self.answer(ticket, Event::NotMyHome { request, members });
        }
        for &piece in missing {
            let want = self.name_want(of_key(blob), DUTY);
            self.duties.insert(want, (ticket, piece));
            self.serving.owe(ticket);
            let item = Item { blob, piece };
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
        self.serving.end_if_done(now, ticket, &mut self.tracker);
        self.start_sending();
    }

    fn stop_serving(&mut self, ticket: Ticket) {
        let flow = self.serving.stop(ticket, &mut self.tracker);
        self.outbox.extend(flow.map(Errand::Stop));
    }
}
