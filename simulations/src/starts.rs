//! When nodes start.

use std::{f64::consts::TAU, time::Duration};

use rand::Rng;

use crate::{
    images::{Image, drawn},
    scenario::{Workload, WorkloadKind},
    topology::Index,
};

/// A node starts an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    pub(crate) node: Index,
    pub(crate) image: Image,
    pub(crate) at: Duration,
}

/// All starts of a workload: each node's first image, then each node's second, and so on.
pub(crate) fn planned(workload: &Workload, nodes: &[Index], rng: &mut impl Rng) -> Vec<Start> {
    let times = starts(workload, nodes.len() * workload.images.starts_per_node as usize, rng);
    let images: Vec<_> = nodes.iter().map(|_| drawn(&workload.images, rng)).collect();
    let start = |(turn, at): (usize, Duration)| {
        let (round, place) = (turn / nodes.len(), turn % nodes.len());
        Start { node: nodes[place], image: images[place][round], at }
    };
    times.into_iter().enumerate().map(start).collect()
}

/// When each of so many starts is. At random they are in no order: nodes come zone after zone, and that is none in which they start.
fn starts(workload: &Workload, count: usize, rng: &mut impl Rng) -> Vec<Duration> {
    let over = Duration::from_secs_f64(workload.over_s);
    let evenly = |turn: usize| over.mul_f64(turn as f64 / count as f64);
    match workload.kind {
        WorkloadKind::FlashCrowd => vec![Duration::ZERO; count],
        WorkloadKind::Rolling => (0..count).map(evenly).collect(),
        WorkloadKind::Poisson => {
            let mean = over / count.max(1) as u32;
            let mut at = Duration::ZERO;
            let next = |_| {
                at += gap(mean, rng);
                at
            };
            let mut starts: Vec<_> = (0..count).map(next).collect();
            shuffle(&mut starts, rng);
            starts
        }
        WorkloadKind::Diurnal => {
            let ratio = workload.peak_to_trough.unwrap_or(1.0);
            let mut starts = diurnal(over, count, (ratio - 1.0) / (ratio + 1.0), rng);
            shuffle(&mut starts, rng);
            starts
        }
    }
}

pub(crate) fn shuffle<T>(items: &mut [T], rng: &mut impl Rng) {
    for at in (1..items.len()).rev() {
        items.swap(at, (rng.next_u64() % (at as u64 + 1)) as usize);
    }
}

/// Thinning, as Lewis and Shedler have it: of points at the rate of the busiest time each stays with the part of that rate which
/// its own time has. That goes from `1 - swing` to `1 + swing` times the mean and back.
fn diurnal(over: Duration, count: usize, swing: f64, rng: &mut impl Rng) -> Vec<Duration> {
    let mean = over.div_f64(count.max(1) as f64 * (1.0 + swing));
    let (mut at, mut starts) = (Duration::ZERO, Vec::new());
    while starts.len() < count {
        at += gap(mean, rng);
        let rate = 1.0 - swing * (TAU * at.as_secs_f64() / over.as_secs_f64()).cos();
        if uniform(rng) * (1.0 + swing) <= rate {
            starts.push(at);
        }
    }
    starts
}

/// The time from one of many independent points to the next, so long on average.
fn gap(mean: Duration, rng: &mut impl Rng) -> Duration {
    mean.mul_f64(-uniform(rng).ln())
}

/// In (0, 1], so that its logarithm is finite.
fn uniform(rng: &mut impl Rng) -> f64 {
    (f64::from(rng.next_u32()) + 1.0) / 2f64.powi(32)
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::scenario::{Images, Scenario};

    fn of(kind: WorkloadKind, count: usize, peak_to_trough: f64) -> Vec<Duration> {
        let mut workload = Scenario::parse(include_str!("../scenarios/flash-crowd.toml")).unwrap().workload;
        (workload.kind, workload.over_s) = (kind, 100.0);
        workload.peak_to_trough = Some(peak_to_trough);
        starts(&workload, count, &mut ChaCha8Rng::seed_from_u64(1))
    }

    #[test]
    fn a_crowd_a_row_and_a_drizzle() {
        let of = |kind| of(kind, 1000, 1.0);
        assert!(of(WorkloadKind::FlashCrowd).iter().all(Duration::is_zero));
        let rolling = of(WorkloadKind::Rolling);
        assert_eq!((rolling[0], rolling[500]), (Duration::ZERO, Duration::from_secs(50)));
        let poisson = of(WorkloadKind::Poisson);
        let last = poisson.iter().max().unwrap().as_secs_f64();
        assert!((80.0..120.0).contains(&last), "{last}");
        let first_half = poisson[..500].iter().sum::<Duration>().as_secs_f64() / 500.0;
        assert!((40.0..60.0).contains(&first_half), "who stands first starts first: {first_half}");
    }

    #[test]
    fn every_node_has_its_first_start_before_its_second() {
        let mut workload = Scenario::parse(include_str!("../scenarios/flash-crowd.toml")).unwrap().workload;
        (workload.kind, workload.over_s) = (WorkloadKind::Rolling, 60.0);
        workload.images = Images { count: 5, zipf: 1.0, starts_per_node: 2 };
        let plan = planned(&workload, &[3, 4, 9], &mut ChaCha8Rng::seed_from_u64(1));
        let who: Vec<_> = plan.iter().map(|start| (start.node, start.at.as_secs())).collect();
        assert_eq!(who, [(3, 0), (4, 10), (9, 20), (3, 30), (4, 40), (9, 50)]);
        assert!((0..3).all(|at| plan[at].image != plan[at + 3].image));
    }

    /// The mean rate over a part of the day is that of the sinusoid: around noon `1 + swing sin(x) / x` of the mean for `x` to
    /// either side.
    #[test]
    fn a_day_has_its_peak_at_noon() {
        for ratio in [1.0, 4.0, 1e6] {
            let starts = of(WorkloadKind::Diurnal, 20_000, ratio);
            let within = |from: f64, to: f64| {
                starts.iter().filter(|start| (from..to).contains(&start.as_secs_f64())).count() as f64 / 20_000.0
            };
            let swing = (ratio - 1.0) / (ratio + 1.0);
            for (part, from) in [(0.5, 25.0), (0.1, 45.0), (0.02, 49.0)] {
                let side = part * TAU / 2.0;
                let expected = part * (1.0 + swing * side.sin() / side);
                let found = within(from, 100.0 - from);
                assert!((found - expected).abs() < 0.012, "{ratio}: {found} for {expected} around noon");
            }
            let night = within(0.0, 5.0) + within(95.0, 100.0);
            let side = 0.1 * TAU / 2.0;
            let expected = 0.1 * (1.0 - swing * side.sin() / side);
            assert!((night - expected).abs() < 0.012, "{ratio}: {night} for {expected} at night");
        }
    }
}
