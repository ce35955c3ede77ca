//! The life of one connection: hello, notices and requests, and its end.
//!
//! ```text
//! who dials                            who is dialled
//!   TLS both ways: now each knows the other's identity
//!   opens the first stream, Hello ->     membership good? otherwise close, having said nothing
//!   membership good?                  <- Hello
//!   notices <-> notices, requests <-> requests
//! ```
//!
//! Until its hello is accepted a peer has one stream, a small window and a few seconds.

use std::{sync::Arc, time::Duration};

use quinn::{Connection, ReadError, SendStream, WriteError};
use shoal_proto::{Hello, Message};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, timeout},
};

use super::{
    Closing, Gone, PeerEvent, Shared, endpoint,
    frames::{self, FrameError, FrameReader, WriteFailed},
    link::Link,
    server,
    table::SIMULTANEOUS,
    tls,
};

/// How long TLS may take, and after it the hellos; the sum of one side's waits is what the other side allows for.
pub(super) const HANDSHAKE_TIMEOUT: Duration = SIMULTANEOUS;
/// How long a notice may wait for a peer that does not read.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// QUIC priority of notices: they are small, and what others ask of whom hangs on them.
const NOTICE_PRIORITY: i32 = 2;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// It took too long.
    #[error("the handshake took too long")]
    TimedOut,
    /// The network or the other side ended it.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// This side ended it.
    #[error("{why}: {detail}")]
    Refused {
        /// Why.
        why: Closing,
        /// In words.
        detail: String,
    },
    /// The address cannot be dialled.
    #[error(transparent)]
    Dial(#[from] quinn::ConnectError),
    /// There was no address to dial.
    #[error("no address is known")]
    NoAddress,
}

impl HandshakeError {
    pub(super) fn refused(why: Closing, detail: impl ToString) -> Self {
        Self::Refused { why, detail: detail.to_string() }
    }
}

impl From<quinn::ConnectionError> for HandshakeError {
    fn from(error: quinn::ConnectionError) -> Self {
        Gone::from(error).into()
    }
}

impl From<FrameError> for HandshakeError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Read(ReadError::ConnectionLost(error)) => error.into(),
            error => Self::refused(Closing::Violation, error),
        }
    }
}

impl From<WriteFailed> for HandshakeError {
    fn from(error: WriteFailed) -> Self {
        match error {
            WriteFailed::Write(WriteError::ConnectionLost(error)) => error.into(),
            error => Self::refused(Closing::Violation, error),
        }
    }
}

/// A connection to a peer whose hello was accepted, with its first stream.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) link: Arc<Link>,
    outgoing: mpsc::Receiver<Message>,
    send: SendStream,
    frames: FrameReader,
    /// Our hello, if the peer has yet to hear it.
    reply: Option<Hello>,
}

/// Exchanges hellos, or fails and closes the connection.
pub(super) async fn greet(shared: &Shared, connection: Connection, dialled: bool) -> Result<Greeted, HandshakeError> {
    let greeting = async {
        if dialled { greet_first(shared, &connection).await } else { greet_back(shared, &connection).await }
    };
    let greeted = timeout(HANDSHAKE_TIMEOUT, greeting).await.unwrap_or(Err(HandshakeError::TimedOut));
    match &greeted {
        Err(HandshakeError::Refused { why, detail }) => connection.close(why.code(), detail.as_bytes()),
        Err(HandshakeError::TimedOut) => connection.close(Closing::Violation.code(), b"no hello in time"),
        _ => {}
    }
    greeted
}

async fn greet_first(shared: &Shared, connection: &Connection) -> Result<Greeted, HandshakeError> {
    let (mut send, receive) = connection.open_bi().await?;
    frames::write(&mut send, &Message::Hello(shared.hello())).await?;
    let mut frames = FrameReader::new(receive);
    let (link, outgoing) = admit(shared, connection, frames.next().await?)?;
    Ok(Greeted { link, outgoing, send, frames, reply: None })
}

async fn greet_back(shared: &Shared, connection: &Connection) -> Result<Greeted, HandshakeError> {
    let (send, receive) = connection.accept_bi().await?;
    let mut frames = FrameReader::new(receive);
    let (link, outgoing) = admit(shared, connection, frames.next().await?)?;
    Ok(Greeted { link, outgoing, send, frames, reply: Some(shared.hello()) })
}

/// Checks who is there and what it showed first.
fn admit(
    shared: &Shared,
    connection: &Connection,
    first: Option<Message>,
) -> Result<(Arc<Link>, mpsc::Receiver<Message>), HandshakeError> {
    let refused = |why, detail: &str| HandshakeError::refused(why, detail);
    let peer = tls::peer_of(connection).ok_or_else(|| refused(Closing::Refused, "not an ed25519 identity"))?;
    let Some(Message::Hello(mut hello)) = first else {
        return Err(refused(Closing::Violation, "the first message is not a hello"));
    };
    let admitted = (shared.admit)(&peer, &hello.membership).map_err(|why| refused(Closing::Refused, &why))?;
    if shared.hello.common_version(&hello).is_none() {
        let ours = &shared.hello;
        let versions = format!("{} to {} are spoken here", ours.min_version, ours.version);
        return Err(refused(Closing::Version, &versions));
    }
    hello.role = admitted.role;
    hello.zone.clone_from(&admitted.zone);
    Ok(Link::new(connection.clone(), admitted, hello, shared.limits.requests_per_peer))
}

/// Runs a connection that was entered in the table, until it ends.
pub(super) async fn run(shared: &Arc<Shared>, greeted: Greeted) {
    let Greeted { link, outgoing, send, frames, reply } = greeted;
    endpoint::welcome(link.connection(), shared.limits.streams_per_peer());
    let end = tokio::select! {
        end = read_notices(shared, &link, frames) => end,
        end = write_notices(&link, send, reply, outgoing) => end,
        end = accept_requests(shared, &link) => end,
        end = watch(&link, shared.limits.idle) => end,
    };
    if let End::Close(why, detail) = end {
        link.close(why, &detail);
    }
    let gone = link.gone(link.connection().closed().await);
    shared.leave(&link, gone).await;
}

/// Why a connection does not go on.
enum End {
    /// It is gone already.
    Lost,
    /// There is a reason to close it.
    Close(Closing, String),
}

fn violation(detail: impl ToString) -> End {
    End::Close(Closing::Violation, detail.to_string())
}

async fn read_notices(shared: &Shared, link: &Arc<Link>, mut frames: FrameReader) -> End {
    loop {
        let message = match frames.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return violation("the stream of notices ended"),
            Err(FrameError::Read(ReadError::ConnectionLost(_))) => return End::Lost,
            Err(error) => return violation(error),
        };
        link.touch();
        let peer = link.peer();
        let event = match message {
            Message::Have(have) => PeerEvent::Have { peer, have },
            Message::Interest { bootstrap, blob } => PeerEvent::Interest { peer, bootstrap, blob },
            Message::Peers { blob, contacts } => PeerEvent::Peers { peer, blob, contacts },
            _ => return violation("a message that is no notice, among notices"),
        };
        shared.tell(link, event).await;
    }
}

async fn write_notices(
    link: &Link,
    mut send: SendStream,
    reply: Option<Hello>,
    mut outgoing: mpsc::Receiver<Message>,
) -> End {
    // Fails only when the connection is gone, which the write below finds too.
    let _ = send.set_priority(NOTICE_PRIORITY);
    let mut next = reply.map(Message::Hello);
    loop {
        let message = match next.take() {
            Some(message) => message,
            None => match outgoing.recv().await {
                Some(message) => message,
                None => std::future::pending().await,
            },
        };
        match timeout(STALL_TIMEOUT, frames::write(&mut send, &message)).await {
            Ok(Ok(())) => link.touch(),
            Ok(Err(WriteFailed::Codec(error))) => tracing::error!("a notice was not sent: {error}"),
            Ok(Err(WriteFailed::Write(WriteError::ConnectionLost(_)))) => return End::Lost,
            Ok(Err(WriteFailed::Write(error))) => return violation(error),
            Err(_) => return violation("notices are not read"),
        }
    }
}

async fn accept_requests(shared: &Arc<Shared>, link: &Arc<Link>) -> End {
    loop {
        match link.connection().accept_bi().await {
            Ok((send, receive)) => {
                shared.tasks.spawn(server::serve(shared.clone(), link.clone(), send, receive));
            }
            Err(_) => return End::Lost,
        }
    }
}

/// Waits until nothing has used the connection for `idle`.
async fn watch(link: &Link, idle: Duration) -> End {
    let mut ticks = interval((idle / 4).max(Duration::from_millis(10)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if link.idle() >= idle {
            return End::Close(Closing::Idle, format!("not used for {} s", idle.as_secs()));
        }
    }
}
