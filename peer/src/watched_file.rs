//! Files that others replace while the daemon runs: has this one changed since it was last looked at?

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

/// How often such files are looked at.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A file, and what it looked like.
#[derive(Debug)]
pub(crate) struct WatchedFile {
    path: PathBuf,
    seen: Option<Version>,
}

/// What changes when a file is replaced or written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    inode: u64,
    changed: (i64, i64),
    length: u64,
}

impl WatchedFile {
    /// Not looked at yet: the first look sees a change, if the file is there.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, seen: None }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is another file than at the last look. One that is gone is no change: it may be on its way.
    pub(crate) fn changed(&mut self) -> bool {
        let found = version(&self.path).ok();
        if found == self.seen || found.is_none() {
            return false;
        }
        self.seen = found;
        true
    }
}

fn version(file: &Path) -> io::Result<Version> {
    let metadata = fs::metadata(file)?;
    let changed = (metadata.mtime(), metadata.mtime_nsec());
    Ok(Version { inode: metadata.ino(), changed, length: metadata.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_replaced_or_written_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let mut file = WatchedFile::new(path.clone());
        assert!(!file.changed());
        fs::write(&path, "one").unwrap();
        assert!(file.changed() && !file.changed());
        fs::write(&path, "longer").unwrap();
        assert!(file.changed() && !file.changed());
        fs::write(dir.path().join("new"), "longer").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        assert!(file.changed() && !file.changed());
        fs::remove_file(&path).unwrap();
        assert!(!file.changed());
    }
}
