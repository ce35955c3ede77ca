//! What has been read from mounts since the daemon started, by mode, with that of mounts that are gone. What a complete native mount
//! gives the kernel reads by itself: nobody sees it.

use std::sync::{Mutex, PoisonError};

use shoal_rafs::{MountStats, ReadTimes};

use super::{
    Mounts,
    session::Session,
    table::{Mounted, Slot},
};

/// Limits of the histogram's buckets: powers of two of microseconds, 64 µs to 67 s.
const BUCKETS: [usize; 11] = [6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26];

/// How a read gets to this daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Fuse,
    Lazy,
}

impl Mode {
    const ALL: [(Self, &'static str); 2] = [(Self::Fuse, "fuse"), (Self::Lazy, "lazy")];
}

/// Of the mounts of one mode.
#[derive(Debug, Clone, Copy, Default)]
struct Figures {
    reads: u64,
    bytes: u64,
    errors: u64,
    times: ReadTimes,
    /// Encoded bytes that came from elsewhere.
    fetched: u64,
}

impl Figures {
    fn add(&mut self, other: Self) {
        self.reads += other.reads;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.times += other.times;
        self.fetched += other.fetched;
    }

    fn export(&self, mode: &'static str) {
        let count = |name: &'static str, value| metrics::counter!(name, "mode" => mode).absolute(value);
        count("shoal_reads_total", self.reads);
        count("shoal_read_bytes_total", self.bytes);
        count("shoal_read_errors_total", self.errors);
        count("shoal_read_fetched_bytes_total", self.fetched);
        let amplification = self.fetched as f64 / self.bytes.max(1) as f64;
        metrics::gauge!("shoal_read_amplification", "mode" => mode).set(amplification);
        // A histogram by hand: noting a read costs an addition, and nothing is kept for each.
        let bucket = |limit: String, value| {
            metrics::counter!("shoal_read_seconds_bucket", "mode" => mode, "le" => limit).absolute(value);
        };
        for power in BUCKETS {
            bucket(format!("{}", (1u64 << power) as f64 / 1e6), self.times.below(power));
        }
        bucket("+Inf".into(), self.times.count());
        count("shoal_read_seconds_count", self.times.count());
        metrics::gauge!("shoal_read_seconds_sum", "mode" => mode).set(self.times.total().as_secs_f64());
    }
}

/// Of mounts that are gone.
#[derive(Debug, Default)]
pub(super) struct Past(Mutex<[Figures; Mode::ALL.len()]>);

impl Mounted {
    fn figures(&self) -> Option<(Mode, Figures)> {
        let mode = match &self.session {
            Session::Fuse(_) => Mode::Fuse,
            Session::Lazy(_) => Mode::Lazy,
            Session::Native(_) => return None,
        };
        let MountStats { reads, bytes, errors, times } = self.session.stats();
        let from = self.reader.traffic().snapshot().bytes.unwrap_or_default();
        Some((mode, Figures { reads, bytes, errors, times, fetched: from.peer + from.seed + from.registry }))
    }
}

impl Mounts {
    /// A mount goes: what was read from it still counts.
    pub(super) fn remember(&self, mounted: &Mounted) {
        if let Some((mode, figures)) = mounted.figures() {
            self.past.0.lock().unwrap_or_else(PoisonError::into_inner)[mode as usize].add(figures);
        }
    }

    /// Sets the metrics of reads.
    pub(crate) fn export_reads(&self) {
        let mut all = *self.past.0.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in self.lock().0.values() {
            if let Slot::Mounted(mounted) = slot
                && let Some((mode, figures)) = mounted.figures()
            {
                all[mode as usize].add(figures);
            }
        }
        for (mode, name) in Mode::ALL {
            all[mode as usize].export(name);
        }
    }
}
