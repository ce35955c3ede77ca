//! QUIC: the UDP socket, its parameters, connections, and frames on their streams.
//!
//! Measured on loopback with two cores: a datagram of 6000 bytes with segmentation offload carries 1.2 GB/s where
//! 1500 carries 0.76; beyond 6000 a batch no longer fits in the 64 KiB of one offloaded send, and quinn stalls. Path
//! MTU discovery finds out what the network takes, from the 1200 that QUIC promises upwards.

use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use bytes::{BufMut, Bytes, BytesMut};
use quinn::{
    ConnectionError, Endpoint, EndpointConfig, IdleTimeout, Incoming, MtuDiscoveryConfig, ReadError, ReadExactError,
    RecvStream, SendStream, ServerConfig, TransportConfig, VarInt, WriteError,
    congestion::CubicConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use rustls::pki_types::CertificateDer;
use shoal_proto::{Message, PREFIX, PeerId, decode_body, header_len};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::AsyncReadExt;

use super::{
    Closing, Gone,
    connection::HandshakeError,
    frames::{FrameError, FrameReader, FrameWriter, Urgency, WriteFailed, encode},
    tls,
};

/// Largest datagram, in bytes without the UDP header.
const MAX_DATAGRAM: u16 = 6000;
/// What the kernel is asked to queue on the socket each way; it may grant less.
const SOCKET_BUFFER: usize = 4 << 20;
/// Unread bytes that one stream may have sent us.
const STREAM_WINDOW: u32 = 4 << 20;
/// Unread bytes that a connection may have sent us before its hello was accepted; a hello has at most 64 KiB.
const STRANGER_WINDOW: u32 = 128 << 10;
/// Unread bytes that a member may have sent us: 10 Gbit/s over 6 ms, 1 Gbit/s over 60 ms.
const MEMBER_WINDOW: u32 = 8 << 20;
/// Unacknowledged bytes that we keep for one connection.
const SEND_WINDOW: u64 = 4 << 20;
/// Bytes sent before the first acknowledgement: a small piece, whole.
const INITIAL_WINDOW: u64 = 64 << 10;
/// Round trip time to assume before the first measurement: what is far within one continent.
const INITIAL_RTT: Duration = Duration::from_millis(100);
/// Silence after which a connection counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(12);
/// Code of streams that are given up.
const GIVEN_UP: VarInt = VarInt::from_u32(1);
/// How often a silent connection shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(4);

/// The endpoint, and how it dials.
#[derive(Debug)]
pub(super) struct Quic {
    endpoint: Endpoint,
    client: quinn::ClientConfig,
}

impl Quic {
    /// Listens; an IPv6 address takes IPv4 too.
    pub(super) fn bind(
        listen: SocketAddr,
        (client, server): (QuicClientConfig, QuicServerConfig),
    ) -> io::Result<Self> {
        let transport = Arc::new(transport());
        let mut server = ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(transport.clone());
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(transport);
        let mut config = EndpointConfig::default();
        config.max_udp_payload_size(MAX_DATAGRAM).map_err(io::Error::other)?;
        let endpoint = Endpoint::new(config, Some(server), socket(listen)?.into(), Arc::new(quinn::TokioRuntime))?;
        Ok(Self { endpoint, client })
    }

    pub(super) fn local_address(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// QUIC with whoever is at `address`.
    pub(super) async fn dial(&self, address: SocketAddr) -> Result<Connection, HandshakeError> {
        Ok(Connection::new(self.endpoint.connect_with(self.client.clone(), address, tls::SERVER_NAME)?.await?))
    }

    /// Who comes next; `None` once the endpoint is closed. Whoever comes while `cautious` has to prove its address first.
    pub(super) async fn accept(&self, cautious: impl Fn() -> bool) -> Option<Incoming> {
        loop {
            let incoming = self.endpoint.accept().await?;
            if !cautious() || !incoming.may_retry() {
                return Some(incoming);
            }
            if let Err(error) = incoming.retry() {
                error.into_incoming().ignore();
            }
        }
    }

    /// Closes every connection, also those that are being made.
    pub(super) fn close(&self) {
        self.endpoint.close(Closing::Stopping.code().into(), b"");
    }

    /// Connections that it has not yet forgotten.
    #[cfg(test)]
    pub(super) fn open_connections(&self) -> usize {
        self.endpoint.open_connections()
    }

    /// Waits until all peers know that it is closed.
    pub(super) async fn wait_idle(&self) {
        self.endpoint.wait_idle().await;
    }
}

/// A connection that knows why this side closed it.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    connection: quinn::Connection,
    /// The first reason counts.
    closing: Arc<OnceLock<(Closing, String)>>,
}

impl Connection {
    pub(super) fn new(connection: quinn::Connection) -> Self {
        Self { connection, closing: Arc::default() }
    }

    /// Distinguishes it from all others that are open.
    pub(super) fn id(&self) -> usize {
        self.connection.stable_id()
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        self.connection.remote_address()
    }

    pub(super) fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// The peer at the other end; `None` if its certificate names no ed25519 identity.
    pub(super) fn peer(&self) -> Option<PeerId> {
        let shown = self.connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
        tls::peer_of(&shown)
    }

    /// Closes it, which ends everything on it at both ends. Does nothing to one that has ended.
    pub(super) fn close(&self, why: Closing, detail: &str) {
        if self.connection.close_reason().is_none() && self.closing.set((why, detail.to_owned())).is_ok() {
            self.connection.close(why.code().into(), detail.as_bytes());
        }
    }

    /// Resolves when it has ended.
    pub(super) async fn closed(&self) -> Gone {
        self.gone(self.connection.closed().await)
    }

    fn gone(&self, error: ConnectionError) -> Gone {
        match (error, self.closing.get()) {
            (ConnectionError::LocallyClosed, Some((why, detail))) => Gone::Ours { why: *why, detail: detail.clone() },
            (error, _) => error.into(),
        }
    }

    /// The stream of hellos and notices.
    pub(super) async fn first(&self, dialled: bool) -> Result<(FrameWriter, FrameReader), Gone> {
        if dialled { self.halves(self.connection.open_bi().await) } else { self.accept().await }
    }

    /// The next stream that the peer opens.
    pub(super) async fn accept(&self) -> Result<(FrameWriter, FrameReader), Gone> {
        self.halves(self.connection.accept_bi().await)
    }

    /// Sends a request on a stream of its own, and gives the half with its answer.
    pub(super) async fn ask(&self, request: &Message) -> Result<FrameReader, WriteFailed> {
        let (mut writer, reader) = self.halves(self.connection.open_bi().await)?;
        writer.write(request, Bytes::new()).await?;
        // Cancelling is stopping the other half, which the server notices as soon.
        writer.finish();
        Ok(reader)
    }

    fn halves(
        &self,
        opened: Result<(SendStream, RecvStream), ConnectionError>,
    ) -> Result<(FrameWriter, FrameReader), Gone> {
        let (send, receive) = opened.map_err(|error| self.gone(error))?;
        Ok((FrameWriter::Quic(Writer(send)), FrameReader::Quic(Reader { stream: receive, header: Vec::new() })))
    }

    /// Gives a peer whose hello was accepted what strangers do not get: windows, and streams for requests.
    pub(super) fn welcome(&self, streams: u32) {
        self.connection.set_receive_window(MEMBER_WINDOW.into());
        self.connection.set_max_concurrent_bi_streams(streams.into());
    }
}

/// See [`FrameReader`].
#[derive(Debug)]
pub(super) struct Reader {
    stream: RecvStream,
    header: Vec<u8>,
}

impl Reader {
    pub(super) async fn next(&mut self) -> Result<Option<Message>, FrameError> {
        let mut prefix = [0; PREFIX];
        match self.stream.read_exact(&mut prefix).await {
            Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
            read => read.map_err(exact)?,
        }
        self.header.resize(header_len(prefix)?, 0);
        self.stream.read_exact(&mut self.header).await.map_err(exact)?;
        Ok(Some(decode_body(&self.header)?))
    }

    pub(super) async fn payload(&mut self, length: usize, to: &mut BytesMut) -> Result<(), FrameError> {
        let end = to.len() + length;
        while to.len() < end {
            let left = end - to.len();
            let read = self.stream.read_buf(&mut to.limit(left)).await.map_err(unwrapped)?;
            if read == 0 {
                return Err(FrameError::Truncated);
            }
        }
        Ok(())
    }
}

impl From<ReadError> for FrameError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => Self::Gone(error.into()),
            _ => Self::Reset,
        }
    }
}

fn exact(error: ReadExactError) -> FrameError {
    match error {
        ReadExactError::FinishedEarly(_) => FrameError::Truncated,
        ReadExactError::ReadError(error) => error.into(),
    }
}

/// Takes quinn's error out of the `io::Error` that the `AsyncRead` of its stream wraps it in.
fn unwrapped(error: io::Error) -> FrameError {
    error.downcast::<ReadError>().map_or(FrameError::Reset, Into::into)
}

/// See [`FrameWriter`].
#[derive(Debug)]
pub(super) struct Writer(SendStream);

impl Writer {
    pub(super) fn set_urgency(&mut self, urgency: Urgency) {
        // Fails only for a stream that the other side has stopped.
        let _ = self.0.set_priority(urgency as i32);
    }

    pub(super) async fn write(&mut self, message: &Message, payload: Bytes) -> Result<(), WriteFailed> {
        self.0.write_all_chunks(&mut [encode(message)?, payload]).await.map_err(|error| match error {
            WriteError::ConnectionLost(error) => WriteFailed::Gone(error.into()),
            _ => WriteFailed::Stopped,
        })
    }

    pub(super) fn finish(&mut self) {
        // Fails only for a stream that the other side has stopped, or that was given up.
        let _ = self.0.finish();
    }

    pub(super) fn reset(&mut self) {
        // Fails only when there is nothing left to give up.
        let _ = self.0.reset(GIVEN_UP);
    }

    pub(super) fn taken(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.0.stopped();
        async { _ = stopped.await }
    }
}

fn transport() -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_DATAGRAM);
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        // The stream of the hello; see `welcome`.
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .receive_window(STRANGER_WINDOW.into())
        .stream_receive_window(STREAM_WINDOW.into())
        .send_window(SEND_WINDOW)
        // Pieces one after the other: a whole one can be verified and served on, two halves cannot.
        .send_fairness(false)
        .initial_rtt(INITIAL_RTT)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(IdleTimeout::try_from(DEAD_AFTER).ok())
        .keep_alive_interval(Some(KEEP_ALIVE))
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(cubic));
    transport
}

fn socket(listen: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(listen), Type::DGRAM, Some(Protocol::UDP))?;
    if listen.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_nonblocking(true)?;
    socket.bind(&listen.into())?;
    Ok(socket)
}
