//! Who gets a connection, and that two peers keep one.

use super::*;
use crate::data::quic::Quic;

#[tokio::test(flavor = "multi_thread")]
async fn an_address_where_somebody_else_answers_is_refused() {
    for transport in TRANSPORTS {
        let (mut a, mut b) = (Node::start(transport, "a", serving(1)), Node::start(transport, "b", serving(1)));
        let other = PeerId::new([7; 32]);
        a.plane.connect(other, &[b.address()]);
        eventually(|| dials(&a.plane) == 0).await;
        assert!(!a.plane.is_connected(other));
        // The first that both hear is the connection that was meant.
        a.connect(&b);
        assert_eq!(a.up().await.0, b.peer);
        assert_eq!(b.up().await.0, a.peer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_by_who_is_dialled_and_by_who_dials() {
    for transport in TRANSPORTS {
        let never: Arc<dyn Service> =
            Arc::new(Answering(|_, _, _| panic!("a stranger's request reached the service")));
        let member = Node::start(transport, "member", never);
        let stranger = Node::with(transport, "stranger", serving(1), b"forged", Limits::default());
        stranger.connect(&member);
        eventually(|| dials(&stranger.plane) == 0).await;
        member.connect(&stranger);
        eventually(|| dials(&member.plane) == 0).await;
        assert!(!member.plane.is_connected(stranger.peer));
        eventually(|| !stranger.plane.is_connected(member.peer)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_without_overlap_do_not_connect() {
    for transport in TRANSPORTS {
        let mut a = Node::start(transport, "a", serving(1));
        let (version, min_version) = (shoal_proto::VERSION + 2, shoal_proto::VERSION + 1);
        let hello = Hello { version, min_version, ..hello("newer", MEMBER) };
        let mut newer = Node::saying(transport, hello, serving(1), Limits::default());
        newer.connect(&a);
        eventually(|| dials(&newer.plane) == 0).await;
        assert!(newer.events.try_recv().is_err() && a.events.try_recv().is_err());
        assert!(!a.plane.is_connected(newer.peer));
    }
}

/// A daemon of the next version speaks this one as well; that there is more to it changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn daemons_a_version_apart_work_together() {
    for transport in TRANSPORTS {
        let mut this = Node::start(transport, "this", serving(100));
        let (version, min_version) = (shoal_proto::VERSION + 1, shoal_proto::VERSION);
        let hello = Hello { version, min_version, features: u64::MAX, ..hello("next", MEMBER) };
        let mut next = Node::saying(transport, hello, serving(100), Limits::default());
        next.connect(&this);
        assert_eq!((this.up().await.1.version, next.up().await.1.version), (version, shoal_proto::VERSION));
        for (asker, server) in [(&this, &next), (&next, &this)] {
            let expected = Answer::Data { piece: 4, bytes: piece(4, 100) };
            assert_eq!(all(asker.ask(server.peer, 4, &[100]).await).await, vec![Ok(expected)]);
        }
        let (bootstrap, blob) = (ObjectId::new([1; 32]), BlobId::new([2; 32]));
        next.plane.notify(this.peer, Message::Interest { bootstrap, blob }).expect("room for a notice");
        assert_eq!(this.event().await, PeerEvent::Interest { peer: next.peer, bootstrap, blob });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dialling_at_once_ends_with_one_connection() {
    for transport in TRANSPORTS {
        for _ in 0..4 {
            let (a, b) = (Node::start(transport, "a", serving(10)), Node::start(transport, "b", serving(10)));
            a.connect(&b);
            b.connect(&a);
            eventually(|| dials(&a.plane) + dials(&b.plane) == 0).await;
            let one =
                |node: &Node| Some(node.plane.connections()).filter(|all| all.len() == 1).map(|all| all[0].dialled);
            eventually(|| matches!((one(&a), one(&b)), (Some(ours), Some(theirs)) if ours != theirs)).await;
            eventually(|| connections_left(&a) <= 1 && connections_left(&b) <= 1).await;
            let expected = Answer::Data { piece: 3, bytes: piece(3, 10) };
            assert_eq!(all(a.ask(b.peer, 3, &[10]).await).await, vec![Ok(expected)]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lost_its_connection_gets_another() {
    for transport in TRANSPORTS {
        let (mut a, mut b) = pair(transport, serving(1), serving(1)).await;
        a.plane.disconnect(b.peer);
        assert!(matches!(a.down().await, Gone::Ours { why: Closing::Disconnected, .. }));
        assert!(matches!(b.down().await, Gone::Theirs { why: Closing::Disconnected, .. }));
        b.connect(&a);
        assert_eq!(a.up().await.0, b.peer);
        assert_eq!(b.up().await.0, a.peer);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_banned_stay_out_until_the_ban_ends() {
    for transport in TRANSPORTS {
        let (mut a, mut b) = pair(transport, serving(1), serving(1)).await;
        a.plane.ban(b.peer, Duration::from_secs(3600));
        assert!(matches!(a.down().await, Gone::Ours { why: Closing::Banned, .. }));
        assert!(matches!(b.down().await, Gone::Theirs { why: Closing::Banned, .. }));
        b.connect(&a);
        a.connect(&b);
        eventually(|| dials(&a.plane) + dials(&b.plane) == 0).await;
        assert!(!a.plane.is_connected(b.peer));
        eventually(|| !b.plane.is_connected(a.peer)).await;
        a.plane.ban(b.peer, Duration::ZERO);
        a.connect(&b);
        eventually(|| a.plane.is_connected(b.peer)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_good_address_among_bad_ones_is_enough() {
    for transport in TRANSPORTS {
        let (mut a, b) = (Node::start(transport, "a", serving(1)), Node::start(transport, "b", serving(1)));
        let other = Node::start(transport, "other", serving(1));
        let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
        a.plane.connect(b.peer, &[nobody, other.address(), b.address()]);
        assert_eq!(a.up().await.0, b.peer);
    }
}

/// Dials under way.
fn dials(plane: &DataPlane) -> usize {
    plane.shared().table().dials()
}

/// Connections that QUIC has not yet forgotten.
fn connections_left(node: &Node) -> usize {
    node.plane.shared().endpoint.quic.as_ref().map_or(0, Quic::open_connections)
}
