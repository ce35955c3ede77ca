//! What a seed peer has heard of starts, and gives to those that start the same images later.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use shoal_proto::{ObjectId, PeerId, StartTrace, control::StartTraces};

use super::merge::merge;

/// Starts of an image that are remembered, the latest: those of older daemons and other arguments die out.
const MAX_STARTS: usize = 8;
/// Images of which something is remembered, those that were told or asked of last.
const MAX_IMAGES: usize = 1024;
/// Bytes of all traces.
const MAX_BYTES: usize = 16 << 20;

/// See the module. In memory alone, of which it takes up 16 MiB at most: a seed peer that starts anew hears of the next starts.
/// Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct CollectedStarts(Arc<Mutex<Collected>>);

#[derive(Debug, Default)]
struct Collected {
    images: HashMap<ObjectId, Starts>,
    /// Of all traces and merged ones.
    bytes: usize,
    /// Counts uses.
    uses: u64,
}

/// The starts of one image.
#[derive(Debug, Default)]
struct Starts {
    /// The oldest first, one of each node.
    traces: VecDeque<(PeerId, StartTrace)>,
    /// All of them, since somebody has asked.
    merged: Option<Bytes>,
    used: u64,
}

impl Starts {
    fn bytes(&self) -> usize {
        let traces: usize = self.traces.iter().map(|(_, trace)| trace.encoded_len()).sum();
        traces + self.merged.as_ref().map_or(0, Bytes::len)
    }
}

impl CollectedStarts {
    /// Takes in what `peer` tells of its start of the image with this bootstrap layer, in place of what it told before.
    pub(crate) fn take_in(&self, peer: PeerId, layer: ObjectId, trace: StartTrace) {
        if trace.is_empty() {
            return;
        }
        let mut collected = self.lock();
        collected.change(layer, |starts| {
            starts.traces.retain(|(known, _)| *known != peer);
            if starts.traces.len() == MAX_STARTS {
                starts.traces.pop_front();
            }
            starts.traces.push_back((peer, trace));
            starts.merged = None;
        });
        collected.make_room();
    }

    /// All starts of an image in one, encoded, if any is known. The first to ask after a start waits for some milliseconds of work.
    pub(crate) fn of(&self, layer: ObjectId) -> Option<Bytes> {
        let mut collected = self.lock();
        if !collected.images.contains_key(&layer) {
            return None;
        }
        let merged = collected.change(layer, |starts| {
            let traces = || starts.traces.iter().map(|(_, trace)| trace);
            starts.merged.get_or_insert_with(|| merge(traces()).encode().into()).clone()
        });
        collected.make_room();
        Some(merged)
    }

    /// How much there is.
    pub(crate) fn figures(&self) -> StartTraces {
        let collected = self.lock();
        let starts = collected.images.values().map(|starts| starts.traces.len() as u64).sum();
        StartTraces { images: collected.images.len() as u64, starts, bytes: collected.bytes as u64 }
    }

    fn lock(&self) -> MutexGuard<'_, Collected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Collected {
    /// Changes, and uses, what is known of an image.
    fn change<T>(&mut self, layer: ObjectId, change: impl FnOnce(&mut Starts) -> T) -> T {
        self.uses += 1;
        let starts = self.images.entry(layer).or_default();
        starts.used = self.uses;
        let before = starts.bytes();
        let changed = change(starts);
        self.bytes = self.bytes - before + starts.bytes();
        changed
    }

    /// Forgets the images that were used longest ago, if there is too much.
    fn make_room(&mut self) {
        while self.images.len() > MAX_IMAGES || self.bytes > MAX_BYTES {
            let oldest = self.images.iter().min_by_key(|(_, starts)| starts.used).map(|(layer, _)| *layer);
            let Some(starts) = oldest.and_then(|layer| self.images.remove(&layer)) else { return };
            self.bytes -= starts.bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(number: u8) -> PeerId {
        PeerId::new([number; 32])
    }

    fn layer(number: u32) -> ObjectId {
        let mut id = [0; 32];
        id[..4].copy_from_slice(&number.to_le_bytes());
        ObjectId::new(id)
    }

    fn pieces(starts: &CollectedStarts, image: u32) -> Vec<u32> {
        let trace = StartTrace::parse(&starts.of(layer(image)).unwrap()).unwrap();
        trace.pieces().map(|(_, piece)| piece).collect()
    }

    fn trace(pieces: impl IntoIterator<Item = u32>) -> StartTrace {
        StartTrace::of(pieces.into_iter().map(|piece| (0, piece)))
    }

    #[test]
    fn the_last_start_of_each_of_the_last_nodes_counts() {
        let starts = CollectedStarts::default();
        assert_eq!(starts.of(layer(0)), None);
        starts.take_in(peer(0), layer(0), trace([1, 2]));
        assert_eq!(pieces(&starts, 0), [1, 2]);
        starts.take_in(peer(0), layer(0), trace([3, 1]));
        starts.take_in(peer(0), layer(0), StartTrace::default());
        assert_eq!(pieces(&starts, 0), [3, 1]);
        for other in 1..=8 {
            starts.take_in(peer(other), layer(0), trace([u32::from(other) + 10]));
        }
        assert_eq!(pieces(&starts, 0), (11..=18).collect::<Vec<_>>());
        assert_eq!(starts.figures().starts, 8);
        assert_eq!(starts.of(layer(1)), None);
    }

    #[test]
    fn memory_is_bounded_and_what_was_used_last_stays() {
        let starts = CollectedStarts::default();
        for image in 0..2000 {
            starts.take_in(peer(0), layer(image), trace([image]));
            assert_eq!(pieces(&starts, 0), [0]);
        }
        assert_eq!(starts.figures().images, MAX_IMAGES as u64);
        assert!(starts.of(layer(1)).is_none() && starts.of(layer(1999)).is_some());
        let long = trace((0..StartTrace::MAX_RUNS as u32).map(|piece| piece * 2));
        for image in 0..100 {
            for node in 0..10 {
                starts.take_in(peer(node), layer(image), long.clone());
            }
        }
        let figures = starts.figures();
        assert!(figures.bytes <= MAX_BYTES as u64 && figures.images < 50, "{figures:?}");
        let counted: usize = starts.lock().images.values().map(Starts::bytes).sum();
        assert_eq!(counted as u64, figures.bytes);
    }
}
