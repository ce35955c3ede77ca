//! Mounts that have gone without being asked: somebody else has unmounted one, or ended its session. They are made again; whoever has
//! files of the old one open is served on, as far as there is still somebody to do it.

use std::{path::Path, time::Duration};

use shoal_rafs::{MountPresence, MountTable};

use super::{Mounts, blocking, restore::Waiting};

/// How often it is looked whether all mounts are there.
const LOOK: Duration = Duration::from_secs(5);

impl Mounts {
    /// Looks after the mounts for as long as the daemon runs.
    pub(crate) async fn watch(self) {
        loop {
            tokio::time::sleep(LOOK).await;
            let presences = self.table.presences();
            if presences.is_empty() {
                continue;
            }
            let gone = blocking(move || match MountTable::read() {
                Ok(table) => presences.into_iter().filter(|(_, presence)| !presence.is_in(&table)).collect(),
                Err(error) => {
                    tracing::warn!("cannot see whether all mounts are there: {error}");
                    Vec::new()
                }
            });
            for (mountpoint, _) in gone.await {
                self.mend(&mountpoint).await;
            }
        }
    }

    /// Makes a mount again that is not there any more. If that fails it is tried again until it can be made, or is unmounted.
    pub(crate) async fn mend(&self, mountpoint: &Path) {
        let Some((presence, needs)) = self.table.presence(mountpoint) else { return };
        if is_there(&presence).await {
            return;
        }
        let hold = self.node.store.hold(needs);
        let Some((claim, mounted)) = self.table.replace(mountpoint, &presence, hold) else { return };
        tracing::error!(
            "{} is not mounted any more, though nobody has asked for that: mounted anew",
            mountpoint.display()
        );
        metrics::counter!("shoal_mounts_lost_total").increment(1);
        let record = mounted.record(mountpoint);
        self.remember(&mounted);
        // Takes away what is dead.
        blocking(move || drop(mounted)).await;
        self.bring_back(Waiting { record, claim, kept: None }).await;
    }
}

/// Whether the mount is there, or nobody can tell.
async fn is_there(presence: &MountPresence) -> bool {
    let presence = presence.clone();
    blocking(move || MountTable::read().map_or(true, |table| presence.is_in(&table))).await
}
