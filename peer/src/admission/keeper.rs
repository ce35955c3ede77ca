//! The task behind an [`Admission`]: reads the node's certificate again when its file changes, closes data connections
//! of peers that may not stay, and writes revocations down.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::{Admission, Record};
use crate::{
    chain,
    data::{Closing, DataPlane},
    membership::{MAX_REVOCATIONS, Membership, Policy, Refusal, unix_now},
};

/// How often the clock and the file are looked at. A peer stays this much longer than its certificate at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What the keeper works with.
pub(crate) struct KeeperParts {
    pub admission: Admission,
    /// The node's certificate; none in an open cluster.
    pub file: Option<PathBuf>,
    pub record: Record,
    pub data: DataPlane,
}

/// See the module.
pub(crate) struct Keeper {
    parts: KeeperParts,
    changes: watch::Receiver<()>,
    seen: Option<Version>,
    warned: Warned,
}

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    changed: (i64, i64),
    length: u64,
}

/// What the log was told about the node's own certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Warned {
    Nothing,
    Soon,
    Over,
}

impl Keeper {
    pub(crate) fn new(parts: KeeperParts) -> Self {
        let changes = parts.admission.changes();
        Self { parts, changes, seen: None, warned: Warned::Nothing }
    }

    /// Runs for as long as the node.
    pub(crate) async fn run(mut self) {
        if matches!(self.parts.admission.policy(), Policy::Open) {
            return;
        }
        let mut written = true;
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.read_again(),
                // The sender lives in the admission that this task holds.
                _ = self.changes.changed() => written = false,
            }
            self.close();
            self.warn();
            if !written {
                written = self.write_down().await;
            }
        }
    }

    /// A file that cannot be used is reported once; the certificate in use is good for a while still.
    fn read_again(&mut self) {
        let Some(file) = self.parts.file.clone() else { return };
        let found = version(&file).ok();
        if found == self.seen || found.is_none() {
            return;
        }
        self.seen = found;
        let admission = &self.parts.admission;
        let loaded = Membership::load(admission.policy(), &file, &admission.own().peer(), unix_now());
        let renewed = loaded.and_then(|own| {
            let shown = own.shown().clone();
            if shown == admission.own().shown() { Ok(None) } else { admission.renew(own).map(|()| Some(shown)) }
        });
        match renewed {
            Ok(None) => {}
            Ok(Some(shown)) => {
                self.parts.data.renew(shown);
                self.warned = Warned::Nothing;
                tracing::info!(path = %file.display(), "the certificate of membership was renewed");
            }
            Err(error) => tracing::error!("the certificate of membership is not renewed: {}", chain(&error)),
        }
    }

    fn close(&self) {
        let now = unix_now();
        for connection in self.parts.data.connections() {
            let why = match self.parts.admission.stands(&connection.admitted, now) {
                Ok(()) => continue,
                Err(Refusal::Expired) => Closing::Expired,
                Err(_) => Closing::Refused,
            };
            self.parts.data.expel(connection.peer, why);
        }
    }

    fn warn(&mut self) {
        let (own, now) = (self.parts.admission.own(), unix_now());
        let left = own.expires().saturating_sub(now);
        let due = match left {
            0 => Warned::Over,
            left if left < own.expires().saturating_sub(own.issued()) / 4 => Warned::Soon,
            _ => Warned::Nothing,
        };
        if due > self.warned {
            self.warned = due;
            match due {
                Warned::Over => {
                    tracing::error!("the certificate of membership has expired: other nodes refuse this one")
                }
                _ => tracing::warn!("the certificate of membership expires in {left} s; put a new one in its place"),
            }
        }
    }

    async fn write_down(&self) -> bool {
        let (record, admission) = (self.parts.record.clone(), self.parts.admission.clone());
        let stored = tokio::task::spawn_blocking(move || {
            let list = admission.revocation_lists(MAX_REVOCATIONS).pop().unwrap_or_default();
            record.store(&list)
        });
        let error = match stored.await {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error,
            Err(panic) => io::Error::other(panic),
        };
        tracing::error!("revocations are not written down: {error}");
        false
    }
}

fn version(file: &Path) -> io::Result<Version> {
    let metadata = fs::metadata(file)?;
    let changed = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Version { inode: metadata.ino(), changed, length: metadata.len() })
}
