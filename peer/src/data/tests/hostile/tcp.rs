//! The same over TCP, where all that a peer says shares one stream.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::*;

/// TLS with a good identity, and nothing above it.
pub(in crate::data::tests) struct TcpDouble {
    tls: tls::Configs,
    peer: PeerId,
}

impl TcpDouble {
    pub(in crate::data::tests) fn new() -> Self {
        let keypair = Keypair::generate_ed25519();
        Self { tls: tls::configure(&keypair).expect("a certificate can be made"), peer: peer_id(&keypair) }
    }

    pub(in crate::data::tests) fn peer(&self) -> PeerId {
        self.peer
    }

    pub(in crate::data::tests) async fn dial(&self, node: &Node) -> TlsStream<TcpStream> {
        let stream = TcpStream::connect(node.address()).await.expect("the node listens");
        let tls = TlsConnector::from(self.tls.client.clone()).connect(tls::server_name(), stream);
        within(tls).await.expect("the handshake is good").into()
    }

    /// Dials and says hello as a member does.
    async fn join(&self, node: &Node) -> TlsStream<TcpStream> {
        let mut stream = self.dial(node).await;
        say(&mut stream, &frame(&Message::Hello(hello("double", MEMBER)))).await;
        eventually(|| node.plane.is_connected(self.peer)).await;
        stream
    }

    /// Accepts one connection and says nothing.
    pub(in crate::data::tests) async fn accept(&self, listener: &TcpListener) -> TlsStream<TcpStream> {
        let (stream, _) = within(listener.accept()).await.expect("the node dials");
        let tls = TlsAcceptor::from(self.tls.server.clone()).accept(stream);
        within(tls).await.expect("the handshake is good").into()
    }

    /// Accepts one connection and says hello as a member does.
    async fn serve(&self, listener: &TcpListener) -> TlsStream<TcpStream> {
        let mut stream = self.accept(listener).await;
        say(&mut stream, &frame(&Message::Hello(hello("double", MEMBER)))).await;
        stream
    }
}

/// Writes; the node may close before it has all.
async fn say(stream: &mut TlsStream<TcpStream>, bytes: &[u8]) {
    let _ = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    }
    .await;
}

/// All that the node says until it closes: messages without payload.
async fn heard(stream: &mut TlsStream<TcpStream>) -> Vec<Message> {
    let mut bytes = Vec::new();
    // What was said before it was cut off counts.
    let _ = within(stream.read_to_end(&mut bytes)).await;
    let (mut rest, mut messages) = (&bytes[..], Vec::new());
    while let Ok(Some((message, length))) = shoal_proto::decode_header(rest) {
        messages.push(message);
        rest = &rest[length..];
    }
    messages
}

async fn assert_closed(stream: &mut TlsStream<TcpStream>, why: Closing) -> Vec<Message> {
    let mut messages = heard(stream).await;
    let last = messages.pop();
    assert!(matches!(&last, Some(Message::Close { code, .. }) if *code == why.code()), "{last:?}");
    messages
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_place_closes_the_connection() {
    let node = Node::start(Transport::Auto, "node", serving(1000));
    let data = |request| Message::Data(Data { request, piece: 0, total: 1, offset: 0, length: 1 });
    let asked = |id| frame(&Message::Request(Request { id, ..request(0, 1, Priority::OnDemand) }));
    let attacks: [&[u8]; 8] = [
        &u32::MAX.to_le_bytes(),
        &(shoal_proto::MAX_HEADER as u32 + 1).to_le_bytes(),
        &0_u32.to_le_bytes(),
        &raw(&[0xff; 40]),
        &frame(&data(1)),
        &frame(&Message::End { request: 1, status: Status::Complete }),
        &frame(&Message::Hello(hello("again", MEMBER))),
        &[asked(1), frame(&data(1))].concat(),
    ];
    for attack in attacks {
        let mut stream = TcpDouble::new().join(&node).await;
        say(&mut stream, attack).await;
        assert_closed(&mut stream, Closing::Violation).await;
    }
    assert_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_under_the_number_of_an_open_one_closes_the_connection() {
    let (service, _given_up) = holding();
    let node = Node::start(Transport::Tcp, "node", service);
    let mut stream = TcpDouble::new().join(&node).await;
    let asked = frame(&Message::Request(Request { id: 7, ..request(0, 1, Priority::OnDemand) }));
    say(&mut stream, &[&asked[..], &asked].concat()).await;
    assert_closed(&mut stream, Closing::Violation).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_something_else_than_hello_hears_only_why_it_is_closed() {
    let never: Arc<dyn Service> = Arc::new(Answering(|_, _, _| panic!("a request came before a hello")));
    let node = Node::start(Transport::Tcp, "node", never);
    let asked = frame(&Message::Request(request(0, 1, Priority::OnDemand)));
    let forged = frame(&Message::Hello(hello("double", b"forged")));
    let attacks = [
        (asked, Closing::Violation),
        (raw(&[7; 10]), Closing::Violation),
        (u32::MAX.to_le_bytes().to_vec(), Closing::Violation),
        (forged, Closing::Refused),
    ];
    for (attack, why) in attacks {
        let mut stream = TcpDouble::new().dial(&node).await;
        say(&mut stream, &attack).await;
        assert_eq!(assert_closed(&mut stream, why).await, [], "nothing is said to strangers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_silent_lose_their_place() {
    let limits = Limits { strangers: 2, ..Limits::default() };
    let node = Node::with(Transport::Tcp, "node", serving(1000), MEMBER, limits);
    // One says nothing at all, one stops after the handshake.
    let mut no_tls = TcpStream::connect(node.address()).await.expect("the node listens");
    let mut no_hello = TcpDouble::new().dial(&node).await;
    // While they have all places nobody else is heard.
    let mut third = TcpStream::connect(node.address()).await.expect("the node listens");
    assert_eq!(within(third.read(&mut [0])).await.ok(), Some(0));
    assert_closed(&mut no_hello, Closing::Violation).await;
    assert_eq!(within(no_tls.read(&mut [0])).await.ok(), Some(0));
    assert_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_flood_of_connections_few_are_held_and_members_get_in_afterwards() {
    let limits = Limits { strangers: 8, ..Limits::default() };
    let node = Node::with(Transport::Tcp, "node", serving(1000), MEMBER, limits);
    let flood = (0..200).map(|_| TcpStream::connect(node.address()));
    let flood = futures::future::try_join_all(flood).await.expect("the node listens");
    // Those for whom there is no place are closed at once, the others when they have been silent for too long.
    let closed = flood.into_iter().map(|mut stream| async move {
        let read = within(stream.read(&mut [0])).await;
        assert!(!matches!(read, Ok(1..)), "nothing is said to strangers");
    });
    futures::future::join_all(closed).await;
    assert!(node.plane.connections().is_empty());
    assert_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_requests_ends_the_connection() {
    let silent = Answering(|_, _, answers: AnswerSender| {
        tokio::spawn(async move { answers.cancelled().cancelled().await });
    });
    let most = shoal_proto::MAX_OPEN;
    let limits = Limits { requests: 4 * most, requests_per_peer: 2 * most, ..Limits::default() };
    let mut node = Node::with(Transport::Tcp, "node", Arc::new(silent), MEMBER, limits);
    let mut stream = TcpDouble::new().join(&node).await;
    node.up().await;
    let ask = |id| frame(&Message::Request(Request { id, ..request(0, 1, Priority::OnDemand) }));
    let asked: Vec<u8> = (0..most as u64).flat_map(ask).collect();
    say(&mut stream, &asked).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(node.events.try_recv().is_err() && !node.plane.connections().is_empty(), "as many are allowed");
    say(&mut stream, &ask(most as u64)).await;
    assert_closed(&mut stream, Closing::Violation).await;
    let gone = node.down().await;
    assert!(matches!(gone, Gone::Ours { why: Closing::Violation, .. }), "{gone}");
}

/// Lets a node ask a double for pieces 10 and 11 of at most 1000 bytes, and has the double answer with `frames`.
async fn answered_with(frames: impl FnOnce(u64) -> Vec<u8>) -> (Vec<Result<Answer, AnswerError>>, Gone) {
    let mut node = Node::start(Transport::Tcp, "node", serving(1000));
    let double = TcpDouble::new();
    let listener = TcpListener::bind(any_port()).await.expect("loopback can be listened on");
    node.plane.connect(double.peer, &[listener.local_addr().expect("it is bound")]);
    let mut stream = double.serve(&listener).await;
    node.up().await;
    let answer = async {
        // The first request of a connection has the id 1.
        say(&mut stream, &frames(1)).await;
        assert_closed(&mut stream, Closing::Violation).await;
    };
    let ask = async { all(node.ask(double.peer, 10, &[1000, 1000]).await).await };
    let (answers, ()) = tokio::join!(ask, answer);
    let gone = node.down().await;
    (answers, gone)
}

async fn assert_violation(frames: impl FnOnce(u64) -> Vec<u8>) {
    let (answers, gone) = answered_with(frames).await;
    assert!(matches!(answers[..], [Err(_)]), "{answers:?}");
    assert!(matches!(gone, Gone::Ours { why: Closing::Violation, .. }), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_answers_are_violations() {
    assert_violation(|id| part(id + 1, 10, 4, 0, b"data")).await;
    assert_violation(|id| part(id, 12, 4, 0, b"data")).await;
    assert_violation(|id| part(id, 10, 1001, 0, &[0; 1001])).await;
    assert_violation(|id| part(id, 10, 8000, 0, &[0; 2001])).await;
    assert_violation(|id| [part(id, 10, 8, 0, b"data"), part(id, 10, 8, 2, b"data")].concat()).await;
    assert_violation(|id| [part(id, 10, 8, 0, b"data"), part(id, 11, 8, 0, b"data")].concat()).await;
    assert_violation(|id| frame(&Message::End { request: id, status: Status::Complete })).await;
    assert_violation(|_| vec![0xee; 4 << 20]).await;
}
