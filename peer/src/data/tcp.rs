//! TLS 1.3 over TCP: the listener, sockets, and dialling. Inside a data center it costs about a third of QUIC's CPU per byte.
//!
//! One connection carries everything between two peers; `connection` says how frames of many requests share it.

mod connection;
mod intake;
mod outbox;
mod streams;

use std::{io, net::SocketAddr, time::Duration};

use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::task::TaskTracker;

pub(super) use self::connection::{Connection, Reader, Writer};
use self::intake::Intake;
use super::{connection::HandshakeError, tls};

/// Bytes of one part of a piece: a frame goes out whole, and what is urgent waits for it. 50 ms at 20 Mbit/s.
pub(super) const PART: usize = 128 << 10;
/// Bytes that the kernel takes without sending them yet; more would keep what is urgent behind them.
const NOT_SENT: u32 = 128 << 10;
/// Silence after which a connection that should have answered counts as dead.
const DEAD_AFTER: Duration = Duration::from_secs(12);
/// How often a silent connection is asked whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(4);
/// Connections that the kernel completes before they are accepted here.
const BACKLOG: i32 = 256;
/// How long to wait after the system gave no connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The listener, and TLS for both sides of a connection.
pub(super) struct Tcp {
    listener: TcpListener,
    connector: TlsConnector,
    acceptor: TlsAcceptor,
    tasks: TaskTracker,
}

impl Tcp {
    /// Listens; an IPv6 address takes IPv4 too. Tasks of its connections are `tasks`.
    pub(super) fn bind(address: SocketAddr, tls: &tls::Configs, tasks: TaskTracker) -> io::Result<Self> {
        let listener = listen(address)?;
        Ok(Self { listener, connector: tls.client.clone().into(), acceptor: tls.server.clone().into(), tasks })
    }

    pub(super) fn local_address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// TLS with whoever is at `address`.
    pub(super) async fn dial(&self, address: SocketAddr) -> Result<Connection, HandshakeError> {
        let stream = TcpStream::connect(address).await?;
        configure(&stream)?;
        let stream = self.connector.connect(tls::server_name(), Intake::new(stream)).await?;
        Ok(Connection::start(stream.into(), &self.tasks)?)
    }

    /// Who comes next. Cancel safe.
    pub(super) async fn accept(&self) -> (TcpStream, SocketAddr) {
        loop {
            match self.listener.accept().await {
                Ok(accepted) => return accepted,
                Err(error) => {
                    // Out of descriptors, most likely: waiting is all that helps.
                    tracing::warn!("cannot accept connections: {error}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    }

    /// TLS with who came.
    pub(super) fn welcome(
        &self,
        stream: TcpStream,
    ) -> impl Future<Output = Result<Connection, HandshakeError>> + Send + use<> {
        let (acceptor, tasks) = (self.acceptor.clone(), self.tasks.clone());
        async move {
            configure(&stream)?;
            let stream = acceptor.accept(Intake::new(stream)).await?;
            Ok(Connection::start(stream.into(), &tasks)?)
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Connections of an earlier process on the same port may not be over yet.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// How the kernel is to treat the connection.
fn configure(stream: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_notsent_lowat(NOT_SENT)?;
    socket.set_tcp_user_timeout(Some(DEAD_AFTER))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEP_ALIVE).with_interval(KEEP_ALIVE).with_retries(2))
}
