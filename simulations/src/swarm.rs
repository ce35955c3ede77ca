//! The swarm: nodes around their schedulers, the messages between them, and the transfers on the links. One loop takes
//! whatever is next, from the agenda or from the links.

mod connections;
mod faults;
mod news;
mod setup;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rand_chacha::ChaCha8Rng;
use shoal_proto::{Bitfield, PeerId};
use shoal_scheduler::{Event, RequestId, Time};

use crate::{
    clock::Agenda,
    flows::{FlowId, Flows, LinkId},
    images::Image,
    node::{Errand, Message, Node, REMIND},
    report::{Outcome, Reader},
    run::Progress,
    scenario::{Role, Scenario, millis},
    serving::{Sending, Ticket},
    tally::Tally,
    topology::{Index, Topology},
};

/// A swarm in which nothing arrives for so long will not move again.
const STANDSTILL: Duration = Duration::from_secs(900);
/// How often somebody watching is told.
const PROGRESS_EVERY: u64 = 1 << 16;

#[derive(Debug)]
enum Happening {
    Start(Index, Image),
    Mounted(Index, Image),
    Timeout(Index),
    Message {
        from: Index,
        to: Index,
        message: Message,
    },
    Connected(Index, Index),
    Noticed {
        at: Index,
        gone: Index,
    },
    /// The neighbours of a node in one zone hear what is new there.
    Have {
        from: Index,
        image: Image,
        zone: u16,
        news: Arc<Bitfield>,
    },
    /// What neighbours told a node has waited for long enough.
    TakeIn(Index),
    Tick(Index, Image),
    RegistryRead {
        to: Index,
        request: RequestId,
    },
    Arrival {
        to: Index,
        request: RequestId,
        image: Image,
        piece: u32,
        good: bool,
    },
    Remind(Index, Ticket),
    Leases,
    Fault(usize),
    Heal(usize),
    Silence(usize),
}

/// What is on the links.
#[derive(Debug, Clone, Copy)]
struct Parcel {
    /// Nobody is the registry.
    from: Option<Index>,
    to: Index,
    request: RequestId,
    image: Image,
    piece: u32,
    since: Time,
}

/// A read of the registry under way.
#[derive(Debug)]
struct Read {
    image: Image,
    pieces: VecDeque<u32>,
    flow: Option<FlowId>,
}

/// What the swarm keeps of each node beside the node itself.
#[derive(Debug, Default)]
struct Standing {
    /// Nodes that it is connected to.
    neighbours: BTreeSet<Index>,
    /// When in the interval it tells what is new.
    phase: Duration,
    /// Which cuts keep it from whom.
    cut: Vec<usize>,
}

pub(crate) struct Swarm<'a> {
    scenario: &'a Scenario,
    now: Time,
    agenda: Agenda<Happening>,
    flows: Flows<Parcel>,
    topology: Topology,
    nodes: Vec<Node>,
    standing: Vec<Standing>,
    connecting: BTreeSet<(Index, Index)>,
    reads: BTreeMap<(Index, RequestId), Read>,
    /// Of every image.
    piece_bytes: Arc<[u64]>,
    /// Who has to do with each image, in the order of their places.
    circles: Vec<Vec<Index>>,
    tally: Tally,
    rng: ChaCha8Rng,
    cuts: Vec<faults::Cut>,
    /// Rates of the links that a fault has changed, as they were.
    full_rates: BTreeMap<LinkId, f64>,
    /// When something arrived last; at first, when the last reader starts.
    last_arrival: Time,
    /// Starts on living nodes that are not complete.
    unfinished: usize,
    events: u64,
}

/// Runs a scenario to its end.
pub(crate) fn run(scenario: &Scenario, seed: u64, progress: &dyn Progress) -> Outcome {
    let mut swarm = Swarm::new(scenario, seed);
    swarm.set_up();
    while swarm.unfinished > 0 && swarm.now.since(swarm.last_arrival) < STANDSTILL && swarm.step() {
        if swarm.events.is_multiple_of(PROGRESS_EVERY) {
            progress.report(swarm.now, swarm.tally.received.iter().sum());
        }
    }
    swarm.outcome()
}

impl Swarm<'_> {
    /// Lets the next thing happen; says whether there was one.
    fn step(&mut self) -> bool {
        let transfer = self.flows.next(self.now).filter(|&at| at < Time::MAX);
        let Some(at) = self.agenda.next().into_iter().chain(transfer).min() else { return false };
        self.now = at;
        self.events += 1;
        if transfer == Some(at) {
            if let Some(parcel) = self.flows.finish(at) {
                self.carried(parcel);
            }
        } else if let Some(what) = self.agenda.pop() {
            self.happen(what);
        }
        true
    }

    fn after(&mut self, delay: Duration, what: Happening) {
        self.agenda.push(self.now + delay, what);
    }

    fn happen(&mut self, what: Happening) {
        match what {
            Happening::Start(at, image) => self.start(at, image),
            Happening::Mounted(at, image) => {
                self.tell(at, |node, now| node.read(now, image));
                self.note_wants(at);
            }
            Happening::Timeout(at) => {
                if self.nodes[at as usize].wake == Some(self.now) {
                    self.node(at).wake = None;
                    let arriving = self.arriving(at);
                    self.tell(at, |node, now| node.timeout(now, &arriving));
                }
            }
            Happening::Message { from, to, message } => {
                if self.standing[to as usize].neighbours.contains(&from) {
                    let peer = self.topology.place(from).id;
                    self.tell(to, |node, now| node.hear(now, from, peer, message));
                }
            }
            Happening::Connected(a, b) => self.connected(a, b),
            Happening::Noticed { at, gone } => self.noticed(at, gone),
            Happening::Have { from, image, zone, news } => self.have(from, image, zone, &news),
            Happening::TakeIn(at) => self.tell(at, Node::take_in),
            Happening::Tick(at, image) => self.tick(at, image),
            Happening::RegistryRead { to, request } => self.read_on(to, request),
            Happening::Arrival { to, request, image, piece, good } => self.arrive(to, request, image, piece, good),
            Happening::Remind(at, ticket) => self.tell(at, |node, _| node.remind(ticket)),
            Happening::Leases => self.leases(),
            Happening::Fault(at) => self.fault(at),
            Happening::Heal(at) => self.heal(at),
            Happening::Silence(at) => self.silence(at),
        }
    }

    /// The requests of a node that may look silent although something is coming in.
    fn arriving(&self, at: Index) -> Vec<RequestId> {
        let moves = |flow: Option<FlowId>| flow.is_some_and(|flow| self.flows.is_moving(flow));
        let comes = |&(request, peer): &(RequestId, Option<PeerId>)| match peer {
            Some(peer) => {
                let sender = self.topology.find(peer);
                sender.is_some_and(|from| moves(self.nodes[from as usize].serving.flow((at, request))))
            }
            None => moves(self.reads.get(&(at, request)).and_then(|read| read.flow)),
        };
        let waiting = self.nodes[at as usize].requests.waiting(self.now).filter(comes);
        let mut arriving: Vec<_> = waiting.map(|(request, _)| request).collect();
        arriving.sort_unstable();
        arriving
    }

    fn node(&mut self, at: Index) -> &mut Node {
        &mut self.nodes[at as usize]
    }

    /// Lets a node act and does what it then asks for.
    fn tell(&mut self, at: Index, act: impl FnOnce(&mut Node, Time)) {
        let now = self.now;
        let node = &mut self.nodes[at as usize];
        if !node.alive {
            return;
        }
        act(node, now);
        let mut errands = std::mem::take(&mut node.outbox);
        if std::mem::take(&mut node.stirred) {
            let next = node.scheduler.poll_timeout().map(|next| next.max(now));
            if let Some(next) = next.filter(|&next| node.wake.is_none_or(|wake| next < wake)) {
                node.wake = Some(next);
                self.agenda.push(next, Happening::Timeout(at));
            }
            while let Some(image) = self.node(at).fresh.pop() {
                self.expect_tick(at, image);
            }
        }
        errands.drain(..).for_each(|errand| self.run_errand(at, errand));
        // The allocation is worth keeping, unless the errands had the node act again.
        let outbox = &mut self.node(at).outbox;
        if outbox.is_empty() {
            *outbox = errands;
        }
    }

    fn run_errand(&mut self, at: Index, errand: Errand) {
        match errand {
            Errand::Send(peer, message) => {
                if let Some(to) = self.topology.find(peer) {
                    self.tally.requests += u64::from(matches!(message, Message::Request { .. }));
                    self.send(at, to, message);
                }
            }
            Errand::Reply(to, message) => {
                self.tally.refused += u64::from(matches!(message, Message::Answer(Event::Busy { .. })));
                self.send(at, to, message);
            }
            Errand::Connect(peer) => {
                if let Some(other) = self.topology.find(peer) {
                    self.connect(at, other);
                }
            }
            Errand::Disconnect(peer) => {
                if let Some(other) = self.topology.find(peer) {
                    self.after(Duration::ZERO, Happening::Noticed { at, gone: other });
                    self.after(self.topology.latency(at, other), Happening::Noticed { at: other, gone: at });
                }
            }
            Errand::Registry { request, image, pieces } => {
                self.tally.registry_requests += 1;
                self.reads.insert((at, request), Read { image, pieces: pieces.into(), flow: None });
                self.after(self.topology.registry_latency(), Happening::RegistryRead { to: at, request });
            }
            Errand::CancelRegistry { request } => {
                if let Some(flow) = self.reads.remove(&(at, request)).and_then(|read| read.flow) {
                    self.stop(flow);
                }
            }
            Errand::Transfer(sending) => self.transfer(at, sending),
            Errand::Stop(flow) => self.stop(flow),
            Errand::Remind(ticket) => self.after(REMIND, Happening::Remind(at, ticket)),
        }
    }

    /// A message arrives a latency later, or once both ends can hear each other again.
    fn send(&mut self, from: Index, to: Index, message: Message) {
        let mut delay = self.topology.latency(from, to);
        if matches!(message, Message::Request { .. }) {
            delay += millis(self.scenario.costs.request_ms);
        }
        let cut = self.cut_until(from, to).map_or(Duration::ZERO, |until| until.since(self.now));
        self.after(delay + cut, Happening::Message { from, to, message });
    }

    fn transfer(&mut self, at: Index, sending: Sending) {
        let Sending { ticket: (to, request), image, piece, bytes } = sending;
        let parcel = Parcel { from: Some(at), to, request, image, piece, since: self.now };
        let flow = self.flows.start(self.now, self.topology.path(at, to), bytes, parcel);
        self.node(at).serving.carried_by((to, request), flow);
    }

    /// Breaks a transfer off. What came through is a waste.
    fn stop(&mut self, flow: FlowId) {
        if let Some((parcel, bytes)) = self.flows.cancel(self.now, flow) {
            self.tally.wasted += bytes;
            self.count(&parcel, bytes);
        }
    }

    fn count(&mut self, parcel: &Parcel, bytes: u64) {
        self.tally.add(&self.topology, (parcel.from, parcel.to), (parcel.since, self.now), bytes);
    }

    fn note_wants(&mut self, at: Index) {
        if self.topology.place(at).role == Role::Node {
            self.tally.wants(self.now, at, self.nodes[at as usize].wants());
        }
    }

    /// The last byte of a parcel is through.
    fn carried(&mut self, parcel: Parcel) {
        let Parcel { from, to, request, image, piece, .. } = parcel;
        let bytes = self.piece_bytes[piece as usize];
        self.count(&parcel, bytes);
        let latency = from.map_or(Duration::ZERO, |from| self.topology.latency(from, to));
        let good = from.is_none_or(|from| !self.nodes[from as usize].poisonous);
        // Pieces are decoded one after the other, with all cores.
        let here = self.now + latency;
        let node = self.node(to);
        let decoded = node.decoded.max(here);
        let decoded = decoded + self.scenario.costs.decoding(bytes);
        self.node(to).decoded = decoded;
        self.agenda.push(decoded, Happening::Arrival { to, request, image, piece, good });
        match from {
            Some(from) => self.tell(from, |node, now| node.sent(now, (to, request))),
            None => self.read_on(to, request),
        }
    }

    /// The next piece of a read of the registry goes on the links.
    fn read_on(&mut self, to: Index, request: RequestId) {
        let Some(read) = self.reads.get_mut(&(to, request)) else { return };
        let Some(piece) = read.pieces.pop_front() else {
            self.reads.remove(&(to, request));
            return;
        };
        let parcel = Parcel { from: None, to, request, image: read.image, piece, since: self.now };
        let (path, bytes) = (self.topology.path_from_registry(to), self.piece_bytes[piece as usize]);
        read.flow = Some(self.flows.start(self.now, path, bytes, parcel));
    }

    fn arrive(&mut self, to: Index, request: RequestId, image: Image, piece: u32, good: bool) {
        self.last_arrival = self.last_arrival.max(self.now);
        let node = self.node(to);
        if !node.alive {
            return;
        }
        if !good || node.has(image, piece) {
            self.tally.wasted += self.piece_bytes[piece as usize];
        }
        let was_read = self.is_read(to, image);
        if good {
            self.tell(to, |node, now| node.receive(now, request, image, piece));
        } else {
            self.tell(to, |node, now| node.reject(now, request, piece));
        }
        self.note_wants(to);
        if was_read && !self.is_read(to, image) {
            self.unfinished -= 1;
        }
    }

    /// Whether a node has started an image and lacks something of it.
    fn is_read(&self, at: Index, image: Image) -> bool {
        let mount = self.nodes[at as usize].mount(image);
        mount.is_some_and(|mount| mount.started.is_some() && mount.last.is_none())
    }

    /// A node mounts an image: it looks for neighbours and tells those that it has.
    fn start(&mut self, at: Index, image: Image) {
        if !self.nodes[at as usize].alive {
            return;
        }
        self.tell(at, |node, now| node.start(now, image));
        self.after(millis(self.scenario.costs.mount_ms), Happening::Mounted(at, image));
        if !self.is_read(at, image) {
            self.unfinished -= 1;
        }
        for other in self.standing[at as usize].neighbours.clone() {
            self.show_interest(at, other, image);
        }
        for other in self.neighbours_for(at, image) {
            self.connect(at, other);
        }
    }

    fn outcome(mut self) -> Outcome {
        self.tally.hedged = self.nodes.iter().map(|node| node.requests.hedges()).sum();
        let readers = self.topology.of_role(Role::Node).flat_map(|at| {
            let (node, zone) = (&self.nodes[at as usize], self.topology.place(at).zone);
            node.mounts.iter().map(move |mount| {
                let since = |end: Option<Time>| Some(end?.since(mount.started?).as_secs_f64());
                Reader {
                    node: at,
                    image: mount.image,
                    zone,
                    alive: node.alive,
                    started_s: mount.started.map(Time::as_secs_f64),
                    first_s: since(mount.first),
                    start_s: since(mount.ready),
                    complete_s: since(mount.last),
                    failed_reads: mount.failed_reads,
                }
            })
        });
        let readers = readers.collect();
        Outcome::new(&self.topology, readers, self.tally, self.now, self.events)
    }
}
