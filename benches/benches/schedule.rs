//! How many decisions a second does the scheduler take with 1,000 peers and 10,000 chunks, each wanted once and had by
//! some of the peers? A decision is a want until its delivery.

use std::{sync::Arc, time::Duration};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use shoal_proto::{Bitfield, PeerId, Priority, Role};
use shoal_scheduler::{Action, BlobKey, Config, Event, Item, Origin, Scheduler, Time, WantId};

const PEERS: u32 = 1000;
const PIECES: u32 = 10_000;
const LEN: u64 = 1 << 20;

fn peer(n: u32) -> PeerId {
    let mut id = [0; 32];
    id[..4].copy_from_slice(&n.to_le_bytes());
    PeerId::new(id)
}

fn crowd() -> (Scheduler, BlobKey) {
    let blob = BlobKey { id: [7; 32], variant: 0 };
    let mut scheduler = Scheduler::new(Config::new(peer(PEERS), "a"), Time::ZERO, [1; 32]);
    let extents: Arc<[_]> = (0..u64::from(PIECES)).map(|n| n * LEN..(n + 1) * LEN).collect();
    scheduler.handle_event(Time::ZERO, Event::BlobAdded { blob, extents, present: Bitfield::new(PIECES) });
    for n in 0..PEERS {
        let up = Event::PeerUp { peer: peer(n), role: Role::Node, zone: "a".into(), labels: Default::default() };
        scheduler.handle_event(Time::ZERO, up);
        let mut have = Bitfield::new(PIECES);
        // A tenth of the pieces each, spread so that every piece has a hundred holders.
        for piece in (n % 10..PIECES).step_by(10) {
            have.insert(piece);
        }
        scheduler.handle_event(Time::ZERO, Event::PeerHave { peer: peer(n), blob, first: 0, have, full: true });
    }
    (scheduler, blob)
}

fn fetch_all((mut scheduler, blob): (Scheduler, BlobKey)) -> Scheduler {
    let mut now = Time::ZERO;
    for piece in 0..PIECES {
        let item = Item { blob, piece };
        let deadline = Time::ZERO + Duration::from_secs(3600);
        let want = WantId(piece.into());
        let event = Event::Want { want, item, priority: Priority::OnDemand, deadline, origin: Origin::Local };
        scheduler.handle_event(now, event);
    }
    let (mut open, mut complete) = (std::collections::VecDeque::new(), 0);
    while complete < PIECES {
        while let Some(action) = scheduler.poll_action(now) {
            match action {
                Action::Request { request, blob, pieces, .. }
                | Action::BackToSource { request, blob, pieces, .. } => {
                    open.extend(pieces.into_iter().map(|piece| (request, Item { blob, piece })));
                }
                Action::Complete { outcome, .. } => {
                    outcome.expect("somebody has it");
                    complete += 1;
                }
                _ => {}
            }
        }
        now = now + Duration::from_micros(10);
        if let Some((request, item)) = open.pop_front() {
            scheduler.handle_event(now, Event::Delivered { request, item, bytes: LEN });
        }
    }
    scheduler
}

fn schedule(c: &mut Criterion) {
    let mut group = c.benchmark_group("schedule");
    group.sample_size(10).throughput(Throughput::Elements(PIECES.into()));
    group.bench_function("1000 peers, 10000 chunks", |b| {
        b.iter_batched(crowd, fetch_all, BatchSize::PerIteration);
    });
    group.finish();
}

criterion_group!(benches, schedule);
criterion_main!(benches);
