//! What is fetched before it is read, because what lies before it was.
//!
//! The builder puts the files of a folder side by side, so who has read one may want the next. A piece that has to be fetched
//! opens a *window* behind it, which is asked for as one. Once half of it is read the next window is asked for, twice as large,
//! up to [`ahead_bytes`](crate::config::ReadConfig::ahead_bytes), so that who goes through an image in a row does not wait at the end of
//! each. How large the first one is depends on what became of the last: it begins with a sixteenth of `ahead_bytes`, doubles with each
//! window that was read on from, and is halved by each that was not. So who opens files here and there fetches little that is
//! never read, and who reads folder after folder seldom waits.
//!
//! Pure: which pieces, not how they come.

use std::collections::{HashSet, VecDeque};

use shoal_scheduler::{BlobKey, Item};

/// Readers of a mount that are followed at a time; of more the one that was seen longest ago is forgotten.
const STREAMS: usize = 8;
/// The smallest window is this part of `ahead_bytes`.
const SMALLEST: u64 = 16;

/// The windows of a mount.
#[derive(Debug)]
pub(super) struct Windows {
    /// Most bytes of one.
    ahead: u64,
    /// Bytes of the first one of the next reader.
    first: u64,
    windows: VecDeque<Window>,
}

/// Pieces of a blob, one behind the other, that were asked for ahead of a reader.
#[derive(Debug)]
struct Window {
    blob: BlobKey,
    start: u32,
    end: u32,
    /// Encoded bytes that were last asked for.
    size: u64,
    /// Encoded bytes that were not read yet.
    unread: u64,
    /// The piece that was read last: a large one is read in several requests.
    last: u32,
    /// Whether it was read on from.
    followed: bool,
}

impl Window {
    fn has(&self, blob: BlobKey, piece: u32) -> bool {
        self.blob == blob && (self.start..self.end).contains(&piece)
    }
}

/// Encoded lengths of the pieces of a blob.
pub(super) trait Lengths {
    /// How many there are.
    fn count(&self) -> u32;
    /// Of one of them, in bytes; 0 for what the image does not name.
    fn of(&self, piece: u32) -> u64;
}

impl Windows {
    /// None yet, of at most `ahead` bytes each; with 0 there never are any.
    pub(super) fn new(ahead: u64) -> Self {
        Self { ahead, first: ahead / SMALLEST, windows: VecDeque::new() }
    }

    /// A piece is read. Gives the pieces that are now to be fetched, if any.
    pub(super) fn read(&mut self, blob: BlobKey, piece: u32, lengths: &impl Lengths) -> Vec<u32> {
        let Some(place) = self.windows.iter().position(|window| window.has(blob, piece)) else { return Vec::new() };
        let Some(window) = self.windows.get_mut(place).filter(|window| window.last != piece) else {
            return Vec::new();
        };
        window.last = piece;
        window.unread = window.unread.saturating_sub(lengths.of(piece));
        if window.unread > window.size / 2 {
            return Vec::new();
        }
        if !window.followed {
            self.first = (self.first * 2).min(self.ahead);
        }
        window.followed = true;
        window.size = (window.size * 2).min(self.ahead);
        let (next, end, bytes) = behind(window.end, lengths, window.size);
        window.end = end;
        window.unread += bytes;
        if let Some(window) = self.windows.remove(place) {
            self.windows.push_back(window);
        }
        next
    }

    /// A piece is not here, but perhaps on its way ahead of its reader. Gives the pieces behind it that are to be fetched, if
    /// that reader is not followed already.
    pub(super) fn missed(&mut self, blob: BlobKey, piece: u32, on_its_way: bool, lengths: &impl Lengths) -> Vec<u32> {
        if self.ahead == 0 || on_its_way {
            return Vec::new();
        }
        // Pieces that are larger than a window are read on to as well.
        let goes_on = self.windows.iter().any(|window| window.blob == blob && window.end == piece);
        // One that it was asked for in has failed, or has been evicted since.
        self.windows.retain(|window| window.blob != blob || !(window.start..=window.end).contains(&piece));
        if self.windows.len() == STREAMS
            && let Some(Window { followed: false, .. }) = self.windows.pop_front()
        {
            self.first = (self.first / 2).max(self.ahead / SMALLEST);
        }
        let size = if goes_on { self.ahead } else { self.first };
        let (next, end, unread) = behind(piece.saturating_add(1), lengths, size);
        self.windows.push_back(Window { blob, start: piece, end, size, unread, last: piece, followed: goes_on });
        next
    }
}

/// Pieces from `from` on of together at most `ahead` bytes, where they end, and their bytes.
fn behind(from: u32, lengths: &impl Lengths, ahead: u64) -> (Vec<u32>, u32, u64) {
    let (mut pieces, mut end, mut bytes) = (Vec::new(), from, 0);
    while end < lengths.count() {
        let length = lengths.of(end);
        if bytes + length > ahead {
            break;
        }
        if length > 0 {
            pieces.push(end);
        }
        bytes += length;
        end += 1;
    }
    (pieces, end, bytes)
}

/// Pieces that are being fetched ahead of their readers, over all mounts: each once, and not too many.
#[derive(Debug, Default)]
pub(crate) struct Ahead(HashSet<Item>);

impl Ahead {
    /// Pieces on their way at a time; further ones are left to their readers.
    const LIMIT: usize = 1024;

    /// Whether the caller is to fetch `item`; it then says when that has [ended](Self::end).
    pub(super) fn begin(&mut self, item: Item) -> bool {
        self.0.len() < Self::LIMIT && self.0.insert(item)
    }

    pub(super) fn has(&self, item: Item) -> bool {
        self.0.contains(&item)
    }

    pub(super) fn end(&mut self, item: Item) {
        self.0.remove(&item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of so many bytes each.
    struct Even(u64);

    impl Lengths for Even {
        fn count(&self) -> u32 {
            1000
        }

        fn of(&self, _: u32) -> u64 {
            self.0
        }
    }

    const BLOB: BlobKey = BlobKey { id: [1; 32], variant: 0 };
    /// Sixteen of which are a window at first, and 256 at most.
    const SMALL: Even = Even(1);
    const AHEAD: u64 = 256;

    #[test]
    fn who_goes_through_a_blob_waits_once() {
        let mut windows = Windows::new(AHEAD);
        let mut asked: HashSet<u32> = windows.missed(BLOB, 0, false, &SMALL).into_iter().collect();
        assert_eq!(asked.len(), 16);
        let mut times = 1;
        for piece in 1..1000 {
            assert!(asked.contains(&piece), "{piece} was not asked for");
            assert!(windows.missed(BLOB, piece, true, &SMALL).is_empty());
            let next = windows.read(BLOB, piece, &SMALL);
            times += usize::from(!next.is_empty());
            asked.extend(next);
            let most = asked.iter().filter(|&&other| other > piece).count();
            assert!(most <= 3 * AHEAD as usize / 2, "{most} pieces ahead");
            // In several parts.
            assert!(windows.read(BLOB, piece, &SMALL).is_empty());
        }
        assert!(asked.len() == 999 && times < 12, "{} pieces in {times} requests", asked.len());
    }

    #[test]
    fn who_reads_large_pieces_one_after_the_other_is_followed_from_the_second_on() {
        let (mut windows, large) = (Windows::new(AHEAD), Even(100));
        assert!(windows.missed(BLOB, 0, false, &large).is_empty());
        assert_eq!(windows.missed(BLOB, 1, false, &large), [2, 3]);
        assert!(windows.read(BLOB, 2, &large) == [4, 5] && windows.read(BLOB, 3, &large).is_empty());
    }

    #[test]
    fn who_jumps_is_not_followed_and_windows_stay_small() {
        let mut windows = Windows::new(AHEAD);
        for miss in (0..900).step_by(50) {
            assert_eq!(windows.missed(BLOB, miss, false, &SMALL).len(), 16);
            // One of sixteen is read.
            assert!(windows.read(BLOB, miss + 7, &SMALL).is_empty());
        }
        assert!(windows.missed(BLOB, 999, false, &SMALL).is_empty() && windows.read(BLOB, 999, &SMALL).is_empty());
        let mut none = Windows::new(0);
        assert!(none.missed(BLOB, 0, false, &SMALL).is_empty() && none.read(BLOB, 1, &SMALL).is_empty());
    }

    #[test]
    fn windows_grow_where_they_are_read_on_from_and_shrink_where_they_are_not() {
        let mut windows = Windows::new(AHEAD);
        let mut sizes = Vec::new();
        for miss in (0..400).step_by(100) {
            sizes.push(windows.missed(BLOB, miss, false, &SMALL).len());
            (miss + 1..miss + 90).for_each(|piece| drop(windows.read(BLOB, piece, &SMALL)));
        }
        assert_eq!(sizes, [16, 32, 64, 128]);
        let other = |variant| BlobKey { variant, ..BLOB };
        let sizes: Vec<_> = (1..30).map(|variant| windows.missed(other(variant), 0, false, &SMALL).len()).collect();
        assert_eq!((sizes[0], sizes[28]), (256, 16), "{sizes:?}");
        assert_eq!(windows.windows.len(), STREAMS);
    }

    #[test]
    fn what_was_fetched_ahead_and_is_gone_is_fetched_ahead_again() {
        let mut windows = Windows::new(AHEAD);
        assert_eq!(windows.missed(BLOB, 0, false, &SMALL).len(), 16);
        assert_eq!(windows.missed(BLOB, 5, false, &SMALL), (6..22).collect::<Vec<_>>());
        assert_eq!(windows.windows.len(), 1);
    }

    #[test]
    fn what_is_on_its_way_is_bounded() {
        let mut ahead = Ahead::default();
        let begun = (0..2000).filter(|&piece| ahead.begin(Item { blob: BLOB, piece })).count();
        assert_eq!(begun, Ahead::LIMIT);
        ahead.end(Item { blob: BLOB, piece: 0 });
        assert!(!ahead.begin(Item { blob: BLOB, piece: 1 }) && ahead.begin(Item { blob: BLOB, piece: 0 }));
    }
}
