//! Peers with a good identity and membership, or without, that break the protocol in every way that came to mind.
//! Each loses its connection and no more happens: the same node goes on serving others.

pub(super) mod tcp;

use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use shoal_proto::{Data, Status, encode_header};

use super::*;

/// A raw QUIC endpoint with a good identity.
struct Double {
    endpoint: Endpoint,
    client: quinn::ClientConfig,
    peer: PeerId,
}

impl Double {
    fn new() -> Self {
        let keypair = Keypair::generate_ed25519();
        let configs = tls::configure(&keypair).expect("a certificate can be made");
        let (client, server) = configs.quic().expect("it fits QUIC");
        let server = quinn::ServerConfig::with_crypto(Arc::new(server));
        let endpoint = Endpoint::server(server, any_port()).expect("loopback can be listened on");
        Self { endpoint, client: quinn::ClientConfig::new(Arc::new(client)), peer: peer_id(&keypair) }
    }

    async fn dial(&self, node: &Node) -> Connection {
        let connecting = self.endpoint.connect_with(self.client.clone(), node.address(), tls::SERVER_NAME);
        within(connecting.expect("a good address")).await.expect("the handshake is good")
    }

    /// Dials and says hello as a member does.
    async fn join(&self, node: &Node) -> (Connection, SendStream, RecvStream) {
        let connection = self.dial(node).await;
        let (mut send, receive) = within(connection.open_bi()).await.expect("one stream is allowed");
        send.write_all(&frame(&Message::Hello(hello("double", MEMBER)))).await.expect("the stream is open");
        eventually(|| node.plane.is_connected(self.peer)).await;
        (connection, send, receive)
    }

    /// Accepts one connection as a member does, and gives what is asked on it with where to answer.
    async fn serve(&self) -> (Connection, SendStream, RecvStream) {
        let incoming = within(self.endpoint.accept()).await.expect("the endpoint is open");
        let connection = within(incoming.accept().expect("a good packet")).await.expect("a good handshake");
        connection.set_max_concurrent_bi_streams(16_u32.into());
        let (mut send, receive) = within(connection.accept_bi()).await.expect("a hello comes");
        send.write_all(&frame(&Message::Hello(hello("double", MEMBER)))).await.expect("the stream is open");
        (connection, send, receive)
    }
}

fn frame(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_header(message, &mut bytes).expect("within the limits");
    bytes
}

/// A frame with any header.
fn raw(header: &[u8]) -> Vec<u8> {
    [&(header.len() as u32).to_le_bytes(), header].concat()
}

/// A protobuf field with a length in front.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).expect("short fields only");
    let length = if length < 128 { vec![length] } else { vec![length | 128, 1] };
    [&[number << 3 | 2], &length[..], bytes].concat()
}

/// The same message with a field that nobody knows yet. `number` is the message's own; what comes under it in two parts is
/// put together.
fn with_news(message: &Message, number: u8) -> Vec<u8> {
    let known = &frame(message)[shoal_proto::PREFIX..];
    raw(&[known, &field(number, &field(15, b"news"))].concat())
}

fn code(error: &ConnectionError) -> Option<u64> {
    match error {
        ConnectionError::ApplicationClosed(close) => Some(close.error_code.into_inner()),
        _ => None,
    }
}

async fn assert_closed(connection: &Connection, why: Closing) {
    let error = within(connection.closed()).await;
    assert_eq!(code(&error), Some(why.code().into()), "{error}");
}

/// The node still serves a peer that behaves.
async fn assert_serves(node: &Node) {
    let mut good = Node::start(Transport::Auto, "good", serving(1));
    good.connect(node);
    good.up().await;
    let expected = Answer::Data { piece: 5, bytes: piece(5, 1000) };
    assert_eq!(all(good.ask(node.peer, 5, &[1000]).await).await, vec![Ok(expected)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_a_later_version_are_passed_over() {
    let node = Node::start(Transport::Auto, "node", serving(1000));
    let double = Double::new();
    let connection = double.dial(&node).await;
    let (mut notices, _heard) = within(connection.open_bi()).await.expect("one stream is allowed");
    let hello = with_news(&Message::Hello(hello("double", MEMBER)), 1);
    notices.write_all(&hello).await.expect("the stream is open");
    eventually(|| node.plane.is_connected(double.peer)).await;
    let (mut asked, mut answers) = within(connection.open_bi()).await.expect("members may ask");
    let request = Message::Request(Request { id: 1, ..request(5, 1, Priority::OnDemand) });
    asked.write_all(&with_news(&request, 2)).await.expect("the stream is open");
    asked.finish().expect("the stream is open");
    let answer = within(answers.read_to_end(10_000)).await.expect("an answer");
    let (answer, _) = shoal_proto::decode_header(&answer).expect("a frame").expect("all of it");
    assert_eq!(answer, Message::Data(Data { request: 1, piece: 5, total: 1000, offset: 0, length: 1000 }));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_frames_on_a_request_stream_close_the_connection() {
    let node = Node::start(Transport::Auto, "node", serving(1000));
    let bad_request = [field(2, &[8, 1]), vec![0; 3]].concat();
    let attacks: [&[u8]; 7] = [
        &u32::MAX.to_le_bytes(),
        &(shoal_proto::MAX_HEADER as u32 + 1).to_le_bytes(),
        &0_u32.to_le_bytes(),
        &raw(&[0xff; 40]),
        &raw(&bad_request),
        &frame(&Message::Data(Data { request: 1, piece: 0, total: 1, offset: 0, length: 1 })),
        &frame(&Message::Hello(hello("again", MEMBER))),
    ];
    for attack in attacks {
        let double = Double::new();
        let (connection, _notices, _heard) = double.join(&node).await;
        let (mut send, _answers) = within(connection.open_bi()).await.expect("members may ask");
        send.write_all(attack).await.expect("the stream is open");
        assert_closed(&connection, Closing::Violation).await;
    }
    assert_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_notices_close_the_connection() {
    let node = Node::start(Transport::Auto, "node", serving(1000));
    // A bitfield of 2^32 - 1 pieces in one run, in a `Have` that is fine otherwise.
    let absurd = [vec![8, 0xff, 0xff, 0xff, 0xff, 15], field(2, &[0, 0xff, 0xff, 0xff, 0xff, 15])].concat();
    let have = field(11, &[field(1, &[1; 32]), field(2, &[2; 32]), vec![24, 1], field(5, &absurd)].concat());
    // Bits that are said to be there and are not.
    let short = [vec![8, 0x80, 0x80, 4], field(3, &[0xff; 3])].concat();
    let cut = field(11, &[field(1, &[1; 32]), field(2, &[2; 32]), vec![24, 1], field(5, &short)].concat());
    let attacks: [&[u8]; 5] = [
        &raw(&have),
        &raw(&cut),
        &frame(&Message::Hello(hello("again", MEMBER))),
        &frame(&Message::End { request: 1, status: Status::Complete }),
        &[0xff; 100_000],
    ];
    for attack in attacks {
        let double = Double::new();
        let (connection, mut notices, _heard) = double.join(&node).await;
        // The node may close before all of it is written.
        let _ = notices.write_all(attack).await;
        assert_closed(&connection, Closing::Violation).await;
    }
    assert_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_says_something_else_than_hello_is_closed_unheard() {
    let never: Arc<dyn Service> = Arc::new(Answering(|_, _, _| panic!("a request came before a hello")));
    let node = Node::start(Transport::Auto, "node", never);
    let request = Message::Request(request(0, 1, Priority::OnDemand));
    for attack in [frame(&request), raw(&[7; 10]), u32::MAX.to_le_bytes().to_vec()] {
        let double = Double::new();
        let connection = double.dial(&node).await;
        let (mut send, mut receive) = within(connection.open_bi()).await.expect("one stream is allowed");
        send.write_all(&attack).await.expect("the stream is open");
        assert_closed(&connection, Closing::Violation).await;
        assert!(receive.read_to_end(10).await.is_err(), "nothing is said to strangers");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_gets_one_stream_and_a_small_window() {
    let node = Node::start(Transport::Auto, "node", serving(1000));
    let double = Double::new();
    let connection = double.dial(&node).await;
    let (mut send, _receive) = within(connection.open_bi()).await.expect("one stream is allowed");
    assert!(tokio::time::timeout(Duration::from_millis(200), connection.open_bi()).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(200), connection.open_uni()).await.is_err());
    // A header that never ends, then silence.
    send.write_all(&(shoal_proto::MAX_HEADER as u32).to_le_bytes()).await.expect("the stream is open");
    assert_closed(&connection, Closing::Violation).await;
    assert_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_after_the_handshake_is_not_waited_out() {
    let node = Node::start(Transport::Auto, "node", serving(1000));
    let double = Double::new();
    let connection = double.dial(&node).await;
    assert_serves(&node).await;
    assert_closed(&connection, Closing::Violation).await;
}

/// Lets a node ask a double for pieces 10 and 11 of at most 1000 bytes, and has the double answer with `frames`.
async fn answered_with(frames: impl FnOnce(u64) -> Vec<u8>) -> (Vec<Result<Answer, AnswerError>>, Gone) {
    let mut node = Node::start(Transport::Quic, "node", serving(1000));
    let double = Double::new();
    node.plane.connect(double.peer, &[double.endpoint.local_addr().expect("it is bound")]);
    let (connection, _notices, _heard) = double.serve().await;
    node.up().await;
    let answer = async {
        let (mut send, _asked) = within(connection.accept_bi()).await.expect("a request comes");
        // The first request of a connection has the id 1. The node may close before all of it is written; otherwise
        // the stream ends here.
        let _ = send.write_all(&frames(1)).await;
    };
    let ask = async { all(node.ask(double.peer, 10, &[1000, 1000]).await).await };
    let (answers, ()) = tokio::join!(ask, answer);
    let gone = node.down().await;
    assert_eq!(code(&within(connection.closed()).await), Some(Closing::Violation.code().into()));
    assert_serves(&node).await;
    (answers, gone)
}

fn part(request: u64, piece: u32, total: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u32;
    [&frame(&Message::Data(Data { request, piece, total, offset, length }))[..], bytes].concat()
}

async fn assert_violation(frames: impl FnOnce(u64) -> Vec<u8>) {
    let (answers, gone) = answered_with(frames).await;
    assert!(matches!(answers[..], [Err(AnswerError::Violation(_))]), "{answers:?}");
    assert!(matches!(gone, Gone::Ours { why: Closing::Violation, .. }), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_to_other_questions_are_violations() {
    assert_violation(|id| part(id + 1, 10, 4, 0, b"data")).await;
    assert_violation(|id| part(id, 12, 4, 0, b"data")).await;
    assert_violation(|_| frame(&Message::Hello(hello("again", MEMBER)))).await;
    assert_violation(|id| frame(&Message::Cancel { request: id })).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_than_was_declared_or_can_be_is_a_violation() {
    assert_violation(|id| part(id, 10, 1001, 0, &[0; 1001])).await;
    assert_violation(|id| part(id, 10, shoal_proto::MAX_ANSWER, 0, &[0; 1001])).await;
    assert_violation(|id| [part(id, 10, 8, 0, b"data"), part(id, 10, 8, 2, b"data")].concat()).await;
    assert_violation(|id| [part(id, 10, 8, 0, b"data"), vec![0; 1 << 20]].concat()).await;
    assert_violation(|_| u32::MAX.to_le_bytes().to_vec()).await;
    assert_violation(|_| vec![0xee; 20 << 20]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_ends_in_the_middle_is_a_violation() {
    assert_violation(|id| frame(&Message::End { request: id, status: Status::Complete })).await;
    assert_violation(|id| part(id, 10, 8, 0, b"data")[..6].to_vec()).await;
    let (answers, _) = answered_with(|id| [part(id, 11, 4, 0, b"good"), part(id, 10, 8, 0, b"data")].concat()).await;
    let good = Answer::Data { piece: 11, bytes: Bytes::from_static(b"good") };
    assert_eq!(answers[0], Ok(good));
    assert!(matches!(answers[1..], [Err(AnswerError::Violation(_))]), "{answers:?}");
}
