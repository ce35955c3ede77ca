//! Connections from both directions: dialling a peer at its addresses, and accepting who comes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use shoal_proto::PeerId;
use tokio::{
    sync::OwnedSemaphorePermit,
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    Closing, Shared,
    connection::{self, Greeted, HANDSHAKE_TIMEOUT, HandshakeError},
    quic::{self, Quic},
    tcp::Tcp,
    wire::Wire,
};

/// Head start of an address over the one behind it.
const HEAD_START: Duration = Duration::from_millis(300);

/// Dials `peer` and runs the connection. The table counts it as being dialled already.
pub(super) async fn dial(shared: Arc<Shared>, peer: PeerId, addresses: Vec<SocketAddr>) {
    let greeted = unless_stopped(&shared, greet_peer(&shared, peer, addresses)).await;
    shared.table().dialled(peer, greeted.is_ok(), std::time::Instant::now());
    match greeted {
        Ok(greeted) => connection::run(&shared, greeted).await,
        Err(error) => tracing::debug!(%peer, "not connected: {error}"),
    }
}

async fn unless_stopped<T>(
    shared: &Shared,
    what: impl Future<Output = Result<T, HandshakeError>>,
) -> Result<T, HandshakeError> {
    let done = shared.stopping.run_until_cancelled(what).await;
    done.unwrap_or_else(|| Err(HandshakeError::refused(Closing::Stopping, "")))
}

async fn greet_peer(
    shared: &Arc<Shared>,
    peer: PeerId,
    addresses: Vec<SocketAddr>,
) -> Result<Greeted, HandshakeError> {
    let wire = race(shared, peer, addresses).await?;
    let greeted = connection::greet(shared, wire, true).await?;
    shared.enter(&greeted.link, true).await?;
    Ok(greeted)
}

/// The first connection on which `peer` itself answers.
async fn race(shared: &Arc<Shared>, peer: PeerId, addresses: Vec<SocketAddr>) -> Result<Wire, HandshakeError> {
    let mut attempts = JoinSet::new();
    for (nth, address) in (0..).zip(addresses) {
        let shared = shared.clone();
        attempts.spawn(async move {
            sleep(HEAD_START * nth).await;
            let wire = within_time(shared.endpoint.dial(address)).await?;
            if wire.peer() == Some(peer) {
                return Ok(wire);
            }
            let detail = format!("somebody else answers at {address}");
            wire.close(Closing::Refused, &detail);
            Err(HandshakeError::refused(Closing::Refused, detail))
        });
    }
    let mut failure = HandshakeError::NoAddress;
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(wire)) => return Ok(wire),
            Ok(Err(error)) => failure = error,
            Err(error) => failure = HandshakeError::refused(Closing::Unknown, error),
        }
    }
    Err(failure)
}

async fn within_time<T>(handshake: impl Future<Output = Result<T, HandshakeError>>) -> Result<T, HandshakeError> {
    timeout(HANDSHAKE_TIMEOUT, handshake).await.unwrap_or(Err(HandshakeError::TimedOut))
}

/// Accepts connections on every transport until the plane stops.
pub(super) async fn accept(shared: Arc<Shared>) {
    let over_quic = async {
        if let Some(quic) = &shared.endpoint.quic {
            accept_quic(&shared, quic).await;
        }
    };
    let over_tcp = async {
        if let Some(tcp) = &shared.endpoint.tcp {
            accept_tcp(&shared, tcp).await;
        }
    };
    shared.stopping.run_until_cancelled(futures::future::join(over_quic, over_tcp)).await;
}

async fn accept_quic(shared: &Arc<Shared>, quic: &Quic) {
    // Addresses can be forged until a packet has come back from them; when places are scarce they have to prove
    // themselves first.
    let scarce = || shared.strangers.available_permits() < shared.limits().strangers / 2;
    while let Some(incoming) = quic.accept(scarce).await {
        let Ok(place) = shared.strangers.clone().try_acquire_owned() else {
            incoming.ignore();
            refused("crowded");
            continue;
        };
        let from = incoming.remote_address();
        let handshake = async move { Ok(Wire::Quic(quic::Connection::new(incoming.accept()?.await?))) };
        shared.tasks.spawn(welcome(shared.clone(), from, place, handshake));
    }
}

async fn accept_tcp(shared: &Arc<Shared>, tcp: &Tcp) {
    loop {
        let (stream, from) = tcp.accept().await;
        let Ok(place) = shared.strangers.clone().try_acquire_owned() else {
            // The connection is closed.
            refused("crowded");
            continue;
        };
        let tls = tcp.welcome(stream);
        let handshake = async move { tls.await.map(Wire::Tcp) };
        shared.tasks.spawn(welcome(shared.clone(), from, place, handshake));
    }
}

/// Greets who came, and runs the connection.
async fn welcome(
    shared: Arc<Shared>,
    from: SocketAddr,
    place: OwnedSemaphorePermit,
    handshake: impl Future<Output = Result<Wire, HandshakeError>>,
) {
    let greeting = async {
        let wire = within_time(handshake).await?;
        let greeted = connection::greet(&shared, wire, false).await?;
        shared.enter(&greeted.link, false).await?;
        Ok(greeted)
    };
    let greeted = unless_stopped(&shared, greeting).await;
    drop(place);
    match greeted {
        Ok(greeted) => connection::run(&shared, greeted).await,
        Err(error) => {
            refused(match &error {
                HandshakeError::Refused { why: Closing::Refused | Closing::Version, .. } => "refused",
                HandshakeError::Refused { why: Closing::Violation, .. } => "violation",
                HandshakeError::TimedOut => "silent",
                _ => "other",
            });
            tracing::debug!(%from, "not accepted: {error}");
        }
    }
}

/// Counts a connection of somebody who did not get in, and therefore has no name.
fn refused(reason: &'static str) {
    metrics::counter!("shoal_refused_connections_total", "reason" => reason).increment(1);
}
