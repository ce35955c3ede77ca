//! Threads that read a mount over and over, each in its own way, and compare what they see with the source.
//!
//! In a process of their own: a thread that waits for a mapped page may hold the lock of its process' memory, and then the
//! process cannot be forked, also not to start the daemon that would answer.

use std::{
    env,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::{
    fs::{Advice, MemfdFlags, fadvise, memfd_create},
    mm::{MapFlags, ProtFlags, mmap, munmap},
};

use crate::support::{files, wait};

/// Where the process that reads is told what to compare.
const SOURCE: &str = "SHOAL_TEST_SOURCE";
const MOUNT: &str = "SHOAL_TEST_MOUNT";
/// Set where reads may end with errors; what they give must be right all the same.
const ERRORS: &str = "SHOAL_TEST_ERRORS";
/// What it says when all its threads have read more.
const WENT_ON: &str = "went on";

/// The process that reads, until it is told to stop by the end of its standard input.
pub(crate) struct Readers {
    process: Child,
    said: BufReader<ChildStdout>,
}

impl Readers {
    pub(crate) fn start(source: &Path, mount: &Path) -> Self {
        Self::start_with(source, mount, false)
    }

    /// The same, with readers that go on after `errors` where there may be some.
    pub(crate) fn start_with(source: &Path, mount: &Path, errors: bool) -> Self {
        let mut command = Command::new(env::current_exe().expect("this program"));
        command.args(["--exact", "kept_mounts::readers::read_in_a_process_of_its_own", "--nocapture"]);
        if errors {
            command.env(ERRORS, "1");
        }
        command.env(SOURCE, source).env(MOUNT, mount).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("it starts");
        let said = BufReader::new(process.stdout.take().expect("a pipe"));
        Self { process, said }
    }

    /// Waits until each of the threads has seen several files more.
    pub(crate) fn go_on(&mut self) {
        let stdin = self.process.stdin.as_mut().expect("a pipe");
        stdin.write_all(b"\n").expect("a reader has failed, see above");
        let mut line = String::new();
        // The test program has something to say, too.
        while !line.ends_with(&format!("{WENT_ON}\n")) {
            let read = self.said.read_line(&mut line).expect("a pipe");
            assert_ne!(read, 0, "a reader has failed, see above");
        }
    }

    /// Ends them; none must have seen an error or a wrong byte.
    pub(crate) fn end(mut self) {
        drop(self.process.stdin.take());
        assert!(self.process.wait().expect("it ends").success(), "a reader has failed, see above");
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        // It ends when it is answered, or when its mount has gone, for which it is too early.
        let _ = self.process.kill();
    }
}

/// That process. Without being told what to compare it does nothing.
#[test]
fn read_in_a_process_of_its_own() {
    let (Some(source), Some(mount)) = (env::var_os(SOURCE), env::var_os(MOUNT)) else { return };
    let threads = Threads::start(source.as_ref(), mount.as_ref());
    for line in io::stdin().lines() {
        line.expect("a pipe");
        threads.go_on();
        writeln!(io::stdout(), "{WENT_ON}").expect("a pipe");
    }
    let looks: u64 = threads.threads.iter().map(|(looks, _)| looks.load(Relaxed)).sum();
    threads.end();
    eprintln!("readers looked at {looks} files and saw {} errors", SEEN.load(Relaxed));
}

/// Errors that were seen.
static SEEN: AtomicU64 = AtomicU64::new(0);

/// Threads of each way.
const EACH: usize = 2;

/// A way of reading one file: whether it is the same in the mount as in the source.
type Way = fn(&Path, &Path) -> io::Result<bool>;

const WAYS: [(&str, Way); 4] = [("read", whole), ("pread", parts), ("stat and readdir", names), ("mmap", mapped)];

/// They read until they are told to stop.
struct Threads {
    stop: Arc<AtomicBool>,
    threads: Vec<(Arc<AtomicU64>, JoinHandle<()>)>,
}

impl Threads {
    fn start(source: &Path, mount: &Path) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = WAYS.iter().cycle().take(EACH * WAYS.len()).map(|(name, way)| {
            let (looks, stop) = (Arc::new(AtomicU64::new(0)), stop.clone());
            let (source, mount, count) = (source.to_owned(), mount.to_owned(), looks.clone());
            (looks, thread::spawn(move || go_round(name, *way, &source, &mount, &count, &stop)))
        });
        Self { threads: threads.collect(), stop }
    }

    /// Waits until each of them has seen several files more.
    fn go_on(&self) {
        let before: Vec<_> = self.threads.iter().map(|(looks, _)| looks.load(Relaxed)).collect();
        wait("all readers go on", || {
            // Who has ended has seen something wrong: `end` says what.
            let mut all = self.threads.iter().zip(&before);
            all.all(|((looks, thread), before)| looks.load(Relaxed) >= before + 4 || thread.is_finished())
        });
        assert!(self.threads.iter().all(|(_, thread)| !thread.is_finished()), "a reader has failed, see above");
    }

    /// Ends them; none must have seen an error or a wrong byte.
    fn end(self) {
        self.stop.store(true, Relaxed);
        for (_, thread) in self.threads {
            thread.join().expect("a reader saw nothing wrong");
        }
    }
}

fn go_round(name: &str, way: Way, source: &Path, mount: &Path, looks: &AtomicU64, stop: &AtomicBool) {
    let (all, errors) = (files(source), env::var_os(ERRORS).is_some());
    for file in all.iter().cycle() {
        if stop.load(Relaxed) {
            return;
        }
        match way(&source.join(file), &mount.join(file)) {
            Ok(same) => assert!(same, "{name}: {} is not what it was", file.display()),
            Err(_) if errors => {
                SEEN.fetch_add(1, Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{name}: {}: {error}", file.display()),
        }
        looks.fetch_add(1, Relaxed);
    }
}

/// Opens a file so that what is read of it comes from the daemon.
fn open(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(file)
}

fn whole(source: &Path, mount: &Path) -> io::Result<bool> {
    let mut bytes = Vec::new();
    open(mount)?.read_to_end(&mut bytes)?;
    Ok(bytes == fs::read(source)?)
}

/// Every seventh block, through a descriptor that stays open.
fn parts(source: &Path, mount: &Path) -> io::Result<bool> {
    let (file, expected) = (open(mount)?, fs::read(source)?);
    fadvise(&file, 0, None, Advice::Random)?;
    let mut block = [0; 4096];
    for at in (0..expected.len()).step_by(7 * block.len()) {
        let here = file.read_at(&mut block, at as u64)?;
        if block[..here] != expected[at..(at + block.len()).min(expected.len())] {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What the folder of the file lists, and the file's attributes.
fn names(source: &Path, mount: &Path) -> io::Result<bool> {
    let listed = |file: &Path| -> io::Result<Vec<PathBuf>> {
        let folder = fs::read_dir(file.parent().unwrap_or(file))?;
        let mut names = folder.map(|entry| Ok(entry?.file_name().into())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    };
    let (a, b) = (fs::metadata(source)?, fs::metadata(mount)?);
    let same = (a.len(), a.mode(), a.nlink(), a.uid()) == (b.len(), b.mode(), b.nlink(), b.uid());
    Ok(same && listed(source)? == listed(mount)?)
}

/// Through a mapping. A system call copies it, which fails where touching the memory would be a SIGBUS, the end of all tests.
fn mapped(source: &Path, mount: &Path) -> io::Result<bool> {
    let (file, expected) = (open(mount)?, fs::read(source)?);
    if expected.is_empty() {
        return Ok(true);
    }
    let copy = File::from(memfd_create("mapped", MemfdFlags::CLOEXEC)?);
    // SAFETY: the file never changes or shrinks, and the mapping is used before it is unmapped, only.
    let copied = unsafe {
        let at = mmap(std::ptr::null_mut(), expected.len(), ProtFlags::READ, MapFlags::PRIVATE, &file, 0)?;
        let copied = copy.write_all_at(std::slice::from_raw_parts(at.cast::<u8>(), expected.len()), 0);
        munmap(at, expected.len())?;
        copied
    };
    copied?;
    let mut bytes = vec![0; expected.len()];
    copy.read_exact_at(&mut bytes, 0)?;
    Ok(bytes == expected)
}
