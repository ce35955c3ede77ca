//! What a node reads of the image and in which order, and how much of that is not there yet.

use std::collections::HashSet;

use shoal_proto::{Bitfield, Priority};

use crate::scenario::{Prefetch, Scenario};

/// Prefetch wants open at a time, as in the daemon.
const PREFETCH_OPEN: usize = 256;

/// What every node reads.
#[derive(Debug)]
pub(crate) struct Reading {
    prefetch: Vec<u32>,
    on_demand: Vec<u32>,
    /// Pieces that a reader waits for at a time.
    window: usize,
    /// What a start reads.
    start: Bitfield,
    /// All that is fetched.
    all: Bitfield,
}

/// Pieces that a node lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Left {
    /// Of those that its start reads.
    pub(crate) start: u32,
    /// Of all that it fetches.
    pub(crate) all: u32,
}

impl Reading {
    /// Of an image of so many pieces.
    pub(crate) fn new(scenario: &Scenario, pieces: u32) -> Self {
        let workload = &scenario.workload;
        let on_demand = workload.start(pieces);
        let prefetch = match workload.prefetched() {
            Prefetch::Nothing => Vec::new(),
            Prefetch::Start => on_demand.clone(),
            Prefetch::All => {
                let first: HashSet<u32> = on_demand.iter().copied().collect();
                let rest = (0..pieces).filter(|piece| !first.contains(piece));
                on_demand.iter().copied().chain(rest).collect()
            }
        };
        let set = |order: &[u32]| {
            let mut set = Bitfield::new(pieces);
            order.iter().for_each(|&piece| _ = set.insert(piece));
            set
        };
        let start = set(&on_demand);
        let all = if workload.fetches_all() { Bitfield::full(pieces) } else { start.clone() };
        Self { prefetch, on_demand, window: workload.window(), start, all }
    }

    /// The pieces in the order in which a priority wants them, and how many of them at a time.
    pub(crate) fn order(&self, priority: Priority) -> (&[u32], usize) {
        match priority {
            Priority::OnDemand => (&self.on_demand, self.window),
            Priority::Prefetch => (&self.prefetch, PREFETCH_OPEN),
        }
    }

    /// What is missing for somebody who has these pieces.
    pub(crate) fn left(&self, present: &Bitfield) -> Left {
        let missing = |of: &Bitfield| {
            let mut missing = of.clone();
            missing.subtract(present);
            missing.count()
        };
        Left { start: missing(&self.start), all: missing(&self.all) }
    }

    /// Takes note of a piece that was not there before.
    pub(crate) fn got(&self, piece: u32, left: &mut Left) {
        left.start -= u32::from(self.start.contains(piece));
        left.all -= u32::from(self.all.contains(piece));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Read;

    fn reading(read: Read, prefetch: Option<Prefetch>) -> Reading {
        let mut scenario = Scenario::parse(include_str!("../scenarios/flash-crowd.toml")).unwrap();
        (scenario.workload.read, scenario.workload.prefetch) = (read, prefetch);
        scenario.workload.traced = vec![7, 2];
        Reading::new(&scenario, 30)
    }

    fn orders(reading: &Reading) -> (Vec<u32>, usize, Vec<u32>) {
        let (on_demand, window) = reading.order(Priority::OnDemand);
        (on_demand.to_vec(), window, reading.order(Priority::Prefetch).0.to_vec())
    }

    #[test]
    fn what_is_read_on_demand_and_what_is_prefetched() {
        let every: Vec<u32> = (0..30).collect();
        let trace = || Read::Trace("trace".into());
        for (read, prefetch, on_demand, window, early, all) in [
            (Read::All, None, &every[..], 0, every.clone(), 30),
            (Read::All, Some(Prefetch::Start), &every, 0, every.clone(), 30),
            (Read::All, Some(Prefetch::Nothing), &every, 1, vec![], 30),
            (Read::Fraction(0.1), None, &[0, 1, 2], 1, vec![], 3),
            (Read::Fraction(1e-9), None, &[0], 1, vec![], 1),
            (trace(), Some(Prefetch::Start), &[7, 2], 1, vec![7, 2], 2),
            (trace(), Some(Prefetch::All), &[7, 2], 1, [&[7, 2, 0, 1, 3, 4, 5, 6][..], &every[8..]].concat(), 30),
        ] {
            let reading = reading(read.clone(), prefetch);
            assert_eq!(orders(&reading), (on_demand.to_vec(), window, early), "{read:?}, {prefetch:?}");
            let left = reading.left(&Bitfield::new(30));
            assert_eq!(left, Left { start: on_demand.len() as u32, all }, "{read:?}, {prefetch:?}");
        }
    }

    #[test]
    fn what_is_left_is_counted_down() {
        let reading = reading(Read::Fraction(0.1), Some(Prefetch::All));
        let mut present = Bitfield::new(30);
        let mut left = reading.left(&present);
        for piece in [1, 9, 0] {
            present.insert(piece);
            reading.got(piece, &mut left);
            assert_eq!(left, reading.left(&present));
        }
        assert_eq!(left, Left { start: 1, all: 27 });
    }
}
