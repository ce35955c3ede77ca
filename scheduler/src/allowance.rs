//! What may pass in a time: token buckets of exact integers, in which prefetch takes what on-demand leaves.
//!
//! A bucket holds one second's worth. Who finds anything in it takes all that it needs, so that a piece larger than the
//! bucket passes too, and those behind it wait until that is made up for: in any `t` seconds at most `rate * (t + 1)` and one
//! taking pass. Prefetch leaves half of the bucket to the next reader, and has a bucket of its own besides where it has a
//! lower rate. Whoever waits is let in once nobody of its priority, or of a higher one, takes what comes in.
//!
//! Crates that limit rates (governor, leaky-bucket, async-speed-limit) know one priority, and most of them rates that stay
//! as they are; hence own code.

use std::time::Duration;

use shoal_proto::Priority;

use crate::Time;

/// Parts that a unit is counted in, so that nothing is lost to rounding.
const PARTS: i128 = 1_000_000_000;

/// How many bytes, or requests, may pass in a second. 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// All together.
    pub all: u64,
    /// Of these, for what nobody waits for.
    pub prefetch: u64,
}

/// What had to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Waits {
    /// How long something waited, whatever its priority; on-demand and prefetch that wait at the same time count both.
    pub time: Duration,
    /// What passed after it had waited.
    pub amount: u64,
}

/// One bucket.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    /// In parts of a unit, at `at`; below zero by what was taken beyond it.
    level: i128,
    at: Time,
}

impl Bucket {
    fn new(now: Time, rate: u64) -> Self {
        Self { rate, level: capacity(rate), at: now }
    }

    /// What was taken beyond the old rate is forgotten, what is left of it stays. The same rate changes nothing.
    fn set_rate(&mut self, now: Time, rate: u64) {
        if rate == self.rate {
            return;
        }
        let left = if self.rate == 0 { i128::MAX } else { self.level(now) };
        *self = Self { rate, level: left.clamp(0, capacity(rate)), at: now };
    }

    fn level(&self, now: Time) -> i128 {
        let nanos = now.as_nanos().saturating_sub(self.at.as_nanos());
        let come = i128::from(nanos).saturating_mul(self.rate.into());
        self.level.saturating_add(come).min(capacity(self.rate))
    }

    /// When there is more than `floor` in it.
    fn opens(&self, now: Time, floor: i128) -> Time {
        if self.rate == 0 {
            return now;
        }
        let missing = floor.saturating_add(1).saturating_sub(self.level(now));
        if missing <= 0 {
            return now;
        }
        let rate = i128::from(self.rate);
        let nanos = u64::try_from((missing - 1) / rate + 1).unwrap_or(u64::MAX);
        now + Duration::from_nanos(nanos)
    }

    fn add(&mut self, now: Time, amount: i128) {
        if self.rate == 0 {
            return;
        }
        let level = self.level(now).saturating_add(amount.saturating_mul(PARTS));
        (self.level, self.at) = (level.min(capacity(self.rate)), self.at.max(now));
    }
}

/// A second's worth.
fn capacity(rate: u64) -> i128 {
    i128::from(rate) * PARTS
}

/// See the module. Nobody queues here: ask with [`poll`](Self::poll) when it is somebody's turn.
#[derive(Debug)]
pub struct Allowance {
    all: Bucket,
    prefetch: Bucket,
    /// Since when prefetch, and on-demand, wait.
    waiting: [Option<Time>; 2],
    /// Whether what may pass now had to wait.
    late: [bool; 2],
    waits: Waits,
}

impl Allowance {
    /// Full buckets.
    pub fn new(now: Time, rates: Rates) -> Self {
        Self {
            all: Bucket::new(now, rates.all),
            prefetch: Bucket::new(now, rates.prefetch),
            waiting: [None; 2],
            late: [false; 2],
            waits: Waits::default(),
        }
    }

    /// Other rates from now on. Whoever was told to wait should ask again.
    pub fn set(&mut self, now: Time, rates: Rates) {
        self.all.set_rate(now, rates.all);
        self.prefetch.set_rate(now, rates.prefetch);
    }

    /// Whether something of this priority may pass now, otherwise when to ask again: then it may, unless others come
    /// first. It counts as waiting until it may.
    ///
    /// # Errors
    /// The time to ask again.
    pub fn poll(&mut self, now: Time, priority: Priority) -> Result<(), Time> {
        let at = match priority {
            Priority::OnDemand => self.all.opens(now, 0),
            Priority::Prefetch => self.all.opens(now, capacity(self.all.rate) / 2).max(self.prefetch.opens(now, 0)),
        };
        let waiting = &mut self.waiting[priority as usize];
        if at > now {
            waiting.get_or_insert(now);
            return Err(at);
        }
        let since = waiting.take();
        self.late[priority as usize] = since.is_some();
        self.waits.time += since.map_or(Duration::ZERO, |since| now.since(since));
        Ok(())
    }

    /// Takes what passes.
    pub fn take(&mut self, now: Time, amount: u64, priority: Priority) {
        self.add(now, -i128::from(amount), priority);
        if std::mem::take(&mut self.late[priority as usize]) {
            self.waits.amount = self.waits.amount.saturating_add(amount);
        }
    }

    /// Gives back what was taken and did not pass.
    pub fn give_back(&mut self, now: Time, amount: u64, priority: Priority) {
        self.add(now, amount.into(), priority);
    }

    fn add(&mut self, now: Time, amount: i128, priority: Priority) {
        self.all.add(now, amount);
        if priority == Priority::Prefetch {
            self.prefetch.add(now, amount);
        }
    }

    /// How much to take at a time, where there is a choice, for the next reader to find something left: a quarter of a
    /// second's worth.
    pub fn share(&self, priority: Priority) -> u64 {
        let quarter = |rate: u64| if rate == 0 { u64::MAX } else { (rate / 4).max(1) };
        match priority {
            Priority::OnDemand => quarter(self.all.rate),
            Priority::Prefetch => quarter(self.all.rate).min(quarter(self.prefetch.rate)),
        }
    }

    /// What had to wait so far.
    pub fn waits(&self) -> Waits {
        self.waits
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ms(millis: u64) -> Time {
        Time::ZERO + Duration::from_millis(millis)
    }

    #[test]
    fn prefetch_leaves_half_and_waits_longer() {
        let mut allowance = Allowance::new(Time::ZERO, Rates { all: 1000, prefetch: 0 });
        assert_eq!(allowance.poll(Time::ZERO, Priority::Prefetch), Ok(()));
        allowance.take(Time::ZERO, 600, Priority::Prefetch);
        let again = allowance.poll(Time::ZERO, Priority::Prefetch).unwrap_err();
        assert_eq!(again, Time::ZERO + Duration::from_nanos(100_000_001), "when there is more than half");
        assert_eq!(allowance.poll(Time::ZERO, Priority::OnDemand), Ok(()));
        allowance.take(Time::ZERO, 1400, Priority::OnDemand);
        assert_eq!(allowance.poll(Time::ZERO, Priority::OnDemand), Err(ms(1000) + Duration::from_nanos(1)));
        assert_eq!(allowance.poll(ms(1001), Priority::OnDemand), Ok(()));
        assert_eq!(allowance.poll(ms(1501), Priority::Prefetch), Ok(()));
        allowance.take(ms(1501), 5, Priority::Prefetch);
        let waits = Waits { time: Duration::from_millis(1001 + 1501), amount: 5 };
        assert_eq!(allowance.waits(), waits);
    }

    #[test]
    fn without_a_rate_everything_passes_and_a_new_rate_counts_at_once() {
        let mut allowance = Allowance::new(Time::ZERO, Rates::default());
        for priority in [Priority::Prefetch, Priority::OnDemand] {
            allowance.take(Time::ZERO, u64::MAX, priority);
            assert_eq!(allowance.poll(Time::ZERO, priority), Ok(()));
            assert_eq!(allowance.share(priority), u64::MAX);
        }
        allowance.set(Time::ZERO, Rates { all: 10, prefetch: 4 });
        allowance.take(Time::ZERO, 5, Priority::Prefetch);
        assert_eq!((allowance.share(Priority::OnDemand), allowance.share(Priority::Prefetch)), (2, 1));
        assert!(allowance.poll(ms(249), Priority::Prefetch).is_err(), "it has a rate of its own");
        allowance.take(Time::ZERO, 1_000_000, Priority::OnDemand);
        allowance.set(Time::ZERO, Rates { all: 10, prefetch: 1 });
        assert!(allowance.poll(Time::ZERO + 1000 * SECOND, Priority::OnDemand).is_err());
        allowance.set(Time::ZERO, Rates { all: 20, prefetch: 0 });
        assert!(allowance.poll(ms(1), Priority::OnDemand).is_ok(), "what the old rate was exceeded by is forgotten");
        allowance.set(ms(1), Rates::default());
        assert_eq!(allowance.poll(ms(1), Priority::Prefetch), Ok(()));
    }

    /// Takes as soon as it may, again and again; gives when what was taken.
    fn greedy(rates: Rates, takes: &[(u64, Priority, u64)]) -> Vec<(Time, u64, Priority)> {
        let mut allowance = Allowance::new(Time::ZERO, rates);
        let mut now = Time::ZERO;
        let mut taken = Vec::new();
        for &(amount, priority, pause) in takes {
            now = now + Duration::from_millis(pause);
            if let Err(at) = allowance.poll(now, priority) {
                assert!(at > now);
                now = at;
                assert_eq!(allowance.poll(now, priority), Ok(()), "nobody else came");
            }
            allowance.take(now, amount, priority);
            taken.push((now, amount, priority));
        }
        taken
    }

    /// In no span more than the rate, a second's worth and one taking pass.
    fn assert_within(taken: &[(Time, u64)], rate: u64) {
        let most = taken.iter().map(|&(_, amount)| amount).max().unwrap_or_default();
        for (at, &(first, _)) in taken.iter().enumerate() {
            let mut sum = 0;
            for &(last, amount) in &taken[at..] {
                sum += amount;
                let allowed = i128::from(rate) * (last.since(first) + SECOND).as_nanos() as i128;
                assert!(
                    i128::from(sum) * PARTS <= allowed + i128::from(most) * PARTS,
                    "{sum} in {first:?}..{last:?}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn no_span_has_more_than_the_rate_allows(
            all in 1u64..1 << 40,
            prefetch in 1u64..1 << 40,
            takes in prop::collection::vec((0u64..1 << 36, any::<bool>(), 0u64..2000), 1..60),
        ) {
            let priority = |waited: bool| if waited { Priority::OnDemand } else { Priority::Prefetch };
            let takes: Vec<_> = takes.into_iter().map(|(amount, w, pause)| (amount, priority(w), pause)).collect();
            let taken = greedy(Rates { all, prefetch }, &takes);
            assert_within(&taken.iter().map(|&(at, amount, _)| (at, amount)).collect::<Vec<_>>(), all);
            let prefetched = taken.iter().filter(|(.., priority)| *priority == Priority::Prefetch);
            assert_within(&prefetched.map(|&(at, amount, _)| (at, amount)).collect::<Vec<_>>(), prefetch);
        }

        /// However much is prefetched, a reader that comes does not wait for it.
        #[test]
        fn prefetch_in_shares_keeps_no_reader_waiting(
            all in 4u64..1 << 40,
            prefetch in 0u64..1 << 40,
            pauses in prop::collection::vec(0u64..500, 1..60),
        ) {
            let mut allowance = Allowance::new(Time::ZERO, Rates { all, prefetch });
            let mut now = Time::ZERO;
            for pause in pauses {
                now = now + Duration::from_millis(pause);
                let at = allowance.poll(now, Priority::Prefetch).err().unwrap_or(now);
                prop_assert_eq!(allowance.poll(now, Priority::OnDemand), Ok(()));
                now = at;
                allowance.take(now, allowance.share(Priority::Prefetch), Priority::Prefetch);
                prop_assert_eq!(allowance.poll(now, Priority::OnDemand), Ok(()));
            }
        }

        /// What is given back may be taken again, and no more than that.
        #[test]
        fn giving_back_undoes_taking(rate in 1u64..1 << 40, amount in 0u64..1 << 40) {
            let mut allowance = Allowance::new(Time::ZERO, Rates { all: rate, prefetch: rate });
            allowance.take(Time::ZERO, rate, Priority::Prefetch);
            let before = allowance.poll(Time::ZERO, Priority::Prefetch);
            prop_assert!(before.is_err());
            allowance.take(Time::ZERO, amount, Priority::Prefetch);
            allowance.give_back(Time::ZERO, amount, Priority::Prefetch);
            prop_assert_eq!(allowance.poll(Time::ZERO, Priority::Prefetch), before);
        }
    }
}
