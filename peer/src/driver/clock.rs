//! The time of the scheduler, which has no clock of its own.

use std::time::Instant;

use shoal_scheduler::Time;

/// The node's clock: the scheduler's time is what has passed since the start.
#[derive(Debug, Clone, Copy)]
pub struct Clock(Instant);

impl Clock {
    /// Starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// A moment of the system's monotonic clock, in the scheduler's time; the start for what was before it.
    pub fn at(&self, moment: Instant) -> Time {
        Time::ZERO + moment.saturating_duration_since(self.0)
    }

    /// The scheduler's present.
    pub fn now(&self) -> Time {
        self.at(Instant::now())
    }
}
