//! A peer of the previous release: it knows the messages of that release's schema, by code made of it, and no others.

use prost::Message as _;
use shoal_proto::{Bitfield, FEATURE_HASH_LISTS, FEATURE_START_TRACES, StartTrace};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsStream;

use super::{hostile::tcp::TcpDouble, *};

#[allow(missing_docs, unreachable_pub, dead_code, clippy::all, reason = "it is generated, and was another crate's")]
#[rustfmt::skip]
#[path = "../../../../proto/previous/shoal.wire.v1.rs"]
mod old;

use old::header::Message as Old;

/// One connection of such a peer.
struct Previous {
    stream: TlsStream<TcpStream>,
    peer: PeerId,
}

impl Previous {
    async fn say(&mut self, message: Old, payload: &[u8]) {
        let header = old::Header { message: Some(message) }.encode_to_vec();
        self.stream.write_u32_le(header.len() as u32).await.expect("the node listens");
        self.stream.write_all(&header).await.expect("the node listens");
        self.stream.write_all(payload).await.expect("the node listens");
        self.stream.flush().await.expect("the node listens");
    }

    /// The next message, and what follows it. One that this release does not know ends the test.
    async fn hear(&mut self) -> (Old, Vec<u8>) {
        let length = within(self.stream.read_u32_le()).await.expect("a message comes");
        let mut header = vec![0; length as usize];
        within(self.stream.read_exact(&mut header)).await.expect("all of it comes");
        let message = old::Header::decode(&header[..]).expect("protobuf").message.expect("a message that is known");
        let length = if let Old::Data(data) = &message { data.length } else { 0 };
        let mut payload = vec![0; length as usize];
        within(self.stream.read_exact(&mut payload)).await.expect("all of it comes");
        (message, payload)
    }

    async fn greet(&mut self) {
        let hello = old::Hello {
            version: 1,
            min_version: 1,
            features: FEATURE_HASH_LISTS,
            membership: Bytes::from_static(MEMBER),
            role: old::Role::Node.into(),
            zone: "claimed".into(),
            name: "previous".into(),
            ..old::Hello::default()
        };
        self.say(Old::Hello(hello), &[]).await;
    }

    async fn greeted(&mut self) {
        let (hello, _) = self.hear().await;
        assert!(matches!(&hello, Old::Hello(hello) if hello.min_version == 1), "{hello:?}");
    }
}

/// A node of this release that has every feature, and one of the previous release, connected; who of the two dialled.
async fn meet(node_dials: bool) -> (Node, Previous) {
    let hello = Hello { features: u64::MAX, data_addresses: vec![any_port()], ..hello("node", MEMBER) };
    let mut node = Node::saying(Transport::Tcp, hello, serving(1000), Limits::default());
    let double = TcpDouble::new();
    let previous = if node_dials {
        let listener = TcpListener::bind(any_port()).await.expect("loopback can be listened on");
        node.plane.connect(double.peer(), &[listener.local_addr().expect("it is bound")]);
        let mut previous = Previous { stream: double.accept(&listener).await, peer: double.peer() };
        previous.greeted().await;
        previous.greet().await;
        previous
    } else {
        let mut previous = Previous { stream: double.dial(&node).await, peer: double.peer() };
        previous.greet().await;
        previous.greeted().await;
        previous
    };
    assert_eq!(node.up().await.0, previous.peer);
    (node, previous)
}

async fn work_together(node_dials: bool) {
    let (mut node, mut previous) = meet(node_dials).await;
    let (bootstrap, blob) = (ObjectId::new([1; 32]), BlobId::new([2; 32]));

    // It asks, and is told.
    let interest = old::Interest { bootstrap: vec![1; 32], blob: vec![2; 32] };
    previous.say(Old::Interest(interest), &[]).await;
    assert_eq!(node.event().await, PeerEvent::Interest { peer: previous.peer, bootstrap, blob });
    let mut pieces = Bitfield::new(9);
    pieces.insert(4);
    let have = Have { bootstrap, blob, full: true, first: 0, pieces };
    node.plane.notify(previous.peer, Message::Have(have)).expect("room for a notice");
    let (told, _) = previous.hear().await;
    assert!(matches!(&told, Old::Have(have) if have.full && have.blob == [2; 32]), "{told:?}");
    let source = Some(old::ImageSource { registry: "registry.test".into(), repository: "app".into() });
    let what = old::request::What::Pieces(old::Pieces {
        bootstrap: vec![1; 32],
        blob: vec![2; 32],
        first: 7,
        fingerprints: vec![vec![3; 32]],
        manifest: Vec::new(),
    });
    let request = old::Request {
        id: 5,
        image: source,
        what: Some(what),
        priority: old::Priority::OnDemand.into(),
        source: false,
        deadline_ms: 30_000,
    };
    previous.say(Old::Request(request), &[]).await;
    let (data, payload) = previous.hear().await;
    assert!(matches!(&data, Old::Data(data) if (data.request, data.piece, data.total) == (5, 7, 1000)), "{data:?}");
    assert!(payload == piece(7, 1000));
    let (end, _) = previous.hear().await;
    assert!(matches!(&end, Old::End(end) if end.status() == old::Status::Complete), "{end:?}");

    // It is asked for what it knows, and answers.
    let asking = node.ask(previous.peer, 3, &[4]);
    let answering = async {
        let (asked, _) = previous.hear().await;
        let Old::Request(asked) = asked else { panic!("no request: {asked:?}") };
        let data = old::Data { request: asked.id, piece: 3, total: 4, offset: 0, length: 4 };
        previous.say(Old::Data(data), b"data").await;
        let end = old::End { request: asked.id, status: old::Status::Complete.into() };
        previous.say(Old::End(end), &[]).await;
    };
    let (answers, ()) = tokio::join!(async { all(asking.await).await }, answering);
    assert_eq!(answers, vec![Ok(Answer::Data { piece: 3, bytes: Bytes::from_static(b"data") })]);

    // What it does not know it is neither told nor asked, and the connection goes on.
    assert!(node.plane.has_feature(previous.peer, FEATURE_HASH_LISTS));
    assert!(!node.plane.has_feature(previous.peer, FEATURE_START_TRACES));
    let news = Message::Trace { bootstrap, trace: StartTrace::of([(0, 1)]) };
    assert_eq!(node.plane.notify(previous.peer, news), Err(NotifyError::Unknown));
    let news = asking_object(ObjectKind::StartTrace);
    let refused = within(node.plane.request(previous.peer, news, vec![1000])).await;
    assert!(matches!(refused, Err(RequestError::Unknown(_))), "{refused:?}");
    node.plane.notify(previous.peer, Message::Interest { bootstrap, blob }).expect("room for a notice");
    let (told, _) = previous.hear().await;
    assert!(matches!(told, Old::Interest(_)), "{told:?}");
}

fn asking_object(kind: ObjectKind) -> Request {
    asking(Asked::Object { id: ObjectId::new([1; 32]), kind }, Priority::Prefetch)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_the_previous_release_that_dials_is_served_and_asked() {
    work_together(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_the_previous_release_that_is_dialled_is_served_and_asked() {
    work_together(true).await;
}
