//! Arbitrary sequences of events for the scheduler: it never panics, never talks without end, keeps its limits, and
//! every want ends by its deadline. `scheduler/tests/properties.rs` checks more on fewer sequences.
#![no_main]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use shoal_proto::{Bitfield, PeerId, Priority, Role};
use shoal_scheduler::{
    Action, BlobKey, Config, Event, Failure, Item, Limits, Origin, Rates, RequestId, Scheduler, Time, WantId,
};

const PIECES: u32 = 64;

#[derive(Debug, Arbitrary)]
enum Op {
    Add { blob: bool, size: u8, present: u8 },
    Remove { blob: bool },
    Want { item: (bool, u8), on_demand: bool, for_peer: bool, seconds: u8 },
    Unwant(u8),
    Present((bool, u8)),
    Lost((bool, u8)),
    Evicted { blob: bool },
    Up { peer: u8, far: bool },
    Down(u8),
    Have { peer: u8, blob: bool, first: u32, len: u8, full: bool },
    Lease { peer: u8, capacity: u64, seconds: u8 },
    LeaseEnded(u8),
    Answer { request: u8, answer: Answer },
    Advance(u16),
    Limits { download: (u64, u64), per_peer: (u64, u64), registry: (u64, u64), reads: (u8, u8), slots: u8 },
}

#[derive(Debug, Arbitrary)]
enum Answer {
    Delivered { piece: u8, bytes: u64 },
    Progress,
    NotHave(u8),
    Pending(u32),
    Busy { millis: u32, alternates: Vec<u8> },
    NotMyHome(Vec<u8>),
    CannotSource,
    Transport,
    WrongBytes,
    Registry { seconds: Option<u8>, permanent: bool },
    Store,
    Finished,
}

struct Shell {
    scheduler: Scheduler,
    now: Time,
    wants: BTreeMap<WantId, Time>,
    /// Live requests; nobody is the registry.
    live: BTreeMap<RequestId, Option<PeerId>>,
    asked: BTreeSet<RequestId>,
}

fn peer(n: u8) -> PeerId {
    PeerId::new([n % 12; 32])
}

fn blob(second: bool) -> BlobKey {
    BlobKey { id: [u8::from(second); 32], variant: 0 }
}

impl Shell {
    fn handle(&mut self, event: Event) {
        self.scheduler.handle_event(self.now, event);
        self.drain();
    }

    fn drain(&mut self) {
        for _ in 0..100_000 {
            let Some(action) = self.scheduler.poll_action(self.now) else { return };
            match action {
                Action::Request { request, peer, .. } => self.start(request, Some(peer)),
                Action::BackToSource { request, .. } => self.start(request, None),
                Action::Cancel { request } => _ = self.live.remove(&request),
                Action::Complete { want, .. } => {
                    let deadline = self.wants.remove(&want).expect("completes once");
                    assert!(self.now <= deadline);
                }
                Action::Ban { .. } | Action::Connect { .. } => {}
            }
        }
        panic!("no end of actions");
    }

    fn start(&mut self, request: RequestId, peer: Option<PeerId>) {
        assert!(self.asked.insert(request), "an id used again");
        self.live.insert(request, peer);
    }

    fn advance(&mut self, to: Time) {
        while let Some(at) = self.scheduler.poll_timeout().filter(|&at| at <= to) {
            self.now = self.now.max(at);
            self.scheduler.handle_timeout(self.now);
            self.drain();
        }
        self.now = self.now.max(to);
    }

    fn apply(&mut self, op: Op) {
        let item = |(second, piece): (bool, u8)| Item { blob: blob(second), piece: u32::from(piece) % (PIECES + 1) };
        let event = match op {
            Op::Add { blob: second, size, present } => {
                let size = u64::from(size) << 12;
                let extents = (0..u64::from(PIECES)).map(|at| at * size..(at + 1) * size).collect();
                let mut have = Bitfield::new(PIECES);
                have.insert_range(0..u32::from(present) % PIECES);
                Event::BlobAdded { blob: blob(second), extents, present: have }
            }
            Op::Remove { blob: second } => Event::BlobRemoved { blob: blob(second) },
            Op::Want { item: wanted, on_demand, for_peer, seconds } => {
                let want = WantId(self.asked.len() as u64 + self.wants.len() as u64 * 1000);
                let deadline = self.now + Duration::from_secs(u64::from(seconds) % 90);
                if self.wants.contains_key(&want) {
                    return;
                }
                self.wants.insert(want, deadline);
                let priority = if on_demand { Priority::OnDemand } else { Priority::Prefetch };
                let origin = if for_peer { Origin::ForPeer } else { Origin::Local };
                Event::Want { want, item: item(wanted), priority, deadline, origin }
            }
            Op::Unwant(which) => {
                let Some(&want) = nth(&self.wants, which) else { return };
                self.wants.remove(&want);
                Event::Unwant { want }
            }
            Op::Present(here) => Event::Present { item: item(here) },
            Op::Lost(gone) => Event::Lost { item: item(gone) },
            Op::Evicted { blob: second } => Event::Evicted { blob: blob(second) },
            Op::Up { peer: n, far } => {
                self.live.retain(|_, asked| *asked != Some(peer(n)));
                let zone = if far { "b" } else { "a" }.into();
                Event::PeerUp { peer: peer(n), role: Role::Node, zone, labels: BTreeMap::new() }
            }
            Op::Down(n) => {
                self.live.retain(|_, asked| *asked != Some(peer(n)));
                Event::PeerDown { peer: peer(n) }
            }
            Op::Have { peer: n, blob: second, first, len, full } => {
                Event::PeerHave { peer: peer(n), blob: blob(second), first, have: Bitfield::full(len.into()), full }
            }
            Op::Lease { peer: n, capacity, seconds } => {
                let until = self.now + Duration::from_secs(seconds.into());
                Event::Lease { peer: peer(n), zone: "a".into(), capacity, until }
            }
            Op::LeaseEnded(n) => Event::LeaseEnded { peer: peer(n) },
            Op::Answer { request, answer } => {
                let Some(&request) = nth(&self.live, request) else { return };
                if !matches!(
                    answer,
                    Answer::Progress | Answer::Pending(_) | Answer::NotHave(_) | Answer::Delivered { .. }
                ) {
                    self.live.remove(&request);
                }
                self.answer(request, answer)
            }
            Op::Limits { download, per_peer, registry, reads: (all, prefetch), slots } => {
                let rates = |(all, prefetch)| Rates { all, prefetch };
                Event::Limits(Limits {
                    download: rates(download),
                    download_per_peer: rates(per_peer),
                    registry: rates(registry),
                    registry_requests: rates((all.into(), prefetch.into())),
                    registry_slots: slots.into(),
                    registry_reserve: u32::from(slots) / 4,
                })
            }
            Op::Advance(millis) => return self.advance(self.now + Duration::from_millis(millis.into())),
        };
        self.handle(event);
    }

    fn answer(&self, request: RequestId, answer: Answer) -> Event {
        let item = |piece: u8| Item { blob: blob(piece > 127), piece: u32::from(piece) % PIECES };
        let failed = |reason| Event::Failed { request, reason };
        match answer {
            Answer::Delivered { piece, bytes } => Event::Delivered { request, item: item(piece), bytes },
            Answer::Progress => Event::Progress { request },
            Answer::NotHave(piece) => Event::NotHave { request, item: item(piece) },
            Answer::Pending(millis) => Event::Pending { request, eta: Duration::from_millis(millis.into()) },
            Answer::Busy { millis, alternates } => Event::Busy {
                request,
                retry_after: Duration::from_millis(millis.into()),
                alternates: alternates.into_iter().map(peer).collect(),
            },
            Answer::NotMyHome(members) => {
                Event::NotMyHome { request, members: members.into_iter().map(peer).collect() }
            }
            Answer::CannotSource => Event::CannotSource { request },
            Answer::Transport => failed(Failure::Transport),
            Answer::WrongBytes => failed(Failure::WrongBytes),
            Answer::Registry { seconds, permanent } => failed(Failure::Registry {
                retry_after: seconds.map(|seconds| Duration::from_secs(seconds.into())),
                permanent,
            }),
            Answer::Store => failed(Failure::Store),
            Answer::Finished => Event::Finished { request },
        }
    }
}

fn nth<K, V>(map: &BTreeMap<K, V>, which: u8) -> Option<&K> {
    map.keys().nth(usize::from(which) % map.len().max(1))
}

fuzz_target!(|input: (u8, Vec<Op>)| {
    let (seed, ops) = input;
    let limits = Limits { registry_slots: 3, ..Limits::default() };
    let config = Config { peer_window: 8, limits, ..Config::new(peer(0), "a") };
    let mut shell = Shell {
        scheduler: Scheduler::new(config, Time::ZERO, [seed; 32]),
        now: Time::ZERO,
        wants: BTreeMap::new(),
        live: BTreeMap::new(),
        asked: BTreeSet::new(),
    };
    for second in [false, true] {
        shell.apply(Op::Add { blob: second, size: 16, present: 0 });
    }
    ops.into_iter().take(400).for_each(|op| shell.apply(op));
    let last = shell.wants.values().copied().max().unwrap_or_default();
    shell.advance(last);
    assert!(shell.wants.is_empty(), "open after the last deadline");
});
