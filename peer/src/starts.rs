//! Starts of images: what a container reads first when its image has just been mounted, told by those that started it to
//! those that will.
//!
//! ```text
//!   Reader --piece--> StartRecord, of the image   a minute after the mount, or at its end, a StartTrace
//!        --Trace--> the seed peer that keeps it: CollectedStarts, the last few starts of each image
//!        <--object, merged-- whoever mounts the image later, and fetches these pieces before they are asked for
//! ```
//!
//! Who keeps the traces of an image is decided by the same hash as homes are, over the digest of its bootstrap layer; see
//! `Exchange`, which carries them. Nothing depends on one: a seed peer has them in memory alone, and who finds none mounts
//! without.

mod collected;
mod merge;

use std::{
    collections::HashSet,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use shoal_proto::StartTrace;

pub(crate) use self::collected::CollectedStarts;

/// The pieces of a loaded image that are read after it was mounted, in the order of their first use, while that is noted. At most
/// [`StartTrace::MAX_PIECES`], about half a megabyte.
#[derive(Debug, Default)]
pub(crate) struct StartRecord {
    /// Looked at by every read.
    open: AtomicBool,
    /// Locked for a look.
    touched: Mutex<Touched>,
}

#[derive(Debug, Default)]
struct Touched {
    seen: HashSet<(u32, u32)>,
    order: Vec<(u32, u32)>,
}

impl StartRecord {
    /// Begins to note reads; false if that is under way, for another mount of the image.
    pub(crate) fn begin(&self) -> bool {
        !self.open.swap(true, Relaxed)
    }

    /// Notes a read of a piece, of the blob at this place in the image's table.
    pub(crate) fn note(&self, blob: u32, piece: u32) {
        if !self.open.load(Relaxed) {
            return;
        }
        let mut touched = self.touched();
        if touched.order.len() < StartTrace::MAX_PIECES && touched.seen.insert((blob, piece)) {
            touched.order.push((blob, piece));
        }
    }

    /// Ends it; nothing if nothing was read.
    pub(crate) fn finish(&self) -> Option<StartTrace> {
        self.open.store(false, Relaxed);
        let touched = std::mem::take(&mut *self.touched());
        Some(StartTrace::of(touched.order)).filter(|trace| !trace.is_empty())
    }

    fn touched(&self) -> MutexGuard<'_, Touched> {
        self.touched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_uses_are_noted_while_it_is_open() {
        let record = StartRecord::default();
        record.note(0, 1);
        assert!(record.begin() && !record.begin());
        for (blob, piece) in [(0, 7), (1, 0), (0, 7), (0, 8), (0, 1)] {
            record.note(blob, piece);
        }
        let trace = record.finish().unwrap();
        assert_eq!(trace.pieces().collect::<Vec<_>>(), [(0, 7), (1, 0), (0, 8), (0, 1)]);
        record.note(0, 9);
        assert!(record.begin());
        assert_eq!(record.finish(), None);
    }

    #[test]
    fn a_record_is_bounded() {
        let record = StartRecord::default();
        record.begin();
        (0..StartTrace::MAX_PIECES as u32 + 10).for_each(|piece| record.note(0, piece));
        assert_eq!(record.touched().order.len(), StartTrace::MAX_PIECES);
        assert_eq!(record.finish().unwrap().pieces().count(), StartTrace::MAX_PIECES);
    }
}
