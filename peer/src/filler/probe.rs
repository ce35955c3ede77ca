//! Whether files in a folder raise pre-content events: one is made, marked, read and written.

use std::{
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileExt,
    },
    path::Path,
    thread::{self, JoinHandle},
    time::Duration,
};

use shoal_keeper::{Event, Group, Verdict};

/// Why they do not, or cannot be relied on.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The kernel, or what it permits this process.
    #[error("the kernel gives no pre-content events (that takes Linux 6.15, and root)")]
    Kernel(#[source] io::Error),
    /// The file system.
    #[error("the file system of the data directory takes no marks for pre-content events")]
    Mark(#[source] io::Error),
    /// It took the mark, and then a file was read without an event.
    #[error("the file system of the data directory raises no pre-content events")]
    Silent,
    /// An event came where none may: the daemon would wait for itself.
    #[error("a file that was opened before it was marked raises pre-content events")]
    Noisy,
    /// The file for it.
    #[error("cannot look for pre-content events")]
    Io(#[from] io::Error),
}

/// Finds out. Blocks for a few milliseconds.
///
/// # Errors
/// See [`ProbeError`].
pub(super) fn probe(folder: &Path) -> Result<(), ProbeError> {
    // When it is closed, whoever waits goes on.
    let group = Group::new().map_err(ProbeError::Kernel)?;
    let early = tempfile::tempfile_in(folder)?;
    early.set_len(1)?;
    group.mark(early.as_fd()).map_err(ProbeError::Mark)?;
    let mut late = File::open(format!("/proc/self/fd/{}", early.as_raw_fd()))?;
    let reader = spawn(move || late.read(&mut [0]).map(drop))?;
    let asked = event(&group, &reader)?.ok_or(ProbeError::Silent)?;
    let writer = spawn(move || early.write_all_at(b"x", 0))?;
    if let Some(event) = event(&group, &writer)? {
        group.answer(event.file.as_raw_fd(), Verdict::Allow)?;
        return Err(ProbeError::Noisy);
    }
    group.answer(asked.file.as_raw_fd(), Verdict::Allow)?;
    for thread in [writer, reader] {
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    }
    Ok(())
}

fn spawn(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<JoinHandle<io::Result<()>>> {
    thread::Builder::new().name("shoal-probe".into()).spawn(work)
}

/// The next event, or none if the thread ends without one.
fn event(group: &Group, thread: &JoinHandle<io::Result<()>>) -> io::Result<Option<Event>> {
    loop {
        let ended = thread.is_finished();
        match group.read()?.pop() {
            None if ended => return Ok(None),
            None => thread::sleep(Duration::from_millis(1)),
            event => return Ok(event),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

    use super::*;

    /// A file system that goes with it.
    struct Mounted(std::path::PathBuf);

    impl Mounted {
        /// None where nothing may be mounted.
        fn new(kind: &str, at: &Path, data: &str) -> Option<Self> {
            let data = std::ffi::CString::new(data).unwrap();
            std::fs::create_dir(at).unwrap();
            mount(kind, at, kind, MountFlags::empty(), data.as_c_str()).ok()?;
            Some(Self(at.to_owned()))
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = unmount(&self.0, UnmountFlags::DETACH);
        }
    }

    /// `f_type` of statfs(2) of file systems that raise them: ext4, XFS, Btrfs.
    const RAISING: [i64; 3] = [0xef53, 0x5846_5342, 0x9123_683e];

    #[test]
    fn a_file_system_that_raises_none_is_told_from_one_that_does() {
        let here = tempfile::tempdir().unwrap();
        if let Err(error) = Group::new() {
            assert!(matches!(probe(here.path()), Err(ProbeError::Kernel(_))));
            println!("skipped: pre-content events ({error})");
            return;
        }
        match rustix::fs::statfs(here.path()).unwrap().f_type {
            kind if RAISING.contains(&kind) => probe(here.path()).unwrap(),
            kind => println!("skipped: a file system that raises pre-content events (here is one of type {kind:x})"),
        }
        let at = |name: &str| here.path().join(name);
        let Some(_tmpfs) = Mounted::new("tmpfs", &at("tmpfs"), "size=1m") else {
            return println!("skipped: file systems that raise no pre-content events (none can be mounted)");
        };
        let layers = ["lower", "upper", "work"].map(|name| at("tmpfs").join(name));
        layers.iter().for_each(|layer| std::fs::create_dir(layer).unwrap());
        let [lower, upper, work] = layers.each_ref().map(|layer| layer.display());
        let data = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let _overlay = Mounted::new("overlay", &at("overlay"), &data).unwrap();
        let _ramfs = Mounted::new("ramfs", &at("ramfs"), "").unwrap();
        for name in ["tmpfs", "overlay", "ramfs"] {
            let refused = probe(&at(name));
            assert!(matches!(refused, Err(ProbeError::Mark(_))), "{name}: {refused:?}");
        }
        // Where no file can be made, as in a mount of an image.
        assert!(matches!(probe(&at("none")), Err(ProbeError::Io(_))));
    }
}
