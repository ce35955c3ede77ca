//! A seed peer with many neighbours: all that read an image hear what it has, those that read another are found, and what they all want
//! at once is in memory once.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use shoal::{
    data::{Answer, AnswerSender, DataOptions, DataPlane, Limits, PeerContext, PeerEvent, Service, Transport},
    identity::{self, Identity},
    membership::{self, Membership, Policy},
};
use shoal_proto::{
    Asked, Bitfield, BlobId, Contact, FEATURE_HASH_LISTS, FEATURE_START_TRACES, Hello, ImageSource, MIN_VERSION,
    Message, ObjectId, ObjectKind, PeerId, Priority, Request, Role, VERSION,
};
use tokio::{sync::mpsc, time::timeout};

use crate::support::{Built, Daemon, Registry, peak, tree};

/// More than any table of who is interested once held.
const CROWD: usize = 300;
/// Files, of one piece each.
const FILES: usize = 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Has nothing.
struct Empty;

impl Service for Empty {
    fn handle(&self, _: PeerContext, _: Request, answers: AnswerSender) {
        tokio::spawn(async move { answers.cannot_source("no".into()).await });
    }
}

struct Neighbour {
    data: DataPlane,
    events: mpsc::Receiver<PeerEvent>,
    peer: PeerId,
}

impl Neighbour {
    fn start() -> Self {
        let identity = Identity::generate();
        let membership = Membership::open(identity.peer(), Role::Node, "default").expect("a valid zone");
        let hello = Hello {
            version: VERSION,
            min_version: MIN_VERSION,
            features: FEATURE_HASH_LISTS | FEATURE_START_TRACES,
            membership: membership.shown().clone(),
            role: Role::Node,
            zone: "default".into(),
            labels: Default::default(),
            data_addresses: Vec::new(),
            name: "neighbour".into(),
        };
        let options = DataOptions {
            keypair: identity.keypair().clone(),
            listen: ([127, 0, 0, 1], 0).into(),
            transport: Transport::Tcp,
            hello,
            admit: Arc::new(|peer, shown| {
                membership::verify(&Policy::Open, shown, peer, 0).map_err(|refusal| refusal.to_string())
            }),
            limits: Limits::default(),
        };
        let (data, events) = DataPlane::start(options, Arc::new(Empty)).expect("a data plane");
        Self { data, events, peer: identity.peer() }
    }

    async fn event(&mut self) -> PeerEvent {
        timeout(PATIENCE, self.events.recv()).await.expect("something is said").expect("the plane runs")
    }

    async fn up(&mut self) -> PeerId {
        loop {
            if let PeerEvent::Up { peer, .. } = self.event().await {
                return peer;
            }
        }
    }

    /// The next blob that the daemon says it reads.
    async fn interest(&mut self) -> (ObjectId, BlobId) {
        loop {
            if let PeerEvent::Interest { bootstrap, blob, .. } = self.event().await {
                return (bootstrap, blob);
            }
        }
    }

    /// Gets an object from the daemon as its home, however often that is busy; gives its length.
    async fn fetch(&self, to: PeerId, image: &ImageSource, id: ObjectId) -> usize {
        loop {
            let request = Request {
                id: 0,
                image: image.clone(),
                what: Asked::Object { id, kind: ObjectKind::Blob },
                priority: Priority::OnDemand,
                source: true,
                deadline: PATIENCE,
                lacks: 0,
            };
            let mut answers = self.data.request(to, request, vec![1 << 30]).await.expect("it is connected");
            while let Some(answer) = answers.next().await {
                match answer.expect("a good answer") {
                    Answer::Data { bytes, .. } => return bytes.len(),
                    Answer::Busy { retry_after, .. } => tokio::time::sleep(retry_after).await,
                    Answer::Progress | Answer::Pending { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    /// Waits until all of a blob is said to be there.
    async fn hears_all(&mut self, blob: BlobId) {
        let mut pieces = Bitfield::new(FILES as u32);
        while !pieces.is_full() {
            if let PeerEvent::Have { have, .. } = self.event().await
                && have.blob == blob
            {
                pieces.union_with(&have.pieces);
            }
        }
    }
}

#[test]
fn all_of_a_crowd_hear_and_the_few_that_read_something_else_are_found() {
    let mut registry = Registry::start();
    registry.publish(tree(811, FILES, 30_000).path(), "1");
    registry.publish(tree(812, FILES, 30_000).path(), "2");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("seed", folder.path(), &["role=seed".into(), "data.transport=tcp".into()]);
    let status = daemon.status();
    let to = identity::from_text(status["peer"].as_str().expect("an id")).expect("an id");
    let address = status["data_address"].as_str().expect("an address").parse().expect("an address");

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut crowd: Vec<_> = (0..CROWD).map(|_| Neighbour::start()).collect();
        for neighbour in &mut crowd {
            neighbour.data.connect(to, &[address]);
            neighbour.up().await;
        }
        // What is here before they ask, and what comes after.
        tokio::task::block_in_place(|| daemon.ctl(&["prefetch", &registry.reference("1")]));
        let mut blobs = Vec::new();
        for neighbour in &mut crowd {
            let (bootstrap, blob) = neighbour.interest().await;
            blobs.push(blob);
            neighbour.data.notify(to, Message::Interest { bootstrap, blob }).expect("it listens");
        }
        for neighbour in &mut crowd {
            // Nobody is left out: each is answered.
            loop {
                if let PeerEvent::Have { .. } = neighbour.event().await {
                    break;
                }
            }
        }
        // All of it has gone, and comes again.
        tokio::task::block_in_place(|| daemon.ctl(&["evict", "--all"]));
        for neighbour in &mut crowd {
            loop {
                if let PeerEvent::Have { have, .. } = neighbour.event().await
                    && have.full
                    && have.pieces.is_empty()
                {
                    break;
                }
            }
        }
        tokio::task::block_in_place(|| daemon.ctl(&["prefetch", &registry.reference("1")]));
        for neighbour in &mut crowd {
            neighbour.hears_all(blobs[0]).await;
        }

        // Of the second image one of them names somebody who is not connected. All the others read the first one.
        let mut other = Neighbour::start();
        let contact = Contact { peer: other.peer, addresses: vec![other.data.local_address()] };
        tokio::task::block_in_place(|| daemon.ctl(&["prefetch", &registry.reference("2")]));
        let (_, blob) = crowd[0].interest().await;
        crowd[0].data.notify(to, Message::Peers { blob, contacts: vec![contact] }).expect("it listens");
        assert_eq!(other.up().await, to);
    });
    daemon.stop();
}

/// Those that want the object at once, and how large it is: all of them together would be a gigabyte.
const ASKERS: usize = 24;
const OBJECT: usize = 40 << 20;

#[test]
fn a_large_object_that_many_ask_for_at_once_is_in_memory_in_parts() {
    let built = Built::with(tree(813, 1, OBJECT).path(), &["--compressor", "none"]);
    let mut registry = Registry::start();
    built.push(&registry.layout(), "1");
    registry.switch_on();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut daemon = Daemon::start("seed", folder.path(), &["role=seed".into(), "data.transport=tcp".into()]);
    daemon.wait_for_own_lease();
    let status = daemon.status();
    let to = identity::from_text(status["peer"].as_str().expect("an id")).expect("an id");
    let address = status["data_address"].as_str().expect("an address").parse().expect("an address");
    let reference = registry.reference("1");
    let (host, _) = reference.split_once('/').expect("a registry and a repository");
    let image = ImageSource { registry: host.into(), repository: "app".into() };
    let id: ObjectId = built.blob().parse().expect("a digest");

    let before = peak(&daemon);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut askers: Vec<_> = (0..ASKERS).map(|_| Neighbour::start()).collect();
        for asker in &mut askers {
            asker.data.connect(to, &[address]);
            asker.up().await;
        }
        let fetched = futures::future::join_all(askers.iter().map(|asker| asker.fetch(to, &image, id))).await;
        assert!(fetched.iter().all(|length| *length >= OBJECT), "{fetched:?}");
    });
    // Twice the object while it comes, and what may be on its way to others.
    let grown = peak(&daemon) - before;
    assert!(grown < 256 << 20, "{grown} bytes more");
    daemon.stop();
}
