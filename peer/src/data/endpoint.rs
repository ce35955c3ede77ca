//! The sockets of the transports in use, and how a peer is reached.
//!
//! Both transports listen on the same port, so that an address means both. Which of them is dialled is the choice of who
//! dials ([`Transport`]); who is dialled takes whatever comes.

use std::{io, net::SocketAddr, pin::pin, time::Duration};

use futures::future::{Either, select};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::{Closing, DataError, connection::HandshakeError, quic::Quic, tcp::Tcp, tls, wire::Wire};

/// Round trips up to this long are those of one data center or city, where TCP moves a byte for a third of QUIC's work.
/// On longer paths QUIC recovers sooner from what is lost, and one lost packet does not hold up all answers.
const NEAR: Duration = Duration::from_millis(10);
/// How long TCP may take to connect before QUIC is tried beside it: what takes longer is far, or filtered.
const HEAD_START: Duration = Duration::from_millis(300);
/// How often another free port is tried because only one transport could have the one before.
const PORTS: u32 = 16;

/// How pieces travel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Both: TCP to peers that are near, QUIC to those that are far or cannot be reached by TCP.
    #[default]
    Auto,
    /// QUIC only.
    Quic,
    /// TLS over TCP only.
    Tcp,
}

/// See the module. At least one transport is there.
pub(super) struct Endpoint {
    pub(super) quic: Option<Quic>,
    pub(super) tcp: Option<Tcp>,
    pub(super) address: SocketAddr,
}

impl Endpoint {
    /// Listens on `listen`, where port 0 takes any that is free. Tasks of connections are `tasks`.
    pub(super) fn bind(
        listen: SocketAddr,
        transport: Transport,
        tls: &tls::Configs,
        tasks: &TaskTracker,
    ) -> Result<Self, DataError> {
        let mut attempts = if listen.port() == 0 { PORTS } else { 1 };
        loop {
            attempts -= 1;
            match Self::bind_once(listen, transport, tls, tasks) {
                Err(DataError::Listen { source, .. })
                    if source.kind() == io::ErrorKind::AddrInUse && attempts > 0 => {}
                bound => return bound,
            }
        }
    }

    fn bind_once(
        listen: SocketAddr,
        transport: Transport,
        tls: &tls::Configs,
        tasks: &TaskTracker,
    ) -> Result<Self, DataError> {
        let mut endpoint = Self { quic: None, tcp: None, address: listen };
        if transport != Transport::Tcp {
            let refused = |source| DataError::Listen { transport: "UDP", address: listen, source };
            let quic = Quic::bind(listen, tls.quic()?).map_err(refused)?;
            endpoint.address = quic.local_address().map_err(refused)?;
            endpoint.quic = Some(quic);
        }
        if transport != Transport::Quic {
            let address = endpoint.address;
            let refused = |source| DataError::Listen { transport: "TCP", address, source };
            let tcp = Tcp::bind(address, tls, tasks.clone()).map_err(refused)?;
            endpoint.address = tcp.local_address().map_err(refused)?;
            endpoint.tcp = Some(tcp);
        }
        Ok(endpoint)
    }

    /// A connection to whoever is at `address`, as the module says.
    pub(super) async fn dial(&self, address: SocketAddr) -> Result<Wire, HandshakeError> {
        let tcp = async |tcp: &Tcp| tcp.dial(address).await.map(Wire::Tcp);
        let quic = async |quic: &Quic| quic.dial(address).await.map(Wire::Quic);
        match (&self.tcp, &self.quic) {
            (Some(near), Some(far)) => choose(|wire| wire.rtt() <= NEAR, tcp(near), quic(far)).await,
            (Some(only), None) => tcp(only).await,
            (None, Some(only)) => quic(only).await,
            (None, None) => Err(HandshakeError::NoAddress),
        }
    }
}

/// The connection that suits what its path shows.
pub(super) async fn choose(
    is_near: impl FnOnce(&Wire) -> bool,
    tcp: impl Future<Output = Result<Wire, HandshakeError>>,
    quic: impl Future<Output = Result<Wire, HandshakeError>>,
) -> Result<Wire, HandshakeError> {
    let mut tcp = pin!(tcp);
    match timeout(HEAD_START, &mut tcp).await {
        Ok(Ok(wire)) if is_near(&wire) => Ok(wire),
        Ok(Ok(far)) => match quic.await {
            Ok(better) => {
                far.close(Closing::Duplicate, "QUIC suits the path");
                Ok(better)
            }
            Err(_) => Ok(far),
        },
        Ok(Err(refused)) => quic.await.map_err(|also| HandshakeError::Both(refused.into(), also.into())),
        Err(_) => match select(tcp, pin!(quic)).await {
            Either::Left((Ok(wire), _)) | Either::Right((Ok(wire), _)) => Ok(wire),
            Either::Left((Err(failed), quic)) => {
                quic.await.map_err(|also| HandshakeError::Both(failed.into(), also.into()))
            }
            Either::Right((Err(failed), tcp)) => {
                tcp.await.map_err(|also| HandshakeError::Both(also.into(), failed.into()))
            }
        },
    }
}
