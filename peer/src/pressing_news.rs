//! The blobs whose news should not wait. The driver notes what comes, the exchange tells.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use shoal_scheduler::{BlobKey, is_pressing};
use tokio::sync::Notify;

/// What came of a blob since its neighbours were told.
#[derive(Debug, Default)]
struct News {
    pieces: u32,
    pressing: bool,
}

/// See the module. Holds an entry for each blob of which something came that was not told.
#[derive(Debug, Default)]
pub(crate) struct PressingNews {
    blobs: Mutex<HashMap<BlobKey, News>>,
    /// The news of one more blob presses.
    came: Notify,
}

impl PressingNews {
    fn lock(&self) -> MutexGuard<'_, HashMap<BlobKey, News>> {
        self.blobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A piece of a blob came, of which `here` are here with it; `unheld` if no neighbour had it.
    pub(crate) fn arrived(&self, blob: BlobKey, unheld: bool, here: u32) {
        let mut blobs = self.lock();
        let news = blobs.entry(blob).or_default();
        news.pieces += 1;
        let pressing = is_pressing(unheld, news.pieces, here.saturating_sub(news.pieces));
        if pressing && !std::mem::replace(&mut news.pressing, true) {
            self.came.notify_one();
        }
    }

    /// The news of a blob is told, or does not matter any more.
    pub(crate) fn remove(&self, blob: BlobKey) {
        self.lock().remove(&blob);
    }

    pub(crate) fn contains(&self, blob: BlobKey) -> bool {
        self.lock().get(&blob).is_some_and(|news| news.pressing)
    }

    /// Waits until there is a blob more. For one task at a time. Cancel safe.
    pub(crate) async fn come(&self) {
        self.came.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn wakes_once_for_each_blob_that_is_new() {
        let (news, blob) = (PressingNews::default(), BlobKey { id: [1; 32], variant: 0 });
        let comes = async || timeout(Duration::ZERO, news.come()).await.is_ok();
        assert!(!comes().await);
        news.arrived(blob, true, 1000);
        assert!(comes().await && news.contains(blob));
        news.arrived(blob, true, 1001);
        assert!(!comes().await, "it is known");
        news.remove(blob);
        assert!(!news.contains(blob));
        news.arrived(blob, true, 1002);
        assert!(comes().await);
    }

    #[tokio::test]
    async fn what_all_have_waits_until_it_is_much_of_what_was_told() {
        let (news, blob) = (PressingNews::default(), BlobKey { id: [1; 32], variant: 0 });
        let pressing = |here| {
            news.arrived(blob, false, here);
            news.contains(blob)
        };
        assert!(pressing(1), "the first");
        news.remove(blob);
        assert!(!(41..=50).any(&pressing), "ten beside forty");
        assert!(pressing(51));
    }
}
