//! Limits that a node keeps when it serves, and changes of them while it does.

use super::*;
use shoal_scheduler::Rates;

/// After one piece nothing passes for longer than any test takes.
const CRAWLING: Rates = Rates { all: 1, prefetch: 0 };

/// A node with these limits, and one that is connected to it.
async fn limited(transport: Transport, limits: Limits, service: Arc<dyn Service>) -> (Node, Node) {
    let server = Node::with(transport, "server", service, MEMBER, limits);
    let asker = asker(transport, &server).await;
    (server, asker)
}

async fn asker(transport: Transport, server: &Node) -> Node {
    let mut asker = Node::start(transport, "asker", serving(1));
    asker.connect(server);
    asker.up().await;
    asker
}

async fn ask(asker: &Node, server: &Node, priority: Priority) -> AnswerStream {
    within(asker.plane.request(server.peer, request(3, 1, priority), vec![1000])).await.expect("it is connected")
}

/// The first answer that is more than a word of patience.
async fn first(answers: &mut AnswerStream) -> Answer {
    loop {
        match within(answers.next()).await.expect("an answer").expect("a good one") {
            Answer::Pending { .. } => {}
            answer => return answer,
        }
    }
}

async fn assert_waits(answers: &mut AnswerStream) {
    let next = within(answers.next()).await;
    assert!(matches!(next, Some(Ok(Answer::Pending { .. }))), "{next:?}");
}

fn data() -> Answer {
    Answer::Data { piece: 3, bytes: piece(3, 1000) }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_limit_hears_so_and_goes_on_when_it_is_lifted() {
    for transport in TRANSPORTS {
        let none = Limits::default();
        for limits in [Limits { upload: CRAWLING, ..none }, Limits { upload_per_peer: CRAWLING, ..none }] {
            let (server, node) = limited(transport, limits, serving(1000)).await;
            assert_eq!(first(&mut ask(&node, &server, Priority::OnDemand).await).await, data());
            let mut waiting = ask(&node, &server, Priority::OnDemand).await;
            assert_waits(&mut waiting).await;
            assert_waits(&mut waiting).await;
            if limits.upload == none.upload {
                let other = asker(transport, &server).await;
                assert_eq!(first(&mut ask(&other, &server, Priority::OnDemand).await).await, data());
            }
            server.plane.adjust(none);
            assert_eq!(first(&mut waiting).await, data());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_are_not_behind_limited_prefetch() {
    for transport in TRANSPORTS {
        let limits = Limits { upload: Rates { all: 0, prefetch: 1 }, ..Limits::default() };
        let (server, node) = limited(transport, limits, serving(1000)).await;
        assert_eq!(first(&mut ask(&node, &server, Priority::Prefetch).await).await, data());
        let mut prefetch = ask(&node, &server, Priority::Prefetch).await;
        assert_waits(&mut prefetch).await;
        for _ in 0..10 {
            assert_eq!(first(&mut ask(&node, &server, Priority::OnDemand).await).await, data());
        }
        drop(prefetch);
        let mut later = ask(&node, &server, Priority::Prefetch).await;
        assert_waits(&mut later).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn places_for_requests_and_connections_can_be_changed() {
    for transport in TRANSPORTS {
        let limits = Limits { requests_per_peer: 1, connections: 1, ..Limits::default() };
        let (server, node) = limited(transport, limits, holding().0).await;
        let mut held = ask(&node, &server, Priority::OnDemand).await;
        assert_waits(&mut held).await;
        let busy = first(&mut ask(&node, &server, Priority::OnDemand).await).await;
        assert!(matches!(busy, Answer::Busy { .. }), "{busy:?}");
        let second = Node::start(transport, "second", serving(1));
        second.connect(&server);
        eventually(|| second.plane.shared().table().dials() == 0).await;
        eventually(|| !second.plane.is_connected(server.peer)).await;

        server.plane.adjust(Limits { requests_per_peer: 2, connections: 2, ..limits });
        assert_eq!(server.plane.limits().connections, 2);
        assert_waits(&mut ask(&node, &server, Priority::OnDemand).await).await;
        asker(transport, &server).await;
        assert!(server.plane.is_connected(node.peer), "who is there stays");
    }
}
