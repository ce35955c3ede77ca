//! What drops have to tell the loop. A drop cannot wait for room in a channel, and what it says must not be lost: a want that
//! nobody waits for would be fetched for as long as its deadline, and what nobody needs be remembered for ever.
//!
//! Each want and each stake says one thing, once, so there is no more of it than there was of them.

use std::sync::{Mutex, PoisonError};

use shoal_scheduler::{BlobKey, WantId};
use tokio::sync::Notify;

/// What was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Farewell {
    /// Whoever waited for a want.
    Want(WantId),
    /// The last clone of a stake in this key.
    Stake(BlobKey),
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Farewells {
    /// Held for a push or a take.
    said: Mutex<Vec<Farewell>>,
    came: Notify,
}

impl Farewells {
    pub(super) fn say(&self, farewell: Farewell) {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).push(farewell);
        self.came.notify_one();
    }

    /// All that was said since the last time.
    pub(super) fn take(&self) -> Vec<Farewell> {
        std::mem::take(&mut self.said.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until something is said. For one task at a time. Cancel safe.
    pub(super) async fn come(&self) {
        self.came.notified().await;
    }
}
