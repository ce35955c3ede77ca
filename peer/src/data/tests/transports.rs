//! Which transport reaches a peer.

use super::*;
use crate::data::{
    endpoint::{Endpoint, choose},
    wire::Wire,
};

/// What carries the connection from a node that dials one way to one that listens another way; `None` when neither fits.
async fn carried(dials: Transport, listens: Transport) -> Option<&'static str> {
    let (a, b) = (Node::start(dials, "a", serving(1)), Node::start(listens, "b", serving(1)));
    a.connect(&b);
    eventually(|| a.plane.shared().table().dials() == 0).await;
    let connections = a.plane.connections();
    if let [connection] = &connections[..] {
        let expected = Answer::Data { piece: 1, bytes: piece(1, 1) };
        assert_eq!(all(a.ask(b.peer, 1, &[1]).await).await, vec![Ok(expected)]);
        return Some(connection.transport);
    }
    assert!(connections.is_empty());
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn near_peers_are_reached_by_what_both_speak_tcp_first() {
    use Transport::{Auto, Quic, Tcp};
    assert_eq!(carried(Auto, Auto).await, Some("tcp"));
    assert_eq!(carried(Auto, Quic).await, Some("quic"));
    assert_eq!(carried(Auto, Tcp).await, Some("tcp"));
    assert_eq!(carried(Quic, Auto).await, Some("quic"));
    assert_eq!(carried(Tcp, Auto).await, Some("tcp"));
    assert_eq!(carried(Tcp, Quic).await, None);
}

/// An endpoint that dials `node` by either transport.
fn dialler() -> Endpoint {
    let tls = tls::configure(&Keypair::generate_ed25519()).expect("a certificate can be made");
    Endpoint::bind(any_port(), Transport::Auto, &tls, &TaskTracker::new()).expect("loopback can be listened on")
}

#[tokio::test(flavor = "multi_thread")]
async fn far_peers_are_reached_by_quic_unless_it_fails() {
    let node = Node::start(Transport::Auto, "node", serving(1));
    let deaf = Node::start(Transport::Tcp, "deaf", serving(1));
    let endpoint = dialler();
    let (tcp, quic) = (endpoint.tcp.as_ref().expect("it is bound"), endpoint.quic.as_ref().expect("it is bound"));
    let by_tcp = async |to: &Node| tcp.dial(to.address()).await.map(Wire::Tcp);
    let by_quic = async |to: &Node| quic.dial(to.address()).await.map(Wire::Quic);
    let never = std::future::pending();
    let fails = async || Err(HandshakeError::TimedOut);
    let far = |_: &Wire| false;

    let name = |chosen: Result<Wire, HandshakeError>| chosen.ok().map(|wire| wire.transport());
    assert_eq!(name(choose(far, by_tcp(&node), by_quic(&node)).await), Some("quic"));
    assert_eq!(name(choose(far, by_tcp(&deaf), fails()).await), Some("tcp"));
    assert_eq!(name(choose(far, never, by_quic(&node)).await), Some("quic"), "TCP may be filtered");
    assert_eq!(name(choose(far, fails(), by_quic(&node)).await), Some("quic"));
    let both = choose(far, fails(), fails()).await.expect_err("neither reaches it").to_string();
    assert!(both.contains("by TCP") && both.contains("by QUIC"), "{both}");
}
