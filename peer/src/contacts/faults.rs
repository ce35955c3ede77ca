//! What other nodes did that they should not, counted for people to see: `shoal ctl peers` and metrics name them. Nothing is decided
//! by it; who is asked, left alone or banned is the scheduler's to say, and who loses its connection the data plane's.

use std::collections::HashSet;

use shoal_proto::PeerId;

use crate::identity;

/// Nodes that metrics name, those that came first; others are counted together. A name is a label that stays for good, and anybody
/// may come under a new one.
const MAX_NAMED: usize = 64;

/// What can be wrong with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It broke the protocol, and lost its connection for it.
    Violation,
    /// It sent bytes that are not what they should be, and is banned.
    WrongBytes,
    /// It fell silent while it owed an answer, which was then not waited for.
    Stall,
    /// It does not have a piece that it, or another for it, said it has.
    BrokenPromise,
    /// It said so much that it had to be slowed down.
    Flood,
}

impl Fault {
    /// Its name in metrics.
    fn name(self) -> &'static str {
        match self {
            Self::Violation => "violation",
            Self::WrongBytes => "wrong_bytes",
            Self::Stall => "stall",
            Self::BrokenPromise => "broken_promise",
            Self::Flood => "flood",
        }
    }
}

/// How often a node did each, and what the last was.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    pub(crate) violations: u64,
    pub(crate) wrong_bytes: u64,
    pub(crate) stalls: u64,
    pub(crate) broken_promises: u64,
    pub(crate) floods: u64,
    /// In words.
    pub(crate) last: String,
}

impl Faults {
    pub(super) fn count(&mut self, fault: Fault, detail: &str) {
        *match fault {
            Fault::Violation => &mut self.violations,
            Fault::WrongBytes => &mut self.wrong_bytes,
            Fault::Stall => &mut self.stalls,
            Fault::BrokenPromise => &mut self.broken_promises,
            Fault::Flood => &mut self.floods,
        } += 1;
        detail.clone_into(&mut self.last);
    }
}

/// The nodes that metrics name.
#[derive(Debug, Default)]
pub(super) struct Named(HashSet<PeerId>);

impl Named {
    /// Counts a fault in the metrics, under the node's name if there is room for it.
    pub(super) fn count(&mut self, peer: PeerId, fault: Fault) {
        let known = self.0.contains(&peer) || (self.0.len() < MAX_NAMED && self.0.insert(peer));
        let name = if known { identity::to_text(&peer) } else { "other".to_owned() };
        metrics::counter!("shoal_peer_faults_total", "peer" => name, "fault" => fault.name()).increment(1);
    }
}
