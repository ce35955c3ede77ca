//! `[prefetch]`: what is fetched of a mounted image before anybody reads it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// `[prefetch]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "docs/shoal.toml is the one place that documents the keys")]
pub struct PrefetchConfig {
    pub traces: bool,
    #[serde(with = "humantime_serde")]
    pub trace_time: Duration,
    pub rest: bool,
}

impl Default for PrefetchConfig {
    fn default() -> Self {
        Self { traces: true, trace_time: Duration::from_secs(60), rest: false }
    }
}

impl PrefetchConfig {
    /// Nothing but what an image itself lists: for a node that knows no others.
    pub(crate) const ALONE: Self = Self { traces: false, trace_time: Duration::ZERO, rest: false };

    /// Whether reads are noted for others.
    pub(crate) fn notes_starts(&self) -> bool {
        self.traces && !self.trace_time.is_zero()
    }
}
