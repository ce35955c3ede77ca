//! How much a peer may say: notices cost work here that nobody has asked for. Who says more is read more slowly, and with it all that
//! comes over its connection; what it said is not lost, since news that is missed is missed for good. Pure: time is an argument.

use std::time::{Duration, Instant};

use shoal_proto::Message;

/// Shortest time between two short notices in the long run. A seed peer that has news of forty blobs that none of its neighbours had says as
/// much.
const INTERVAL: Duration = Duration::from_micros(250);
/// So much may be said at once, as by who has just connected and shares thousands of blobs: 8,192 notices.
const BURST: Duration = Duration::from_micros(250 * 8192);
/// So much that came too early is a flood: the whole of what may be said in a second. Who is silent for so long that it may say as much
/// at once as at first has said nothing too early.
const FLOOD: u32 = 4096;
/// Pieces, in a bitfield or a trace, and contacts, that are as much work as a short notice.
const PIECES: u32 = 8192;
const TRACED: usize = 512;
const CONTACTS: usize = 8;

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// When all that was said is within the pace.
    even: Instant,
    /// What came too early, in short notices.
    early: u32,
}

/// What becomes of a notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Heard {
    /// How long it is to wait.
    pub(super) wait: Duration,
    /// Whether this is a flood, as it is now and then while one lasts.
    pub(super) is_flood: bool,
}

impl Pace {
    pub(super) fn new(now: Instant) -> Self {
        Self { even: now, early: 0 }
    }

    /// A notice has come that is as long as so many short ones.
    pub(super) fn hear(&mut self, now: Instant, length: u32) -> Heard {
        if self.even <= now {
            (self.even, self.early) = (now, 0);
        }
        self.even += INTERVAL * length;
        let wait = self.even.saturating_duration_since(now).saturating_sub(BURST);
        let before = self.early;
        if !wait.is_zero() {
            self.early = before.saturating_add(length);
        }
        Heard { wait, is_flood: self.early / FLOOD > before / FLOOD }
    }
}

/// As how many short ones a notice counts.
pub(super) fn length(notice: &Message) -> u32 {
    let more = match notice {
        Message::Have(have) => have.pieces.len() / PIECES,
        Message::Trace { trace, .. } => (trace.pieces().count() / TRACED) as u32,
        Message::Peers { contacts, .. } => (contacts.len() / CONTACTS) as u32,
        _ => 0,
    };
    1 + more
}

#[cfg(test)]
mod tests {
    use shoal_proto::{Bitfield, BlobId, Have, ObjectId, StartTrace};

    use super::*;

    #[test]
    fn a_burst_passes_and_a_flood_is_slowed_down_and_seen() {
        let mut now = Instant::now();
        let start = now;
        let mut pace = Pace::new(now);
        for n in 0..8192 {
            assert_eq!(pace.hear(now, 1), Heard { wait: Duration::ZERO, is_flood: false }, "{n}");
        }
        let floods = (0..3 * FLOOD).filter(|_| {
            let heard = pace.hear(now, 1);
            assert!(!heard.wait.is_zero());
            now += heard.wait;
            heard.is_flood
        });
        assert_eq!(floods.count(), 3);
        assert_eq!(now - start, INTERVAL * (3 * FLOOD));
        now += BURST + INTERVAL;
        assert_eq!(pace.hear(now, 1), Heard { wait: Duration::ZERO, is_flood: false });
    }

    #[test]
    fn what_is_long_counts_for_more() {
        let now = Instant::now();
        let mut pace = Pace::new(now);
        assert!(pace.hear(now, 8192).wait.is_zero());
        assert_eq!(pace.hear(now, 9), Heard { wait: INTERVAL * 9, is_flood: false });
        assert!(!pace.hear(now, FLOOD - 10).is_flood && pace.hear(now, 1).is_flood);
        let (bootstrap, blob) = (ObjectId::new([1; 32]), BlobId::new([2; 32]));
        assert_eq!(length(&Message::Interest { bootstrap, blob }), 1);
        let have = |pieces| Have { bootstrap, blob, full: true, first: 0, pieces: Bitfield::new(pieces) };
        assert_eq!([640, 1 << 16].map(|pieces| length(&Message::Have(have(pieces)))), [1, 9]);
        let trace = StartTrace::of((0..4000).map(|piece| (0, piece * 2)));
        assert_eq!(length(&Message::Trace { bootstrap, trace }), 8);
    }

    #[test]
    fn who_keeps_the_pace_never_waits() {
        let mut now = Instant::now();
        let mut pace = Pace::new(now);
        for _ in 0..100_000 {
            assert!(pace.hear(now, 1).wait.is_zero());
            now += INTERVAL;
        }
    }
}
