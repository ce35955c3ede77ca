//! The task behind an [`Admission`]: reads the node's certificate again when its file changes, closes data connections
//! of peers that may not stay, and writes revocations down.

use std::{io, path::PathBuf};

use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use super::{Admission, Record};
use crate::{
    chain,
    data::{Closing, DataPlane},
    membership::{MAX_REVOCATIONS, Membership, Policy, Refusal, unix_now},
    watched_file::{LOOK_EVERY, WatchedFile},
};

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
    file: Option<WatchedFile>,
    warned: Warned,
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
        let (changes, file) = (parts.admission.changes(), parts.file.clone().map(WatchedFile::new));
        Self { parts, changes, file, warned: Warned::Nothing }
    }

    /// Runs for as long as the node.
    pub(crate) async fn run(mut self) {
        if matches!(self.parts.admission.policy(), Policy::Open) {
            return;
        }
        let mut written = true;
        // A peer stays this much longer than its certificate at most.
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
        let Some(watched) = &mut self.file else { return };
        if !watched.changed() {
            return;
        }
        let file = watched.path().to_owned();
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
