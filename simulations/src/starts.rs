//! When nodes start.

use std::time::Duration;

use rand::Rng;

use crate::scenario::{Workload, WorkloadKind};

/// The times at which so many nodes start, earliest first.
pub(crate) fn starts(workload: &Workload, count: usize, rng: &mut impl Rng) -> Vec<Duration> {
    let over = Duration::from_secs_f64(workload.over_s);
    let evenly = |turn: usize| over.mul_f64(turn as f64 / count as f64);
    match workload.kind {
        WorkloadKind::FlashCrowd => vec![Duration::ZERO; count],
        WorkloadKind::Rolling => (0..count).map(evenly).collect(),
        WorkloadKind::Poisson => {
            let mut at = Duration::ZERO;
            let gap = |rng: &mut _| {
                // In (0, 1], so that its logarithm is finite.
                let uniform = (f64::from(Rng::next_u32(rng)) + 1.0) / 2f64.powi(32);
                (over / count as u32).mul_f64(-uniform.ln())
            };
            (0..count)
                .map(|_| {
                    at += gap(rng);
                    at
                })
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::scenario::Scenario;

    #[test]
    fn a_crowd_a_row_and_a_drizzle() {
        let of = |kind| {
            let mut workload = Scenario::parse(include_str!("../scenarios/flash-crowd.toml")).unwrap().workload;
            (workload.kind, workload.over_s) = (kind, 100.0);
            starts(&workload, 1000, &mut ChaCha8Rng::seed_from_u64(1))
        };
        assert!(of(WorkloadKind::FlashCrowd).iter().all(Duration::is_zero));
        let rolling = of(WorkloadKind::Rolling);
        assert_eq!((rolling[0], rolling[500]), (Duration::ZERO, Duration::from_secs(50)));
        let poisson = of(WorkloadKind::Poisson);
        assert!(poisson.is_sorted());
        let last = poisson[999].as_secs_f64();
        assert!((80.0..120.0).contains(&last), "{last}");
    }
}
