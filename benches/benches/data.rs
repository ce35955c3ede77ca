//! How fast do pieces go from one node to another over either transport of the data plane, next to a bare stream of each
//! (quinn; TLS over TCP) and to plain TCP on the same loopback? Both ends share the processors; bytes come from memory
//! and are dropped on arrival. What both ends spend of the processors is printed beside it.

use std::{net::Ipv4Addr, net::SocketAddr, process, sync::Arc, time::Duration};

use bytes::Bytes;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use futures::{StreamExt, TryStreamExt, stream};
use libp2p::identity::Keypair;
use shoal::{
    data::{Admit, Answer, AnswerSender, DataOptions, DataPlane, Limits, PeerContext, PeerEvent, Service, Transport},
    membership::Admitted,
};
use shoal_benches::half_compressible;
use shoal_proto::{Asked, BlobId, Fingerprint, Hello, ImageSource, ObjectId, PeerId, Priority, Request, Role};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::mpsc,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const PIECE: usize = 1 << 20;
/// Pieces of a request, and requests in flight: what a node has under way with a good neighbour.
const RUN: usize = 16;
const IN_FLIGHT: usize = 4;
const REQUESTS: usize = 16;
const TOTAL: usize = PIECE * RUN * REQUESTS;
/// What a bare stream is written and read in.
const PART: usize = 256 << 10;

/// Answers every piece with the same bytes.
struct Memory(Bytes);

impl Service for Memory {
    fn handle(&self, _: PeerContext, request: Request, mut answers: AnswerSender) {
        let bytes = self.0.clone();
        tokio::spawn(async move {
            let Asked::Pieces { first, fingerprints, .. } = &request.what else { return Ok(()) };
            for piece in (*first..).take(fingerprints.len()) {
                answers.reserve(bytes.len()).await?;
                answers.send_data(piece, bytes.clone()).await?;
            }
            answers.end().await
        });
    }
}

fn node(transport: Transport, service: Arc<dyn Service>) -> (DataPlane, mpsc::Receiver<PeerEvent>, PeerId) {
    let keypair = Keypair::generate_ed25519();
    let peer = PeerId::new(keypair.public().try_into_ed25519().expect("an ed25519 key").to_bytes());
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let hello = Hello {
        version: shoal_proto::VERSION,
        min_version: shoal_proto::MIN_VERSION,
        features: 0,
        membership: Bytes::new(),
        role: Role::Node,
        zone: String::new(),
        labels: Default::default(),
        data_addresses: vec![listen],
        name: String::new(),
    };
    let admit: Admit = Arc::new(|peer, _| {
        Ok(Admitted { peer: *peer, role: Role::Node, zone: String::new(), issued: 0, expires: u64::MAX })
    });
    let options = DataOptions { keypair, listen, transport, hello, admit, limits: Limits::default() };
    let (plane, events) = DataPlane::start(options, service).expect("loopback can be listened on");
    (plane, events, peer)
}

async fn ask(plane: &DataPlane, peer: PeerId, first: u32) -> usize {
    let what = Asked::Pieces {
        bootstrap: ObjectId::new([1; 32]),
        blob: BlobId::new([2; 32]),
        first,
        fingerprints: vec![Fingerprint::new([3; 32]); RUN],
        manifest: None,
    };
    let image = ImageSource { registry: "registry.test".into(), repository: "app".into() };
    let deadline = Duration::from_secs(60);
    let request = Request { id: 0, image, what, priority: Priority::Prefetch, source: false, deadline, lacks: 0 };
    let answers = plane.request(peer, request, vec![PIECE as u64; RUN]).await.expect("the peer is connected");
    let received = answers.try_fold(0, async |sum, answer| match answer {
        Answer::Data { bytes, .. } => Ok(sum + bytes.len()),
        Answer::Progress => Ok(sum),
        other => panic!("no data: {other:?}"),
    });
    received.await.expect("it answers")
}

async fn planes(transport: Transport, bytes: Bytes) -> (DataPlane, DataPlane, PeerId) {
    let (server, mut arrivals, peer) = node(transport, Arc::new(Memory(bytes)));
    let (client, mut events, _) = node(transport, Arc::new(Memory(Bytes::new())));
    tokio::spawn(async move { while arrivals.recv().await.is_some() {} });
    client.connect(peer, &[server.local_address()]);
    assert!(matches!(events.recv().await, Some(PeerEvent::Up { .. })), "the peer can be reached");
    tokio::spawn(async move { while events.recv().await.is_some() {} });
    (server, client, peer)
}

async fn fetch(plane: &DataPlane, peer: PeerId) {
    let requests = (0..REQUESTS).map(|n| ask(plane, peer, (n * RUN) as u32));
    let received: usize = stream::iter(requests).buffer_unordered(IN_FLIGHT).fold(0, async |sum, n| sum + n).await;
    assert_eq!(received, TOTAL);
}

/// TLS for `localhost` with a certificate made now: the server's side and the client's.
fn tls() -> (rustls::ServerConfig, rustls::ClientConfig) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.key_pair.serialize_der());
    let certificate = made.cert.der().clone();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.clone()).expect("a root");
    // What the data plane prefers.
    let provider = Arc::new(rustls::crypto::CryptoProvider {
        cipher_suites: vec![rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256],
        ..rustls::crypto::aws_lc_rs::default_provider()
    });
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("it fits the suite")
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key.into())
        .expect("a server");
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("it fits the suite")
        .with_root_certificates(roots)
        .with_no_client_auth();
    (server, client)
}

/// A bare connection with the data plane's datagram size: one that both ends keep for all iterations.
async fn bare_quinn() -> (quinn::Connection, quinn::Connection) {
    let mut mtu = quinn::MtuDiscoveryConfig::default();
    mtu.upper_bound(6000);
    let mut transport = quinn::TransportConfig::default();
    transport.mtu_discovery_config(Some(mtu));
    let transport = Arc::new(transport);
    let (server, client) = tls();
    let server: quinn::crypto::rustls::QuicServerConfig = server.try_into().expect("it fits QUIC");
    let client: quinn::crypto::rustls::QuicClientConfig = client.try_into().expect("it fits QUIC");
    let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(transport.clone());
    let mut client = quinn::ClientConfig::new(Arc::new(client));
    client.transport_config(transport);
    let bind = |server| {
        let mut config = quinn::EndpointConfig::default();
        config.max_udp_payload_size(6000).expect("it fits");
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).expect("a socket");
        quinn::Endpoint::new(config, server, socket, Arc::new(quinn::TokioRuntime)).expect("an endpoint")
    };
    let listening = bind(Some(server));
    let address = listening.local_addr().expect("an address");
    let accepted = tokio::spawn(async move { listening.accept().await.expect("a dial").await.expect("a handshake") });
    let dialled = bind(None).connect_with(client, address, "localhost").expect("a dial").await.expect("a handshake");
    (accepted.await.expect("it accepts"), dialled)
}

async fn quinn_stream((sender, receiver): &(quinn::Connection, quinn::Connection), bytes: &Bytes) {
    let receiver = receiver.clone();
    let receiving = tokio::spawn(async move {
        let mut stream = receiver.accept_uni().await.expect("a stream");
        let mut received = 0;
        while let Some(chunk) = stream.read_chunk(PART, true).await.expect("it arrives") {
            received += chunk.bytes.len();
        }
        received
    });
    let mut stream = sender.open_uni().await.expect("a stream");
    for _ in 0..TOTAL / PIECE {
        stream.write_chunk(bytes.clone()).await.expect("it is sent");
    }
    stream.finish().expect("it ends");
    assert_eq!(receiving.await.expect("it receives"), TOTAL);
}

/// Both ends of a TCP connection.
async fn bare_tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a socket");
    let address = listener.local_addr().expect("an address");
    let (accepted, dialled) = tokio::join!(listener.accept(), TcpStream::connect(address));
    (accepted.expect("a connection").0, dialled.expect("a connection"))
}

async fn tcp_stream(bytes: &Bytes) {
    let (sender, receiver) = bare_tcp().await;
    stream_over(sender, receiver, bytes).await;
}

async fn tls_stream(bytes: &Bytes, (server, client): &(TlsAcceptor, TlsConnector)) {
    let (sender, receiver) = bare_tcp().await;
    let name = rustls::pki_types::ServerName::try_from("localhost").expect("a name");
    let (sender, receiver) = tokio::join!(server.accept(sender), client.connect(name, receiver));
    stream_over(sender.expect("a handshake"), receiver.expect("a handshake"), bytes).await;
}

async fn stream_over(
    mut sender: impl AsyncWrite + Unpin,
    mut receiver: impl AsyncRead + Send + Unpin + 'static,
    bytes: &Bytes,
) {
    let receiving = tokio::spawn(async move {
        let (mut buffer, mut received) = (vec![0; PART], 0);
        while received < TOTAL {
            received += receiver.read(&mut buffer).await.expect("it arrives");
        }
    });
    for _ in 0..TOTAL / PIECE {
        sender.write_all(bytes).await.expect("it is sent");
    }
    sender.flush().await.expect("it is sent");
    receiving.await.expect("it receives");
}

/// Measures moving [`TOTAL`] bytes, and prints the processor seconds that it took a gigabyte.
fn measure<F: Future<Output = ()>>(
    group: &mut BenchmarkGroup<'_, WallTime>,
    runtime: &Runtime,
    name: &str,
    mut run: impl FnMut() -> F,
) {
    let (mut runs, before) = (0, processor_time());
    group.bench_function(name, |b| {
        b.iter(|| {
            runs += 1;
            runtime.block_on(run());
        });
    });
    let spent = processor_time() - before;
    // Criterion runs nothing when the name is filtered out.
    if runs > 0 {
        println!("data/{name}: {:.2} CPU s/GB", spent.as_secs_f64() * 1e9 / (TOTAL as f64 * f64::from(runs)));
    }
}

/// What this process has used so far.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process::id())).expect("proc is mounted");
    // proc_pid_stat(5): utime and stime are the 14th and 15th field; the second ends with the last parenthesis.
    let fields: Vec<_> = stat.rsplit(')').next().expect("never empty").split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

fn data(c: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let bytes = Bytes::from(half_compressible(PIECE));
    let mut group = c.benchmark_group("data");
    group.sample_size(10).throughput(Throughput::Bytes(TOTAL as u64));
    measure(&mut group, &runtime, "limit: TCP stream", || tcp_stream(&bytes));
    let (server, client) = tls();
    let tls = (TlsAcceptor::from(Arc::new(server)), TlsConnector::from(Arc::new(client)));
    measure(&mut group, &runtime, "limit: TLS over TCP stream", || tls_stream(&bytes, &tls));
    let connections = runtime.block_on(bare_quinn());
    measure(&mut group, &runtime, "limit: quinn stream", || quinn_stream(&connections, &bytes));
    for (name, transport) in [("data plane over QUIC", Transport::Quic), ("data plane over TCP", Transport::Tcp)] {
        let (_server, client, peer) = runtime.block_on(planes(transport, bytes.clone()));
        measure(&mut group, &runtime, name, || fetch(&client, peer));
    }
    group.finish();
}

criterion_group!(benches, data);
criterion_main!(benches);
