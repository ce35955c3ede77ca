//! Reads a mounted tree and compares it with its source, byte for byte.

use std::{
    ffi::OsString,
    fs::{self, File, FileType, Metadata},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// Where two trees part, or why they could not be compared.
#[derive(Debug, thiserror::Error)]
pub(super) enum Difference {
    /// A file system refused.
    #[error("cannot read {path}")]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Something is not the same on both sides.
    #[error("{path}: {what} differs")]
    Differs {
        /// Path in the mount.
        path: PathBuf,
        /// Which attribute.
        what: &'static str,
    },
    /// The demo was interrupted.
    #[error("interrupted")]
    Interrupted,
}

/// What a comparison saw on its way.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// From the start until the first byte of file data.
    pub first_byte: Option<Duration>,
    /// Until the end.
    pub all: Duration,
}

/// Compares all of `mount` with `source`: names, types, modes, owners, link targets, devices and contents.
pub(super) struct Comparison<'a> {
    started: Instant,
    interrupted: &'a AtomicBool,
    seen: Seen,
    buffers: [Vec<u8>; 2],
}

impl<'a> Comparison<'a> {
    /// Times are measured from `started`.
    pub(super) fn new(started: Instant, interrupted: &'a AtomicBool) -> Self {
        Self { started, interrupted, seen: Seen::default(), buffers: [vec![0; 1 << 20], vec![0; 1 << 20]] }
    }

    pub(super) fn run(mut self, source: &Path, mount: &Path) -> Result<Seen, Difference> {
        self.directory(source, mount)?;
        self.seen.all = self.started.elapsed();
        Ok(self.seen)
    }

    fn directory(&mut self, source: &Path, mount: &Path) -> Result<(), Difference> {
        let names = names(source)?;
        if names != self::names(mount)? {
            return Err(differs(mount, "the list of names"));
        }
        for name in names {
            if self.interrupted.load(Relaxed) {
                return Err(Difference::Interrupted);
            }
            self.entry(&source.join(&name), &mount.join(&name))?;
        }
        Ok(())
    }

    fn entry(&mut self, source: &Path, mount: &Path) -> Result<(), Difference> {
        let (a, b) = (metadata(source)?, metadata(mount)?);
        if kind(a.file_type()) != kind(b.file_type()) {
            return Err(differs(mount, "the type"));
        }
        if (a.mode(), a.uid(), a.gid()) != (b.mode(), b.uid(), b.gid()) {
            return Err(differs(mount, "mode or owner"));
        }
        if a.is_dir() {
            return self.directory(source, mount);
        }
        if (a.mtime(), a.mtime_nsec()) != (b.mtime(), b.mtime_nsec()) {
            return Err(differs(mount, "the modification time"));
        }
        if a.is_symlink() {
            let target = |path: &Path| fs::read_link(path).map_err(read(path));
            return if target(source)? == target(mount)? { Ok(()) } else { Err(differs(mount, "the target")) };
        }
        if a.is_file() {
            return self.contents(source, mount);
        }
        if a.rdev() == b.rdev() { Ok(()) } else { Err(differs(mount, "the device number")) }
    }

    fn contents(&mut self, source: &Path, mount: &Path) -> Result<(), Difference> {
        let open = |path: &Path| File::open(path).map_err(read(path));
        let (mut a, mut b) = (open(source)?, open(mount)?);
        let [left, right] = &mut self.buffers;
        loop {
            let n = fill(&mut b, right).map_err(read(mount))?;
            if n > 0 && self.seen.first_byte.is_none() {
                self.seen.first_byte = Some(self.started.elapsed());
            }
            let m = fill(&mut a, left).map_err(read(source))?;
            if left[..m] != right[..n] {
                return Err(differs(mount, "the content"));
            }
            if n == 0 {
                return Ok(());
            }
        }
    }
}

fn read(path: &Path) -> impl FnOnce(io::Error) -> Difference {
    let path = path.to_owned();
    move |source| Difference::Read { path, source }
}

fn differs(path: &Path, what: &'static str) -> Difference {
    Difference::Differs { path: path.to_owned(), what }
}

fn metadata(path: &Path) -> Result<Metadata, Difference> {
    fs::symlink_metadata(path).map_err(read(path))
}

fn names(directory: &Path) -> Result<Vec<OsString>, Difference> {
    let entries = fs::read_dir(directory).map_err(read(directory))?;
    let mut names: Vec<_> =
        entries.map(|e| e.map(|e| e.file_name())).collect::<Result<_, _>>().map_err(read(directory))?;
    names.sort();
    Ok(names)
}

fn kind(file_type: FileType) -> u8 {
    match file_type {
        t if t.is_file() => 0,
        t if t.is_dir() => 1,
        t if t.is_symlink() => 2,
        t if t.is_char_device() => 3,
        t if t.is_block_device() => 4,
        t if t.is_fifo() => 5,
        _ => 6,
    }
}

fn fill(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match file.read(&mut buffer[n..])? {
            0 => break,
            more => n += more,
        }
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compare(a: &Path, b: &Path) -> Result<Seen, Difference> {
        Comparison::new(Instant::now(), &AtomicBool::new(false)).run(a, b)
    }

    #[test]
    fn every_kind_of_difference_is_found() {
        let same_time = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let make = |content: &str| {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir(dir.path().join("d")).unwrap();
            let file = dir.path().join("d/f");
            fs::write(&file, content).unwrap();
            File::options().write(true).open(&file).unwrap().set_modified(same_time).unwrap();
            dir
        };
        let (a, b) = (make("hello"), make("hello"));
        assert!(compare(a.path(), b.path()).unwrap().first_byte.is_some());

        let other = make("hellO");
        assert!(matches!(compare(a.path(), other.path()), Err(Difference::Differs { what: "the content", .. })));
        let longer = make("hello!");
        assert!(matches!(compare(a.path(), longer.path()), Err(Difference::Differs { what: "the content", .. })));
        fs::write(b.path().join("extra"), "").unwrap();
        assert!(matches!(compare(a.path(), b.path()), Err(Difference::Differs { what: "the list of names", .. })));
    }
}
