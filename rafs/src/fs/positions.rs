//! Where those who list directories are.
//!
//! The kernel goes on behind the n-th entry, and a block does not say how many came before it: without a note, listing a
//! directory of n blocks would look at n blocks for each answer. A note that is gone costs time and nothing else.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use fuser::INodeNo;
use lru::LruCache;

use crate::bootstrap::BlockStart;

/// Directories with a note: more than are listed at a time.
const NOTES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();

/// Per directory the block where the last answer ended.
#[derive(Debug)]
pub(super) struct Positions(Mutex<LruCache<u64, BlockStart>>);

impl Default for Positions {
    fn default() -> Self {
        Self(Mutex::new(LruCache::new(NOTES)))
    }
}

impl Positions {
    /// Where the last answer ended; the beginning if nobody knows.
    pub(super) fn last(&self, directory: INodeNo) -> BlockStart {
        self.lock().get(&directory.0).copied().unwrap_or_default()
    }

    pub(super) fn note(&self, directory: INodeNo, at: BlockStart) {
        self.lock().put(directory.0, at);
    }

    /// For one look.
    fn lock(&self) -> MutexGuard<'_, LruCache<u64, BlockStart>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
