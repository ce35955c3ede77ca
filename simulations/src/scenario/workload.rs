//! Who reads what when.

use std::path::PathBuf;

use serde::Deserialize;

/// Who reads what when.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// The kind.
    pub kind: WorkloadKind,
    /// What a start reads of the image.
    pub read: Read,
    /// Pieces that the trace names, in order, filled in by [`Scenario::load`](super::Scenario::load).
    #[serde(skip)]
    pub traced: Vec<u32>,
    /// For all kinds but `flash-crowd`: the time over which the nodes start, seconds.
    #[serde(default)]
    pub over_s: f64,
    /// For `diurnal`: how many times as many nodes start at the busiest time as at the quietest, at least 1.
    #[serde(default)]
    pub peak_to_trough: Option<f64>,
    /// Pieces that a reader waits for at a time, in order, beside the prefetch. Default 0; where only a part is read, or nothing
    /// is prefetched, 1: one after the other.
    #[serde(default)]
    pub on_demand: usize,
    /// What is fetched although nobody waits for it. Default: everything if everything is read, otherwise nothing.
    #[serde(default)]
    pub prefetch: Option<Prefetch>,
    /// Images that are started. Default: the one that is described.
    #[serde(default)]
    pub images: Images,
}

/// Images like the one that is described, of which none shares anything with another.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Images {
    /// How many.
    pub count: u32,
    /// How uneven their popularity is: a node starts that of rank `r` with a probability that goes as `1 / r^zipf`. Default 1.
    #[serde(default = "harmonic")]
    pub zipf: f64,
    /// Different images that each node starts. Default 1.
    #[serde(default = "once")]
    pub starts_per_node: u32,
}

fn harmonic() -> f64 {
    1.0
}

fn once() -> u32 {
    1
}

impl Default for Images {
    fn default() -> Self {
        Self { count: 1, zipf: harmonic(), starts_per_node: once() }
    }
}

/// When nodes start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadKind {
    /// All at once.
    FlashCrowd,
    /// Evenly over `over_s`.
    Rolling,
    /// At random, independently of each other, as many in `over_s` on average as there are.
    Poisson,
    /// The same with a rate that goes up and down as a sinusoid, once in `over_s`, beginning at the quietest time.
    Diurnal,
}

/// What a start reads of the image.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Read {
    /// Every piece.
    All,
    /// What `shoal mount --trace` recorded, in that order: a file beside the scenario's. It needs the image's bootstrap.
    Trace(PathBuf),
    /// The first pieces: this part of all, one at least.
    Fraction(f64),
}

/// What a node fetches although nobody waits for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prefetch {
    /// Nothing, as a daemon by default where nobody has started the image before.
    Nothing,
    /// What a start reads, as a daemon that was told of an earlier start.
    Start,
    /// That first, and then the rest.
    All,
}

impl Workload {
    /// What is prefetched: where a start reads everything, that is everything or nothing.
    pub fn prefetched(&self) -> Prefetch {
        match (&self.read, self.prefetch) {
            (Read::All, None | Some(Prefetch::Start)) => Prefetch::All,
            (_, said) => said.unwrap_or(Prefetch::Nothing),
        }
    }

    /// Pieces that a reader waits for at a time; 0 if nobody does, because all is prefetched.
    pub(crate) fn window(&self) -> usize {
        let needs_reader = self.read != Read::All || self.prefetched() == Prefetch::Nothing;
        self.on_demand.max(usize::from(needs_reader))
    }

    /// Whether a node fetches the whole image in the end.
    pub(crate) fn fetches_all(&self) -> bool {
        self.read == Read::All || self.prefetched() == Prefetch::All
    }

    /// The pieces that a start reads, in order, of an image of so many.
    pub(crate) fn start(&self, pieces: u32) -> Vec<u32> {
        match &self.read {
            Read::All => (0..pieces).collect(),
            Read::Trace(_) => self.traced.clone(),
            Read::Fraction(part) => (0..(f64::from(pieces) * part).round().max(1.0) as u32).collect(),
        }
    }
}
