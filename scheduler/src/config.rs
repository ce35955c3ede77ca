//! What the scheduler can be told to do differently.

use std::{collections::BTreeMap, time::Duration};

use shoal_proto::PeerId;

use crate::Limits;

/// Who this node is, and the limits it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// This node.
    pub me: PeerId,
    /// Its zone: homes are peers of the same one.
    pub zone: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Labels that make a peer near when both have the same value, nearest first. Default `host`, `rack`.
    pub near_labels: Vec<String>,

    /// Pieces in flight at one peer, and less prefetch at one that refuses some. Default 16.
    pub peer_window: u32,
    /// Of these, kept for on-demand. Default 4.
    pub peer_reserve: u32,
    /// Consecutive pieces in one request to a peer, at most 64. Default 16.
    pub peer_run: u32,
    /// Encoded bytes of one request to a peer, unless a single piece has more: enough to save requests for small
    /// pieces, little enough to spread a file over the neighbours. Default 512 KiB.
    pub run_bytes: u64,
    /// How much may be on its way at a time from all sources: what arrives in this time at the measured rate.
    /// On-demand may have twice as much and counts only itself. Default 500 ms.
    pub window_time: Duration,
    /// As much may always be on its way, bytes. Default 4 MiB.
    pub min_window: u64,
    /// As many requests to peers may always be on their way, however large their pieces: who has one or two under way takes in
    /// little, would take that for all that there is, and ask for no more. Default 6.
    pub min_requests: u32,
    /// Rates, and what is under way at the registry; these can be changed later.
    pub limits: Limits,
    /// Encoded bytes of one registry request, unless a single piece has more. Default 8 MiB.
    pub max_join: u64,
    /// Unwanted bytes between two pieces that are still worth reading for one request less. Default 64 KiB.
    pub max_gap: u64,
    /// Encoded bytes that a home reads at least when it reads the registry behind what it has read: what lies behind a piece that
    /// one node asks for is what it, or another, asks for next, and each request would cost the registry as much as tens of
    /// kilobytes. A sixteenth of it anywhere else. Default 1 MiB.
    pub read_ahead: u64,
    /// Encoded bytes of a stripe; every node of a zone must have the same. Default 16 MiB.
    pub stripe: u64,

    /// How long a peer that owes a piece may be silent before another is asked as well. Grows with the gaps that
    /// the peer's answers have had, to at most `max_progress`. Default 500 ms.
    pub progress: Duration,
    /// The same where nobody waits for the piece: what is merely slow because the peer has much to send need not be
    /// sent a second time. Default 2 s.
    pub prefetch_progress: Duration,
    /// Longest that either grows to. Default 10 s.
    pub max_progress: Duration,
    /// Longest `eta` of a pending answer that is believed at a time. Default 10 s.
    pub max_eta: Duration,
    /// How long the registry may be silent before a read is given up and counted as failed. Default 15 s.
    pub registry_progress: Duration,
    /// How long an on-demand piece waits for a home that keeps saying busy before the next in hash order is asked, and
    /// at last the registry. Prefetch waits for as long as the home is there. Default 20 s.
    pub home_patience: Duration,
    /// How long a connection to a home is waited for. Default 500 ms.
    pub connect_timeout: Duration,
    /// First back-off after a failure; doubles with each, with a jitter of a quarter. Default 200 ms.
    pub backoff: Duration,
    /// Longest back-off. Default 10 s.
    pub max_backoff: Duration,
    /// How long a home that cannot read a blob's registry is not asked for that blob. Default 60 s.
    pub cannot_source: Duration,
    /// How long a peer that served wrong bytes is not used. Default 10 min.
    pub ban: Duration,

    /// Open wants; one more ends at once with an error. Default 131,072.
    pub max_wants: usize,
    /// Peers known; more are not used. Default 4,096.
    pub max_peers: usize,
    /// Connected peers with which no more are looked for, of those that may be asked for what they have: an alternate that is
    /// not among them is not dialled. Every connection costs an announcement whenever something is new. Default 24.
    pub enough_peers: usize,
    /// Leases remembered; more are ignored. Default 1,024.
    pub max_leases: usize,
}

impl Config {
    /// The defaults for this node.
    pub fn new(me: PeerId, zone: impl Into<String>) -> Self {
        Self {
            me,
            zone: zone.into(),
            labels: BTreeMap::new(),
            near_labels: vec!["host".into(), "rack".into()],
            peer_window: 16,
            peer_reserve: 4,
            peer_run: 16,
            run_bytes: 512 << 10,
            window_time: Duration::from_millis(500),
            min_window: 4 << 20,
            min_requests: 6,
            limits: Limits::default(),
            max_join: 8 << 20,
            max_gap: 64 << 10,
            read_ahead: 1 << 20,
            stripe: 16 << 20,
            progress: Duration::from_millis(500),
            prefetch_progress: Duration::from_secs(2),
            max_progress: Duration::from_secs(10),
            max_eta: Duration::from_secs(10),
            registry_progress: Duration::from_secs(15),
            home_patience: Duration::from_secs(20),
            connect_timeout: Duration::from_millis(500),
            backoff: Duration::from_millis(200),
            max_backoff: Duration::from_secs(10),
            cannot_source: Duration::from_secs(60),
            ban: Duration::from_secs(600),
            max_wants: 1 << 17,
            max_peers: 4096,
            enough_peers: 24,
            max_leases: 1024,
        }
    }
}
