//! Waiting for a limit: an [`Allowance`] with a clock, and a queue of those who want to pass.
//!
//! First come, first served within a priority. Readers and prefetch queue apart; which of the two first ones goes is the
//! allowance's to say.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use shoal_proto::Priority;
use shoal_scheduler::{Allowance, Rates, Time};
use tokio::{sync::Notify, time::sleep};

/// See the module.
#[derive(Debug)]
pub(crate) struct Throttle {
    /// Its name in metrics.
    limit: &'static str,
    start: Instant,
    /// Held for a look or a change.
    allowance: Mutex<Allowance>,
    /// Held by who comes next, prefetch and on-demand.
    turns: [tokio::sync::Mutex<()>; 2],
    changed: Notify,
}

impl Throttle {
    pub(crate) fn new(limit: &'static str, rates: Rates) -> Self {
        Self {
            limit,
            start: Instant::now(),
            allowance: Mutex::new(Allowance::new(Time::ZERO, rates)),
            turns: Default::default(),
            changed: Notify::new(),
        }
    }

    /// Other rates from now on, also for those who wait.
    pub(crate) fn set(&self, rates: Rates) {
        self.allowance().set(self.now(), rates);
        self.changed.notify_waiters();
    }

    /// Waits until `bytes` may pass. Cancel safe: who leaves takes nothing.
    pub(crate) async fn pass(&self, bytes: u64, priority: Priority) {
        let _turn = self.turns[priority as usize].lock().await;
        let came = Instant::now();
        loop {
            // Hears of every change from here on.
            let changed = self.changed.notified();
            match self.try_pass(bytes, priority) {
                Ok(late) => {
                    return if late {
                        self.count(came, bytes)
                    };
                }
                Err(at) => tokio::select! {
                    () = sleep(at.since(self.now())) => {}
                    () = changed => {}
                },
            }
        }
    }

    /// Takes `bytes` if they may pass now, and says whether they had to wait.
    fn try_pass(&self, bytes: u64, priority: Priority) -> Result<bool, Time> {
        let (now, mut allowance) = (self.now(), self.allowance());
        let before = allowance.waits();
        allowance.poll(now, priority)?;
        allowance.take(now, bytes, priority);
        Ok(allowance.waits() != before)
    }

    fn count(&self, came: Instant, bytes: u64) {
        metrics::gauge!("shoal_limit_wait_seconds", "limit" => self.limit).increment(came.elapsed().as_secs_f64());
        metrics::counter!("shoal_limit_delayed_total", "limit" => self.limit).increment(bytes);
    }

    fn now(&self) -> Time {
        Time::ZERO + self.start.elapsed()
    }

    fn allowance(&self) -> MutexGuard<'_, Allowance> {
        self.allowance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// Overdrawn for longer than any test runs.
    async fn overdrawn() -> Throttle {
        let throttle = Throttle::new("test", Rates { all: 1, prefetch: 0 });
        throttle.pass(1 << 40, Priority::OnDemand).await;
        throttle
    }

    #[tokio::test]
    async fn each_kind_keeps_its_order() {
        let throttle = overdrawn().await;
        for priority in [Priority::Prefetch, Priority::OnDemand] {
            let mut first = Box::pin(throttle.pass(1, priority));
            let mut second = Box::pin(throttle.pass(1, priority));
            assert!((&mut first).now_or_never().is_none() && (&mut second).now_or_never().is_none());
            throttle.set(Rates::default());
            assert!((&mut second).now_or_never().is_none(), "it is behind the first");
            assert!(first.now_or_never().is_some() && second.now_or_never().is_some());
            throttle.set(Rates { all: 1, prefetch: 0 });
            throttle.pass(1 << 40, Priority::OnDemand).await;
        }
    }

    #[tokio::test]
    async fn who_waits_hears_of_a_change_and_who_leaves_takes_nothing() {
        let throttle = overdrawn().await;
        let mut gone = Box::pin(throttle.pass(1 << 40, Priority::OnDemand));
        assert!((&mut gone).now_or_never().is_none());
        drop(gone);
        let change = async {
            tokio::task::yield_now().await;
            throttle.set(Rates { all: 2, prefetch: 0 });
            throttle.set(Rates::default());
        };
        futures::join!(throttle.pass(1, Priority::OnDemand), throttle.pass(1, Priority::Prefetch), change);
    }
}
