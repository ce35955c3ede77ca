//! How many peers have each piece.
//!
//! Announcements come often, from every neighbour, and each changes some pieces by one. So the counters of 64 pieces stand
//! side by side, one word for each binary digit, and a word of an announcement is added to all 64 at once, as a chain of
//! half adders ("vertical counters", Knuth, *The Art of Computer Programming*, 7.1.3).

use crate::blobs::WORD;

/// A counter for each piece of a blob.
#[derive(Debug)]
pub(crate) struct Holders {
    /// The digits of each 64 pieces one behind the other, the lowest first.
    digits: Vec<u64>,
    /// Digits of a counter: as many as the highest has needed so far.
    depth: usize,
}

impl Holders {
    /// All zero, for so many pieces.
    pub(crate) fn new(pieces: u32) -> Self {
        Self { digits: vec![0; pieces.div_ceil(WORD) as usize], depth: 1 }
    }

    fn of_word(&mut self, at: u32) -> &mut [u64] {
        &mut self.digits[at as usize * self.depth..][..self.depth]
    }

    /// One more for each of these pieces of a word.
    pub(crate) fn add(&mut self, at: u32, pieces: u64) {
        let mut carry = pieces;
        for digit in self.of_word(at) {
            (*digit, carry) = (*digit ^ carry, *digit & carry);
        }
        if carry != 0 {
            self.deepen();
            self.of_word(at).last_mut().into_iter().for_each(|digit| *digit = carry);
        }
    }

    /// One less for each of these pieces of a word, none of which is at zero.
    pub(crate) fn take(&mut self, at: u32, pieces: u64) {
        let mut borrow = pieces;
        for digit in self.of_word(at) {
            (*digit, borrow) = (*digit ^ borrow, !*digit & borrow);
        }
        debug_assert_eq!(borrow, 0, "somebody had it");
    }

    /// How many have a piece; nobody one past the end.
    pub(crate) fn count(&self, piece: u32) -> u32 {
        let digits = self.digits.chunks_exact(self.depth).nth((piece / WORD) as usize).unwrap_or_default();
        (0..).zip(digits).map(|(place, digit)| ((digit >> (piece % WORD) & 1) as u32) << place).sum()
    }

    /// One more digit.
    fn deepen(&mut self) {
        let longer = self.digits.chunks_exact(self.depth).flat_map(|digits| digits.iter().copied().chain([0]));
        self.digits = longer.collect();
        self.depth += 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    proptest! {
        #[test]
        fn counts_as_integers_do(steps in vec((0..3u32, any::<u64>(), any::<bool>()), 0..100)) {
            let mut holders = Holders::new(130);
            let mut model = [0u32; 192];
            for (at, pieces, more) in steps {
                let of_word = |bit: &u32| at * WORD + bit;
                let there = (0..WORD).filter(|bit| model[of_word(bit) as usize] > 0).fold(0, |bits, bit| bits | 1 << bit);
                let pieces = if more { pieces } else { pieces & there };
                if more { holders.add(at, pieces) } else { holders.take(at, pieces) }
                for bit in (0..WORD).filter(|bit| pieces >> bit & 1 == 1) {
                    let count = &mut model[of_word(&bit) as usize];
                    *count = if more { *count + 1 } else { *count - 1 };
                }
            }
            for (piece, &count) in (0..).zip(&model) {
                prop_assert_eq!(holders.count(piece), count);
            }
            prop_assert_eq!(holders.count(u32::MAX), 0);
        }
    }
}
