//! What is asked for within limits, and what waits for them.

use shoal_proto::Priority;
use shoal_scheduler::{Action, Event, Limits, Origin, Rates, Source};

use crate::world::*;

/// Limits to a piece each second, from peers or from the registry.
fn a_piece_per_second() -> (Limits, Limits) {
    let rates = Rates { all: PIECE, prefetch: 0 };
    (Limits { download: rates, ..Limits::default() }, Limits { registry: rates, ..Limits::default() })
}

#[test]
fn the_registry_is_read_no_faster_than_its_limit_and_for_readers_first() {
    let mut world = World::new();
    world.tell(Event::Limits(a_piece_per_second().1));
    for piece in 0..8 {
        world.note_want(piece, Priority::Prefetch, Origin::Local);
    }
    assert_eq!(all_asked(&world.actions()).len(), 1, "a second's worth is one piece");
    assert_eq!(all_asked(&world.want(63)), [], "nothing is left of it");
    assert_eq!(all_asked(&world.wait(ms(1))), [(Source::Registry, vec![63])], "a reader may have what comes in");
    assert_eq!(all_asked(&world.wait(ms(1499))), [], "that is to be made up for, and half is a reader's");
    let next = world.wait(ms(1));
    assert_eq!(all_asked(&next).len(), 1);
    let cancelled = |action: &Action| matches!(action, Action::Cancel { .. });
    assert!(!world.wait(ms(400)).iter().any(cancelled), "what waits for a limit is nobody's fault");
    assert!(world.scheduler.waits().registry.time >= ms(1500));
    let freed = world.tell(Event::Limits(Limits::default()));
    assert_eq!(all_asked(&freed).len(), 1, "the change counts at once, and the rest is one read");
}

#[test]
fn reads_of_the_registry_are_counted_too() {
    let mut world = World::new();
    let limits = Limits { registry_requests: Rates { all: 2, prefetch: 1 }, ..Limits::default() };
    world.tell(Event::Limits(limits));
    for piece in [0, 2, 4, 6] {
        world.note_want(piece, Priority::OnDemand, Origin::Local);
        world.note_want(piece + 20, Priority::Prefetch, Origin::Local);
    }
    assert_eq!(all_asked(&world.actions()).len(), 2);
    assert_eq!(all_asked(&world.wait(ms(1))).len(), 1);
    assert_eq!(all_asked(&world.wait(ms(499))), []);
    assert_eq!(all_asked(&world.wait(ms(1))), [(Source::Registry, vec![6])]);
}

#[test]
fn what_waits_for_the_download_limit_stays_with_its_neighbour() {
    let mut world = World::new();
    world.up(2);
    world.has(2, 0..64);
    world.tell(Event::Limits(a_piece_per_second().0));
    let first = world.want(0);
    assert_eq!(all_asked(&first), [(Source::Peer(peer(2)), vec![0])]);
    for piece in 1..8 {
        world.note_want(piece, Priority::Prefetch, Origin::Local);
    }
    assert_eq!(all_asked(&world.actions()), [], "neither the peer nor the registry");
    let refused = world.tell(Event::NotHave { request: request(&first), item: item(0) });
    let asked = all_asked(&refused);
    assert!(asked.contains(&(Source::Registry, vec![0])), "{asked:?}");
    assert_eq!(asked.len(), 2, "what does not come is asked for elsewhere, and leaves room: {asked:?}");
    assert_eq!(all_asked(&world.wait(ms(500))), [], "a prefetch waits until half is there again");
    assert_eq!(all_asked(&world.wait(ms(1))).len(), 1);
}

#[test]
fn a_peer_is_asked_for_no_more_than_its_share_and_others_bring_the_rest() {
    let mut world = World::new();
    world.up(2);
    world.has(2, 0..64);
    world.up(3);
    world.has(3, 0..64);
    let rates = Rates { all: PIECE, prefetch: 0 };
    world.tell(Event::Limits(Limits { download_per_peer: rates, ..Limits::default() }));
    for piece in (0..16).step_by(2) {
        world.note_want(piece, Priority::Prefetch, Origin::Local);
    }
    let of_peers = |actions: &[Action]| {
        let asked = all_asked(actions).into_iter().filter(|(source, _)| matches!(source, Source::Peer(_)));
        asked.collect::<Vec<_>>()
    };
    let first = of_peers(&world.actions());
    let sources: Vec<_> = first.iter().map(|(source, _)| *source).collect();
    assert_eq!(first.len(), 2, "one piece of each: {first:?}");
    assert!(sources.contains(&Source::Peer(peer(2))) && sources.contains(&Source::Peer(peer(3))), "{first:?}");
    assert_eq!(of_peers(&world.wait(ms(500))), [], "half of a second's worth is a reader's");
    let asked = world.want(31);
    assert!(matches!(all_asked(&asked)[..], [(Source::Peer(_), _)]), "a reader may have it: {asked:?}");
    // A limit that is lifted counts at once.
    world.tell(Event::Limits(Limits::default()));
    let rest = world.want(33);
    assert!(matches!(all_asked(&rest)[..], [(Source::Peer(_), _)]), "{rest:?}");
}

#[test]
fn what_waits_for_the_share_of_its_home_stays_there() {
    let mut world = World::new();
    world.up(SEED);
    world.seed(SEED);
    let rates = Rates { all: PIECE, prefetch: 0 };
    world.tell(Event::Limits(Limits { download_per_peer: rates, ..Limits::default() }));
    let first = world.want(0);
    assert_eq!(all_asked(&first), [(Source::Home(peer(SEED)), vec![0])]);
    assert_eq!(all_asked(&world.want(40)), [], "neither the home nor the registry");
    assert_eq!(all_asked(&world.wait(ms(1))), [(Source::Home(peer(SEED)), vec![40])], "a reader takes what comes in");
    assert_eq!(all_asked(&world.want(20)), []);
    let refused = all_asked(&world.tell(Event::NotHave { request: request(&first), item: item(0) }));
    assert!(refused.contains(&(Source::Home(peer(SEED)), vec![20])), "what does not come leaves room: {refused:?}");
}
