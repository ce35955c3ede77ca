//! Another version of the daemon in the place of this one, under its readers.
//!
//! ```text
//!   shoal ctl upgrade ──> examine the program ──> a keeper has every mount? ──> answer the caller
//!                          │ runs, takes this configuration,      │
//!                          │ knows what will be left to it        └─ no: refused
//!                          └─ no: refused
//!   then, in the place where the process waits for its end:
//!     stop, leave mounts and sockets ──> exec(2) ──> the new daemon starts, and serves
//!                                          │                └─ does not: exec(2) of what ran before
//!                                          └─ fails: the same
//! ```
//!
//! The process stays the same, so whoever supervises it sees no end: systemd is told that the unit reloads. Mounts are the keeper's
//! meanwhile, as in any restart; see [`handover`](crate::handover). Sockets stay open, so who calls waits for the new daemon. What goes along
//! is in [`Inheritance`].
//!
//! Why the program is examined by running it: only the new one knows what it understands. It says so with `shoal daemon --check-config`,
//! with the arguments of this process.
//!
//! Not here: fetching a program, and who may ask. Whoever may open the control socket may have file systems mounted, and is
//! trusted with the daemon's place, too; the program must belong to the daemon's user or root all the same.

mod candidate;
mod inheritance;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use shoal_snapshots::Snapshot;
use tokio::sync::mpsc;

pub(crate) use self::{
    candidate::Candidate,
    inheritance::{Inheritance, Listener},
};
use crate::index;

/// Why the daemon stays what it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpgradeError {
    /// Nobody could have written it but this user and root, and it can be run: not so.
    #[error("{} cannot take the daemon's place: {reason}", path.display())]
    Unfit { path: PathBuf, reason: String },
    /// The system does not run it.
    #[error("{} does not run", path.display())]
    NotRun {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// It ends with an error.
    #[error("{} refuses the present configuration: {said}", path.display())]
    Refuses { path: PathBuf, said: String },
    /// It does not go on where this one ends.
    #[error("{} (version {version}) cannot go on from version {}: it does not know {what} {ours}", path.display(), env!("CARGO_PKG_VERSION"))]
    Incompatible { path: PathBuf, version: String, what: &'static str, ours: u32 },
    /// Readers would get errors.
    #[error(
        "{0} mounts would not outlive the daemon: no keeper has them (mounts.keeper); --force does it all the same"
    )]
    Unkept(usize),
    /// There is one.
    #[error("an upgrade is under way")]
    UnderWay,
}

/// What a version of the daemon goes on with when another one has left it; and its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Understands {
    pub(crate) version: String,
    /// Versions of what goes along through exec(2).
    pub(crate) upgrade: Vec<u32>,
    /// Versions of the keeper's protocol.
    pub(crate) keeper: Vec<u32>,
    /// Versions of the records of FUSE sessions.
    pub(crate) sessions: Vec<u32>,
    /// Versions of the store's index.
    pub(crate) index: Vec<u32>,
    /// Versions of snapshots' records. Who does not say knows the first.
    #[serde(default = "first")]
    pub(crate) snapshots: Vec<u32>,
}

impl Understands {
    /// This version.
    pub(crate) fn here() -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            upgrade: inheritance::VERSIONS.to_vec(),
            keeper: vec![shoal_keeper::VERSION.into()],
            sessions: vec![shoal_rafs::SESSION_VERSION],
            index: vec![index::SCHEMA_VERSION],
            snapshots: vec![Snapshot::VERSION],
        }
    }

    /// What this version would leave, and that one would not understand.
    fn lacks(&self) -> Option<(&'static str, u32)> {
        let ours = Self::here();
        let parts = [
            ("the form of upgrades", &ours.upgrade, &self.upgrade),
            ("the keeper's protocol", &ours.keeper, &self.keeper),
            ("records of mounts of version", &ours.sessions, &self.sessions),
            ("an index of version", &ours.index, &self.index),
            ("records of snapshots of version", &ours.snapshots, &self.snapshots),
        ];
        // What is written is the last of what is understood.
        let written = parts.into_iter().filter_map(|(what, ours, theirs)| Some((what, *ours.last()?, theirs)));
        written.filter(|(_, ours, theirs)| !theirs.contains(ours)).map(|(what, ours, _)| (what, ours)).next()
    }
}

fn first() -> Vec<u32> {
    vec![1]
}

/// What comes after this daemon.
#[derive(Debug)]
pub(crate) enum Next {
    /// This program, in the same process.
    Program(Candidate),
    /// What a supervisor starts.
    Supervisor,
}

/// Where the API leaves what it was asked for, once.
pub(crate) type Asked = mpsc::Sender<Next>;

/// A place for one request.
pub(crate) fn channel() -> (Asked, mpsc::Receiver<Next>) {
    mpsc::channel(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_that_knows_less_is_told_from_one_that_knows_more() {
        let here = Understands::here();
        assert_eq!(here.lacks(), None);
        let next = Understands {
            keeper: vec![here.keeper[0], here.keeper[0] + 1],
            index: vec![7, here.index[0]],
            ..here.clone()
        };
        assert_eq!(next.lacks(), None);
        let other = Understands { sessions: vec![here.sessions[0] + 1], ..here.clone() };
        assert_eq!(other.lacks(), Some(("records of mounts of version", here.sessions[0])));
        let older = Understands { snapshots: vec![Snapshot::VERSION + 1], ..here.clone() };
        assert_eq!(older.lacks(), Some(("records of snapshots of version", Snapshot::VERSION)));
        let mut silent = serde_json::to_value(&here).unwrap();
        silent.as_object_mut().unwrap().remove("snapshots");
        let silent: Understands = serde_json::from_value(silent).unwrap();
        assert_eq!(silent.snapshots, [1]);
        let none = Understands { upgrade: Vec::new(), ..here };
        assert_eq!(none.lacks().map(|(what, _)| what), Some("the form of upgrades"));
    }
}
