//! What is known of each blob: where its pieces lie, which are here, which are waited for, and who has which.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::Arc,
};

use foldhash::fast::FixedState;
use shoal_proto::{Bitfield, LACKS_ALL, PeerId, Priority};

use crate::{BlobKey, Item, holders::Holders, peers::Slot};

/// Pieces in a word of a bitfield.
pub(crate) const WORD: u32 = u64::BITS;

/// A blob's place in the table; used again after it was removed.
pub(crate) type BlobSlot = u32;

/// A piece of a blob in the table: what an [`Item`] names, in a fifth of its bytes. Everything within the scheduler is kept
/// by these, since with thousands of pieces under way it is the memory that is touched which costs time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Piece {
    pub(crate) blob: BlobSlot,
    pub(crate) piece: u32,
}

/// The blobs that were added.
#[derive(Debug, Default)]
pub(crate) struct Blobs {
    index: BTreeMap<BlobKey, BlobSlot>,
    slots: Vec<Option<Blob>>,
    free: Vec<BlobSlot>,
}

impl Blobs {
    pub(crate) fn find(&self, key: BlobKey) -> Option<BlobSlot> {
        self.index.get(&key).copied()
    }

    pub(crate) fn at(&self, slot: BlobSlot) -> Option<&Blob> {
        self.slots.get(slot as usize)?.as_ref()
    }

    pub(crate) fn at_mut(&mut self, slot: BlobSlot) -> Option<&mut Blob> {
        self.slots.get_mut(slot as usize)?.as_mut()
    }

    pub(crate) fn get(&self, key: BlobKey) -> Option<&Blob> {
        self.at(self.find(key)?)
    }

    pub(crate) fn get_mut(&mut self, key: BlobKey) -> Option<&mut Blob> {
        self.at_mut(self.find(key)?)
    }

    /// A piece by its name, if the blob is there.
    pub(crate) fn piece(&self, item: Item) -> Option<Piece> {
        Some(Piece { blob: self.find(item.blob)?, piece: item.piece })
    }

    /// The name of a piece, if the blob is there.
    pub(crate) fn item(&self, piece: Piece) -> Option<Item> {
        Some(Item { piece: piece.piece, blob: self.at(piece.blob)?.key })
    }

    /// Encoded bytes of a piece.
    pub(crate) fn size(&self, piece: Piece) -> u64 {
        self.at(piece.blob).map_or(0, |blob| blob.size(piece.piece))
    }

    pub(crate) fn insert(&mut self, blob: Blob) -> BlobSlot {
        let slot = self.free.pop().unwrap_or(self.slots.len() as BlobSlot);
        if slot as usize == self.slots.len() {
            self.slots.push(None);
        }
        self.index.insert(blob.key, slot);
        self.slots[slot as usize] = Some(blob);
        slot
    }

    pub(crate) fn remove(&mut self, slot: BlobSlot) {
        if let Some(blob) = self.slots.get_mut(slot as usize).and_then(Option::take) {
            self.index.remove(&blob.key);
            self.free.push(slot);
        }
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Blob> {
        self.slots.iter_mut().flatten()
    }
}

/// Whose pieces count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// Those of peers in this node's zone.
    Zone,
    /// Those of all peers.
    All,
}

impl Reach {
    fn covers(self, own_zone: bool) -> bool {
        own_zone || self == Self::All
    }
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
    key: BlobKey,
    extents: Arc<[Range<u64>]>,
    pub(crate) present: Bitfield,
    /// Pieces whose flight looks for a source, prefetch and on-demand: what a peer with room is matched against, a
    /// word of 64 pieces at a time.
    waiting: [Bitfield; 2],
    /// By slot; looked at for many peers in a row when a rare piece is searched for, hence no map.
    haves: Vec<Option<Have>>,
    /// How many of `haves` within reach have each piece; most pieces that are searched for have none.
    holders: Holders,
    reach: Reach,
    /// Homes by stripe, as of an epoch of the leases.
    pub(crate) ranking: HashMap<u64, Arc<[PeerId]>, FixedState>,
    pub(crate) ranking_epoch: u64,
    /// All of it is one stripe.
    whole: bool,
}

impl Blob {
    pub(crate) fn new(key: BlobKey, extents: Arc<[Range<u64>]>, present: &Bitfield, reach: Reach) -> Self {
        let len = u32::try_from(extents.len()).unwrap_or(u32::MAX);
        Self {
            key,
            extents,
            present: present.window(0, len),
            waiting: [Bitfield::new(len), Bitfield::new(len)],
            haves: Vec::new(),
            holders: Holders::new(len),
            reach,
            ranking: HashMap::default(),
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
        self.recount();
        self.ranking.clear();
    }

    /// Other peers count from now on.
    pub(crate) fn set_reach(&mut self, reach: Reach) {
        self.reach = reach;
        self.recount();
    }

    fn recount(&mut self) {
        self.holders = Holders::new(self.len());
        for have in self.haves.iter().flatten().filter(|have| self.reach.covers(have.own_zone)) {
            (0..self.present.len().div_ceil(WORD))
                .for_each(|at| self.holders.add(at, have.pieces.bits_from(at * WORD)));
        }
    }

    pub(crate) fn key(&self) -> BlobKey {
        self.key
    }

    pub(crate) fn len(&self) -> u32 {
        self.extents.len() as u32
    }

    /// Thousandths of its pieces that are not here, at least one.
    pub(crate) fn lacks(&self) -> u16 {
        let missing = u64::from(self.len() - self.present.count());
        let all = u64::from(LACKS_ALL);
        (missing * all / u64::from(self.len()).max(1)).clamp(1, all) as u16
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

    /// How many within reach have a piece.
    pub(crate) fn holders(&self, piece: u32) -> u32 {
        self.holders.count(piece)
    }

    pub(crate) fn has(&self, slot: Slot, piece: u32) -> bool {
        self.have(slot).is_some_and(|have| have.contains(piece))
    }

    pub(crate) fn have(&self, slot: Slot) -> Option<&Bitfield> {
        self.haves.get(slot as usize)?.as_ref().map(|have| &have.pieces)
    }

    /// The first piece from a place on that waits and that this peer has, as far as the end of the blob.
    pub(crate) fn next_waiting(&self, slot: Slot, priority: Priority, from: u32) -> Option<u32> {
        self.have(slot)?.next_common(self.waiting(priority), from)
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
        let told = first..first.saturating_add(news.len()).min(len);
        if told.is_empty() {
            return;
        }
        for at in told.start / WORD..told.end.div_ceil(WORD) {
            let start = at * WORD;
            let said =
                if start < first { news.bits_from(0) << (first - start) } else { news.bits_from(start - first) };
            let (held, window) = (have.pieces.bits_from(start), window(start, &told));
            let came = said & window & !held;
            let gone = if full { held & window & !said } else { 0 };
            if came | gone != 0 {
                have.pieces.set_word(at, held & !gone | came);
                if self.reach.covers(have.own_zone) {
                    self.holders.add(at, came);
                    self.holders.take(at, gone);
                }
            }
        }
    }

    /// The peer does not have this piece after all.
    pub(crate) fn unlearn(&mut self, slot: Slot, piece: u32) {
        let have = self.haves.get_mut(slot as usize).and_then(Option::as_mut);
        if let Some(have) = have
            && have.pieces.remove(piece)
            && self.reach.covers(have.own_zone)
        {
            self.holders.take(piece / WORD, 1 << (piece % WORD));
        }
    }

    /// The peer is gone.
    pub(crate) fn forget(&mut self, slot: Slot) {
        let have = self.haves.get_mut(slot as usize).and_then(Option::take);
        if let Some(have) = have.filter(|have| self.reach.covers(have.own_zone)) {
            let words = 0..have.pieces.len().div_ceil(WORD);
            words.for_each(|at| self.holders.take(at, have.pieces.bits_from(at * WORD)));
        }
    }
}

/// Which of the 64 pieces from `start` on lie in a range that is not empty and has some of them.
fn window(start: u32, range: &Range<u32>) -> u64 {
    let (first, last) = (range.start.max(start) - start, (range.end - 1 - start).min(WORD - 1));
    u64::MAX << first & u64::MAX >> (WORD - 1 - last)
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
            steps in vec((0..4u32, 0..120u32, vec(0..40u32, 0..20), any::<bool>(), 0..10u8), 0..60)
        ) {
            let extents: Arc<[_]> = (0..100).map(|at| at * 10..at * 10 + 10).collect();
            let key = BlobKey { id: [0; 32], variant: 0 };
            let mut blob = Blob::new(key, extents, &Bitfield::new(100), Reach::All);
            let mut reach = Reach::All;
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
                    2 => {
                        reach = if full { Reach::Zone } else { Reach::All };
                        blob.set_reach(reach);
                    }
                    _ => {
                        let mut news = Bitfield::new(40);
                        pieces.iter().for_each(|&piece| _ = news.insert(piece));
                        blob.learn(slot, slot.is_multiple_of(2), first, &news, full);
                        if full {
                            let stays = |piece: u32| piece < first || piece >= first + 40 || news.contains(piece - first);
                            model.retain(|&(peer, piece)| peer != slot || stays(piece));
                        }
                        let named = news.iter().map(|piece| first + piece).filter(|&piece| piece < 100);
                        model.extend(named.map(|piece| (slot, piece)));
                    }
                }
                for piece in 0..100 {
                    let counts = |slot: u32| reach == Reach::All || slot.is_multiple_of(2);
                    let holders = model.iter().filter(|&&(slot, held)| held == piece && counts(slot)).count();
                    prop_assert_eq!(blob.holders(piece) as usize, holders);
                    (0..4).for_each(|slot| assert_eq!(blob.has(slot, piece), model.contains(&(slot, piece))));
                }
            }
        }
    }

    #[test]
    fn extending_keeps_what_was_named() {
        let key = BlobKey { id: [0; 32], variant: 0 };
        let mut blob = Blob::new(key, [0..10, 0..0].into(), &Bitfield::full(2), Reach::All);
        blob.extend(&[5..6, 10..20, 20..30]);
        assert_eq!(
            (blob.extent(0), blob.extent(1), blob.extent(2)),
            (Some(&(0..10)), Some(&(10..20)), Some(&(20..30)))
        );
        assert_eq!(blob.present.iter().collect::<Vec<_>>(), [0, 1]);
    }
}
