//! Buffers that one thread fills and another uses, in order; their number bounds memory.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::BuildError;

/// The end of a channel at which buffers are filled, used at the other, and come back.
pub(super) struct Lender<T> {
    work: SyncSender<T>,
    spare: Receiver<Vec<u8>>,
}

/// The end at which they are used.
pub(super) struct Borrower<T> {
    pub(super) work: Receiver<T>,
    pub(super) free: SyncSender<Vec<u8>>,
}

/// Both ends, for so many buffers, all of which wait at the first.
pub(super) fn lend<T>(buffers: usize) -> (Lender<T>, Borrower<T>) {
    let ((work, queue), (free, spare)) = (sync_channel(buffers), sync_channel(buffers));
    // There is room for all of them, and somebody to take them.
    (0..buffers).for_each(|_| _ = free.send(Vec::new()));
    (Lender { work, spare }, Borrower { work: queue, free })
}

impl<T> Lender<T> {
    /// An empty buffer; waits for one.
    ///
    /// # Errors
    /// The other end is gone.
    pub(super) fn spare(&self) -> Result<Vec<u8>, BuildError> {
        self.spare.recv().map_err(|_| BuildError::Worker)
    }

    /// # Errors
    /// The other end is gone.
    pub(super) fn hand_over(&self, work: T) -> Result<(), BuildError> {
        self.work.send(work).map_err(|_| BuildError::Worker)
    }
}
