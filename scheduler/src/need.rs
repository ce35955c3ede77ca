//! Parts by need: who lacks more of a blob than is usual among those that ask is served more.
//!
//! With equal parts, whoever knows few peers is given less by all of them together, stays behind to the end, and a rollout takes
//! as long as its last node. What an asker lacks it says itself and is believed, as it is of what it has: a lie gains it four
//! times the usual place in the line of one node.

use shoal_proto::LACKS_ALL;

/// Parts are counted in parts of this.
const EVEN: u64 = 1 << 8;
/// What an asker lacks changes what is taken for usual by this part.
const LEARNS: u64 = 32;

/// What those that ask of late lack.
#[derive(Debug, Default)]
pub(crate) struct Need {
    /// In parts of a thousandth; 0 before the first.
    usual: u64,
}

impl Need {
    /// What of `even` bytes, which would be everyone's part, is the part of who lacks so many thousandths: by the fourth power
    /// of how much more that is than usual, so that a fifth more is about twice the part; a half at least, and four times
    /// at most. An even part for who does not say.
    pub(crate) fn part(&mut self, even: u64, lacks: u16) -> u64 {
        if lacks == 0 {
            return even;
        }
        let lacks = u64::from(lacks.min(LACKS_ALL)) * LEARNS * EVEN;
        let usual = if self.usual == 0 { lacks } else { self.usual };
        self.usual = usual - usual / LEARNS + lacks / LEARNS;
        let ratio = lacks * EVEN / self.usual;
        let square = ratio * ratio / EVEN;
        even.saturating_mul((square * square / EVEN).clamp(EVEN / 2, EVEN * 4)) / EVEN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifth_more_than_usual_is_twice_the_part() {
        let mut need = Need::default();
        assert_eq!((need.part(1000, 100), need.part(1000, 0)), (1000, 1000));
        for (lacks, least, most) in [(120, 1800, 2100), (90, 600, 700), (10, 500, 500), (u16::MAX, 4000, 4000)] {
            (0..500).for_each(|_| _ = need.part(1000, 100));
            assert!((least..=most).contains(&need.part(1000, lacks)), "{lacks}");
        }
        assert_eq!(need.part(u64::MAX, 1), u64::MAX / EVEN, "nothing overflows");
    }

    #[test]
    fn what_is_usual_follows() {
        let mut need = Need::default();
        (0..500).for_each(|_| _ = need.part(1000, 1));
        (0..500).for_each(|_| _ = need.part(1000, LACKS_ALL));
        assert!(need.part(1000, LACKS_ALL).abs_diff(1000) < 10);
    }
}
