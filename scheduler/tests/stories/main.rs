//! What the scheduler does in the situations that matter, told one by one.

mod limits;
mod world;

use std::{collections::VecDeque, time::Duration};

use shoal_proto::{Bitfield, Priority, Role};
use shoal_scheduler::{Action, BanReason, BlobKey, Event, Failure, Origin, Source, Time, WantFailure, Why};

use world::*;

#[test]
fn neighbour_then_home_then_registry() {
    let mut world = World::new();
    assert_eq!(all_asked(&world.want(0)), [(Source::Registry, vec![0])], "nobody else is there");

    let mut world = World::new();
    world.up(SEED);
    world.seed(SEED);
    world.up(2);
    world.has(2, 0..1);
    assert_eq!(all_asked(&world.want(1)), [(Source::Home(peer(SEED)), vec![1])]);
    let actions = world.want(0);
    assert_eq!(all_asked(&actions), [(Source::Peer(peer(2)), vec![0])]);

    let actions = world.tell(Event::NotHave { request: request(&actions), item: item(0) });
    assert_eq!(all_asked(&actions), [(Source::Home(peer(SEED)), vec![0])]);
    let actions = world.tell(Event::CannotSource { request: request(&actions) });
    assert_eq!(all_asked(&actions), [(Source::Registry, vec![0])]);
    assert_eq!(all_asked(&world.want(2)), [(Source::Registry, vec![2])], "it will not ask for that blob again soon");
    world.wait(Duration::from_secs(61));
    assert_eq!(all_asked(&world.want(3)), [(Source::Home(peer(SEED)), vec![3])]);
}

#[test]
fn a_flight_is_joined_takes_the_highest_priority_and_outlives_its_first_waiter() {
    let mut world = World::new();
    world.up(SEED);
    world.seed(SEED);
    let first = world.note_want(0, Priority::Prefetch, Origin::Local);
    let asked = world.actions();
    let second = world.note_want(0, Priority::OnDemand, Origin::Local);
    assert_eq!(world.actions(), [], "one flight");
    assert_eq!(world.tell(Event::Unwant { want: first }), []);
    let done = world.tell(Event::Delivered { request: request(&asked), item: item(0), bytes: PIECE });
    assert_eq!(outcomes(&done), [(second, Ok(()))]);
    assert!(world.scheduler.present(BLOB).unwrap().contains(0));
}

#[test]
fn on_demand_overtakes_prefetch_and_finds_slots_kept_for_it() {
    let mut world = World::new();
    for piece in 0..60 {
        world.note_want(piece, Priority::Prefetch, Origin::Local);
    }
    let prefetch = world.actions();
    assert!(!prefetch.is_empty());
    let on_demand = world.want(63);
    assert_eq!(all_asked(&on_demand), [(Source::Registry, vec![63])], "past everything that waits");
}

#[test]
fn prefetch_asks_for_less_while_somebody_waits() {
    let mut world = World::new();
    for neighbour in [2, 3] {
        world.up(neighbour);
        world.has(neighbour, 0..64);
    }
    let waits = world.want(63);
    for piece in 0..40 {
        world.note_want(piece, Priority::Prefetch, Origin::Local);
    }
    assert_eq!(all_asked(&world.actions()).len(), 2, "a third of 4 MiB");
    let done = world.tell(Event::Delivered { request: request(&waits), item: item(63), bytes: PIECE });
    assert_eq!(all_asked(&done).len(), 4, "six requests are always under way otherwise");
}

#[test]
fn registry_reads_join_neighbouring_pieces() {
    let mut world = World::new();
    for piece in [3, 4, 5, 7, 9] {
        world.note_want(piece, Priority::OnDemand, Origin::Local);
    }
    let reads = world.actions();
    let expected = [(Source::Registry, vec![3, 4, 5]), (Source::Registry, vec![7]), (Source::Registry, vec![9])];
    assert_eq!(all_asked(&reads), expected);
    let Action::BackToSource { range, .. } = &reads[0] else { panic!("{reads:?}") };
    assert_eq!(*range, 3 * PIECE..6 * PIECE);
}

#[test]
fn pieces_of_a_gzip_layer_are_read_together_though_they_overlap() {
    // Each reaches into the next; the fourth lies within the third.
    let extent = |at: u64| if at == 3 { 2_010_000..2_020_000 } else { at * 1_000_000..(at + 1) * 1_000_000 + 30_000 };
    let mut world = World::with_extents((0..64).map(extent).collect());
    for piece in 1..=3 {
        world.note_want(piece, Priority::OnDemand, Origin::Local);
    }
    let reads = world.actions();
    assert_eq!(all_asked(&reads), [(Source::Registry, vec![1, 2, 3])]);
    let Action::BackToSource { range, .. } = &reads[0] else { panic!("{reads:?}") };
    assert_eq!(*range, 1_000_000..3_030_000);
}

#[test]
fn what_lies_between_wanted_pieces_is_kept_and_a_home_reads_ahead_for_others() {
    let mut world = World::with_pieces(32 << 10);
    world.note_want(0, Priority::Prefetch, Origin::Local);
    world.note_want(2, Priority::Prefetch, Origin::Local);
    assert_eq!(all_asked(&world.actions()), [(Source::Registry, vec![0, 1, 2])]);
    assert_eq!(all_asked(&world.want(1)), [], "it is on its way");

    let mut world = World::with_pieces(192 << 10);
    world.seed(ME);
    assert_eq!(all_asked(&world.want(3)), [(Source::Registry, vec![3])], "not for itself");
    assert_eq!(all_asked(&world.want(9)), [(Source::Registry, vec![9])]);
    let duty = |world: &mut World, piece| {
        world.note_want(piece, Priority::OnDemand, Origin::ForPeer);
        world.actions()
    };
    assert_eq!(all_asked(&duty(&mut world, 10)), [(Source::Registry, (10..15).collect())], "a megabyte");
    world.up(2);
    world.has(2, 21..22);
    let actions = duty(&mut world, 20);
    assert_eq!(all_asked(&actions), [(Source::Registry, vec![20])], "a neighbour has the next");
    let reason = Failure::Registry { retry_after: None, permanent: false };
    world.tell(Event::Failed { request: request(&actions), reason });
    assert_eq!(all_asked(&duty(&mut world, 11)), [], "on its way since the first");

    let mut world = World::with_pieces(512 << 10);
    world.seed(ME);
    assert_eq!(all_asked(&duty(&mut world, 10)), [(Source::Registry, vec![10])], "a large piece is worth a request");
    let mut world = World::with_pieces(250 << 10);
    world.seed(ME);
    assert_eq!(all_asked(&duty(&mut world, 63)), [(Source::Registry, vec![63])], "the stripe ends here");

    let mut world = World::with_pieces(16 << 10);
    world.seed(ME);
    let here = duty(&mut world, 20);
    assert_eq!(all_asked(&here), [(Source::Registry, (20..24).collect())], "it may be the only one here");
    assert_eq!(all_asked(&duty(&mut world, 24)), [(Source::Registry, (24..64).collect())], "somebody reads in order");
}

#[test]
fn the_home_reads_the_registry_and_asks_no_other_home() {
    let mut world = World::new();
    world.seed(ME);
    assert_eq!(world.scheduler.home_of(BLOB, 0), Some(peer(ME)));
    assert_eq!(all_asked(&world.want(0)), [(Source::Registry, vec![0])]);

    // Views differ: somebody takes this node for the home, which thinks that it is another.
    let mut world = World::new();
    world.up(SEED);
    world.seed(SEED);
    assert_eq!(world.scheduler.home_rank(BLOB, 0), None);
    world.note_want(0, Priority::OnDemand, Origin::ForPeer);
    assert_eq!(all_asked(&world.actions()), [(Source::Registry, vec![0])]);

    // The other may be waiting for this one in turn.
    let local = world.want(1);
    assert_eq!(all_asked(&local), [(Source::Home(peer(SEED)), vec![1])]);
    world.tell(Event::Pending { request: request(&local), eta: ms(1000) });
    world.note_want(1, Priority::OnDemand, Origin::ForPeer);
    assert_eq!(all_asked(&world.actions()), [(Source::Registry, vec![1])]);

    world.up(2);
    world.has(2, 2..3);
    world.note_want(2, Priority::OnDemand, Origin::ForPeer);
    assert_eq!(all_asked(&world.actions()), [(Source::Peer(peer(2)), vec![2])], "a neighbour spares the registry");
}

#[test]
fn a_silent_source_is_hedged_and_a_pending_home_is_not() {
    let mut world = World::new();
    for n in [SEED, SEED + 1] {
        world.up(n);
        world.seed(n);
    }
    let asked = world.want(0);
    let home = world.scheduler.home_of(BLOB, 0).unwrap();
    assert_eq!(all_asked(&asked), [(Source::Home(home), vec![0])]);
    world.tell(Event::Pending { request: request(&asked), eta: ms(5000) });
    assert_eq!(world.wait(ms(5400)), [], "it said that it is at it");
    world.tell(Event::Pending { request: request(&asked), eta: ms(5000) });
    assert_eq!(all_asked(&world.wait(ms(5400))), []);
    let hedge = world.wait(Duration::from_secs(6));
    let other = if home == peer(SEED) { peer(SEED + 1) } else { peer(SEED) };
    assert_eq!(all_asked(&hedge)[0], (Source::Home(other), vec![0]));
}

#[test]
fn a_dead_home_costs_one_interval_and_the_next_in_hash_order_takes_over() {
    let mut world = World::new();
    for n in [SEED, SEED + 1] {
        world.seed(n);
        world.up(n);
    }
    let home = world.scheduler.home_of(BLOB, 0).unwrap();
    let other = if home == peer(SEED) { peer(SEED + 1) } else { peer(SEED) };
    world.tell(Event::PeerDown { peer: home });
    assert_eq!(world.want(0), [Action::Connect { peer: home }]);
    assert_eq!(all_asked(&world.wait(ms(500))), [(Source::Home(other), vec![0])]);
    assert_eq!(all_asked(&world.want(1)), [(Source::Home(other), vec![1])], "known to be unreachable");
    world.tell(Event::LeaseEnded { peer: home });
    assert_eq!(world.scheduler.home_of(BLOB, 0), Some(other));
    let gone = world.tell(Event::PeerDown { peer: other });
    assert_eq!(all_asked(&gone), [(Source::Registry, vec![0, 1])], "nobody is left");
}

#[test]
fn a_busy_home_sends_us_to_others() {
    let mut world = World::new();
    world.up(SEED);
    world.seed(SEED);
    world.up(2);
    let asked = world.want(0);
    let (retry_after, alternates) = (ms(300), vec![peer(2), peer(3)]);
    let actions = world.tell(Event::Busy { request: request(&asked), retry_after, alternates });
    assert!(actions.contains(&Action::Connect { peer: peer(3) }));
    assert_eq!(all_asked(&actions), [(Source::Peer(peer(2)), vec![0])]);
    world.tell(Event::NotHave { request: request(&actions), item: item(0) });
    assert_eq!(all_asked(&world.up(3)), [(Source::Peer(peer(3)), vec![0])]);
    assert_eq!(all_asked(&world.tell(Event::PeerDown { peer: peer(3) })), []);
    assert_eq!(all_asked(&world.wait(ms(300))), [(Source::Home(peer(SEED)), vec![0])], "and then home again");
}

#[test]
fn who_sends_wrong_bytes_is_banned_and_has_nothing_for_us() {
    let mut world = World::new();
    world.up(2);
    world.has(2, 0..64);
    let asked = world.want(0);
    let actions = world.tell(Event::Failed { request: request(&asked), reason: Failure::WrongBytes });
    let until = Time::ZERO + Duration::from_secs(600);
    assert_eq!(actions[0], Action::Ban { peer: peer(2), until, reason: BanReason::WrongBytes(item(0)) });
    assert_eq!(all_asked(&actions), [(Source::Registry, vec![0])]);
    world.tell(Event::PeerDown { peer: peer(2) });
    world.up(2);
    world.has(2, 0..64);
    assert_eq!(all_asked(&world.want(1)), [(Source::Registry, vec![1])]);
    world.wait(Duration::from_secs(600));
    world.has(2, 0..64);
    assert_eq!(all_asked(&world.want(2)), [(Source::Peer(peer(2)), vec![2])]);
}

#[test]
fn what_was_denied_is_not_asked_for_again_until_announced() {
    let mut world = World::new();
    world.up(2);
    world.has(2, 0..1);
    let asked = world.want(0);
    let actions = world.tell(Event::NotHave { request: request(&asked), item: item(0) });
    assert_eq!(all_asked(&actions), [(Source::Registry, vec![0])]);
    let reason = Failure::Registry { retry_after: Some(Duration::from_secs(30)), permanent: false };
    assert_eq!(world.tell(Event::Failed { request: request(&actions), reason }), []);
    assert_eq!(all_asked(&world.has(2, 0..1)), [(Source::Peer(peer(2)), vec![0])]);
}

#[test]
fn registry_failures_are_tried_again_until_the_deadline_which_lists_them() {
    let mut world = World::new();
    let mut actions = world.want(0);
    let mut reads = 0;
    let error = loop {
        if let Some((_, outcome)) = outcomes(&actions).pop() {
            break outcome.unwrap_err();
        }
        if !all_asked(&actions).is_empty() {
            reads += 1;
            let reason = Failure::Registry { retry_after: None, permanent: false };
            actions = world.tell(Event::Failed { request: request(&actions), reason });
            assert_eq!(actions, [], "not at once");
        }
        actions = world.wait(ms(50));
    };
    assert_eq!(world.now, Time::ZERO + Duration::from_secs(60));
    assert_eq!(error.reason, WantFailure::Deadline);
    assert!(error.tries.iter().all(|&tried| tried == (Source::Registry, Why::Registry)));
    assert!((8..16).contains(&reads), "{reads} reads with a back-off from 0.2 to 10 s");
    assert!(error.to_string().starts_with("deadline passed; tried registry: registry error"), "{error}");
}

#[test]
fn a_refusal_for_good_ends_the_read_at_once_unless_a_neighbour_has_it() {
    let refuse = |world: &mut World, actions: &[Action]| {
        let reason = Failure::Registry { retry_after: None, permanent: true };
        world.tell(Event::Failed { request: request(actions), reason })
    };
    let mut world = World::new();
    let actions = world.want(0);
    let done = outcomes(&refuse(&mut world, &actions));
    assert_eq!(done[0].1.as_ref().unwrap_err().reason, WantFailure::NoSource);

    let actions = world.want(1);
    world.up(2);
    world.has(2, 1..2);
    assert_eq!(all_asked(&refuse(&mut world, &actions)), [(Source::Peer(peer(2)), vec![1])]);
}

#[test]
fn without_seed_peers_the_nodes_with_the_blob_are_the_homes() {
    let mut world = World::new();
    world.up(2);
    world.has(2, 0..0);
    let homes: Vec<_> = (0..64).map(|piece| world.scheduler.home_of(BLOB, piece).unwrap()).collect();
    assert!(homes.iter().all(|home| [peer(ME), peer(2)].contains(home)));
    let piece = homes.iter().position(|&home| home == peer(2)).expect("four stripes are not all ours") as u32;
    assert_eq!(all_asked(&world.want(piece)), [(Source::Home(peer(2)), vec![piece])]);
    world.seed(SEED);
    assert_eq!(world.scheduler.home_of(BLOB, 0), Some(peer(SEED)));
}

#[test]
fn what_was_evicted_is_fetched_again_and_what_is_on_its_way_still_comes() {
    let mut world = World::new();
    world.tell(Event::Present { item: item(0) });
    let coming = request(&world.want(1));
    assert_eq!(world.tell(Event::Evicted { blob: BLOB }), []);
    assert_eq!(all_asked(&world.want(0)), [(Source::Registry, vec![0])]);
    let done = world.tell(Event::Delivered { request: coming, item: item(1), bytes: PIECE });
    assert_eq!(outcomes(&done)[0].1, Ok(()));
}

#[test]
fn wants_that_cannot_be_are_answered_at_once() {
    let mut world = World::new();
    let reason = |actions: Vec<Action>| outcomes(&actions).pop().unwrap().1.map_err(|error| error.reason);
    assert_eq!(reason(world.want(64)), Err(WantFailure::Unknown));
    world.tell(Event::Present { item: item(0) });
    assert_eq!(reason(world.want(0)), Ok(()));
    world.tell(Event::Lost { item: item(0) });
    assert_eq!(all_asked(&world.want(0)), [(Source::Registry, vec![0])]);
    let gone = world.tell(Event::BlobRemoved { blob: BLOB });
    assert!(gone.iter().any(|action| matches!(action, Action::Cancel { .. })), "{gone:?}");
    assert_eq!(reason(gone), Err(WantFailure::Removed));
    assert_eq!(reason(world.want(0)), Err(WantFailure::Unknown));
}

#[test]
fn who_claims_all_and_serves_none_is_left_alone_and_keeps_nobody_from_the_others() {
    for priority in [Priority::OnDemand, Priority::Prefetch] {
        let mut world = World::new();
        for n in [2, 3] {
            world.up(n);
            world.has(n, 0..64);
        }
        (0..64).for_each(|piece| _ = world.note_want(piece, priority, Origin::Local));
        let (mut complete, mut in_vain, mut owed) = (0, 0, VecDeque::new());
        let mut actions = world.actions();
        while complete < 64 {
            let mut answers = Vec::new();
            for action in &actions {
                complete += usize::from(matches!(action, Action::Complete { outcome: Ok(()), .. }));
                match action {
                    Action::Request { request, peer: of, pieces, .. } if *of == peer(2) => {
                        in_vain += pieces.len();
                        answers.extend(pieces.iter().map(|piece| (*request, *piece)));
                    }
                    Action::Request { request, pieces, .. } | Action::BackToSource { request, pieces, .. } => {
                        owed.extend(pieces.iter().map(|piece| (*request, *piece)));
                    }
                    _ => {}
                }
            }
            assert!(in_vain < 500, "{priority:?}: asked again and again, {complete} pieces are here");
            actions = Vec::new();
            for (request, piece) in answers {
                world.scheduler.handle_event(world.now, Event::NotHave { request, item: item(piece) });
                // And yet it says that it has everything, before anybody else could be asked.
                actions.extend(world.has(2, 0..64));
            }
            if actions.is_empty() {
                // The other needs its time.
                actions = world.wait(ms(10));
                if let Some((request, piece)) = owed.pop_front() {
                    actions.extend(world.tell(Event::Delivered { request, item: item(piece), bytes: PIECE }));
                }
            }
            assert!(world.now < Time::ZERO + Duration::from_secs(30), "{priority:?}: {complete} pieces are here");
        }
    }
}

#[test]
fn a_blob_that_is_read_whole_has_one_home() {
    let mut world = World::new();
    for seed in [SEED, SEED + 1, SEED + 2] {
        world.seed(seed);
    }
    let homes = |world: &World| (0..64).map(|piece| world.scheduler.home_of(BLOB, piece)).collect::<Vec<_>>();
    let striped = homes(&world);
    assert!(striped.iter().any(|home| home != &striped[0]), "four stripes of one home only: choose another id");
    world.tell(Event::OneHome { blob: BLOB });
    let whole = homes(&world);
    assert!(whole.iter().all(|home| home == &whole[0] && home.is_some()), "{whole:?}");
    // An object with this id, such as the list of its pieces, has the same.
    let list = BlobKey { variant: u32::MAX, ..BLOB };
    world.tell(Event::BlobAdded { blob: list, extents: std::iter::once(0..1).collect(), present: Bitfield::new(1) });
    assert_eq!(world.scheduler.home_of(list, 0), whole[0]);
}

#[test]
fn whoever_lied_is_banned_and_its_requests_go_elsewhere() {
    let mut world = World::new();
    world.up(2);
    world.up(3);
    world.has(2, 0..64);
    let asked_first = all_asked(&world.want(0));
    assert_eq!(asked_first, [(Source::Peer(peer(2)), vec![0])]);
    world.has(3, 0..64);
    let actions = world.tell(Event::Lied { peer: peer(2), item: item(0) });
    assert!(actions.iter().any(|action| matches!(action, Action::Ban { peer: banned, .. } if *banned == peer(2))));
    assert_eq!(all_asked(&actions), [(Source::Peer(peer(3)), vec![0])]);
}

#[test]
fn prefetch_asks_homes_for_what_nobody_has_before_it_takes_what_somebody_has() {
    let mut world = World::with_pieces(1 << 20);
    world.up(SEED);
    world.seed(SEED);
    world.up(2);
    for piece in 0..16 {
        world.note_want(piece, Priority::Prefetch, Origin::Local);
    }
    let first = world.actions();
    let asked: Vec<_> = first.iter().filter_map(asked_of_home).collect();
    assert_eq!(asked.len(), 6, "as many as the window allows");
    // Four of those that wait for the home come to a neighbour.
    let mut waiting = (0..16).filter(|piece| asked.iter().all(|(_, on_its_way)| on_its_way != piece));
    let held: Vec<u32> = waiting.by_ref().take(4).collect();
    held.iter().for_each(|&piece| _ = world.has(2, piece..piece + 1));
    for (request, piece) in asked {
        let next = world.tell(Event::Delivered { request, item: item(piece), bytes: 1 << 20 });
        let next: Vec<u32> = next.iter().filter_map(asked_of_home).map(|(_, piece)| piece).collect();
        assert!(next.len() == 1 && !held.contains(&next[0]), "{next:?} of {held:?}");
    }
}

#[test]
fn other_zones_are_asked_by_the_homes_and_by_nodes_without_one() {
    let far = |world: &mut World| {
        let labels = Default::default();
        world.tell(Event::PeerUp { peer: peer(2), role: Role::Node, zone: "b".into(), labels });
        world.has(2, 0..3);
    };
    let mut world = World::new();
    world.up(SEED);
    world.seed(SEED);
    far(&mut world);
    assert_eq!(all_asked(&world.want(0)), [(Source::Home(peer(SEED)), vec![0])]);
    world.note_want(1, Priority::Prefetch, Origin::Local);
    assert_eq!(all_asked(&world.actions()), [(Source::Home(peer(SEED)), vec![1])]);
    let actions = world.tell(Event::LeaseEnded { peer: peer(SEED) });
    assert_eq!(all_asked(&actions), [], "both are on their way");
    assert_eq!(all_asked(&world.want(2)), [(Source::Peer(peer(2)), vec![2])]);

    let mut world = World::new();
    far(&mut world);
    world.seed(ME);
    world.note_want(0, Priority::Prefetch, Origin::ForPeer);
    assert_eq!(all_asked(&world.actions()), [(Source::Peer(peer(2)), vec![0])], "rather than the registry again");
}
