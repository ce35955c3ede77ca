//! Whether a proxy is worth the next read. Takes the time as an argument; asks nobody itself.
//!
//! ```text
//!           a read fails, a ping fails              ping right, or without pings the pause is over
//!   used ─────────────────────────────> passed over ──────────────────────────────────────────────> used
//!           wrong bytes                 (a pause, which doubles while failures follow each other)
//! ```
//!
//! Pings are made because reads come: a proxy that nobody uses is asked nothing. No read waits for one.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::oci::mirrors::PAUSE;

/// How often the pause doubles at most.
const DOUBLINGS: u32 = 4;
/// Longest that a proxy may ask to be left alone.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// How a proxy does.
#[derive(Debug)]
pub(super) struct Health {
    interval: Duration,
    /// How long a ping may take, where there are pings.
    ping_timeout: Option<Duration>,
    /// Held for a look or a change.
    now: Mutex<Condition>,
}

#[derive(Debug)]
struct Condition {
    /// Whether the last ping was answered, and no read has failed since.
    answers: bool,
    paused_until: Option<Instant>,
    /// Pauses that followed each other.
    pauses: u32,
    /// When the last ping began.
    pinged: Option<Instant>,
    failed: Option<Instant>,
}

/// What a read is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) use_it: bool,
    /// Whether it is time to ask whether the proxy works. Whoever is told so does it.
    pub(super) ping: bool,
}

impl Health {
    /// Until something is heard of it, a proxy is believed to work.
    pub(super) fn new(interval: Duration, ping_timeout: Option<Duration>) -> Self {
        let now = Condition { answers: true, paused_until: None, pauses: 0, pinged: None, failed: None };
        Self { interval, ping_timeout, now: Mutex::new(now) }
    }

    pub(super) fn look(&self, now: Instant) -> Look {
        let mut condition = self.condition();
        let ping = self.ping_timeout.is_some_and(|timeout| {
            // A ping has ended when the next one is due.
            condition.pinged.is_none_or(|pinged| now >= pinged + self.interval.max(timeout))
        });
        if ping {
            condition.pinged = Some(now);
        }
        Look { use_it: self.is_usable(&condition, now), ping }
    }

    pub(super) fn is_used(&self, now: Instant) -> bool {
        self.is_usable(&self.condition(), now)
    }

    /// A read failed. Whether the proxy was used until then.
    pub(super) fn failed(&self, now: Instant, retry_after: Option<Duration>) -> bool {
        let mut condition = self.condition();
        let was_used = self.is_usable(&condition, now);
        condition.answers = false;
        condition.failed = Some(now);
        // Of the reads that failed together the first one counts.
        if was_used {
            let last = self.interval * 2u32.pow(condition.pauses.min(DOUBLINGS));
            let worked = condition.paused_until.is_none_or(|until| now >= until + last);
            condition.pauses = if worked { 0 } else { condition.pauses + 1 };
            let pause = self.interval * 2u32.pow(condition.pauses.min(DOUBLINGS));
            let asked = retry_after.unwrap_or_default().min(MAX_RETRY_AFTER);
            condition.paused_until = Some(now + pause.max(asked));
        }
        was_used
    }

    /// It gave wrong bytes. Whether it was used until then.
    pub(super) fn distrust(&self, now: Instant) -> bool {
        let mut condition = self.condition();
        let was_used = self.is_usable(&condition, now);
        condition.paused_until = condition.paused_until.max(Some(now + PAUSE));
        was_used
    }

    /// The ping was answered or not. Whether that is news; a read that failed meanwhile knows better than an answer.
    pub(super) fn pinged(&self, answers: bool) -> bool {
        let mut condition = self.condition();
        if answers && condition.failed.is_some_and(|failed| Some(failed) >= condition.pinged) {
            return false;
        }
        std::mem::replace(&mut condition.answers, answers) != answers
    }

    fn is_usable(&self, condition: &Condition, now: Instant) -> bool {
        let paused = condition.paused_until.is_some_and(|until| now < until);
        !paused && (condition.answers || self.ping_timeout.is_none())
    }

    fn condition(&self) -> MutexGuard<'_, Condition> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_failure_costs_a_pause_that_grows_and_is_forgiven() {
        let health = Health::new(SECOND, None);
        let mut now = Instant::now();
        assert_eq!(health.look(now), Look { use_it: true, ping: false });
        for pause in [1, 2, 4, 8, 16, 16] {
            assert!(health.failed(now, None));
            assert!(!health.failed(now, None), "those that fail with it add nothing");
            assert!(!health.look(now + SECOND * pause - SECOND / 2).use_it, "{pause}");
            now += SECOND * pause;
            assert!(health.look(now).use_it, "{pause}");
        }
        // It works for as long as it was left alone.
        now += SECOND * 16;
        assert!(health.failed(now, None));
        assert!(health.look(now + SECOND).use_it);
        // It may ask for more, within bounds.
        now += SECOND * 60;
        assert!(health.failed(now, Some(SECOND * 90)));
        assert!(!health.look(now + SECOND * 89).use_it && health.look(now + SECOND * 90).use_it);
        now += SECOND * 1000;
        assert!(health.failed(now, Some(Duration::MAX)));
        assert!(health.look(now + MAX_RETRY_AFTER).use_it);
    }

    #[test]
    fn with_pings_one_must_be_answered() {
        let health = Health::new(SECOND, Some(SECOND * 3));
        let now = Instant::now();
        assert_eq!(health.look(now), Look { use_it: true, ping: true });
        assert_eq!(health.look(now + SECOND * 2), Look { use_it: true, ping: false }, "one at a time");
        assert!(health.pinged(false) && !health.pinged(false));
        assert_eq!(health.look(now + SECOND * 3), Look { use_it: false, ping: true });
        assert!(health.pinged(true));
        assert!(health.look(now + SECOND * 4).use_it);
        // A read knows better than a ping that began before it; the pause alone does not bring it back.
        assert!(health.failed(now + SECOND * 4, None));
        assert!(!health.pinged(true));
        assert_eq!(health.look(now + SECOND * 60), Look { use_it: false, ping: true });
        assert!(health.pinged(true));
        assert!(health.look(now + SECOND * 61).use_it);
    }

    #[test]
    fn wrong_bytes_cost_more_than_a_ping_can_mend() {
        let health = Health::new(SECOND, Some(SECOND));
        let now = Instant::now();
        assert!(health.distrust(now) && !health.distrust(now));
        assert!(!health.pinged(true));
        assert!(!health.is_used(now + PAUSE - SECOND) && health.is_used(now + PAUSE));
    }
}
