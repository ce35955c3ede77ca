//! The auth file of registries, read again when it changes.

use shoal_rafs::oci::{Authfile, Keyring};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    chain,
    mounts::blocking,
    watched_file::{LOOK_EVERY, WatchedFile},
};

/// Runs for as long as the node. A file that cannot be used is reported once for each change; what was read before it is used
/// on.
pub(crate) async fn keep_fresh(mut file: WatchedFile, keyring: Keyring) {
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let looked = blocking(move || {
            let read = file.changed().then(|| Authfile::load(file.path()));
            (file, read)
        });
        let (back, read) = looked.await;
        file = back;
        match read {
            None => {}
            Some(Ok(read)) => {
                tracing::debug!(path = %file.path().display(), "credentials of registries were read");
                keyring.replace(read);
            }
            Some(Err(error)) => tracing::error!("credentials of registries are not read again: {}", chain(&error)),
        }
    }
}
