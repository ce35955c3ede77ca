//! Against closed forms, and against plain water-filling over all links at once.

use std::time::Duration;

use proptest::{collection::vec, prelude::*};

use super::*;

const MB: u64 = 1_000_000;

fn path(links: &[LinkId]) -> Path {
    let mut path = Path::EMPTY;
    links.iter().for_each(|&link| path.push(Some(link)));
    path
}

/// What was kept with each flow and when it was done, in that order.
fn run<T>(flows: &mut Flows<T>) -> Vec<(f64, T)> {
    let mut done = Vec::new();
    let mut now = Time::ZERO;
    while let Some(next) = flows.next(now).filter(|&next| next < Time::MAX) {
        now = next;
        done.extend(flows.finish(now).map(|what| (now.as_secs_f64(), what)));
    }
    done
}

fn rates<T>(flows: &mut Flows<T>) -> Vec<f64> {
    flows.next(Time::ZERO);
    flows.flows.iter().zip(&flows.rates).filter(|(flow, _)| flow.is_some()).map(|(_, &rate)| rate).collect()
}

#[test]
fn one_link_two_flows() {
    let mut flows = Flows::new(TOLERANCE);
    let link = flows.add_link(1e6);
    flows.start(Time::ZERO, path(&[link]), MB, 'a');
    flows.start(Time::ZERO, path(&[link]), 3 * MB, 'b');
    // Half the link each until a is done at 2 s with 1 MB of b; then 2 MB at the whole rate.
    assert_eq!(run(&mut flows), [(2.0, 'a'), (4.0, 'b')]);
}

#[test]
fn a_star_is_bound_by_its_middle_or_by_its_points() {
    for (middle, expected) in [(4e6, 4.0), (64e6, 1.0)] {
        let mut flows = Flows::new(TOLERANCE);
        let centre = flows.add_link(middle);
        for _ in 0..16 {
            let point = flows.add_link(1e6);
            flows.start(Time::ZERO, path(&[centre, point]), MB, ());
        }
        let done = run(&mut flows);
        assert_eq!(done.len(), 16);
        assert!(done.iter().all(|(at, ())| (at - expected).abs() < 1e-6), "{done:?}");
    }
}

#[test]
fn a_parking_lot_gives_the_long_flow_its_part_of_the_narrowest_place() {
    // One flow over three links of 6, 3 and 9; one, two and three flows of a single link each beside it.
    let mut flows = Flows::new(1e-9);
    let links = [6e6, 3e6, 9e6].map(|rate| flows.add_link(rate));
    flows.start(Time::ZERO, path(&links), MB, ());
    for (link, count) in links.into_iter().zip(1..) {
        (0..count).for_each(|_| _ = flows.start(Time::ZERO, path(&[link]), MB, ()));
    }
    let expected = [1e6, 5e6, 1e6, 1e6, 8e6 / 3.0, 8e6 / 3.0, 8e6 / 3.0];
    for (rate, expected) in rates(&mut flows).into_iter().zip(expected) {
        assert!((rate - expected).abs() < 1.0, "{rate} instead of {expected}");
    }
}

#[test]
fn a_cut_link_stops_its_flows_and_a_cancelled_flow_tells_how_far_it_came() {
    let mut flows = Flows::new(TOLERANCE);
    let (up, down) = (flows.add_link(2e6), flows.add_link(1e6));
    let id = flows.start(Time::ZERO, path(&[up, down]), 4 * MB, 'a');
    let at = |millis| Time::ZERO + Duration::from_millis(millis);
    assert_eq!(flows.next(at(0)), Some(at(4000)));
    flows.set_rate(down, 0.0);
    assert_eq!(flows.next(at(1000)), Some(Time::MAX));
    assert!(flows.finish(at(3000)).is_none());
    flows.set_rate(down, 3e6);
    assert_eq!(flows.next(at(5000)), Some(at(6500)), "the other link is the narrow one now");
    assert_eq!(flows.cancel(at(6000), id), Some(('a', 3 * MB)));
    assert_eq!(flows.cancel(at(6000), id), None);
    flows.start(at(7000), Path::EMPTY, MB, 'b');
    assert_eq!(flows.next(at(7000)), Some(at(7000)), "nothing in its way");
}

/// Plain water-filling: all flows are raised together; whoever meets a full link stays where it is.
fn water_fill(links: &[f64], paths: &[Vec<usize>]) -> Vec<f64> {
    let mut rates = vec![None; paths.len()];
    loop {
        let level_of = |link: usize| {
            let over = paths.iter().zip(&rates).filter(|(path, _)| path.contains(&link));
            let (mut fixed, mut open) = (0.0, 0);
            over.for_each(|(_, rate)| rate.map_or_else(|| open += 1, |rate: f64| fixed += rate));
            if open == 0 { f64::INFINITY } else { (links[link] - fixed) / f64::from(open) }
        };
        let levels: Vec<f64> = (0..links.len()).map(level_of).collect();
        let lowest = levels.iter().copied().fold(f64::INFINITY, f64::min);
        if lowest.is_infinite() {
            return rates.into_iter().map(|rate| rate.unwrap_or(0.0)).collect();
        }
        let full: Vec<usize> = (0..links.len()).filter(|&link| levels[link] <= lowest * (1.0 + 1e-12)).collect();
        for (path, rate) in paths.iter().zip(&mut rates) {
            if rate.is_none() && path.iter().any(|link| full.contains(link)) {
                *rate = Some(lowest);
            }
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Start(Vec<usize>),
    Cancel(prop::sample::Index),
    /// One goes and another comes at the same moment.
    Replace(prop::sample::Index, Vec<usize>),
    Rate(usize, u32),
}

const LINKS: usize = 8;

fn step() -> impl Strategy<Value = Step> {
    let over = || prop::sample::subsequence((0..LINKS).collect::<Vec<_>>(), 1..4).prop_shuffle();
    prop_oneof![
        6 => over().prop_map(Step::Start),
        3 => (any::<prop::sample::Index>(), over()).prop_map(|(which, over)| Step::Replace(which, over)),
        3 => any::<prop::sample::Index>().prop_map(Step::Cancel),
        1 => (0..LINKS, 1..100u32).prop_map(|(link, rate)| Step::Rate(link, rate)),
    ]
}

/// What a sequence of steps leads to: rates of the links, paths and rates of the flows.
type Outcome = (Vec<f64>, Vec<Vec<usize>>, Vec<f64>);

fn play(tolerance: f64, steps: &[Step]) -> Outcome {
    let mut flows = Flows::new(tolerance);
    let links: Vec<_> = (1..=LINKS).map(|n| flows.add_link(n as f64 * 1e6)).collect();
    let mut open = Vec::new();
    for step in steps {
        let (goes, comes) = match step {
            Step::Start(over) => (None, Some(over)),
            Step::Cancel(which) => (Some(which), None),
            Step::Replace(which, over) => (Some(which), Some(over)),
            Step::Rate(link, rate) => {
                flows.set_rate(links[*link], f64::from(*rate) * 1e5);
                (None, None)
            }
        };
        if let Some(which) = goes.filter(|_| !open.is_empty()) {
            let id = open.swap_remove(which.index(open.len()));
            flows.cancel(Time::ZERO, id);
        }
        if let Some(over) = comes {
            let over: Vec<_> = over.iter().map(|&link| links[link]).collect();
            open.push(flows.start(Time::ZERO, path(&over), 1 << 40, ()));
        }
        flows.next(Time::ZERO);
    }
    let live = || flows.flows.iter().flatten();
    let paths = live().map(|flow| flow.path.links().iter().map(|link| link.0 as usize).collect());
    let capacities = flows.links.iter().map(|link| link.bytes_per_s).collect();
    let paths = paths.collect();
    (capacities, paths, rates(&mut flows))
}

fn load(link: usize, paths: &[Vec<usize>], rates: &[f64]) -> f64 {
    paths.iter().zip(rates).filter(|(path, _)| path.contains(&link)).map(|(_, rate)| rate).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// With next to no tolerance the rates are those of water-filling.
    #[test]
    fn exact_sharing_is_water_filling(steps in vec(step(), 0..40)) {
        let (links, paths, rates) = play(1e-7, &steps);
        for (rate, expected) in rates.iter().zip(water_fill(&links, &paths)) {
            prop_assert!((rate - expected).abs() <= 1e-4 * expected, "{} instead of {}", rate, expected);
        }
    }

    /// With the tolerance of a simulation no link is above its rate, and every flow crosses a link that is full but for
    /// the tolerance and on which nobody has more but for the tolerance.
    #[test]
    fn tolerant_sharing_is_nearly_max_min_fair(steps in vec(step(), 0..40)) {
        let (links, paths, rates) = play(TOLERANCE, &steps);
        for (link, rate) in links.iter().enumerate() {
            prop_assert!(load(link, &paths, &rates) <= rate * (1.0 + 1e-6));
        }
        for (path, rate) in paths.iter().zip(&rates) {
            let holds_back = |&link: &usize| {
                let on_it = paths.iter().zip(&rates).filter(|(path, _)| path.contains(&link));
                let most = on_it.map(|(_, rate)| *rate).fold(0.0, f64::max);
                let free = links[link] - load(link, &paths, &rates);
                let off = TOLERANCE * (links[link] + 2.0 * most);
                free <= 2.0 * off && *rate >= most - 2.0 * off
            };
            prop_assert!(path.iter().any(holds_back), "{:?} at {} of {:?}: {:?} {:?}", path, rate, links, paths, rates);
        }
    }

    /// All bytes arrive, and no sooner than the links allow.
    #[test]
    fn bytes_are_conserved(sizes in vec((1..50u64, 0..LINKS, 0..LINKS), 1..30)) {
        let mut flows = Flows::new(TOLERANCE);
        let links: Vec<_> = (1..=LINKS).map(|n| flows.add_link(n as f64 * 1e6)).collect();
        let mut over = [0.0; LINKS];
        for &(size, a, b) in &sizes {
            let crossed: Vec<usize> = if a == b { vec![a] } else { vec![a, b] };
            let used: Vec<_> = crossed.iter().map(|&link| links[link]).collect();
            flows.start(Time::ZERO, path(&used), size * MB, size);
            crossed.into_iter().for_each(|link| over[link] += size as f64);
        }
        let done = run(&mut flows);
        prop_assert_eq!(done.iter().map(|(_, size)| size).sum::<u64>(), sizes.iter().map(|(size, ..)| size).sum::<u64>());
        let last = done.last().map_or(0.0, |(at, _)| *at);
        for (link, bytes) in over.iter().enumerate() {
            prop_assert!(last >= bytes / (link + 1) as f64 * (1.0 - 1e-6));
        }
        prop_assert!(flows.links.iter().all(|link| link.flows.is_empty() && link.load == 0.0));
    }
}
