//! What is known of each blob: where its pieces lie, which are here, which are waited for, and who has which.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use shoal_proto::{Bitfield, PeerId, Priority};

use crate::peers::Slot;

/// Whose pieces count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Those of peers in this node's zone.
    Zone,
    /// Those of all peers.
    All,
}

/// What a peer has.
#[derive(Debug, Clone)]
struct Have {
    own_zone: bool,
    pieces: Bitfield,
}

/// One blob.
#[derive(Debug)]
pub(crate) struct Blob {
    extents: Arc<[Range<u64>]>,
    pub(crate) present: Bitfield,
    /// Pieces whose flight looks for a source, prefetch and on-demand: what a peer with room is matched against, a
    /// word of 64 pieces at a time.
    waiting: [Bitfield; 2],
    /// By slot; looked at for many peers in a row when a rare piece is searched for, hence no map.
    haves: Vec<Option<Have>>,
    /// How many of `haves` have each piece, by [`Reach`]; most pieces that are searched for have none.
    holders: [Vec<u32>; 2],
    /// Homes by stripe, as of an epoch of the leases.
    pub(crate) ranking: BTreeMap<u64, Arc<[PeerId]>>,
    pub(crate) ranking_epoch: u64,
    /// All of it is one stripe.
    whole: bool,
}

impl Blob {
    pub(crate) fn new(extents: Arc<[Range<u64>]>, present: &Bitfield) -> Self {
        let len = u32::try_from(extents.len()).unwrap_or(u32::MAX);
        Self {
            extents,
            present: present.window(0, len),
            waiting: [Bitfield::new(len), Bitfield::new(len)],
            haves: Vec::new(),
            holders: [vec![0; len as usize], vec![0; len as usize]],
            ranking: BTreeMap::new(),
            ranking_epoch: 0,
            whole: false,
        }
    }

    /// From now on all of it is one stripe.
    pub(crate) fn keep_whole(&mut self) {
        self.whole = true;
        self.ranking.clear();
    }

    /// The stripe of a piece, and where it ends, with stripes of so many bytes; nothing if nobody here names the piece.
    pub(crate) fn stripe(&self, piece: u32, stripe_bytes: u64) -> Option<(u64, u64)> {
        let start = self.extent(piece)?.start;
        if self.whole {
            return Some((0, u64::MAX));
        }
        let (stripe, bytes) = (start / stripe_bytes.max(1), stripe_bytes.max(1));
        Some((stripe, (stripe + 1).saturating_mul(bytes)))
    }

    /// Takes over the pieces that were unnamed so far, and a greater length.
    pub(crate) fn extend(&mut self, extents: &[Range<u64>]) {
        let len = self.extents.len().max(extents.len());
        let pick = |at: usize| {
            let known = self.extents.get(at).filter(|range| !range.is_empty());
            known.or(extents.get(at)).or(self.extents.get(at)).cloned().unwrap_or(0..0)
        };
        self.extents = (0..len).map(pick).collect();
        let len = len as u32;
        self.present = self.present.window(0, len);
        self.waiting = [self.waiting[0].window(0, len), self.waiting[1].window(0, len)];
        for have in self.haves.iter_mut().flatten() {
            have.pieces = have.pieces.window(0, len);
        }
        self.holders.iter_mut().for_each(|holders| holders.resize(len as usize, 0));
        self.ranking.clear();
    }

    pub(crate) fn len(&self) -> u32 {
        self.extents.len() as u32
    }

    /// The bytes of a piece in the blob, if somebody here names it.
    pub(crate) fn extent(&self, piece: u32) -> Option<&Range<u64>> {
        self.extents.get(piece as usize).filter(|range| !range.is_empty())
    }

    pub(crate) fn size(&self, piece: u32) -> u64 {
        self.extent(piece).map_or(0, |range| range.end - range.start)
    }

    pub(crate) fn waiting(&self, priority: Priority) -> &Bitfield {
        &self.waiting[priority as usize]
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.waiting.iter().any(|waiting| !waiting.is_empty())
    }

    pub(crate) fn wait(&mut self, piece: u32, priority: Priority) {
        self.waiting[priority as usize].insert(piece);
        self.waiting[1 - priority as usize].remove(piece);
    }

    pub(crate) fn stop_waiting(&mut self, piece: u32) {
        self.waiting.iter_mut().for_each(|waiting| _ = waiting.remove(piece));
    }

    pub(crate) fn holders(&self, piece: u32, reach: Reach) -> u32 {
        self.holders[reach as usize].get(piece as usize).copied().unwrap_or(0)
    }

    pub(crate) fn has(&self, slot: Slot, piece: u32) -> bool {
        self.have(slot).is_some_and(|have| have.contains(piece))
    }

    pub(crate) fn have(&self, slot: Slot) -> Option<&Bitfield> {
        self.haves.get(slot as usize)?.as_ref().map(|have| &have.pieces)
    }

    /// Everybody who ever spoke of this blob.
    pub(crate) fn speakers(&self) -> impl Iterator<Item = Slot> + '_ {
        (0..).zip(&self.haves).filter(|(_, have)| have.is_some()).map(|(slot, _)| slot)
    }

    /// Notes what a peer announced.
    pub(crate) fn learn(&mut self, slot: Slot, own_zone: bool, first: u32, news: &Bitfield, full: bool) {
        let len = self.len();
        let at = slot as usize;
        if at >= self.haves.len() {
            self.haves.resize(at + 1, None);
        }
        let have = self.haves[at].get_or_insert_with(|| Have { own_zone, pieces: Bitfield::new(len) });
        if full {
            let window = first..first.saturating_add(news.len()).min(len);
            let gone = window.filter(|&piece| have.pieces.contains(piece) && !news.contains(piece - first));
            for piece in gone.collect::<Vec<_>>() {
                have.pieces.remove(piece);
                count(&mut self.holders, have.own_zone, piece, |holders| holders - 1);
            }
        }
        for piece in news.iter().filter_map(|piece| first.checked_add(piece)) {
            if have.pieces.insert(piece) {
                count(&mut self.holders, have.own_zone, piece, |holders| holders + 1);
            }
        }
    }

    /// The peer does not have this piece after all.
    pub(crate) fn unlearn(&mut self, slot: Slot, piece: u32) {
        let have = self.haves.get_mut(slot as usize).and_then(Option::as_mut);
        if let Some(have) = have.filter(|have| have.pieces.contains(piece)) {
            have.pieces.remove(piece);
            count(&mut self.holders, have.own_zone, piece, |holders| holders - 1);
        }
    }

    /// The peer is gone.
    pub(crate) fn forget(&mut self, slot: Slot) {
        if let Some(have) = self.haves.get_mut(slot as usize).and_then(Option::take) {
            have.pieces
                .iter()
                .for_each(|piece| count(&mut self.holders, have.own_zone, piece, |holders| holders - 1));
        }
    }
}

/// Changes how many have a piece, in the zone of this node if `own_zone`, and of all.
fn count(holders: &mut [Vec<u32>; 2], own_zone: bool, piece: u32, change: impl Fn(u32) -> u32) {
    let reaches = if own_zone { &[Reach::Zone, Reach::All][..] } else { &[Reach::All] };
    for &reach in reaches {
        let count = &mut holders[reach as usize][piece as usize];
        *count = change(*count);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        /// Against a set of (peer, piece) pairs: what is known, how many hold each piece.
        #[test]
        fn availability_agrees_with_a_model(
            steps in vec((0..4u32, 0..50u32, vec(0..40u32, 0..20), any::<bool>(), 0..10u8), 0..60)
        ) {
            let extents: Arc<[_]> = (0..64).map(|at| at * 10..at * 10 + 10).collect();
            let mut blob = Blob::new(extents, &Bitfield::new(64));
            let mut model = BTreeSet::new();
            for (slot, first, pieces, full, kind) in steps {
                match kind {
                    0 => {
                        blob.forget(slot);
                        model.retain(|&(peer, _)| peer != slot);
                    }
                    1 => {
                        blob.unlearn(slot, first);
                        model.remove(&(slot, first));
                    }
                    _ => {
                        let mut news = Bitfield::new(40);
                        pieces.iter().for_each(|&piece| _ = news.insert(piece));
                        blob.learn(slot, slot.is_multiple_of(2), first, &news, full);
                        if full {
                            let stays = |piece: u32| piece < first || piece >= first + 40 || news.contains(piece - first);
                            model.retain(|&(peer, piece)| peer != slot || stays(piece));
                        }
                        let named = news.iter().map(|piece| first + piece).filter(|&piece| piece < 64);
                        model.extend(named.map(|piece| (slot, piece)));
                    }
                }
                for piece in 0..64 {
                    let holders = |reach| {
                        let counts = |slot: u32| reach == Reach::All || slot.is_multiple_of(2);
                        model.iter().filter(|&&(slot, held)| held == piece && counts(slot)).count()
                    };
                    for reach in [Reach::Zone, Reach::All] {
                        prop_assert_eq!(blob.holders(piece, reach) as usize, holders(reach));
                    }
                    prop_assert_eq!(blob.has(slot, piece), model.contains(&(slot, piece)));
                }
            }
        }
    }

    #[test]
    fn extending_keeps_what_was_named() {
        let mut blob = Blob::new([0..10, 0..0].into(), &Bitfield::full(2));
        blob.extend(&[5..6, 10..20, 20..30]);
        assert_eq!(
            (blob.extent(0), blob.extent(1), blob.extent(2)),
            (Some(&(0..10)), Some(&(10..20)), Some(&(20..30)))
        );
        assert_eq!(blob.present.iter().collect::<Vec<_>>(), [0, 1]);
    }
}
