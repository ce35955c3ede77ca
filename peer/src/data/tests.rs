//! Planes that talk to each other over real sockets on loopback, by each transport, and doubles that speak the protocol
//! badly.

mod exchange;
mod hostile;
mod limits;
mod membership;
mod previous;
mod transports;

use std::{future::Future, net::Ipv4Addr};

use futures::StreamExt;
use shoal_proto::{Asked, BlobId, Contact, Fingerprint, Have, ImageSource, ObjectId, ObjectKind, Priority, Role};

use super::*;

/// What members show; anything else is refused.
const MEMBER: &[u8] = b"member";
/// No test waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// A service made of a closure.
struct Answering<F>(F);

impl<F: Fn(PeerContext, Request, AnswerSender) + Send + Sync + 'static> Service for Answering<F> {
    fn handle(&self, peer: PeerContext, request: Request, answers: AnswerSender) {
        (self.0)(peer, request, answers);
    }
}

/// Each byte of a piece depends on the piece and on where it is.
fn piece(number: u32, length: usize) -> Bytes {
    (0..length).map(|at| (at.wrapping_mul(31) >> 3) as u8 ^ (number as u8)).collect()
}

/// Answers every piece with [`piece`] of `length` bytes.
fn serving(length: usize) -> Arc<dyn Service> {
    Arc::new(Answering(move |_, request: Request, mut answers: AnswerSender| {
        tokio::spawn(async move {
            let (first, count) = match &request.what {
                Asked::Pieces { first, fingerprints, .. } => (*first, fingerprints.len() as u32),
                Asked::Object { .. } => (0, 1),
            };
            for number in first..first + count {
                answers.reserve(length).await?;
                answers.send_data(number, piece(number, length)).await?;
            }
            answers.end().await
        });
    }))
}

/// Answers nothing until the asker gives up, which it tells.
fn holding() -> (Arc<dyn Service>, mpsc::Receiver<()>) {
    let (given_up, told) = mpsc::channel(16);
    let service = Answering(move |_, _, mut answers: AnswerSender| {
        let given_up = given_up.clone();
        tokio::spawn(async move {
            answers.pending(Duration::from_secs(60)).await.expect("the asker listens");
            answers.cancelled().cancelled().await;
            given_up.send(()).await.expect("the test listens");
        });
    });
    (Arc::new(service), told)
}

struct Node {
    plane: DataPlane,
    events: mpsc::Receiver<PeerEvent>,
    peer: PeerId,
}

fn any_port() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

fn peer_id(keypair: &Keypair) -> PeerId {
    PeerId::new(keypair.public().try_into_ed25519().expect("the tests make ed25519 keys").to_bytes())
}

pub(super) fn hello(name: &str, membership: &'static [u8]) -> Hello {
    Hello {
        version: shoal_proto::VERSION,
        min_version: shoal_proto::MIN_VERSION,
        features: 0,
        membership: Bytes::from_static(membership),
        role: Role::Node,
        zone: "claimed".into(),
        labels: [("rack".to_owned(), "r1".to_owned())].into(),
        data_addresses: Vec::new(),
        name: name.into(),
    }
}

fn admit() -> Admit {
    Arc::new(|peer, shown| {
        let admitted = Admitted { peer: *peer, role: Role::Seed, zone: "proved".into(), issued: 0, expires: 1 };
        if shown == MEMBER { Ok(admitted) } else { Err("no member".into()) }
    })
}

/// Each transport alone.
const TRANSPORTS: [Transport; 2] = [Transport::Quic, Transport::Tcp];

impl Node {
    fn start(transport: Transport, name: &str, service: Arc<dyn Service>) -> Self {
        Self::with(transport, name, service, MEMBER, Limits::default())
    }

    fn with(
        transport: Transport,
        name: &str,
        service: Arc<dyn Service>,
        membership: &'static [u8],
        limits: Limits,
    ) -> Self {
        let hello = Hello { data_addresses: vec![any_port()], ..hello(name, membership) };
        Self::saying(transport, hello, service, limits)
    }

    fn saying(transport: Transport, hello: Hello, service: Arc<dyn Service>, limits: Limits) -> Self {
        let keypair = Keypair::generate_ed25519();
        let peer = peer_id(&keypair);
        let options = DataOptions { keypair, listen: any_port(), transport, hello, admit: admit(), limits };
        let (plane, events) = DataPlane::start(options, service).expect("loopback can be listened on");
        Self { plane, events, peer }
    }

    fn address(&self) -> SocketAddr {
        self.plane.local_address()
    }

    fn connect(&self, to: &Self) {
        self.plane.connect(to.peer, &[to.address()]);
    }

    async fn event(&mut self) -> PeerEvent {
        within(self.events.recv()).await.expect("the plane runs")
    }

    async fn up(&mut self) -> (PeerId, Hello) {
        match self.event().await {
            PeerEvent::Up { peer, hello } => (peer, hello),
            other => panic!("not up: {other:?}"),
        }
    }

    async fn down(&mut self) -> Gone {
        match self.event().await {
            PeerEvent::Down { why, .. } => why,
            other => panic!("not down: {other:?}"),
        }
    }

    async fn ask(&self, whom: PeerId, first: u32, limits: &[u64]) -> AnswerStream {
        let request = request(first, limits.len(), Priority::OnDemand);
        within(self.plane.request(whom, request, limits.to_vec())).await.expect("the peer is connected")
    }
}

/// Two nodes, the first of which dialled.
async fn pair(transport: Transport, first: Arc<dyn Service>, second: Arc<dyn Service>) -> (Node, Node) {
    let (mut a, mut b) = (Node::start(transport, "a", first), Node::start(transport, "b", second));
    a.connect(&b);
    a.up().await;
    b.up().await;
    (a, b)
}

async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(PATIENCE, future).await.expect("it happens in time")
}

/// What was answered, without what was only on its way.
async fn all(answers: AnswerStream) -> Vec<Result<Answer, AnswerError>> {
    within(answers.filter(|answer| std::future::ready(*answer != Ok(Answer::Progress))).collect()).await
}

fn request(first: u32, count: usize, priority: Priority) -> Request {
    let what = Asked::Pieces {
        bootstrap: ObjectId::new([1; 32]),
        blob: BlobId::new([2; 32]),
        first,
        fingerprints: vec![Fingerprint::new([3; 32]); count],
        manifest: None,
    };
    asking(what, priority)
}

fn asking(what: Asked, priority: Priority) -> Request {
    let image = ImageSource { registry: "registry.test".into(), repository: "app".into() };
    Request { id: 0, image, what, priority, source: false, deadline: PATIENCE, lacks: 0 }
}

/// Waits until `condition` holds.
async fn eventually(mut condition: impl FnMut() -> bool) {
    within(async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
