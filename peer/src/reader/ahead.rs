//! What is fetched before it is read, because what lies before it was.
//!
//! The builder puts the files of a folder side by side, so who has read one will likely want the next. A piece that has to be
//! fetched opens a *window* behind it, of about [`ahead_bytes`](crate::config::ReadConfig::ahead_bytes), which is asked for as
//! one. While at least half of what was so asked for is being read, the next window is asked for, so that who goes through an image
//! in a row does not wait at the end of each. So what is fetched and never read is bounded: one and a half times `ahead_bytes` for
//! each piece that somebody waited for.
//!
//! Pure: which pieces, not how they come.

use std::collections::{HashSet, VecDeque};

use shoal_scheduler::{BlobKey, Item};

/// Readers of a mount that are followed at a time; of more the one that was seen longest ago is forgotten.
const STREAMS: usize = 8;

/// The windows of a mount.
#[derive(Debug, Default)]
pub(super) struct Windows(VecDeque<Window>);

/// Pieces of a blob, one behind the other, that were asked for ahead of a reader.
#[derive(Debug)]
struct Window {
    blob: BlobKey,
    start: u32,
    end: u32,
    /// Encoded bytes of them that were not read yet.
    unread: u64,
    /// The piece that was read last: a large one is read in several requests.
    last: Option<u32>,
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
    /// A piece is read. Gives the pieces that are now to be fetched, if any.
    pub(super) fn read(&mut self, blob: BlobKey, piece: u32, lengths: &impl Lengths, ahead: u64) -> Vec<u32> {
        let Some(place) = self.0.iter().position(|window| window.has(blob, piece)) else { return Vec::new() };
        let Some(window) = self.0.get_mut(place) else { return Vec::new() };
        if window.last == Some(piece) {
            return Vec::new();
        }
        window.last = Some(piece);
        window.unread = window.unread.saturating_sub(lengths.of(piece));
        if window.unread > ahead / 2 {
            return Vec::new();
        }
        let (next, end, bytes) = behind(window.end, lengths, ahead);
        window.end = end;
        window.unread += bytes;
        if let Some(window) = self.0.remove(place) {
            self.0.push_back(window);
        }
        next
    }

    /// A piece is not here, but perhaps on its way ahead of its reader. Gives the pieces behind it that are to be fetched, if
    /// that reader is not followed already.
    pub(super) fn missed(
        &mut self,
        blob: BlobKey,
        piece: u32,
        on_its_way: bool,
        lengths: &impl Lengths,
        ahead: u64,
    ) -> Vec<u32> {
        if ahead == 0 || on_its_way {
            return Vec::new();
        }
        // One that it was asked for in has failed, or has been evicted since.
        self.0.retain(|window| !window.has(blob, piece));
        if self.0.len() == STREAMS {
            self.0.pop_front();
        }
        let (next, end, unread) = behind(piece.saturating_add(1), lengths, ahead);
        self.0.push_back(Window { blob, start: piece, end, unread, last: Some(piece) });
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

    /// Pieces of 10 bytes each.
    struct Tens(u32);

    impl Lengths for Tens {
        fn count(&self) -> u32 {
            self.0
        }

        fn of(&self, _: u32) -> u64 {
            10
        }
    }

    const BLOB: BlobKey = BlobKey { id: [1; 32], variant: 0 };
    const ALL: Tens = Tens(100);

    #[test]
    fn who_goes_through_a_blob_waits_once() {
        let mut windows = Windows::default();
        let mut asked: HashSet<u32> = windows.missed(BLOB, 0, false, &ALL, 100).into_iter().collect();
        assert_eq!(asked.len(), 10);
        for piece in 1..100 {
            assert!(asked.contains(&piece), "{piece} was not asked for");
            assert!(windows.missed(BLOB, piece, true, &ALL, 100).is_empty());
            asked.extend(windows.read(BLOB, piece, &ALL, 100));
            let most = asked.iter().filter(|&&other| other > piece).count();
            assert!(most <= 15, "{most} pieces ahead");
            // In several parts.
            assert!(windows.read(BLOB, piece, &ALL, 100).is_empty());
        }
        assert_eq!(asked.len(), 99);
    }

    #[test]
    fn who_jumps_is_not_followed() {
        let mut windows = Windows::default();
        let mut asked = 0;
        for miss in [0, 50, 20, 80] {
            asked += windows.missed(BLOB, miss, false, &ALL, 100).len();
            // One of ten is read.
            asked += windows.read(BLOB, miss + 7, &ALL, 100).len();
        }
        assert_eq!(asked, 40);
        assert!(
            windows.missed(BLOB, 99, false, &ALL, 100).is_empty() && windows.read(BLOB, 99, &ALL, 100).is_empty()
        );
        let mut none = Windows::default();
        assert!(none.missed(BLOB, 0, false, &ALL, 0).is_empty() && none.read(BLOB, 1, &ALL, 0).is_empty());
    }

    #[test]
    fn what_was_fetched_ahead_and_is_gone_is_fetched_ahead_again() {
        let mut windows = Windows::default();
        assert_eq!(windows.missed(BLOB, 0, false, &ALL, 100).len(), 10);
        assert_eq!(windows.missed(BLOB, 5, false, &ALL, 100), (6..16).collect::<Vec<_>>());
        assert_eq!(windows.0.len(), 1);
    }

    #[test]
    fn readers_that_are_followed_are_bounded() {
        let mut windows = Windows::default();
        for variant in 0..100 {
            assert_eq!(windows.missed(BlobKey { variant, ..BLOB }, 0, false, &ALL, 100).len(), 10);
        }
        assert_eq!(windows.0.len(), STREAMS);
        let mut ahead = Ahead::default();
        let begun = (0..2000).filter(|&piece| ahead.begin(Item { blob: BLOB, piece })).count();
        assert_eq!(begun, Ahead::LIMIT);
        ahead.end(Item { blob: BLOB, piece: 0 });
        assert!(!ahead.begin(Item { blob: BLOB, piece: 1 }) && ahead.begin(Item { blob: BLOB, piece: 0 }));
    }
}
