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

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use shoal_proto::{Hello, Message};
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval, sleep, timeout},
};

use super::{
    Closing, Gone, PeerEvent, Shared,
    frames::{FrameError, FrameReader, FrameWriter, Urgency, WriteFailed},
    link::Link,
    pace::{self, Pace},
    server,
    table::SIMULTANEOUS,
    wire::Wire,
};

/// How long TLS may take, and after it the hellos; the sum of one side's waits is what the other side allows for.
pub(super) const HANDSHAKE_TIMEOUT: Duration = SIMULTANEOUS;
/// How long a notice may wait for a peer that does not read.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

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
    /// The system, or TLS over TCP, failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Neither transport reached anybody.
    #[error("by TCP: {0}; by QUIC: {1}")]
    Both(Box<Self>, Box<Self>),
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
            FrameError::Gone(gone) => gone.into(),
            error => Self::refused(Closing::Violation, error),
        }
    }
}

impl From<WriteFailed> for HandshakeError {
    fn from(error: WriteFailed) -> Self {
        match error {
            WriteFailed::Gone(gone) => gone.into(),
            error => Self::refused(Closing::Violation, error),
        }
    }
}

/// A connection to a peer whose hello was accepted, with its first stream.
#[derive(Debug)]
pub(super) struct Greeted {
    pub(super) link: Arc<Link>,
    outgoing: mpsc::Receiver<Message>,
    send: FrameWriter,
    frames: FrameReader,
    /// Our hello, if the peer has yet to hear it.
    reply: Option<Hello>,
}

/// Exchanges hellos, or fails and closes the connection.
pub(super) async fn greet(shared: &Shared, wire: Wire, dialled: bool) -> Result<Greeted, HandshakeError> {
    let greeting = async {
        let (mut send, mut frames) = wire.first(dialled).await?;
        send.set_urgency(Urgency::Notice);
        let mut reply = Some(shared.hello());
        if dialled && let Some(hello) = reply.take() {
            send.write(&Message::Hello(hello), Bytes::new()).await?;
        }
        let (link, outgoing) = admit(shared, &wire, frames.next().await?)?;
        Ok(Greeted { link, outgoing, send, frames, reply })
    };
    let greeted = timeout(HANDSHAKE_TIMEOUT, greeting).await.unwrap_or(Err(HandshakeError::TimedOut));
    match &greeted {
        Err(HandshakeError::Refused { why, detail }) => wire.close(*why, detail),
        Err(HandshakeError::TimedOut) => wire.close(Closing::Violation, "no hello in time"),
        _ => {}
    }
    greeted
}

/// Checks who is there and what it showed first.
fn admit(
    shared: &Shared,
    wire: &Wire,
    first: Option<Message>,
) -> Result<(Arc<Link>, mpsc::Receiver<Message>), HandshakeError> {
    let refused = |why, detail: &str| HandshakeError::refused(why, detail);
    let peer = wire.peer().ok_or_else(|| refused(Closing::Refused, "not an ed25519 identity"))?;
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
    Ok(Link::new(wire.clone(), admitted, hello, &shared.limits()))
}

/// Runs a connection that was entered in the table, until it ends.
pub(super) async fn run(shared: &Arc<Shared>, greeted: Greeted) {
    let Greeted { link, outgoing, send, frames, reply } = greeted;
    shared.welcome(&link);
    let end = tokio::select! {
        end = read_notices(shared, &link, frames) => end,
        end = write_notices(&link, send, reply, outgoing) => end,
        end = accept_requests(shared, &link) => end,
        end = watch(&link, shared.limits().idle) => end,
        () = shared.stopping.cancelled() => End::Close(Closing::Stopping, String::new()),
    };
    if let End::Close(why, detail) = end {
        link.close(why, &detail);
    }
    let gone = link.wire().closed().await;
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
    let mut pace = Pace::new(Instant::now());
    loop {
        let message = match frames.next().await {
            Ok(Some(message)) => message,
            Ok(None) => return violation("the stream of notices ended"),
            Err(FrameError::Gone(_)) => return End::Lost,
            Err(error) => return violation(error),
        };
        link.touch();
        let peer = link.peer();
        let heard = pace.hear(Instant::now(), pace::length(&message));
        if heard.is_flood {
            shared.tell(link, PeerEvent::Flood { peer }).await;
        }
        if !heard.wait.is_zero() {
            sleep(heard.wait).await;
        }
        let event = match message {
            Message::Have(have) => PeerEvent::Have { peer, have },
            Message::Interest { bootstrap, blob } => PeerEvent::Interest { peer, bootstrap, blob },
            Message::Peers { blob, contacts } => PeerEvent::Peers { peer, blob, contacts },
            Message::Trace { bootstrap, trace } => PeerEvent::Trace { peer, bootstrap, trace },
            _ => return violation("a message that is no notice, among notices"),
        };
        shared.tell(link, event).await;
    }
}

async fn write_notices(
    link: &Link,
    mut send: FrameWriter,
    reply: Option<Hello>,
    mut outgoing: mpsc::Receiver<Message>,
) -> End {
    let mut next = reply.map(Message::Hello);
    loop {
        let message = match next.take() {
            Some(message) => message,
            None => match outgoing.recv().await {
                Some(message) => message,
                None => std::future::pending().await,
            },
        };
        match timeout(STALL_TIMEOUT, send.write(&message, Bytes::new())).await {
            Ok(Ok(())) => link.touch(),
            Ok(Err(WriteFailed::Codec(error))) => tracing::error!("a notice was not sent: {error}"),
            Ok(Err(WriteFailed::Gone(_))) => return End::Lost,
            Ok(Err(error)) => return violation(error),
            Err(_) => return violation("notices are not read"),
        }
    }
}

async fn accept_requests(shared: &Arc<Shared>, link: &Arc<Link>) -> End {
    loop {
        match link.wire().accept().await {
            Ok((answers, asked)) => {
                shared.tasks.spawn(server::serve(shared.clone(), link.clone(), answers, asked));
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
