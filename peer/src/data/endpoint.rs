//! The UDP socket and QUIC's parameters.
//!
//! Measured on loopback with two cores: a datagram of 6000 bytes with segmentation offload carries 1.2 GB/s where
//! 1500 carries 0.76; beyond 6000 a batch no longer fits in the 64 KiB of one offloaded send, and quinn stalls. Path
//! MTU discovery finds out what the network takes, from the 1200 that QUIC promises upwards.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use quinn::{
    Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt,
    congestion::CubicConfig,
    crypto::rustls::{QuicClientConfig, QuicServerConfig},
};
use socket2::{Domain, Protocol, Socket, Type};

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
/// How often a silent connection shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(4);

/// Binds `listen` and gives the endpoint with the configuration for dialling.
pub(super) fn bind(
    listen: SocketAddr,
    (client, server): (QuicClientConfig, QuicServerConfig),
) -> io::Result<(Endpoint, quinn::ClientConfig)> {
    let transport = Arc::new(transport());
    let mut server = ServerConfig::with_crypto(Arc::new(server));
    server.transport_config(transport.clone());
    let mut client = quinn::ClientConfig::new(Arc::new(client));
    client.transport_config(transport);
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MAX_DATAGRAM).map_err(io::Error::other)?;
    let endpoint = Endpoint::new(config, Some(server), socket(listen)?.into(), Arc::new(quinn::TokioRuntime))?;
    Ok((endpoint, client))
}

/// Gives a peer whose hello was accepted what strangers do not get: windows, and streams for requests.
pub(super) fn welcome(connection: &quinn::Connection, streams: u32) {
    connection.set_receive_window(MEMBER_WINDOW.into());
    connection.set_max_concurrent_bi_streams(streams.into());
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
