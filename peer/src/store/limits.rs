//! How large the store may become: arithmetic over two limits, one on what it keeps itself and one on what it leaves free
//! for others, each with a high and a low mark. No IO.

/// The limits of a store. Eviction begins above the high marks and ends at the low ones, so that it does not run for
/// every piece; beyond a limit nothing is written before something has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreLimits {
    /// Most bytes on disk of blobs and objects together. 0, the default: no limit.
    pub max_bytes: u64,
    /// The high mark, in percent of `max_bytes`, 1 to 100. Default 90.
    pub high_percent: u8,
    /// The low mark, in percent of `max_bytes`, at most the high one. Default 80.
    pub low_percent: u8,
    /// Bytes of the file system that are left free for others. The marks lie above it by the same parts of it as the
    /// others lie below `max_bytes`. 0, the default: the disk may be filled.
    pub keep_free_bytes: u64,
}

impl Default for StoreLimits {
    fn default() -> Self {
        Self { max_bytes: 0, high_percent: 90, low_percent: 80, keep_free_bytes: 0 }
    }
}

impl StoreLimits {
    /// Bytes that have to go before `len` more may come, `used` being kept and `free` being free now: 0 while there is
    /// room, otherwise down to the low marks. `None` when there could never be room.
    pub(super) fn overflow(&self, used: u64, free: u64, len: u64) -> Option<u64> {
        if self.max_bytes != 0 && len > self.max_bytes {
            return None;
        }
        let (used, free) = (used.saturating_add(len), free.saturating_sub(len));
        let fits = (self.max_bytes == 0 || used <= self.max_bytes) && free >= self.keep_free_bytes;
        Some(if fits { 0 } else { self.above_low(used, free).max(1) })
    }

    /// Bytes that should go by and by: 0 up to the high marks, above them down to the low ones.
    pub(super) fn surplus(&self, used: u64, free: u64) -> u64 {
        let low_enough = used <= self.mark(self.high_percent) && free >= self.reserve(self.high_percent);
        if low_enough { 0 } else { self.above_low(used, free) }
    }

    fn above_low(&self, used: u64, free: u64) -> u64 {
        let over = used.saturating_sub(self.mark(self.low_percent));
        over.max(self.reserve(self.low_percent).saturating_sub(free))
    }

    fn mark(&self, percent: u8) -> u64 {
        match self.max_bytes {
            0 => u64::MAX,
            max => part(max, percent),
        }
    }

    /// Free bytes at a mark.
    fn reserve(&self, percent: u8) -> u64 {
        self.keep_free_bytes.saturating_add(part(self.keep_free_bytes, 100u8.saturating_sub(percent)))
    }
}

fn part(whole: u64, percent: u8) -> u64 {
    u64::try_from(u128::from(whole) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = u64::MAX;

    #[test]
    fn without_limits_everything_fits() {
        let limits = StoreLimits::default();
        assert_eq!((limits.overflow(ALL, 0, ALL), limits.surplus(ALL, 0)), (Some(0), 0));
    }

    #[test]
    fn a_size_limit_has_marks_below_it() {
        let limits = StoreLimits { max_bytes: 1000, ..StoreLimits::default() };
        // (used, more, must go, should go)
        for (used, len, must, should) in [
            (0, 1000, Some(0), 0),
            (900, 100, Some(0), 0),
            (901, 99, Some(0), 101),
            (900, 101, Some(201), 0),
            (2000, 0, Some(1200), 1200),
            (0, 1001, None, 0),
        ] {
            assert_eq!(limits.overflow(used, ALL, len), must, "{used} and {len}");
            assert_eq!(limits.surplus(used, ALL), should, "{used}");
        }
    }

    #[test]
    fn what_is_left_free_has_marks_above_it() {
        let limits = StoreLimits { keep_free_bytes: 1000, ..StoreLimits::default() };
        for (free, len, must, should) in [
            (1200, 100, Some(0), 0),
            (1100, 100, Some(0), 0),
            (1099, 99, Some(0), 101),
            (1099, 100, Some(201), 101),
            (0, 0, Some(1200), 1200),
        ] {
            assert_eq!(limits.overflow(500, free, len), must, "{free} and {len}");
            assert_eq!(limits.surplus(500, free), should, "{free}");
        }
    }
}
