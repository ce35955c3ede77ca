//! What a data plane may spend. [`DataPlane::adjust`](super::DataPlane::adjust) changes all of it but what is settled when
//! it starts: strangers and bytes in memory; and the time until they are idle for connections that are open.

use std::time::Duration;

use shoal_scheduler::Rates;

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open connections. Default 4096.
    pub connections: usize,
    /// Incoming connections whose hello is not accepted yet. Default 64.
    pub strangers: usize,
    /// Dials at a time. Default 64.
    pub dials: usize,
    /// Requests being answered at a time, a quarter of them kept for on-demand; others hear `Busy`. Default 1024.
    pub requests: usize,
    /// The same for each peer. Default 64.
    pub requests_per_peer: usize,
    /// Bytes of answers in memory, read from the store and not acknowledged; a quarter is kept for on-demand.
    /// Default 64 MiB.
    pub answer_bytes: u32,
    /// How long a connection stays open that carries neither requests nor notices. Default 2 minutes.
    pub idle: Duration,
    /// Bytes of pieces and objects sent to all peers. Default no limit.
    pub upload: Rates,
    /// The same for each peer.
    pub upload_per_peer: Rates,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            strangers: 64,
            dials: 64,
            requests: 1024,
            requests_per_peer: 64,
            answer_bytes: 64 << 20,
            idle: Duration::from_secs(120),
            upload: Rates::default(),
            upload_per_peer: Rates::default(),
        }
    }
}

impl Limits {
    /// Streams that a peer may have open: some more than places, so that it hears `Busy` rather than nothing.
    pub(super) fn streams_per_peer(&self) -> u32 {
        u32::try_from(self.requests_per_peer.saturating_mul(2)).map_or(1024, |streams| streams.clamp(4, 1024))
    }
}
