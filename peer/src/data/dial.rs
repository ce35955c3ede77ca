//! Connections from both directions: dialling a peer at its addresses, and accepting who comes.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use quinn::{Connection, Incoming};
use shoal_proto::PeerId;
use tokio::{
    task::JoinSet,
    time::{sleep, timeout},
};

use super::{
    Closing, Shared,
    connection::{self, Greeted, HANDSHAKE_TIMEOUT, HandshakeError},
    tls,
};

/// Head start of an address over the one behind it.
const HEAD_START: Duration = Duration::from_millis(300);

/// Dials `peer` and runs the connection. The table counts it as being dialled already.
pub(super) async fn dial(shared: Arc<Shared>, peer: PeerId, addresses: Vec<SocketAddr>) {
    let greeted = greet_peer(&shared, peer, addresses).await;
    shared.table().dialled(peer, greeted.is_ok(), std::time::Instant::now());
    match greeted {
        Ok(greeted) => connection::run(&shared, greeted).await,
        Err(error) => tracing::debug!(%peer, "not connected: {error}"),
    }
}

async fn greet_peer(shared: &Shared, peer: PeerId, addresses: Vec<SocketAddr>) -> Result<Greeted, HandshakeError> {
    let connection = race(shared, peer, addresses).await?;
    let greeted = connection::greet(shared, connection, true).await?;
    shared.enter(&greeted.link, true).await?;
    Ok(greeted)
}

/// The first connection on which `peer` itself answers.
async fn race(shared: &Shared, peer: PeerId, addresses: Vec<SocketAddr>) -> Result<Connection, HandshakeError> {
    let mut attempts = JoinSet::new();
    for (nth, address) in (0..).zip(addresses) {
        let (endpoint, config) = (shared.endpoint.clone(), shared.client.clone());
        attempts.spawn(async move {
            sleep(HEAD_START * nth).await;
            let connecting = endpoint.connect_with(config, address, tls::SERVER_NAME)?;
            let connection = timeout(HANDSHAKE_TIMEOUT, connecting).await.map_err(|_| HandshakeError::TimedOut)??;
            if tls::peer_of(&connection) == Some(peer) {
                return Ok(connection);
            }
            let detail = format!("somebody else answers at {address}");
            connection.close(Closing::Refused.code(), detail.as_bytes());
            Err(HandshakeError::refused(Closing::Refused, detail))
        });
    }
    let mut failure = HandshakeError::NoAddress;
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(connection)) => return Ok(connection),
            Ok(Err(error)) => failure = error,
            Err(error) => failure = HandshakeError::refused(Closing::Unknown, error),
        }
    }
    Err(failure)
}

/// Accepts connections until the endpoint closes.
pub(super) async fn accept(shared: Arc<Shared>) {
    while let Some(incoming) = shared.endpoint.accept().await {
        let strangers = &shared.strangers;
        // Addresses can be forged until a packet has come back from them; when places are scarce they have to prove
        // themselves first.
        if strangers.available_permits() < shared.limits.strangers / 2 && incoming.may_retry() {
            if let Err(error) = incoming.retry() {
                error.into_incoming().ignore();
            }
            continue;
        }
        match strangers.clone().try_acquire_owned() {
            Ok(place) => {
                let shared = shared.clone();
                let tasks = shared.tasks.clone();
                tasks.spawn(async move {
                    let from = incoming.remote_address();
                    let greeted = greet_stranger(&shared, incoming).await;
                    drop(place);
                    match greeted {
                        Ok(greeted) => connection::run(&shared, greeted).await,
                        Err(error) => tracing::debug!(%from, "not accepted: {error}"),
                    }
                });
            }
            Err(_) => incoming.ignore(),
        }
    }
}

async fn greet_stranger(shared: &Shared, incoming: Incoming) -> Result<Greeted, HandshakeError> {
    let connecting = incoming.accept()?;
    let connection = timeout(HANDSHAKE_TIMEOUT, connecting).await.map_err(|_| HandshakeError::TimedOut)??;
    let greeted = connection::greet(shared, connection, false).await?;
    shared.enter(&greeted.link, false).await?;
    Ok(greeted)
}
