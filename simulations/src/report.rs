//! What a run has shown.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

/// The outcome of a scenario.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// The seed that was used.
    pub seed: u64,
    /// Nodes that read the image and were not killed.
    pub nodes: usize,
    /// Of these, how many have all of it.
    pub complete: usize,
    /// Reads that ended with an error.
    pub failed_reads: u64,
    /// Seconds from a node's start to its first piece.
    pub first_s: Spread,
    /// Seconds from a node's start to its last piece.
    pub all_s: Spread,
    /// Lower bound for the last piece of a crowd without faults, seconds.
    pub bound_s: f64,
    /// What the registry sent.
    pub registry: Registry,
    /// Encoded bytes that the reading nodes received, by who sent them: `peer`, `seed`, `registry`.
    pub received_bytes: BTreeMap<&'static str, u64>,
    /// Decoded bytes that the complete nodes could then read.
    pub decoded_bytes: u64,
    /// Events that the world went through.
    pub events: u64,
}

/// What the registry sent.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Registry {
    /// Requests answered.
    pub requests: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Bytes sent to each zone, by the image's encoded bytes.
    pub copies_per_zone: BTreeMap<String, f64>,
}

/// Median, 99th percentile and maximum.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Spread {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Maximum.
    pub max: f64,
}

impl Spread {
    /// Of these values; zeros if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let index = (values.len() as f64 * part).ceil() as usize;
            values.get(index.saturating_sub(1)).copied().unwrap_or_default()
        };
        Self { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} (seed {}): {} of {} nodes complete", self.scenario, self.seed, self.complete, self.nodes)?;
        writeln!(f, "seconds           p50      p99      max")?;
        for (name, spread) in [("first piece", self.first_s), ("all pieces", self.all_s)] {
            writeln!(f, "  {name:<12} {:>8.3} {:>8.3} {:>8.3}", spread.p50, spread.p99, spread.max)?;
        }
        writeln!(f, "  bound        {:>26.3}", self.bound_s)?;
        writeln!(f, "registry: {} bytes in {} requests", self.registry.bytes, self.registry.requests)?;
        for (zone, copies) in &self.registry.copies_per_zone {
            writeln!(f, "  zone {zone}: {copies:.3} copies of the image")?;
        }
        for (source, bytes) in &self.received_bytes {
            writeln!(f, "received from {source}: {bytes} bytes")?;
        }
        write!(f, "failed reads: {}", self.failed_reads)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(Vec::new()), Spread::default());
        assert_eq!(Spread::of(vec![3.0, 1.0, 2.0]), Spread { p50: 2.0, p99: 3.0, max: 3.0 });
        assert_eq!(Spread::of((1..=100).map(f64::from).collect()), Spread { p50: 50.0, p99: 99.0, max: 100.0 });
    }
}
