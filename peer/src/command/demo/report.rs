//! What the demo found, as one JSON object or one table.

use serde::Serialize;
use shoal_proto::control::{BySource, StatusReply};

use crate::{command::human_bytes, layout_server::RegistryFigures};

/// The keys are a contract with scripts: see the README.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub image: ImageFigures,
    pub registry: RegistryFigures,
    pub nodes: Vec<NodeFigures>,
}

#[derive(Debug, Serialize)]
pub(super) struct ImageFigures {
    pub files: u64,
    pub decoded_bytes: u64,
    /// Blobs and bootstrap layer.
    pub encoded_bytes: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct NodeFigures {
    pub name: String,
    pub role: String,
    pub first_byte_seconds: f64,
    pub all_seconds: f64,
    pub bytes: BySource,
    pub objects: BySource,
    pub digest_failures: u64,
    /// The most memory that was resident at a time.
    pub peak_rss_bytes: u64,
    pub identical: bool,
}

impl NodeFigures {
    /// The traffic in `status` is the whole node's, so that what a seed peer reads for others shows.
    pub(super) fn new(
        name: String,
        status: &StatusReply,
        seconds: (f64, f64),
        peak_rss_bytes: u64,
        identical: bool,
    ) -> Self {
        let total = status.total.unwrap_or_default();
        Self {
            name,
            role: status.role.clone(),
            first_byte_seconds: seconds.0,
            all_seconds: seconds.1,
            bytes: total.bytes.unwrap_or_default(),
            objects: total.objects.unwrap_or_default(),
            digest_failures: total.rejected_chunks,
            peak_rss_bytes,
            identical,
        }
    }
}

impl Report {
    /// The registry's bytes in units of the encoded image.
    pub(super) fn registry_ratio(&self) -> f64 {
        self.registry.bytes_sent as f64 / self.image.encoded_bytes.max(1) as f64
    }

    pub(super) fn print(&self) {
        println!(
            "image: {} files, {} decoded, {} encoded",
            self.image.files,
            human_bytes(self.image.decoded_bytes),
            human_bytes(self.image.encoded_bytes)
        );
        println!(
            "{:<8} {:>10} {:>8} {:>12} {:>12} {:>12} {:>12} {:>12} {:>8}  identical",
            "node", "first byte", "all", "registry", "seed", "peers", "local", "peak memory", "failures"
        );
        for node in &self.nodes {
            println!(
                "{:<8} {:>8.3} s {:>6.2} s {:>12} {:>12} {:>12} {:>12} {:>12} {:>8}  {}",
                node.name,
                node.first_byte_seconds,
                node.all_seconds,
                human_bytes(node.bytes.registry + node.objects.registry),
                human_bytes(node.bytes.seed + node.objects.seed),
                human_bytes(node.bytes.peer + node.objects.peer),
                human_bytes(node.bytes.local),
                human_bytes(node.peak_rss_bytes),
                node.digest_failures,
                if node.identical { "yes" } else { "NO" }
            );
        }
        println!(
            "registry: {} requests, {} sent, {:.3} x the encoded image",
            self.registry.requests,
            human_bytes(self.registry.bytes_sent),
            self.registry_ratio()
        );
    }
}
