//! The start of what has just been mounted: which pieces are read first is noted, for those that mount the image later.

use tokio_util::sync::CancellationToken;

use super::{Mounts, table::Mounted};
use crate::prefetch;

impl Mounts {
    /// Has what is read of a new mount noted, until it ends or some time has passed.
    pub(super) fn note_start(&self, mounted: &mut Mounted) {
        let config = self.settings.prefetch;
        if let Some(exchange) = self.exchange.clone().filter(|_| config.notes_starts()) {
            let ended = CancellationToken::new();
            let image = mounted.reader.image().clone();
            // It outlives the mount by what it has to tell.
            tokio::spawn(prefetch::note_start(image, exchange, config.trace_time, ended.clone()));
            mounted._start = Some(ended.drop_guard());
        }
    }
}
