//! What things cost in the simulator beside the bytes on the links, with the reason of each default.

use std::time::Duration;

use serde::Deserialize;

/// The section `[costs]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Costs {
    /// Round trips until a connection is up: handshake with certificates, hello. Default 2.
    pub connect_rtts: f64,
    /// From the start of a mount, when neighbours are looked for, to the first read: tag, manifest and bootstrap, which are
    /// not simulated one by one; milliseconds. Default 100.
    pub mount_ms: f64,
    /// From a request's arrival to the first byte of the answer: parsing, looking up, reading the disk; milliseconds.
    /// Default 0.2.
    pub request_ms: f64,
    /// What a node decodes, verifies and writes, with all its cores; MiB per second. Default 2000: two cores at the
    /// rates of zstd and BLAKE3.
    pub decode_mib_s: f64,
    /// CPU seconds for a GB sent. Default 1.25: QUIC with segmentation offload at an MTU of 1500, one side.
    pub send_cpu_s_per_gb: f64,
    /// CPU seconds for a GB received, decoded and verified. Default 2.2: the other side, and a second for both.
    pub receive_cpu_s_per_gb: f64,
    /// How often a node tells its neighbours what is new, milliseconds. Default 100, as the daemon does.
    pub have_ms: f64,
    /// Neighbours that a node looks for in its zone, beside the seed peers. Others find it as well, so it has about
    /// twice as many. Default 12.
    pub neighbours: usize,
    /// Neighbours that it looks for in other zones. Default 2.
    pub far_neighbours: usize,
    /// Silence after which a connection counts as dead, seconds. Default 12, as the daemon's.
    pub dead_after_s: f64,
    /// Life of a seed peer's lease; it is renewed three times as often. Seconds. Default 15, as the daemon's.
    pub lease_s: f64,
}

impl Default for Costs {
    fn default() -> Self {
        Self {
            connect_rtts: 2.0,
            mount_ms: 100.0,
            request_ms: 0.2,
            decode_mib_s: 2000.0,
            send_cpu_s_per_gb: 1.25,
            receive_cpu_s_per_gb: 2.2,
            have_ms: 100.0,
            neighbours: 12,
            far_neighbours: 2,
            dead_after_s: 12.0,
            lease_s: 15.0,
        }
    }
}

impl Costs {
    /// How long so many bytes take to decode, verify and write.
    pub(crate) fn decoding(&self, bytes: u64) -> Duration {
        Duration::from_secs_f64(bytes as f64 / (self.decode_mib_s * f64::from(1 << 20)))
    }

    /// CPU seconds of both ends for bytes that somebody sent and somebody took in.
    pub(crate) fn cpu_s(&self, sent: u64, received: u64) -> f64 {
        (sent as f64 * self.send_cpu_s_per_gb + received as f64 * self.receive_cpu_s_per_gb) / 1e9
    }
}

pub(crate) fn millis(millis: f64) -> Duration {
    Duration::from_secs_f64(millis / 1e3)
}
