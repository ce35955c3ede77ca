//! Why connections end: the codes on the wire, and what the rest of the program is told.

use std::fmt;

use quinn::ConnectionError;

/// Why a side closed a connection. The number is the QUIC application error code, and that of `Close` over TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Closing {
    /// The node is stopping.
    Stopping = 0,
    /// The other side broke the protocol.
    Violation = 1,
    /// The other side may not join, or is not who was dialled.
    Refused = 2,
    /// There is another connection between the two.
    Duplicate = 3,
    /// It was not used for a while.
    Idle = 4,
    /// The other side is banned.
    Banned = 5,
    /// There are too many connections.
    Full = 6,
    /// There is no common version of the protocol.
    Version = 7,
    /// The caller asked for it.
    Disconnected = 8,
    /// The certificate that the other side showed has expired; it may come again with another one.
    Expired = 9,
    /// A code of a later version.
    Unknown = u32::MAX,
}

impl Closing {
    const KNOWN: [Self; 10] = [
        Self::Stopping,
        Self::Violation,
        Self::Refused,
        Self::Duplicate,
        Self::Idle,
        Self::Banned,
        Self::Full,
        Self::Version,
        Self::Disconnected,
        Self::Expired,
    ];

    pub(super) fn code(self) -> u32 {
        self as u32
    }

    pub(super) fn from_code(code: u64) -> Self {
        Self::KNOWN.into_iter().find(|known| u64::from(known.code()) == code).unwrap_or(Self::Unknown)
    }
}

impl fmt::Display for Closing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopping => "stopping",
            Self::Violation => "protocol violation",
            Self::Refused => "refused",
            Self::Duplicate => "duplicate",
            Self::Idle => "idle",
            Self::Banned => "banned",
            Self::Full => "too many connections",
            Self::Version => "no common version",
            Self::Disconnected => "disconnected",
            Self::Expired => "the certificate of membership has expired",
            Self::Unknown => "unknown reason",
        })
    }
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Gone {
    /// This node closed it.
    #[error("closed: {why}: {detail}")]
    Ours {
        /// Why.
        why: Closing,
        /// In words.
        detail: String,
    },
    /// The peer closed it.
    #[error("closed by the peer: {why}: {detail}")]
    Theirs {
        /// Why, as it says.
        why: Closing,
        /// In its words.
        detail: String,
    },
    /// Nobody closed it: the peer or the network is gone.
    #[error("lost: {0}")]
    Lost(String),
}

impl From<ConnectionError> for Gone {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::ApplicationClosed(close) => Self::Theirs {
                why: Closing::from_code(close.error_code.into_inner()),
                detail: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            ConnectionError::LocallyClosed => Self::Ours { why: Closing::Stopping, detail: String::new() },
            error => Self::Lost(error.to_string()),
        }
    }
}
