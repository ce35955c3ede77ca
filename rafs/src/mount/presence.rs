//! Whether a mount is still there. Anybody with the right to do so may unmount it or end its session, and nobody is told: what is left
//! is an empty folder, or one that gives errors.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{End, table};

/// The kernel's table of mounts, as it was at some moment.
#[derive(Debug)]
pub struct MountTable(Vec<table::Entry>);

impl MountTable {
    /// As it is now.
    ///
    /// # Errors
    /// There is no proc(5).
    pub fn read() -> io::Result<Self> {
        table::entries().map(Self)
    }
}

/// How a mount is found in it.
#[derive(Debug, Clone)]
pub struct MountPresence {
    pub(super) mountpoint: PathBuf,
    pub(super) device: String,
    /// Of a session of this process.
    pub(super) end: Option<Arc<End>>,
}

impl MountPresence {
    /// Whether the mount was where it was made, and somebody served it. What else is mounted over it does not matter.
    pub fn is_in(&self, table: &MountTable) -> bool {
        let MountTable(entries) = table;
        let is_it = |entry: &table::Entry| entry.device == self.device && entry.mountpoint == self.mountpoint;
        !self.end.as_ref().is_some_and(|end| end.is_set()) && entries.iter().any(is_it)
    }

    /// Whether both are of the same mount.
    pub fn is_of(&self, other: &Self) -> bool {
        let same_session = match (&self.end, &other.end) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        };
        same_session && (&self.mountpoint, &self.device) == (&other.mountpoint, &other.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_there_as_long_as_it_is_listed_and_its_session_goes_on() {
        let entry = |device: &str, mountpoint: &str| table::Entry {
            device: device.into(),
            mountpoint: mountpoint.into(),
            fs_type: "fuse.shoal".into(),
            source: "a".into(),
        };
        let table = MountTable(vec![entry("0:1", "/a"), entry("0:2", "/b"), entry("0:3", "/b")]);
        let end = Arc::new(End::default());
        let presence = |device: &str, mountpoint: &str| MountPresence {
            device: device.into(),
            mountpoint: mountpoint.into(),
            end: Some(end.clone()),
        };
        assert!(presence("0:1", "/a").is_in(&table) && presence("0:2", "/b").is_in(&table));
        assert!(!presence("0:4", "/a").is_in(&table) && !presence("0:1", "/b").is_in(&table));
        let native = MountPresence { end: None, ..presence("0:1", "/a") };
        end.set();
        assert!(!presence("0:1", "/a").is_in(&table) && native.is_in(&table));
        assert!(native.is_of(&native.clone()) && !native.is_of(&presence("0:1", "/a")));
    }
}
