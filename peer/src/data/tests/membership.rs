//! Who gets a connection, and that two peers keep one.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_address_where_somebody_else_answers_is_refused() {
    let (mut a, mut b) = (Node::start("a", serving(1)), Node::start("b", serving(1)));
    let other = PeerId::new([7; 32]);
    a.plane.connect(other, &[b.address()]);
    eventually(|| dials(&a.plane) == 0).await;
    assert!(!a.plane.is_connected(other));
    // The first that both hear is the connection that was meant.
    a.connect(&b);
    assert_eq!(a.up().await.0, b.peer);
    assert_eq!(b.up().await.0, a.peer);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_are_refused_by_who_is_dialled_and_by_who_dials() {
    let never: Arc<dyn Service> = Arc::new(Answering(|_, _, _| panic!("a stranger's request reached the service")));
    let member = Node::start("member", never);
    let stranger = Node::with("stranger", serving(1), b"forged", Limits::default());
    stranger.connect(&member);
    eventually(|| dials(&stranger.plane) == 0).await;
    member.connect(&stranger);
    eventually(|| dials(&member.plane) == 0).await;
    assert!(!member.plane.is_connected(stranger.peer));
    eventually(|| !stranger.plane.is_connected(member.peer)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_without_overlap_do_not_connect() {
    let mut a = Node::start("a", serving(1));
    let keypair = Keypair::generate_ed25519();
    let peer = peer_id(&keypair);
    let (version, min_version) = (shoal_proto::VERSION + 2, shoal_proto::VERSION + 1);
    let hello = Hello { version, min_version, ..hello("newer", MEMBER) };
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let options = DataOptions { keypair, listen, hello, admit: admit(), limits: Limits::default() };
    let (plane, mut events) = DataPlane::start(options, serving(1)).expect("loopback can be listened on");
    plane.connect(a.peer, &[a.address()]);
    eventually(|| dials(&plane) == 0).await;
    assert!(events.try_recv().is_err() && a.events.try_recv().is_err());
    assert!(!a.plane.is_connected(peer));
}

#[tokio::test(flavor = "multi_thread")]
async fn dialling_at_once_ends_with_one_connection() {
    for _ in 0..4 {
        let (a, b) = (Node::start("a", serving(10)), Node::start("b", serving(10)));
        a.connect(&b);
        b.connect(&a);
        eventually(|| dials(&a.plane) + dials(&b.plane) == 0).await;
        let one = |node: &Node| Some(node.plane.connections()).filter(|all| all.len() == 1).map(|all| all[0].dialled);
        eventually(|| matches!((one(&a), one(&b)), (Some(ours), Some(theirs)) if ours != theirs)).await;
        eventually(|| open_connections(&a) == 1 && open_connections(&b) == 1).await;
        let expected = Answer::Data { piece: 3, bytes: piece(3, 10) };
        assert_eq!(all(a.ask(b.peer, 3, &[10]).await).await, vec![Ok(expected)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_lost_its_connection_gets_another() {
    let (mut a, mut b) = pair(serving(1), serving(1)).await;
    a.plane.disconnect(b.peer);
    assert!(matches!(a.down().await, Gone::Ours { why: Closing::Disconnected, .. }));
    assert!(matches!(b.down().await, Gone::Theirs { why: Closing::Disconnected, .. }));
    b.connect(&a);
    assert_eq!(a.up().await.0, b.peer);
    assert_eq!(b.up().await.0, a.peer);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_banned_stay_out_until_the_ban_ends() {
    let (mut a, mut b) = pair(serving(1), serving(1)).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn one_good_address_among_bad_ones_is_enough() {
    let (mut a, b) = (Node::start("a", serving(1)), Node::start("b", serving(1)));
    let other = Node::start("other", serving(1));
    let nobody = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    a.plane.connect(b.peer, &[nobody, other.address(), b.address()]);
    assert_eq!(a.up().await.0, b.peer);
}

/// Dials under way.
fn dials(plane: &DataPlane) -> usize {
    plane.shared().table().dials()
}

/// Connections that QUIC has not yet forgotten.
fn open_connections(node: &Node) -> usize {
    node.plane.shared().endpoint.open_connections()
}
