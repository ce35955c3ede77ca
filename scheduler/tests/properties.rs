//! Random sequences of events against the promises of the crate's documentation, checked from outside at every
//! action.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use proptest::{collection::vec, prelude::*, sample::Index};
use shoal_proto::{Bitfield, PeerId, Priority, Role};
use shoal_scheduler::{
    Action, BlobKey, Config, Event, Failure, Item, Limits, Origin, Rates, RequestId, Scheduler, Time, WantId,
};

const PIECES: u32 = 24;
const PIECE: u64 = 1 << 20;
const PEERS: u8 = 6;
/// Limits of bytes per second: none, less than a piece, a few, many.
const RATES: [u64; 4] = [0, PIECE / 2, 4 * PIECE, 64 * PIECE];

#[derive(Debug, Clone)]
enum Op {
    Want { blob: u8, piece: u32, on_demand: bool, for_peer: bool, seconds: u64 },
    Unwant(Index),
    Up(u8),
    Down(u8),
    Have { peer: u8, blob: u8, first: u32, len: u32, full: bool },
    Lease { peer: u8, seconds: u64 },
    LeaseEnded(u8),
    Answer { which: Index, how: Answer },
    Stray { request: u64, how: Answer },
    Lost { blob: u8, piece: u32 },
    Limits { download: usize, per_peer: usize, registry: usize, reads: u64 },
    Evicted(u8),
    Advance(u64),
}

#[derive(Debug, Clone)]
enum Answer {
    Deliver,
    Progress,
    NotHave,
    Pending(u64),
    Busy(u64, u8),
    NotMyHome(u8),
    CannotSource,
    Transport,
    WrongBytes,
    Registry { permanent: bool, seconds: Option<u64> },
    Store,
    Finished,
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        8 => Just(Answer::Deliver),
        1 => Just(Answer::Progress),
        2 => Just(Answer::NotHave),
        3 => (0..3000u64).prop_map(Answer::Pending),
        2 => (0..2000u64, 0..PEERS).prop_map(|(after, peer)| Answer::Busy(after, peer)),
        1 => (0..PEERS).prop_map(Answer::NotMyHome),
        1 => Just(Answer::CannotSource),
        2 => Just(Answer::Transport),
        1 => Just(Answer::WrongBytes),
        2 => (prop::bool::weighted(0.2), prop::option::of(0..5u64))
            .prop_map(|(permanent, seconds)| Answer::Registry { permanent, seconds }),
        1 => Just(Answer::Store),
        1 => Just(Answer::Finished),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let want = (0..3u8, 0..PIECES + 1, any::<bool>(), prop::bool::weighted(0.2), 0..20u64).prop_map(
        |(blob, piece, on_demand, for_peer, seconds)| Op::Want { blob, piece, on_demand, for_peer, seconds },
    );
    let have = (0..PEERS, 0..3u8, 0..PIECES, 0..PIECES, any::<bool>())
        .prop_map(|(peer, blob, first, len, full)| Op::Have { peer, blob, first, len, full });
    prop_oneof![
        6 => want,
        1 => any::<Index>().prop_map(Op::Unwant),
        3 => (0..PEERS).prop_map(Op::Up),
        1 => (0..PEERS).prop_map(Op::Down),
        4 => have,
        2 => (0..=PEERS, 0..10u64).prop_map(|(peer, seconds)| Op::Lease { peer, seconds }),
        1 => (0..=PEERS).prop_map(Op::LeaseEnded),
        10 => (any::<Index>(), answer()).prop_map(|(which, how)| Op::Answer { which, how }),
        1 => (any::<u64>(), answer()).prop_map(|(request, how)| Op::Stray { request, how }),
        1 => (0..3u8, 0..PIECES).prop_map(|(blob, piece)| Op::Lost { blob, piece }),
        1 => (0..RATES.len(), 0..RATES.len(), 0..RATES.len(), 0..3u64)
            .prop_map(|(download, per_peer, registry, reads)| Op::Limits { download, per_peer, registry, reads }),
        1 => (0..3u8).prop_map(Op::Evicted),
        4 => (0..1500u64).prop_map(Op::Advance),
    ]
}

struct Live {
    /// Nobody is the registry.
    peer: Option<PeerId>,
    source: bool,
    blob: BlobKey,
    pieces: BTreeSet<u32>,
    pending_until: Time,
}

/// What was asked for under a limit, less what was refused.
struct Meter {
    rate: u64,
    since: Time,
    sum: i128,
    most: u64,
}

impl Meter {
    fn new(now: Time, rate: u64) -> Self {
        Self { rate, since: now, sum: 0, most: 0 }
    }

    /// Never more than the rate, a second's worth, and one request.
    fn ask(&mut self, now: Time, amount: u64) {
        self.sum += i128::from(amount);
        self.most = self.most.max(amount);
        let nanos = i128::from(now.since(self.since).as_nanos() as u64) + 1_000_000_000;
        let allowed = i128::from(self.rate) * nanos / 1_000_000_000 + i128::from(self.most);
        assert!(self.rate == 0 || self.sum <= allowed, "asks for {} where {allowed} are allowed", self.sum);
    }

    fn refused(&mut self, amount: u64) {
        self.sum -= i128::from(amount);
    }
}

/// Plays the shell and keeps its own books.
struct Shell {
    scheduler: Scheduler,
    config: Config,
    now: Time,
    log: Vec<String>,
    next_want: u64,
    wants: BTreeMap<WantId, (Item, Time)>,
    /// Items whose flight serves a peer.
    duty: BTreeSet<Item>,
    live: BTreeMap<RequestId, Live>,
    up: BTreeSet<PeerId>,
    banned: BTreeMap<PeerId, Time>,
    denied: BTreeSet<(PeerId, Item)>,
    download: Meter,
    /// From each peer.
    downloads: BTreeMap<PeerId, Meter>,
    registry: Meter,
    reads: Meter,
}

fn peer(n: u8) -> PeerId {
    PeerId::new([n + 1; 32])
}

fn blob(n: u8) -> BlobKey {
    BlobKey { id: [n; 32], variant: 0 }
}

impl Shell {
    fn new(seed: u8) -> Self {
        // Small windows, so that they fill; peer PEERS is this node.
        let config = Config {
            peer_window: 4,
            peer_reserve: 1,
            peer_run: 3,
            limits: Limits { registry_slots: 3, registry_reserve: 1, ..Limits::default() },
            max_join: 3 * PIECE,
            read_ahead: 2 * PIECE,
            stripe: 8 * PIECE,
            ..Config::new(peer(PEERS), "a")
        };
        let mut shell = Self {
            scheduler: Scheduler::new(config.clone(), Time::ZERO, [seed; 32]),
            config,
            now: Time::ZERO,
            log: Vec::new(),
            next_want: 0,
            wants: BTreeMap::new(),
            duty: BTreeSet::new(),
            live: BTreeMap::new(),
            up: BTreeSet::new(),
            banned: BTreeMap::new(),
            denied: BTreeSet::new(),
            download: Meter::new(Time::ZERO, 0),
            downloads: BTreeMap::new(),
            registry: Meter::new(Time::ZERO, 0),
            reads: Meter::new(Time::ZERO, 0),
        };
        for n in 0..2 {
            // Piece 5 is named by no image.
            let extents = (0..u64::from(PIECES)).map(|at| if at == 5 { 0..0 } else { at * PIECE..(at + 1) * PIECE });
            let present = Bitfield::new(PIECES);
            shell.handle(Event::BlobAdded { blob: blob(n), extents: extents.collect(), present });
        }
        shell
    }

    fn handle(&mut self, event: Event) {
        self.scheduler.handle_event(self.now, event);
        self.drain();
    }

    fn advance(&mut self, to: Time) {
        while let Some(at) = self.scheduler.poll_timeout().filter(|&at| at <= to) {
            self.now = self.now.max(at);
            self.scheduler.handle_timeout(self.now);
            self.drain();
        }
        self.now = self.now.max(to);
    }

    fn drain(&mut self) {
        for _ in 0..10_000 {
            let Some(action) = self.scheduler.poll_action(self.now) else { return self.check() };
            self.log.push(format!("{:?} {action:?}", self.now));
            self.carry_out(action);
        }
        panic!("no end of actions: {:#?}", &self.log[self.log.len() - 20..]);
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::Request { request, peer, blob, pieces, source, .. } => {
                assert!(self.up.contains(&peer), "asks {peer:?}, which is not connected");
                assert!(self.banned.get(&peer).is_none_or(|&until| until <= self.now), "asks a banned peer");
                assert!(pieces.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{pieces:?} is no run");
                let bytes = pieces.len() as u64 * PIECE;
                self.download.ask(self.now, bytes);
                let now = self.now;
                self.of_peer(peer).ask(now, bytes);
                for &piece in &pieces {
                    assert!(!self.denied.contains(&(peer, Item { blob, piece })), "asks again for what was denied");
                    let duty = self.duty.contains(&Item { blob, piece });
                    assert!(!(source && duty), "asks a home on behalf of a peer");
                }
                self.start(request, Some(peer), source, blob, pieces);
            }
            Action::BackToSource { request, blob, pieces, range, .. } => {
                assert!(range.end - range.start <= self.config.max_join);
                self.registry.ask(self.now, range.end - range.start);
                self.reads.ask(self.now, 1);
                for &piece in &pieces {
                    let item = Item { blob, piece };
                    let present = self.scheduler.present(blob).is_some_and(|present| present.contains(piece));
                    assert!(!present, "reads {item:?}, which is here");
                    for live in self.live.values().filter(|live| live.blob == blob && live.pieces.contains(&piece)) {
                        assert!(live.peer.is_some(), "reads {item:?} twice at a time");
                        let pending = live.source && live.pending_until > self.now;
                        assert!(!pending || self.duty.contains(&item), "reads {item:?} though the home is at it");
                    }
                }
                self.start(request, None, false, blob, pieces);
            }
            Action::Cancel { request } => _ = self.live.remove(&request),
            Action::Complete { want, item, outcome } => {
                let (wanted, deadline) = self.wants.remove(&want).expect("completes an open want, once");
                assert_eq!(wanted, item);
                assert!(self.now <= deadline, "late");
                let present = self.scheduler.present(item.blob).is_some_and(|present| present.contains(item.piece));
                assert_eq!(outcome.is_ok(), present, "{outcome:?}");
            }
            Action::Ban { peer, until, .. } => _ = self.banned.insert(peer, until),
            Action::Connect { peer } => assert!(!self.up.contains(&peer), "connects to a connected peer"),
        }
    }

    fn start(&mut self, id: RequestId, peer: Option<PeerId>, source: bool, blob: BlobKey, pieces: Vec<u32>) {
        assert!(!pieces.is_empty() && !pieces.contains(&5));
        let pieces = pieces.into_iter().collect();
        let live = Live { peer, source, blob, pieces, pending_until: Time::ZERO };
        assert!(self.live.insert(id, live).is_none(), "an id used again");
    }

    /// What holds whenever the scheduler rests.
    fn check(&mut self) {
        let at = |peer| self.live.values().filter(move |live| live.peer == peer);
        for &peer in &self.up {
            let pieces: usize = at(Some(peer)).map(|live| live.pieces.len()).sum();
            assert!(pieces <= self.config.peer_window as usize, "{pieces} pieces at one peer");
        }
        assert!(at(None).count() <= self.config.limits.registry_slots as usize);
        let mut flights: BTreeMap<Item, usize> = BTreeMap::new();
        for live in self.live.values() {
            for &piece in &live.pieces {
                *flights.entry(Item { blob: live.blob, piece }).or_default() += 1;
            }
        }
        assert!(flights.values().all(|&requests| requests <= 2), "more than a request and its hedge: {flights:?}");
        let stats = self.scheduler.stats();
        assert_eq!(stats.wants, self.wants.len());
        assert_eq!(stats.peer_requests + stats.registry_requests, self.live.len());
        let items: BTreeSet<Item> = self.wants.values().map(|&(item, _)| item).chain(flights.into_keys()).collect();
        assert_eq!(stats.flights, items.len(), "one flight for each item");
        self.duty.retain(|item| items.contains(item));
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Want { blob: b, piece, on_demand, for_peer, seconds } => {
                let item = Item { blob: blob(b), piece };
                let deadline = self.now + Duration::from_secs(seconds);
                let (want, origin) = (WantId(self.next_want), if for_peer { Origin::ForPeer } else { Origin::Local });
                self.next_want += 1;
                self.wants.insert(want, (item, deadline));
                if for_peer && seconds > 0 {
                    self.duty.insert(item);
                }
                let priority = if on_demand { Priority::OnDemand } else { Priority::Prefetch };
                self.handle(Event::Want { want, item, priority, deadline, origin });
            }
            Op::Unwant(which) => {
                if !self.wants.is_empty() {
                    let want = *self.wants.keys().nth(which.index(self.wants.len())).unwrap();
                    self.wants.remove(&want);
                    self.handle(Event::Unwant { want });
                }
            }
            Op::Up(n) if !self.up.contains(&peer(n)) => {
                self.up.insert(peer(n));
                self.denied.retain(|&(denier, _)| denier != peer(n));
                self.downloads.remove(&peer(n));
                let zone = if n % 3 == 2 { "b" } else { "a" }.into();
                self.handle(Event::PeerUp { peer: peer(n), role: Role::Node, zone, labels: BTreeMap::new() });
            }
            Op::Up(_) => {}
            Op::Down(n) => {
                self.up.remove(&peer(n));
                self.live.retain(|_, live| live.peer != Some(peer(n)));
                self.handle(Event::PeerDown { peer: peer(n) });
            }
            Op::Have { peer: n, blob: b, first, len, full } => {
                let have = Bitfield::full(len);
                let end = (first + len).min(PIECES);
                let banned = self.banned.get(&peer(n)).is_some_and(|&until| until > self.now);
                if !banned {
                    (first..end).for_each(|piece| _ = self.denied.remove(&(peer(n), Item { blob: blob(b), piece })));
                }
                self.handle(Event::PeerHave { peer: peer(n), blob: blob(b), first, have, full });
            }
            Op::Lease { peer: n, seconds } => {
                let until = self.now + Duration::from_secs(seconds);
                self.handle(Event::Lease { peer: peer(n), zone: "a".into(), capacity: 1 + u64::from(n), until });
            }
            Op::LeaseEnded(n) => self.handle(Event::LeaseEnded { peer: peer(n) }),
            Op::Answer { which, how } => {
                if !self.live.is_empty() {
                    let request = *self.live.keys().nth(which.index(self.live.len())).unwrap();
                    self.answer(request, how);
                }
            }
            Op::Stray { request, how } => {
                let request = RequestId(request | 1 << 63);
                let item = Item { blob: blob(2), piece: 0 };
                let before = self.log.len();
                self.handle(event(request, item, how));
                assert_eq!(self.log.len(), before, "answers to unknown requests are ignored");
            }
            Op::Lost { blob: b, piece } => self.handle(Event::Lost { item: Item { blob: blob(b), piece } }),
            Op::Limits { download, per_peer, registry, reads } => {
                self.limit(RATES[download], RATES[per_peer], RATES[registry], reads);
            }
            Op::Evicted(b) => self.handle(Event::Evicted { blob: blob(b) }),
            Op::Advance(millis) => self.advance(self.now + Duration::from_millis(millis)),
        }
    }

    /// A peer that comes again begins anew.
    fn of_peer(&mut self, peer: PeerId) -> &mut Meter {
        let (now, rate) = (self.now, self.config.limits.download_per_peer.all);
        self.downloads.entry(peer).or_insert_with(|| Meter::new(now, rate))
    }

    fn limit(&mut self, download: u64, per_peer: u64, registry: u64, reads: u64) {
        let rates = |all| Rates { all, prefetch: all / 2 };
        let limits = Limits {
            download: rates(download),
            download_per_peer: rates(per_peer),
            registry: rates(registry),
            registry_requests: rates(reads),
            ..self.config.limits
        };
        self.config.limits = limits;
        self.download = Meter::new(self.now, download);
        self.downloads.clear();
        self.registry = Meter::new(self.now, registry);
        self.reads = Meter::new(self.now, reads);
        self.handle(Event::Limits(limits));
    }

    fn answer(&mut self, request: RequestId, how: Answer) {
        let live = self.live.get_mut(&request).expect("it is live");
        let item = Item { blob: live.blob, piece: *live.pieces.first().expect("it owes something") };
        let refused = match &how {
            Answer::NotHave => 1,
            Answer::Busy(..) | Answer::NotMyHome(_) | Answer::CannotSource | Answer::Finished => live.pieces.len(),
            Answer::Registry { .. } if live.peer.is_none() => live.pieces.len(),
            _ => 0,
        };
        let (source, refused) = (live.peer, refused as u64 * PIECE);
        let meter = if source.is_none() { &mut self.registry } else { &mut self.download };
        meter.refused(refused);
        source.into_iter().for_each(|peer| self.of_peer(peer).refused(refused));
        let live = self.live.get_mut(&request).expect("it is live");
        match &how {
            Answer::Deliver | Answer::NotHave => {
                live.pieces.remove(&item.piece);
                if let (Answer::NotHave, Some(peer)) = (&how, live.peer) {
                    self.denied.insert((peer, item));
                }
                if live.pieces.is_empty() {
                    self.live.remove(&request);
                }
            }
            Answer::Pending(millis) => {
                live.pending_until = self.now + Duration::from_millis(*millis).min(self.config.max_eta);
            }
            Answer::Busy(..) if live.peer.is_none() => return,
            Answer::Progress => {}
            _ => _ = self.live.remove(&request),
        }
        if matches!(how, Answer::Deliver) {
            // A hedge that owes more need not bring this one any more; one that owes nothing else is cancelled.
            let hedges = self.live.values_mut().filter(|live| live.blob == item.blob && live.pieces.len() > 1);
            hedges.for_each(|live| _ = live.pieces.remove(&item.piece));
        }
        self.handle(event(request, item, how));
    }
}

fn event(request: RequestId, item: Item, how: Answer) -> Event {
    let failed = |reason| Event::Failed { request, reason };
    match how {
        Answer::Deliver => Event::Delivered { request, item, bytes: PIECE },
        Answer::Progress => Event::Progress { request },
        Answer::NotHave => Event::NotHave { request, item },
        Answer::Pending(millis) => Event::Pending { request, eta: Duration::from_millis(millis) },
        Answer::Busy(millis, n) => {
            Event::Busy { request, retry_after: Duration::from_millis(millis), alternates: vec![peer(n)] }
        }
        Answer::NotMyHome(n) => Event::NotMyHome { request, members: vec![peer(n)] },
        Answer::CannotSource => Event::CannotSource { request },
        Answer::Transport => failed(Failure::Transport),
        Answer::WrongBytes => failed(Failure::WrongBytes),
        Answer::Registry { permanent, seconds } => {
            failed(Failure::Registry { retry_after: seconds.map(Duration::from_secs), permanent })
        }
        Answer::Store => failed(Failure::Store),
        Answer::Finished => Event::Finished { request },
    }
}

fn run(seed: u8, ops: Vec<Op>) -> Vec<String> {
    let mut shell = Shell::new(seed);
    ops.into_iter().for_each(|op| shell.apply(op));
    let last = shell.wants.values().map(|&(_, deadline)| deadline).max();
    shell.advance(last.unwrap_or_default());
    assert!(shell.wants.is_empty(), "open after the last deadline: {:?}", shell.wants);
    shell.log
}

proptest! {
    #[test]
    fn promises_hold_and_runs_repeat(seed: u8, ops in vec(op(), 0..150)) {
        prop_assert_eq!(run(seed, ops.clone()), run(seed, ops));
    }
}
