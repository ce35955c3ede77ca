//! The world: event queue, clock, random numbers. The only loop.

use std::{
    cmp::{Ordering, Reverse},
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::Duration,
};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use shoal_proto::{Bitfield, PeerId};
use shoal_scheduler::{BlobKey, Event, Item, RequestId, Time};

use crate::{
    link::Link,
    node::{Errand, Index, Message, Node, Parcel, REMIND, Ticket},
    report::{Registry, Report, Spread},
    scenario::{Role, Scenario},
};

/// News of pieces go out this often at most.
const FLUSH: Duration = Duration::from_millis(100);
/// Life of a lease, and how often it is renewed.
const LEASE: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(5));
/// How long a connection takes to notice that the other side is dead.
const NOTICE: Duration = Duration::from_secs(2);
/// A world that stands still for so long will not move again.
const STANDSTILL: Duration = Duration::from_secs(600);
pub(crate) const BLOB: BlobKey = BlobKey { id: [0x5a; 32], variant: 0 };

pub(crate) enum Happening {
    Start(Index),
    Timeout(Index),
    Message { from: Index, to: Index, message: Message },
    Connected(Index, Index),
    Noticed { at: Index, gone: Index },
    UplinkFree(Index),
    RegistryFree,
    RegistryRead { to: Index, request: RequestId, pieces: Vec<u32>, bytes: u64, priority: shoal_proto::Priority },
    Arrival { to: Index, request: RequestId, item: Item, bytes: u64 },
    Flush(Index),
    Remind(Index, Ticket),
    Leases,
    Fault(usize),
}

struct Entry {
    at: Time,
    turn: u64,
    what: Happening,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.turn) == (other.at, other.turn)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at, self.turn).cmp(&(other.at, other.turn))
    }
}

/// A piece on its way from the registry.
struct RegistryParcel {
    to: Index,
    request: RequestId,
    item: Item,
    bytes: u64,
}

pub(crate) struct World<'a> {
    pub(crate) scenario: &'a Scenario,
    now: Time,
    turn: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) index: BTreeMap<PeerId, Index>,
    linked: BTreeSet<(Index, Index)>,
    registry: Link<RegistryParcel>,
    registry_requests: u64,
    registry_bytes: BTreeMap<String, u64>,
    pub(crate) pieces: Vec<u64>,
    pub(crate) rng: ChaCha8Rng,
    last_arrival: Time,
}

/// Runs a scenario to its end.
pub fn run(scenario: &Scenario, seed: u64) -> Report {
    let mut world = World::new(scenario, seed);
    world.set_up();
    while let Some(Reverse(entry)) = world.queue.pop() {
        world.now = entry.at;
        if world.now.since(world.last_arrival) > STANDSTILL {
            break;
        }
        world.happen(entry.what);
        if world.is_over() {
            break;
        }
    }
    world.report(seed)
}

impl<'a> World<'a> {
    fn new(scenario: &'a Scenario, seed: u64) -> Self {
        let (total, piece) = (scenario.encoded_bytes().max(1), scenario.image.piece_kib << 10);
        let pieces = (0..total.div_ceil(piece)).map(|at| piece.min(total - at * piece)).collect();
        let mut bytes = [0; 32];
        bytes[..8].copy_from_slice(&seed.to_le_bytes());
        Self {
            scenario,
            now: Time::ZERO,
            turn: 0,
            queue: BinaryHeap::new(),
            nodes: Vec::new(),
            index: BTreeMap::new(),
            linked: BTreeSet::new(),
            registry: Link::new(scenario.registry.egress_mbit),
            registry_requests: 0,
            registry_bytes: BTreeMap::new(),
            pieces,
            rng: ChaCha8Rng::from_seed(bytes),
            last_arrival: Time::ZERO,
        }
    }

    pub(crate) fn readers(&self) -> impl Iterator<Item = Index> + '_ {
        self.nodes.iter().enumerate().filter(|(_, node)| node.role == Role::Node).map(|(at, _)| at)
    }

    fn latency(&self, from: Index, to: Index) -> Duration {
        let (from, to) = (&self.nodes[from].zone, &self.nodes[to].zone);
        Duration::from_secs_f64(self.scenario.latency_ms(from, to) / 1e3)
    }

    pub(crate) fn after(&mut self, delay: Duration, what: Happening) {
        self.turn += 1;
        self.queue.push(Reverse(Entry { at: self.now + delay, turn: self.turn, what }));
    }

    fn is_over(&self) -> bool {
        self.readers().map(|at| &self.nodes[at]).all(|node| !node.alive || node.is_complete())
    }

    pub(crate) fn happen(&mut self, what: Happening) {
        match what {
            Happening::Start(at) => self.tell(at, |node, now, window| node.start(now, window)),
            Happening::Timeout(at) => {
                if self.nodes[at].wake == Some(self.now) {
                    self.nodes[at].wake = None;
                    self.tell(at, |node, now, _| node.timeout(now));
                }
            }
            Happening::Message { from, to, message } => {
                let peer = self.nodes[from].id;
                let connected = self.linked.contains(&pair(from, to));
                if connected {
                    self.tell(to, |node, now, _| node.hear(now, from, peer, message));
                }
            }
            Happening::Connected(a, b) => self.connected(a, b),
            Happening::Noticed { at, gone } => self.noticed(at, gone),
            Happening::UplinkFree(at) => self.uplink_free(at),
            Happening::RegistryFree => self.registry_free(),
            Happening::RegistryRead { to, request, pieces, bytes, priority } => {
                self.registry_read(to, request, &pieces, bytes, priority);
            }
            Happening::Arrival { to, request, item, bytes } => {
                self.last_arrival = self.now;
                self.tell(to, |node, now, _| node.receive(now, request, item, bytes));
            }
            Happening::Flush(at) => self.flush(at),
            Happening::Remind(at, ticket) => self.tell(at, |node, _, _| node.remind(ticket)),
            Happening::Leases => self.leases(),
            Happening::Fault(at) => self.fault(at),
        }
    }

    /// Lets a node act and does what it then asks for.
    fn tell(&mut self, at: Index, act: impl FnOnce(&mut Node, Time, usize)) {
        let (now, window) = (self.now, self.scenario.workload.on_demand);
        let node = &mut self.nodes[at];
        if !node.alive {
            return;
        }
        let quiet = node.news.is_empty();
        act(node, now, window);
        if quiet && !node.news.is_empty() {
            self.after(FLUSH, Happening::Flush(at));
        }
        for errand in std::mem::take(&mut self.nodes[at].outbox) {
            self.run_errand(at, errand);
        }
        let next = self.nodes[at].scheduler.poll_timeout().map(|next| next.max(now));
        if let Some(next) = next.filter(|&next| self.nodes[at].wake.is_none_or(|wake| next < wake)) {
            self.nodes[at].wake = Some(next);
            self.after(next.since(now), Happening::Timeout(at));
        }
    }

    fn run_errand(&mut self, at: Index, errand: Errand) {
        match errand {
            Errand::Send(to, message) => {
                self.after(self.latency(at, to), Happening::Message { from: at, to, message })
            }
            Errand::Connect(peer) => {
                if let Some(&other) = self.index.get(&peer) {
                    self.connect(at, other);
                }
            }
            Errand::Disconnect(peer) => {
                if let Some(&other) = self.index.get(&peer) {
                    self.after(Duration::ZERO, Happening::Noticed { at, gone: other });
                    self.after(self.latency(at, other), Happening::Noticed { at: other, gone: at });
                }
            }
            Errand::Registry { request, pieces, bytes, priority } => {
                let delay = Duration::from_secs_f64(self.scenario.registry.latency_ms / 1e3);
                self.after(delay, Happening::RegistryRead { to: at, request, pieces, bytes, priority });
            }
            Errand::CancelRegistry { request } => {
                self.registry.cancel((at, request));
            }
            Errand::Uplink => self.start_uplink(at),
            Errand::Remind(ticket) => self.after(REMIND, Happening::Remind(at, ticket)),
        }
    }

    pub(crate) fn connect(&mut self, a: Index, b: Index) {
        if !self.linked.contains(&pair(a, b)) {
            self.after(self.latency(a, b) * 2, Happening::Connected(a, b));
        }
    }

    fn connected(&mut self, a: Index, b: Index) {
        if !self.nodes[a].alive || !self.nodes[b].alive || !self.linked.insert(pair(a, b)) {
            return;
        }
        for (at, other) in [(a, b), (b, a)] {
            let peer = &self.nodes[other];
            let (id, zone, have) = (peer.id, peer.zone.clone(), peer.have());
            let role = match peer.role {
                Role::Node => shoal_proto::Role::Node,
                Role::Seed => shoal_proto::Role::Seed,
            };
            self.tell(at, |node, now, _| {
                node.neighbours.insert(id, other);
                node.handle(now, Event::PeerUp { peer: id, role, zone, labels: BTreeMap::new() });
                node.handle(now, Event::PeerHave { peer: id, blob: BLOB, first: 0, have, full: true });
            });
        }
    }

    fn noticed(&mut self, at: Index, gone: Index) {
        self.linked.remove(&pair(at, gone));
        let peer = self.nodes[gone].id;
        self.tell(at, |node, now, _| node.handle(now, Event::PeerDown { peer }));
    }

    fn start_uplink(&mut self, at: Index) {
        if let Some(time) = self.nodes[at].uplink.start() {
            self.after(time, Happening::UplinkFree(at));
        }
    }

    fn uplink_free(&mut self, at: Index) {
        if !self.nodes[at].alive {
            return;
        }
        if let Some(parcel) = self.nodes[at].uplink.sent() {
            let Parcel { ticket: (to, request), item, bytes } = parcel;
            let peer = self.nodes[to].id;
            self.nodes[at].sent(self.now, &parcel, peer);
            self.carry(to, request, item, bytes, self.latency(at, to));
        }
        self.start_uplink(at);
    }

    /// The last byte is on the way; the downlink may still have to take in what came before.
    fn carry(&mut self, to: Index, request: RequestId, item: Item, bytes: u64, latency: Duration) {
        let node = &mut self.nodes[to];
        let taken = Duration::from_secs_f64(bytes as f64 / node.down_bytes_per_s);
        node.down_free = (node.down_free + taken).max(self.now + latency);
        let delay = node.down_free.since(self.now);
        self.after(delay, Happening::Arrival { to, request, item, bytes });
    }

    fn registry_read(
        &mut self,
        to: Index,
        request: RequestId,
        pieces: &[u32],
        bytes: u64,
        priority: shoal_proto::Priority,
    ) {
        self.registry_requests += 1;
        let thrown_away = bytes - pieces.iter().map(|&piece| self.pieces[piece as usize]).sum::<u64>();
        *self.registry_bytes.entry(self.nodes[to].zone.clone()).or_default() += thrown_away;
        for &piece in pieces {
            let bytes = self.pieces[piece as usize];
            let item = Item { blob: BLOB, piece };
            self.registry.push(priority, (to, request), bytes, RegistryParcel { to, request, item, bytes });
        }
        self.start_registry();
    }

    fn start_registry(&mut self) {
        if let Some(time) = self.registry.start() {
            self.after(time, Happening::RegistryFree);
        }
    }

    fn registry_free(&mut self) {
        if let Some(RegistryParcel { to, request, item, bytes }) = self.registry.sent() {
            *self.registry_bytes.entry(self.nodes[to].zone.clone()).or_default() += bytes;
            self.carry(to, request, item, bytes, Duration::from_millis(1));
        }
        self.start_registry();
    }

    fn flush(&mut self, at: Index) {
        if !self.nodes[at].alive {
            return;
        }
        let empty = Bitfield::new(self.pieces.len() as u32);
        let news = std::mem::replace(&mut self.nodes[at].news, empty);
        for to in self.nodes[at].neighbours.values().copied().collect::<Vec<_>>() {
            let message = Message::Have(news.clone());
            self.after(self.latency(at, to), Happening::Message { from: at, to, message });
        }
    }

    fn leases(&mut self) {
        let seeds = self.nodes.iter().filter(|node| node.alive && node.role == Role::Seed);
        let seeds: Vec<_> = seeds.map(|node| (node.id, node.zone.clone())).collect();
        let until = self.now + LEASE.0;
        for at in 0..self.nodes.len() {
            for (peer, zone) in seeds.clone() {
                self.tell(at, |node, now, _| node.handle(now, Event::Lease { peer, zone, capacity: 1, until }));
            }
        }
        self.after(LEASE.1, Happening::Leases);
    }

    fn fault(&mut self, at: usize) {
        let fault = &self.scenario.faults[at];
        let mut chosen: Vec<Index> = Vec::new();
        for zone in self.scenario.zones.iter().map(|zone| zone.name.clone()) {
            let fits = |node: &Node| node.alive && node.zone == zone && fault.fits(&zone, node.role);
            let mut fitting: Vec<Index> = (0..self.nodes.len()).filter(|&at| fits(&self.nodes[at])).collect();
            let count = fault.concerned(fitting.len());
            self.shuffle(&mut fitting);
            chosen.extend(fitting.into_iter().take(count));
        }
        for gone in chosen {
            self.nodes[gone].alive = false;
            let others: Vec<Index> = self.nodes[gone].neighbours.values().copied().collect();
            for other in others {
                self.after(NOTICE, Happening::Noticed { at: other, gone });
            }
        }
    }

    fn report(&self, seed: u64) -> Report {
        let readers: Vec<&Node> = self.readers().map(|at| &self.nodes[at]).filter(|node| node.alive).collect();
        let spread = |end: fn(&Node) -> Option<Time>| {
            let taken = |node: &&Node| Some(end(node)?.since(node.started?).as_secs_f64());
            Spread::of(readers.iter().filter_map(taken).collect())
        };
        let mut received_bytes = BTreeMap::new();
        for (source, bytes) in readers.iter().flat_map(|node| &node.received) {
            *received_bytes.entry(*source).or_default() += bytes;
        }
        let complete = readers.iter().filter(|node| node.is_complete()).count();
        let encoded = self.scenario.encoded_bytes() as f64;
        let copies = self.registry_bytes.iter().map(|(zone, &bytes)| (zone.clone(), bytes as f64 / encoded));
        Report {
            scenario: self.scenario.name.clone(),
            seed,
            nodes: readers.len(),
            complete,
            failed_reads: readers.iter().map(|node| node.failed_reads).sum(),
            first_s: spread(|node| node.first),
            all_s: spread(|node| node.last),
            bound_s: self.scenario.bound_s(self.scenario.encoded_bytes(), 1.0),
            registry: Registry {
                requests: self.registry_requests,
                bytes: self.registry_bytes.values().sum(),
                copies_per_zone: copies.collect(),
            },
            received_bytes,
            decoded_bytes: (complete as f64 * encoded * self.scenario.image.decoded_ratio) as u64,
            events: self.turn,
        }
    }
}

fn pair(a: Index, b: Index) -> (Index, Index) {
    (a.min(b), a.max(b))
}
