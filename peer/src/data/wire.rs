//! A connection over either transport.

use std::{net::SocketAddr, time::Duration};

use shoal_proto::{Message, PeerId, Request};

use super::{
    Closing, Gone,
    frames::{FrameReader, FrameWriter, WriteFailed},
    quic, tcp,
};

/// Longest reason sent along with a close, in bytes.
const MAX_DETAIL: usize = 200;

/// See the module. Cheap to clone; whoever drops the last clone ends the connection.
#[derive(Debug, Clone)]
pub(super) enum Wire {
    Quic(quic::Connection),
    Tcp(tcp::Connection),
}

impl PartialEq for Wire {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Quic(one), Self::Quic(other)) => one.id() == other.id(),
            (Self::Tcp(one), Self::Tcp(other)) => one.id() == other.id(),
            _ => false,
        }
    }
}

impl Wire {
    /// Its transport's name.
    pub(super) fn transport(&self) -> &'static str {
        match self {
            Self::Quic(_) => "quic",
            Self::Tcp(_) => "tcp",
        }
    }

    pub(super) fn remote_address(&self) -> SocketAddr {
        match self {
            Self::Quic(connection) => connection.remote_address(),
            Self::Tcp(connection) => connection.remote_address(),
        }
    }

    /// Round trip time as the transport measures it.
    pub(super) fn rtt(&self) -> Duration {
        match self {
            Self::Quic(connection) => connection.rtt(),
            Self::Tcp(connection) => connection.rtt(),
        }
    }

    /// The peer at the other end; `None` if its certificate names no ed25519 identity.
    pub(super) fn peer(&self) -> Option<PeerId> {
        match self {
            Self::Quic(connection) => connection.peer(),
            Self::Tcp(connection) => connection.peer(),
        }
    }

    /// Closes it, which ends everything on it at both ends. The first reason counts.
    pub(super) fn close(&self, why: Closing, detail: &str) {
        let detail = &detail[..detail.floor_char_boundary(MAX_DETAIL)];
        match self {
            Self::Quic(connection) => connection.close(why, detail),
            Self::Tcp(connection) => connection.close(why, detail),
        }
    }

    /// Resolves when it has ended.
    pub(super) async fn closed(&self) -> Gone {
        match self {
            Self::Quic(connection) => connection.closed().await,
            Self::Tcp(connection) => connection.closed().await,
        }
    }

    /// The stream of hellos and notices, which the side that dialled opens. To be called once.
    pub(super) async fn first(&self, dialled: bool) -> Result<(FrameWriter, FrameReader), Gone> {
        match self {
            Self::Quic(connection) => connection.first(dialled).await,
            Self::Tcp(connection) => connection.first(),
        }
    }

    /// Lets a peer whose hello was accepted ask, `requests` at a time where the transport can tell it so.
    pub(super) fn welcome(&self, requests: u32) {
        match self {
            Self::Quic(connection) => connection.welcome(requests),
            Self::Tcp(connection) => connection.welcome(),
        }
    }

    /// The next request of the peer: the first message to read, and where to answer.
    pub(super) async fn accept(&self) -> Result<(FrameWriter, FrameReader), Gone> {
        match self {
            Self::Quic(connection) => connection.accept().await,
            Self::Tcp(connection) => connection.accept().await,
        }
    }

    /// Sends a request, and gives what is answered. `limits` bounds the answer, see [`super::DataPlane::request`].
    pub(super) async fn ask(&self, request: Request, limits: &[u64]) -> Result<FrameReader, WriteFailed> {
        match self {
            Self::Quic(connection) => connection.ask(&Message::Request(request)).await,
            Self::Tcp(connection) => connection.ask(request, limits).await,
        }
    }
}
